"""TRL's trainers, given a GPTQ model and a configuration: supervised fine-tuning and preference optimization."""

import pytest
import torch
from datasets import Dataset
from gptq_models import load, tiny_tokenizer
from peft import PeftModel, get_peft_model_state_dict
from quick_training import SETTINGS, logged
from rows import METHODS
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


SMALL = {**SETTINGS, "learning_rate": 2e-3}
PROMPT, CHOSEN, REJECTED = "w1 w2 w3", " w4 w5 w6", " w9 w8 w7"


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def config(method):
    return method.config(task_type="CAUSAL_LM")


def sft(model, directory, steps, **options):
    """Fine-tuning on counting upwards, with TRL's defaults: bf16 autocast and gradient checkpointing."""
    texts = [" ".join(f"w{i}" for i in range(start, start + 16)) for start in range(0, 96, 6)]
    arguments = SFTConfig(output_dir=directory, max_steps=steps, **SMALL)
    dataset = Dataset.from_dict({"text": texts})
    return SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tiny_tokenizer(), **options)


def dpo(model, directory, steps, **options):
    """Preferring one continuation to another."""
    arguments = DPOConfig(output_dir=directory, max_steps=steps, bf16=False, **SMALL)
    dataset = Dataset.from_dict({"prompt": [PROMPT] * 8, "chosen": [CHOSEN] * 8, "rejected": [REJECTED] * 8})
    return DPOTrainer(model, args=arguments, train_dataset=dataset, processing_class=tiny_tokenizer(), **options)


@torch.no_grad()
def log_probability(model, continuation):
    """Log-probability of a continuation of the prompt, and of the end that TRL puts after it."""
    tokenizer = tiny_tokenizer()
    prompt, ids = (tokenizer(text, return_tensors="pt").input_ids for text in (PROMPT, f"{PROMPT}{continuation}</s>"))
    log_probabilities = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    tokens = ids[0, 1:]
    return log_probabilities[torch.arange(len(tokens)), tokens][prompt.shape[1] - 1 :].sum()


def margin(model):
    return log_probability(model, CHOSEN) - log_probability(model, REJECTED)


def same_adapters(model, other):
    adapters = [get_peft_model_state_dict(peft_model) for peft_model in (model, other)]
    assert adapters[0].keys() == adapters[1].keys()
    return all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize("trainer", (sft, dpo))
def test_saved_and_loaded(trainer, config, model, checkpoint, tmp_path):
    run = trainer(model, tmp_path / "run", steps=2, peft_config=config)
    run.train()
    run.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter")
    assert same_adapters(loaded, run.model)


class TestSFT:
    def test_learns_and_trains_the_adapter_alone(self, config, model, tmp_path):
        run = sft(model, tmp_path, steps=12, peft_config=config)
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        trainable = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        run.train()
        losses = logged(run, "loss")
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
        changed = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == trainable.keys()


class TestDPO:
    def test_learns_against_the_base(self, config, model, checkpoint, tmp_path):
        base = load(checkpoint)
        run = dpo(model, tmp_path, steps=4, peft_config=config)
        assert run.ref_model is None
        run.train()
        losses = logged(run, "loss")
        assert losses[0] == pytest.approx(0.6931, abs=1e-4)  # the policy is its reference
        assert losses[-1] < 0.95 * losses[0]
        assert margin(run.model) > margin(base) + 1

        chosen, rejected = run.compute_ref_log_probs(run.model, next(iter(run.get_train_dataloader())))
        for actual, continuation in ((chosen, CHOSEN), (rejected, REJECTED)):
            expected = log_probability(base, continuation).expand(4)
            torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-4)


class TestDPOOfATrainedAdapter:
    """The reference is to be the adapter as it was, which TRL copies to an adapter named `ref`."""

    def run(self, method, checkpoint, directory):
        torch.manual_seed(0)
        first = dpo(load(checkpoint), directory / "first", steps=2, peft_config=method.config(task_type="CAUSAL_LM"))
        first.train()
        first.save_model(directory / "adapter")
        model = PeftModel.from_pretrained(load(checkpoint), directory / "adapter", is_trainable=True)
        return dpo(model, directory / "second", steps=1)

    def first_loss(self, run):
        run.train()
        return logged(run, "loss")[0]

    def test_lrec(self, checkpoint, tmp_path):
        run = self.run(METHODS["LREC"], checkpoint, tmp_path)
        assert self.first_loss(run) == pytest.approx(0.6931, abs=1e-4)

    def test_peqa_has_the_base_for_a_reference_until_the_copy_is_loaded(self, checkpoint, tmp_path):
        # TRL copies parameters with ".default." in their names, and those of PEQA end in ".default"
        run = self.run(METHODS["PEQA"], checkpoint, tmp_path)
        assert self.first_loss(run) < 0.68
        run = self.run(METHODS["PEQA"], checkpoint, tmp_path)
        run.model.load_adapter(tmp_path / "adapter", "ref")
        assert self.first_loss(run) == pytest.approx(0.6931, abs=1e-4)
