"""PEQA under the stock Trainer."""

import json

import pytest
import torch
from gptq_models import load
from peft import PeftModel, get_peft_model
from quick_training import SETTINGS, logged, sequences
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_quant import PEQAConfig, TrainingError


def trainer(model, directory, steps=6, **options):
    set_seed(0)
    defaults = {**SETTINGS, "learning_rate": 2e-3}
    arguments = TrainingArguments(output_dir=directory, max_steps=steps, **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=sequences(), eval_dataset=sequences(4))


def deltas(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "peqa_scales" in name}


@pytest.fixture
def peft_model(model):
    return get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM"))


def test_learns_and_changes_nothing_but_the_deltas(peft_model, tmp_path):
    before = {name: t.clone() for name, t in peft_model.state_dict().items()}
    run = trainer(peft_model, tmp_path, steps=30)
    run.train()
    curve = logged(run, "loss")
    assert sum(curve[-4:]) / 4 < 0.8 * curve[0]
    changed = {name for name, t in peft_model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(deltas(peft_model))


@pytest.mark.parametrize("backend", ("auto", "gptq_torch"))
def test_evaluation_between_steps_takes_no_gradient_away(checkpoint, tmp_path, backend):
    model = get_peft_model(load(checkpoint, backend=backend), PEQAConfig(task_type="CAUSAL_LM"))
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=1)
    run.evaluate()
    run.train()
    assert all(delta.any() for delta in deltas(model).values())


def test_the_loss_of_the_merged_model_is_the_loss_of_training(peft_model, tmp_path):
    run = trainer(peft_model, tmp_path)
    run.train()
    trained = run.evaluate()["eval_loss"]
    peft_model.merge_adapter()
    assert run.evaluate()["eval_loss"] == trained


def test_gradient_accumulation_is_a_larger_batch(checkpoint, tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM"))
        run = trainer(model, tmp_path, steps=2, gradient_accumulation_steps=accumulation, optim="sgd")
        run.args.per_device_train_batch_size = run._train_batch_size = batch
        run.train()
        results.append(deltas(model))
    for name, delta in results[0].items():
        torch.testing.assert_close(results[1][name], delta, rtol=1e-3, atol=1e-3 * delta.abs().max().item())


def test_resuming_gives_the_same_bits(checkpoint, tmp_path):
    def run(directory, **options):
        model = get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM"))
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", **options}
        return model, trainer(model, directory, **options)

    whole, straight = run(tmp_path / "run")
    straight.train()
    resumed, again = run(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, delta in deltas(whole).items():
        assert torch.equal(deltas(resumed)[name], delta), name


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_gradient_checkpointing(peft_model, tmp_path, use_reentrant):
    run = trainer(
        peft_model,
        tmp_path,
        steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    run.train()
    assert all(delta.any() for delta in deltas(peft_model).values())


def test_mixed_precision(peft_model, tmp_path):
    run = trainer(peft_model, tmp_path, steps=3, bf16=True)
    run.train()
    assert all(delta.dtype == torch.float32 and delta.any() for delta in deltas(peft_model).values())
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]


def test_checkpoints_are_adapters_and_the_best_comes_back(peft_model, checkpoint, tmp_path):
    run = trainer(
        peft_model,
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    run.train()
    best = run.state.best_model_checkpoint
    saved = load_file(f"{best}/adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(load(checkpoint), best)
    for name, delta in deltas(peft_model).items():
        assert torch.equal(deltas(loaded)[name], delta)
    assert len(saved) == len(deltas(peft_model))
    with open(f"{best}/adapter_config.json") as file:
        assert json.load(file)["base_quantization"]["bits"] == 4


def test_gradients_that_do_not_arrive_are_noticed_at_the_first_step(peft_model, tmp_path):
    class DropGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            model.zero_grad(set_to_none=True)

    run = trainer(peft_model, tmp_path)
    run.add_callback(DropGradients())
    with pytest.raises(TrainingError, match="none of the 14 adapter tensors has moved"):
        run.train()
    assert run.state.global_step == 0


def test_warmup_from_zero(peft_model, tmp_path):
    run = trainer(peft_model, tmp_path, warmup_steps=3, lr_scheduler_type="linear")
    run.train()
    assert all(delta.any() for delta in deltas(peft_model).values())
