"""LREC under the stock Trainer."""

import pytest
import torch
from gptq_models import load
from peft import PeftModel, get_peft_model
from quick_training import SETTINGS, logged, sequences
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_quant import LRECConfig, TrainingError


def adapted(model, **options):
    set_seed(0)
    return get_peft_model(model, LRECConfig(task_type="CAUSAL_LM", r=4, **options))


def trainer(model, directory, steps=6, **options):
    set_seed(0)
    defaults = {**SETTINGS, "learning_rate": 1e-2}
    arguments = TrainingArguments(output_dir=directory, max_steps=steps, **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=sequences(), eval_dataset=sequences(4))


def branches(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture
def peft_model(model):
    return adapted(model)


def test_learns_and_changes_nothing_but_the_branches(peft_model, tmp_path):
    before = {name: t.clone() for name, t in peft_model.state_dict().items()}
    run = trainer(peft_model, tmp_path, steps=20)
    run.train()
    curve = logged(run, "loss")
    assert sum(curve[-4:]) / 4 < 0.8 * curve[0]
    changed = {name for name, t in peft_model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(branches(peft_model))


@pytest.mark.parametrize("backend", ("auto", "gptq_torch"))
def test_evaluation_between_steps_takes_no_gradient_away(checkpoint, tmp_path, backend):
    model = adapted(load(checkpoint, backend=backend))
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, steps=3)
    run.evaluate()
    run.train()
    assert all(branch.any() for branch in branches(model).values())


def test_gradient_accumulation_is_a_larger_batch(checkpoint, tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = adapted(load(checkpoint))
        run = trainer(model, tmp_path, steps=2, gradient_accumulation_steps=accumulation, optim="sgd")
        run.args.per_device_train_batch_size = run._train_batch_size = batch
        run.train()
        results.append(branches(model))
    for name, branch in results[0].items():
        torch.testing.assert_close(results[1][name], branch, rtol=1e-3, atol=1e-3 * branch.abs().max().item())


@pytest.mark.parametrize("lora_dropout", (0.0, 0.1))
def test_resuming_gives_the_same_bits(checkpoint, tmp_path, lora_dropout):
    def run(directory):
        model = adapted(load(checkpoint), lora_dropout=lora_dropout)
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
        return model, trainer(model, directory, **options)

    whole, straight = run(tmp_path / "run")
    straight.train()
    resumed, again = run(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, branch in branches(whole).items():
        assert torch.equal(branches(resumed)[name], branch), name


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
    assert all(branch.any() for branch in branches(peft_model).values())


def test_mixed_precision(peft_model, tmp_path):
    run = trainer(peft_model, tmp_path, steps=3, bf16=True)
    run.train()
    assert all(branch.dtype == torch.float32 and branch.any() for branch in branches(peft_model).values())
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
    loaded = PeftModel.from_pretrained(load(checkpoint), best)
    for name, branch in branches(peft_model).items():
        assert torch.equal(branches(loaded)[name], branch)
    assert len(load_file(f"{best}/adapter_model.safetensors")) == len(branches(peft_model))


def test_gradients_that_do_not_arrive_are_noticed_at_the_first_step(peft_model, tmp_path):
    class DropGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            model.zero_grad(set_to_none=True)

    run = trainer(peft_model, tmp_path)
    run.add_callback(DropGradients())
    with pytest.raises(TrainingError, match="none of the 14 adapter tensors has moved"):
        run.train()
    assert run.state.global_step == 0
