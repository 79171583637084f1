"""Every method under the stock Trainer."""

import json

import pytest
import torch
from gptq_models import load, save_tiny_llama
from peft import PeftModel, get_peft_model
from quick_training import SETTINGS, logged, sequences
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_quant import TrainingError
from peft_quant.trainers.report.facts import summary


@pytest.fixture
def adapted(method):
    def adapt(model, **options):
        set_seed(0)
        return get_peft_model(model, method.config(task_type="CAUSAL_LM", **options))

    return adapt


@pytest.fixture
def peft_model(adapted, model):
    return adapted(model)


@pytest.fixture
def trainer(method, tmp_path):
    def make(model, steps=6, **options):
        set_seed(0)
        options = {**SETTINGS, "learning_rate": method.learning_rate, "max_steps": steps, **options}
        arguments = TrainingArguments(output_dir=tmp_path, **options)
        return Trainer(model, arguments, train_dataset=sequences(), eval_dataset=sequences(4))

    return make


@pytest.fixture
def values(method):
    return lambda model: {name: p.detach().clone() for name, p in method.parameters(model).items()}


def test_learns_and_changes_nothing_but_the_adapter(method, peft_model, trainer):
    before = {name: t.clone() for name, t in peft_model.state_dict().items()}
    run = trainer(peft_model, steps=30)
    run.train()
    curve = logged(run, "loss")
    assert sum(curve[-4:]) / 4 < 0.8 * curve[0]
    changed = {name for name, t in peft_model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == method.parameters(peft_model).keys()


@pytest.mark.parametrize("backend", ("auto", "gptq_torch"))
def test_evaluation_between_steps_takes_no_gradient_away(checkpoint, adapted, trainer, values, backend):
    model = adapted(load(checkpoint, backend=backend))
    run = trainer(model, steps=3, eval_strategy="steps", eval_steps=1)
    run.evaluate()
    run.train()
    assert all(tensor.any() for tensor in values(model).values())


@pytest.mark.parametrize("method", ["PEQA"], indirect=True)
def test_the_loss_of_the_merged_model_is_the_loss_of_training(peft_model, trainer):
    run = trainer(peft_model)
    run.train()
    trained = run.evaluate()["eval_loss"]
    peft_model.merge_adapter()
    assert run.evaluate()["eval_loss"] == trained


def test_gradient_accumulation_is_a_larger_batch(checkpoint, adapted, trainer, values):
    results = []
    for batch, accumulation in ((8, 1), (4, 2)):
        model = adapted(load(checkpoint))
        run = trainer(model, steps=2, gradient_accumulation_steps=accumulation, optim="sgd")
        run.args.per_device_train_batch_size = run._train_batch_size = batch
        run.train()
        results.append(values(model))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-3 * tensor.abs().max().item())


@pytest.mark.parametrize(
    ("method", "options"), (("PEQA", {}), ("LREC", {}), ("LREC", {"lora_dropout": 0.1})), indirect=["method"]
)
def test_resuming_gives_the_same_bits(checkpoint, adapted, trainer, values, tmp_path, options):
    def run():
        model = adapted(load(checkpoint), **options)
        return model, trainer(model, save_strategy="steps", save_steps=3, lr_scheduler_type="linear")

    whole, straight = run()
    straight.train()
    resumed, again = run()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in values(whole).items():
        assert torch.equal(values(resumed)[name], tensor), name


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_gradient_checkpointing(peft_model, trainer, values, use_reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer(peft_model, steps=2, **options).train()
    assert all(tensor.any() for tensor in values(peft_model).values())


def test_mixed_precision(peft_model, trainer, values):
    run = trainer(peft_model, steps=3, bf16=True)
    run.train()
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in values(peft_model).values())
    assert logged(run, "loss")[-1] < logged(run, "loss")[0]


def test_checkpoints_are_adapters_and_the_best_comes_back(peft_model, checkpoint, trainer, values):
    every_second_step = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(peft_model, **every_second_step, load_best_model_at_end=True)
    run.train()
    best = run.state.best_model_checkpoint
    loaded = values(PeftModel.from_pretrained(load(checkpoint), best))
    for name, tensor in values(peft_model).items():
        assert torch.equal(loaded[name], tensor)
    assert len(load_file(f"{best}/adapter_model.safetensors")) == len(loaded)
    with open(f"{best}/adapter_config.json") as file:
        assert json.load(file)["base_quantization"]["bits"] == 4


def test_gradients_that_do_not_arrive_are_noticed_at_the_first_step(peft_model, trainer):
    class DropGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            model.zero_grad(set_to_none=True)

    run = trainer(peft_model)
    run.add_callback(DropGradients())
    with pytest.raises(TrainingError, match="none of the 14 adapter tensors has moved"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("accumulation", (1, 2))
def test_a_batch_with_nan_is_skipped(peft_model, trainer, values, accumulation, monkeypatch):
    def training_step(run, *args, **kwargs):
        loss = stock(run, *args, **kwargs)
        if run.state.global_step == 1:
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return loss

    class After(TrainerCallback):
        states = []

        def on_step_end(self, args, state, control, model, **kwargs):
            self.states.append(values(model))

    stock = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", training_step)
    run = trainer(peft_model, steps=3, gradient_accumulation_steps=accumulation, lr_scheduler_type="linear")
    run.add_callback(After())
    run.train()
    first, second, third = After.states[-3:]
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert not any(torch.equal(third[name], tensor) for name, tensor in second.items())
    assert peft_model.skipped_steps == 1
    assert summary(run.args, run.state, peft_model)["Skipped steps"] == "1"
    assert run.lr_scheduler.last_epoch == 3


def test_activations_beyond_fp16(checkpoint, adapted, trainer, values, caplog):
    model = load(checkpoint, dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(60000)
    model = adapted(model)
    before = values(model)
    with pytest.raises(TrainingError, match=r"the last 10 optimizer steps, .* \(train in bf16\)"):
        trainer(model, steps=20).train()
    assert "activations beyond 65504" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(model).items())


@pytest.mark.parametrize("everywhere", (False, True))
def test_groups_of_zeros(tmp_path, adapted, trainer, values, everywhere):
    def clear(tensors):
        for name in list(tensors):
            if name.endswith(".qweight") and (everywhere or "q_proj" in name):
                tensors[name].fill_(-0x77777778)  # the code 8 eight times, the zero point
        return tensors

    base = save_tiny_llama(tmp_path / "base")
    save_file(clear(load_file(base / "model.safetensors")), base / "model.safetensors", {"format": "pt"})
    model = adapted(load(base))
    run = trainer(model, steps=12)
    if everywhere:
        with (
            pytest.raises(TrainingError, match="or every weight is zero"),
            pytest.warns(match="gradients .* were zero"),
        ):
            run.train()
    else:
        run.train()
        moved = {name for name, tensor in values(model).items() if tensor.any()}
        assert any("v_proj" in name for name in moved)
        assert all(tensor.isfinite().all() for tensor in values(model).values())


def test_warmup_from_zero(peft_model, trainer, values):
    trainer(peft_model, warmup_steps=3, lr_scheduler_type="linear").train()
    assert all(tensor.any() for tensor in values(peft_model).values())
