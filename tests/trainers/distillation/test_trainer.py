"""Training the adapter to match the float model."""

import json
import logging
import math

import pytest
import torch
from accelerate import disk_offload
from datasets import Dataset, concatenate_datasets
from gptq_models import float_llama, load, peak_bytes, save_tiny_llama, tiny_config
from peft import PeftModel, get_peft_model
from quick_training import SETTINGS, logged
from torch.nn import functional
from transformers import Trainer, TrainingArguments, set_seed

from peft_quant import DistillationTrainer, DistillationTrainingArguments, LRECConfig, PEQAConfig, cache_teacher
from peft_quant.trainers.distillation.teacher import TeacherOutput


def texts(lengths=(16,) * 16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 128, (length,), generator=generator).tolist()} for length in lengths]
    )


def collate(samples, side="right"):
    """Padding, marked in the mask and ignored in the labels; labels of a sample's own if it has any."""
    width = max(len(sample["input_ids"]) for sample in samples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        ids = list(sample["input_ids"])
        padding = width - len(ids)
        rows = {
            "input_ids": (ids, 2),
            "attention_mask": ([1] * len(ids), 0),
            "labels": (list(sample.get("labels") or ids), -100),
        }
        for name, (row, pad) in rows.items():
            batch[name].append(row + [pad] * padding if side == "right" else [pad] * padding + row)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


@pytest.fixture(scope="session")
def two_bits(tmp_path_factory):
    """The float model in 2 bits: far from it."""
    return save_tiny_llama(tmp_path_factory.mktemp("two_bits") / "llama", bits=2)


def adapted(checkpoint, bits=2, **options):
    model = load(checkpoint, bits=bits)
    set_seed(0)
    return get_peft_model(model, LRECConfig(task_type="CAUSAL_LM", r=8, **options))


def trainer(model, directory, teacher, steps=6, data=None, evaluation=None, **options):
    set_seed(0)
    defaults = {**SETTINGS, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    processing = {name: options.pop(name) for name in list(options) if name.endswith("processing_class")}
    return DistillationTrainer(
        model,
        DistillationTrainingArguments(output_dir=directory, max_steps=steps, **{**defaults, **options}),
        teacher=teacher,
        train_dataset=texts() if data is None else data,
        eval_dataset=texts(seed=1, lengths=(8,) * 4) if evaluation is None else evaluation,
        data_collator=collate,
        **processing,
    )


def branches(model, adapter="default"):
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in name
    }


def assert_near(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, branch in expected.items():
        scale = branch.abs().max().item()
        torch.testing.assert_close(actual[name], branch, rtol=tolerance, atol=tolerance * scale)


@torch.no_grad()
def expected_terms(model, samples, temperature=1.0):
    """KL, CE and MSE of the last hidden states, means over all tokens of samples without padding, and their number."""
    teacher = float_llama()
    sums = torch.zeros(4, dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        labels = torch.tensor(sample.get("labels") or sample["input_ids"])[1:]
        kept = labels != -100
        said = [m.eval()(input_ids=ids, output_hidden_states=True) for m in (model, teacher)]
        q, p = (torch.log_softmax(output.logits[0, :-1][kept].double() / temperature, -1) for output in said)
        student, hidden = (output.hidden_states[-1][0, :-1][kept].double() for output in said)
        sums += torch.stack(
            [
                functional.kl_div(q, p, reduction="sum", log_target=True) * temperature**2,
                functional.cross_entropy(said[0].logits[0, :-1][kept].double(), labels[kept], reduction="sum"),
                (student - hidden).square().mean(-1).sum(),
                kept.sum(),
            ]
        )
    return dict(zip(("kl", "ce", "hidden", "tokens"), [*(sums[:3] / sums[3]).tolist(), int(sums[3])]))


RAGGED = texts((16, 5, 9, 12, 3, 8, 11, 2))


def with_prompts(dataset):
    """The first tokens of each sample are not to be learnt."""
    return Dataset.from_list(
        [{**sample, "labels": [-100] * (i % 3) + sample["input_ids"][i % 3 :]} for i, sample in enumerate(dataset)]
    )


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("batch", (1, 3, 8))
def test_evaluation_is_the_mean_over_all_tokens(two_bits, tmp_path, batch, temperature):
    model = adapted(two_bits, init_lora_weights=False)
    data = with_prompts(RAGGED)
    weights = {"kl_weight": 0.5, "ce_weight": 0.25, "hidden_weight": 2.0}
    run = trainer(
        model,
        tmp_path,
        float_llama(),
        evaluation=data,
        per_device_eval_batch_size=batch,
        temperature=temperature,
        **weights,
    )
    metrics = run.evaluate()
    expected = expected_terms(model, data, temperature)
    for term in ("kl", "ce", "hidden"):
        assert metrics[f"eval_{term}"] == pytest.approx(expected[term], rel=1e-4)
    loss = sum(weight * expected[name.removesuffix("_weight")] for name, weight in weights.items())
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert run.predict(data).metrics["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert run.predict(data.select(range(2))).predictions.shape[-1] == 128


@pytest.mark.parametrize("batch, accumulation", ((8, 1), (4, 2), (2, 4), (3, 3)))
def test_steps_and_logs_do_not_depend_on_batches(two_bits, tmp_path, batch, accumulation):
    """One step over the same eight samples of different lengths, cut in different ways."""
    model = adapted(two_bits, init_lora_weights=False)
    data = with_prompts(RAGGED)
    expected = expected_terms(model, data)
    inputs = collate(data)
    labels = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    model.train()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    p = torch.log_softmax(float_llama()(**inputs).logits, -1).detach()
    kl = functional.kl_div(logits.log_softmax(-1), p, reduction="none", log_target=True).sum(-1)
    loss = kl[labels != -100].mean() + 0.5 * functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(loss, named.values())))
    before = branches(model)

    run = trainer(
        model,
        tmp_path,
        float_llama(),
        steps=1,
        data=data,
        optim="sgd",
        ce_weight=0.5,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    run.train()
    assert_near(branches(model), {name: before[name] - 1e-2 * gradients[name] for name in before}, 1e-5)
    assert logged(run, "kl") == [pytest.approx(expected["kl"], rel=1e-4)]
    assert logged(run, "ce") == [pytest.approx(expected["ce"], rel=1e-4)]
    assert logged(run, "loss") == [pytest.approx(expected["kl"] + 0.5 * expected["ce"], rel=1e-4)]


def test_logs_are_means_over_the_steps_since_the_last(two_bits, tmp_path):
    curves = {}
    for logging_steps in (1, 3):
        run = trainer(adapted(two_bits), tmp_path, float_llama(), ce_weight=0.5, logging_steps=logging_steps)
        run.train()
        curves[logging_steps] = [logged(run, name) for name in ("loss", "kl", "ce")]
    for single, triple in zip(curves[1], curves[3]):
        assert triple == [pytest.approx(sum(single[i : i + 3]) / 3, rel=1e-5) for i in (0, 3)]
    for loss, kl, ce in zip(*curves[1]):
        assert loss == pytest.approx(kl + 0.5 * ce, rel=1e-5)


def test_padding_on_the_left_counts_for_nothing(two_bits, tmp_path, monkeypatch):
    cache = cache_teacher(float_llama(), RAGGED, tmp_path / "cache", k=128)
    results = []
    for side in ("right", "left"):
        for teacher in (float_llama(), cache):
            model = adapted(two_bits, init_lora_weights=False)
            run = trainer(model, tmp_path, teacher, data=RAGGED, evaluation=RAGGED, steps=1, optim="sgd")
            run.data_collator = lambda samples, side=side: collate(samples, side)
            run.train()
            results.append((branches(model), run.evaluate()["eval_kl"]))
    for result, kl in results[1:]:
        assert_near(result, results[0][0], 1e-3)
        assert kl == pytest.approx(results[0][1], rel=2e-3)


@pytest.fixture(params=("memory", "streamed", "cache"))
def teacher(request, tmp_path):
    if request.param == "memory":
        return float_llama()
    if request.param == "streamed":
        return disk_offload(float_llama(), tmp_path / "offload", execution_device=torch.device("cpu"))
    data = concatenate_datasets([texts(), texts(seed=1, lengths=(8,) * 4)])
    return cache_teacher(float_llama(), data, tmp_path / "cache", k=128)


def test_every_teacher_teaches_the_same(two_bits, tmp_path, teacher, caplog):
    caplog.set_level(logging.INFO, "peft_quant")
    model = adapted(two_bits)
    run = trainer(model, tmp_path, teacher, steps=2, optim="sgd")
    (message,) = [
        record.message for record in caplog.records if record.name == "peft_quant.trainers.distillation.trainer"
    ]
    assert " MB " in message
    before = run.evaluate()
    assert before["eval_kl"] == pytest.approx(expected_terms(model, texts(seed=1, lengths=(8,) * 4))["kl"], rel=1e-3)
    set_seed(0)
    run.train()
    reference = adapted(two_bits)
    other = trainer(reference, tmp_path, float_llama(), steps=2, optim="sgd")
    set_seed(0)
    other.train()
    # a cache keeps logarithms in fp16, 11 bits
    exact = not isinstance(teacher, type(tmp_path))
    assert_near(branches(model), branches(reference), 1e-6 if exact else 5e-3)


@pytest.mark.parametrize("k", (None, 16))
def test_the_divergence_falls(two_bits, tmp_path, k):
    data = texts((16,) * 24)
    teacher = float_llama()
    if k is not None:
        teacher = cache_teacher(teacher, data, tmp_path / "cache", k=k)
    model = adapted(two_bits)
    before = expected_terms(model, data)["kl"]
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    run = trainer(model, tmp_path, teacher, steps=40, data=data, evaluation=data)
    run.train()
    assert expected_terms(model, data)["kl"] < 0.6 * before
    assert run.evaluate()["eval_kl"] < 0.6 * before
    assert all(torch.equal(model.state_dict()[name], t) for name, t in frozen.items())


def test_hidden_states_approach(two_bits, tmp_path):
    model = adapted(two_bits)
    before = expected_terms(model, texts())["hidden"]
    run = trainer(model, tmp_path, float_llama(), steps=30, kl_weight=0.0, hidden_weight=1.0)
    run.train()
    assert logged(run, "loss") == [pytest.approx(value, rel=1e-5) for value in logged(run, "hidden")]
    assert expected_terms(model, texts())["hidden"] < 0.7 * before


def test_without_a_teacher_it_is_a_plain_trainer(two_bits, tmp_path):
    model, plain = adapted(two_bits), adapted(two_bits)
    data = texts().map(lambda sample: {"labels": sample["input_ids"]})
    run = trainer(model, tmp_path, None, steps=3, data=data, optim="sgd", kl_weight=0.0, ce_weight=1.0)
    run.train()
    assert not logged(run, "kl")
    arguments = TrainingArguments(**{**plain_arguments(tmp_path), "max_steps": 3})
    set_seed(0)
    stock = Trainer(plain, arguments, train_dataset=data, data_collator=collate)
    stock.train()
    assert logged(run, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-5)
    assert_near(branches(model), branches(plain), 1e-4)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_gradient_checkpointing_changes_nothing(two_bits, tmp_path, use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = adapted(two_bits)
        trainer(
            model,
            tmp_path,
            float_llama(),
            steps=2,
            optim="sgd",
            hidden_weight=1.0,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        ).train()
        results.append(branches(model))
    assert_near(*results, 1e-5)


@pytest.mark.parametrize("teacher_dtype", (torch.float32, torch.bfloat16))
def test_mixed_precision(two_bits, tmp_path, teacher_dtype):
    model = adapted(two_bits)
    run = trainer(model, tmp_path, float_llama().to(teacher_dtype), steps=10, bf16=True, hidden_weight=0.1)
    run.train()
    assert all(branch.dtype == torch.float32 for branch in branches(model).values())
    assert logged(run, "kl")[-1] < 0.8 * logged(run, "kl")[0]


@pytest.mark.parametrize("cached", (False, True))
def test_resuming_gives_the_same_bits(two_bits, tmp_path, cached):
    evaluation = texts(seed=1, lengths=(8,) * 4)
    teacher = float_llama()
    if cached:
        teacher = cache_teacher(teacher, concatenate_datasets([texts(), evaluation]), tmp_path / "cache", k=16)

    def run(directory):
        model = adapted(two_bits, lora_dropout=0.1)
        options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
        return model, trainer(model, directory, teacher, lr_scheduler_type="linear", **options)

    whole, straight = run(tmp_path / "run")
    straight.train()
    resumed, again = run(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, branch in branches(whole).items():
        assert torch.equal(branches(resumed)[name], branch), name
    for name in ("loss", "kl", "eval_kl"):
        assert logged(again, name) == logged(straight, name)


def test_checkpoints_are_adapters_and_the_best_comes_back(two_bits, tmp_path):
    model = adapted(two_bits)
    run = trainer(
        model,
        tmp_path,
        float_llama(),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_kl",
        greater_is_better=False,
    )
    run.train()
    loaded = PeftModel.from_pretrained(load(two_bits, bits=2), run.state.best_model_checkpoint)
    for name, branch in branches(model).items():
        assert torch.equal(branches(loaded)[name], branch)
    run.save_model()
    run.create_model_card()
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def plain_arguments(directory):
    return {
        **SETTINGS,
        "output_dir": str(directory),
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
    }


class TestSecondStage:
    """The corrected adapter goes on to a task."""

    @pytest.fixture
    def corrected(self, two_bits, tmp_path):
        model = adapted(two_bits)
        trainer(model, tmp_path / "correction", float_llama()).train()
        return model

    def task(self, model, directory):
        """Losses of six steps on the same four samples."""
        set_seed(0)
        data = texts(seed=2, lengths=(16,) * 4).map(lambda sample: {"labels": sample["input_ids"]})
        run = Trainer(
            model,
            TrainingArguments(**{**plain_arguments(directory), "max_steps": 6, "optim": "adamw_torch"}),
            train_dataset=data,
            data_collator=collate,
        )
        run.train()
        return logged(run, "loss")

    def test_the_same_adapter_goes_on_in_a_plain_trainer(self, corrected, two_bits, tmp_path):
        corrected.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load(two_bits, bits=2), tmp_path / "adapter", is_trainable=True)
        before = branches(corrected)
        for model in (corrected, loaded):
            losses = self.task(model, tmp_path)
            assert losses[-1] < 0.95 * losses[0]
        assert all(not torch.equal(branches(corrected)[name], branch) for name, branch in before.items())
        assert_near(branches(loaded), branches(corrected), 1e-6)

    def test_a_second_adapter_learns_above_the_frozen_one(self, corrected, two_bits, tmp_path):
        corrected.add_adapter("task", LRECConfig(task_type="CAUSAL_LM", r=2))
        corrected.base_model.set_adapter(["default", "task"])
        corrected.set_requires_grad("default", False)
        first, second = branches(corrected), branches(corrected, "task")
        losses = self.task(corrected, tmp_path)
        assert losses[-1] < 0.95 * losses[0]
        assert all(torch.equal(branches(corrected)[name], branch) for name, branch in first.items())
        assert all(not torch.equal(branches(corrected, "task")[name], branch) for name, branch in second.items())
        corrected.save_pretrained(tmp_path / "adapters")
        loaded = PeftModel.from_pretrained(load(two_bits, bits=2), tmp_path / "adapters")
        loaded.load_adapter(tmp_path / "adapters" / "task", "task")
        loaded.base_model.set_adapter(["default", "task"])
        ids = torch.tensor([texts()[0]["input_ids"]])
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, corrected.eval()(ids).logits)


def test_logits_exist_once(tmp_path, monkeypatch):
    """Forward and backward of one batch, of a vocabulary that outweighs all else."""
    monkeypatch.setattr("peft_quant.trainers.distillation.loss._CHUNK", 1 << 16)
    vocabulary, data = 8192, texts((64,) * 8)
    monkeypatch.setattr("gptq_models.tiny_config", lambda **_: tiny_config(vocab_size=vocabulary))
    base = save_tiny_llama(tmp_path / "base")
    cache = cache_teacher(float_llama(vocab_size=vocabulary), data, tmp_path / "cache", k=8)
    logits = 8 * 64 * vocabulary * 4
    batch = collate(data)

    def step(run):
        run.model.train()
        loss = run.compute_loss(run.model, dict(batch))
        loss.backward()

    def stock(run):
        run.model.train()
        run.model(**batch).loss.backward()

    run = trainer(adapted(base, bits=4), tmp_path, cache, data=data, evaluation=data)
    assert peak_bytes(lambda: step(run)) < 1.6 * logits
    live = trainer(adapted(base, bits=4), tmp_path, float_llama(vocab_size=vocabulary), data=data)
    assert peak_bytes(lambda: step(live)) < 2.6 * logits  # the teacher's, in its own dtype
    assert peak_bytes(lambda: stock(run)) > 2.8 * logits  # the measure sees what is there


def test_outputs_that_are_asked_for_are_logits(two_bits, tmp_path):
    model = adapted(two_bits)
    run = trainer(model, tmp_path, float_llama())
    batch = collate(texts().select(range(2)))
    loss, outputs = run.compute_loss(model.train(), batch, return_outputs=True)
    expected = model(input_ids=batch["input_ids"]).logits
    assert torch.equal(outputs.logits, expected)
    loss.backward()


def test_arguments_round_trip_through_json(tmp_path):
    args = DistillationTrainingArguments(
        output_dir=str(tmp_path), kl_weight=0.5, ce_weight=0.02, hidden_weight=1.0, temperature=2.0, use_cpu=True
    )
    read = json.loads(args.to_json_string())
    again = DistillationTrainingArguments(
        output_dir=str(tmp_path), **{n: read[n] for n in read if n.endswith("_weight")}
    )
    assert (again.kl_weight, again.ce_weight, again.hidden_weight) == (0.5, 0.02, 1.0)
    assert read["temperature"] == 2.0
    defaults = DistillationTrainingArguments(output_dir=str(tmp_path))
    assert (defaults.kl_weight, defaults.ce_weight, defaults.hidden_weight, defaults.temperature) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"kl_weight": -1.0}, "kl_weight=-1.0: use 0 or a positive number"),
        ({"ce_weight": -0.1}, "ce_weight=-0.1"),
        ({"hidden_weight": math.nan}, "hidden_weight=nan"),
        ({"kl_weight": 0.0}, "'kl_weight': 0.0, 'ce_weight': 0.0.* leave nothing to learn from"),
        ({"temperature": 0.0}, "temperature=0.0: use a positive number"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
    ),
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments(output_dir=str(tmp_path), **options)


class Tokenizer:
    """As little as a Trainer asks of one."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


class TestBadInput:
    @pytest.fixture
    def cache(self, tmp_path):
        return cache_teacher(float_llama(), texts(), tmp_path / "cache", k=8, tokenizer=Tokenizer("a"))

    @pytest.mark.parametrize(
        ("config", "message"),
        (
            ({"vocab_size": 256}, "The teacher has vocab_size=256, the student vocab_size=128"),
            ({"hidden_size": 32, "num_hidden_layers": 1}, "hidden_size=32, num_hidden_layers=1, the student hidden"),
        ),
    )
    def test_another_architecture(self, two_bits, tmp_path, config, message):
        with pytest.raises(ValueError, match=f"{message}.*use the model that was quantized"):
            trainer(adapted(two_bits), tmp_path, float_llama(**config))

    def test_another_tokenizer(self, two_bits, tmp_path, cache):
        message = "teacher's tokenizer has the vocabulary [0-9a-f]{32}, the student's [0-9a-f]{32}"
        other = Tokenizer("b")
        with pytest.raises(ValueError, match=message):
            trainer(adapted(two_bits), tmp_path, cache, evaluation=texts(), processing_class=other)
        with pytest.raises(ValueError, match=message):
            trainer(
                adapted(two_bits),
                tmp_path,
                float_llama(),
                processing_class=other,
                teacher_processing_class=Tokenizer("a"),
            )
        trainer(adapted(two_bits), tmp_path, cache, evaluation=texts(), processing_class=Tokenizer("a"))

    def test_a_cache_that_does_not_fit(self, two_bits, tmp_path, cache):
        model = adapted(two_bits)
        other = texts(seed=5)
        message = r"\(data [0-9a-f]{32}\) lacks 16 of the 16 samples of train_dataset \(data [0-9a-f]{32}\)"
        with pytest.raises(ValueError, match=message):
            trainer(model, tmp_path, cache, data=other, evaluation=texts())
        with pytest.raises(ValueError, match=r"lacks 16 of the 16 samples of eval_dataset\['b'\]"):
            trainer(model, tmp_path, cache, evaluation={"a": texts(), "b": other})
        with pytest.raises(ValueError, match=r"is for temperature=1.0, asked for was 2.0.*make another"):
            trainer(model, tmp_path, cache, temperature=2.0)
        with pytest.raises(ValueError, match=r"hidden_weight=1.0 needs a live teacher"):
            trainer(model, tmp_path, cache, hidden_weight=1.0)
        large = cache_teacher(float_llama(vocab_size=256), texts(), tmp_path / "large", k=8)
        with pytest.raises(ValueError, match=r"has a vocabulary of 256, the student one of 128"):
            trainer(model, tmp_path, large)
        (cache / "shard-00000.safetensors").unlink()
        with pytest.raises(ValueError, match="is missing"):
            trainer(model, tmp_path, cache)

    def test_samples_made_by_the_collator_are_checked_as_they_come(self, two_bits, tmp_path, cache):
        run = trainer(adapted(two_bits), tmp_path, cache, evaluation=texts())
        run.data_collator = lambda samples: collate([{"input_ids": s["input_ids"][:5]} for s in samples])
        with pytest.raises(ValueError, match=r"no entry for a sample of 5 tokens.*truncation and packing"):
            run.train()

    def test_students_that_cannot_learn(self, two_bits, tmp_path):
        model = adapted(two_bits)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_A" in name)
        with pytest.raises(ValueError, match=r"no trainable LREC adapter \(14 frozen layers\)"):
            trainer(model, tmp_path, float_llama())
        scales = get_peft_model(load(two_bits, bits=2), PEQAConfig(task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match=r"no trainable LREC adapter \(0 frozen layers\)"):
            trainer(scales, tmp_path, float_llama())
        with pytest.raises(ValueError, match="Linear is not a causal language model"):
            trainer(torch.nn.Linear(1, 1), tmp_path, float_llama())

    def test_options_that_make_no_sense(self, two_bits, tmp_path):
        model = adapted(two_bits)
        with pytest.raises(ValueError, match=r"kl_weight=1.0 and hidden_weight=0.0 need a teacher"):
            trainer(model, tmp_path, None)
        with pytest.raises(ValueError, match="is GPTQ-quantized itself"):
            trainer(model, tmp_path, load(two_bits, bits=2))
        with pytest.raises(TypeError, match="`args` is a TrainingArguments: use DistillationTrainingArguments"):
            DistillationTrainer(model, TrainingArguments(**plain_arguments(tmp_path)), teacher=float_llama())
        args = DistillationTrainingArguments(**plain_arguments(tmp_path))
        with pytest.raises(ValueError, match="`compute_loss_func` would replace"):
            DistillationTrainer(model, args, teacher=float_llama(), compute_loss_func=lambda *_, **__: 0)

    def test_several_gpus_in_one_process(self, two_bits, tmp_path, monkeypatch):
        monkeypatch.setattr(DistillationTrainingArguments, "n_gpu", 2)
        model = adapted(two_bits)
        model.is_parallelizable = model.model_parallel = False
        with pytest.raises(ValueError, match="One process would use 2 GPUs"):
            trainer(model, tmp_path, float_llama())

    def test_batches_without_labels(self, two_bits, tmp_path):
        run = trainer(adapted(two_bits), tmp_path, float_llama())
        run.data_collator = lambda samples: {"input_ids": torch.tensor([s["input_ids"] for s in samples])}
        with pytest.raises(ValueError, match=r"The batch has \['input_ids'\] and no `labels`"):
            run.train()


@pytest.mark.parametrize("cached", (False, True))
@pytest.mark.parametrize("accumulation", (1, 2))
def test_a_teacher_that_gives_nan_is_named(two_bits, tmp_path, monkeypatch, caplog, cached, accumulation):
    teacher = float_llama()
    if cached:
        monkeypatch.setattr(TeacherOutput, "has_nan", lambda self: False)
    teacher.register_forward_hook(spoil_large_tokens, with_kwargs=True)
    given = cache_teacher(teacher, texts(), tmp_path / "cache") if cached else teacher
    monkeypatch.undo()
    model = adapted(two_bits)
    run = trainer(model, tmp_path / "run", given, 4, evaluation=texts(), gradient_accumulation_steps=accumulation)
    run.train()
    skipped = logged(run, "skipped_steps")
    assert 0 < skipped[-1] == model.skipped_steps < 4
    assert caplog.text.count("The output of the teacher is not finite") == skipped[-1]
    assert all(branch.isfinite().all() for branch in branches(model).values())
    assert [math.isnan(kl) for kl in logged(run, "kl")] == [
        after > before for before, after in zip([0, *skipped], skipped)
    ]


def spoil_large_tokens(module, args, kwargs, output):
    output.logits[kwargs["input_ids"][:, 0] > 118] = torch.nan


@pytest.mark.parametrize("teacher", (True, False))
def test_a_student_that_gives_nan_is_no_fault_of_the_teacher(two_bits, tmp_path, caplog, teacher):
    model = adapted(two_bits)
    options = {} if teacher else {"kl_weight": 0.0, "ce_weight": 1.0}
    run = trainer(model, tmp_path, float_llama() if teacher else None, steps=2, **options)
    model.lm_head.register_forward_hook(lambda module, args, output: output * torch.nan)
    run.train()
    assert logged(run, "skipped_steps") == [1, 2]
    assert "not finite, so it was skipped" in caplog.text
    assert "The output of the teacher" not in caplog.text


def test_batches_without_labels(two_bits, tmp_path):
    rows = [{**row, "labels": [-100] * 16 if i < 4 else row["input_ids"]} for i, row in enumerate(texts())]
    model = adapted(two_bits)
    with pytest.warns(UserWarning, match="every label of its batch is -100"):
        trainer(
            model, tmp_path, float_llama(), 2, Dataset.from_list(rows), train_sampling_strategy="sequential"
        ).train()
    assert model.skipped_steps == 0
    assert all(branch.any() for name, branch in branches(model).items())
