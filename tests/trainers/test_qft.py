"""QFTTrainer: that it learns, goes on where it stopped, and refuses what it cannot do."""

import json
import logging
import shutil
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from gptq_models import float_llama, load, peak_bytes, save_tiny_llama, tiny_tokenizer
from qft_models import assert_equal, contents, family_trainer, int8_llama, int8_model, trainer
from quick_training import SETTINGS, logged, sequences
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import peft_quant
from peft_quant import (
    Int8Weight,
    QFTConfig,
    QFTTrainer,
    QFTTrainerMixin,
    QFTTrainingArguments,
    QuantizedLion,
    TrainingError,
    convert_to_int8,
    estimate_memory,
)
from peft_quant.qft.dry_run import first_rows_only, require_readable
from peft_quant.trainers.qft import _check_arguments


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
FUSED = {"fused": True, "max_grad_norm": 0.0}


def allocated(tensors):
    """Bytes that PyTorch's allocator gives out on a GPU."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)


def losses(run):
    run.train()
    return logged(run, "loss")


class TestTraining:
    @pytest.mark.parametrize(
        "settings",
        (
            {},
            FUSED,
            {**FUSED, "max_parameter_norm": 0.1},
            {"gradient_accumulation_steps": 2},
            {"bf16": True},
            {"state_bits": 32},
            {"rounding": "error_feedback"},
            {"refresh_steps": 2, "weight_decay": 0.1},
            {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        ),
        ids=str,
    )
    def test_learns(self, tmp_path, settings):
        run = trainer(tmp_path, max_steps=10, **settings)
        found = losses(run)
        # fresh draws of counting sequences; the loss of the first steps is that of guessing
        assert sum(found[-2:]) < 0.75 * sum(found[:2])
        assert logged(run, "skipped_steps") == [0] * 10

    def test_int8_embeddings_tied_to_the_head(self, tmp_path):
        model = int8_llama(QFTConfig(embeddings=True), tie_word_embeddings=True)
        run = trainer(tmp_path, model, max_steps=10)
        found = losses(run)
        assert isinstance(model.lm_head.weight, Int8Weight)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert found[-1] < 0.8 * found[0]

    def test_the_norm_is_that_of_float_gradients(self, tmp_path):
        model = int8_llama(dtype=torch.float32)
        dense = float_llama()
        decoded = {name: p.dequantize() if isinstance(p, Int8Weight) else p for name, p in model.state_dict().items()}
        dense.load_state_dict(decoded)
        arguments = TrainingArguments(str(tmp_path), **{**SETTINGS, "max_steps": 1, "learning_rate": 1e-3})
        stock = Trainer(dense, arguments, train_dataset=sequences())
        stock.train()
        run = trainer(tmp_path, model, max_steps=1)
        run.train()
        # the norm is taken before the gradient is rounded
        assert logged(run, "grad_norm") == pytest.approx(logged(stock, "grad_norm"), rel=1e-4)

    def test_clipping_keeps_the_momentum_small(self, tmp_path):
        def momentum(max_grad_norm):
            run = trainer(tmp_path, max_steps=1, max_grad_norm=max_grad_norm)
            run.train()
            states = run._lion.state.values()
            return max(float(state["momentum_scales"].max()) for state in states), logged(run, "grad_norm")[0]

        (clipped, norm), (whole, same_norm) = momentum(0.5), momentum(0.0)
        assert norm == same_norm > 1
        # one step into momentum is 1 % of the gradient; stochastic rounding moves a block's maximum by a code
        assert clipped == pytest.approx(whole * 0.5 / norm, rel=0.02)

    @pytest.mark.parametrize("settings", ({}, FUSED), ids=str)
    @pytest.mark.parametrize("reentrant", (False, True))
    def test_gradient_checkpointing(self, tmp_path, settings, reentrant):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        found = losses(trainer(tmp_path, max_steps=6, **settings, **options))
        expected = losses(trainer(tmp_path, max_steps=6, **settings))
        assert found[0] == expected[0]
        # layers may end in another order, and round by other random numbers
        assert found == pytest.approx(expected, rel=0.1)

    def test_compiled(self, tmp_path):
        expected = losses(trainer(tmp_path, max_steps=6))
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(disable=False):
            found = losses(trainer(tmp_path, max_steps=6, torch_compile=True, torch_compile_backend="aot_eager"))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        # gradients come in another order, and are summed in another one
        assert found == pytest.approx(expected, rel=0.1)

    def test_evaluation_generation_and_callbacks(self, tmp_path):
        class Generate(TrainerCallback):
            lengths = []

            def on_step_end(self, args, state, control, model=None, **kwargs):
                model.eval()
                tokens = model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
                self.lengths.append(tokens.shape[1])

        quiet, run = (
            trainer(tmp_path, trainer_options={"callbacks": callbacks}, eval_strategy="steps", eval_steps=steps)
            for callbacks, steps in (([], 4), ([Generate()], 1))
        )
        quiet.train()
        run.train()
        assert Generate.lengths == [5] * 4
        assert len(logged(run, "eval_loss")) == 4
        assert_equal(run.model, quiet.model)

    def test_a_step_with_nan_changes_nothing_and_is_counted(self, tmp_path):
        class Broken(QFTTrainer):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                if self.state.global_step == 1:
                    self.before = contents(self.model)
                    return loss * float("nan")
                if self.state.global_step == 2:
                    assert_equal(self.model, self.before)
                return loss

        run = trainer(tmp_path, trainer_class=Broken)
        run.train()
        assert logged(run, "skipped_steps") == [0, 1, 1, 1]

    @pytest.mark.parametrize("settings", ({}, FUSED, {"gradient_accumulation_steps": 2}), ids=str)
    def test_nan_ten_times_in_a_row_ends_it(self, tmp_path, settings, caplog):
        class Broken(QFTTrainer):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                if self.state.global_step == 1:
                    self.before = contents(self.model)
                return loss * float("nan") if self.state.global_step not in (0, 5) else loss * 0.0

        run = trainer(tmp_path, trainer_class=Broken, max_steps=20, weight_decay=0.0, **settings)
        with pytest.raises(TrainingError, match="the last 10 optimizer steps, up to step 16 "):
            run.train()
        assert logged(run, "skipped_steps")[-1] == 13
        assert "optimizer step 2 of this run were not finite, so it was skipped; 1 so far" in caplog.text

    @pytest.mark.parametrize("settings", ({}, FUSED, {"gradient_accumulation_steps": 2}, {"state_bits": 32}), ids=str)
    def test_a_first_batch_without_labels_is_no_failure(self, tmp_path, settings):
        class Unlabelled(QFTTrainer):
            def compute_loss(self, model, inputs, *args, **kwargs):
                if self.state.global_step == 0:
                    inputs = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
                return super().compute_loss(model, inputs, *args, **kwargs)

        run = trainer(tmp_path, trainer_class=Unlabelled, max_steps=3, **settings)
        with pytest.warns(UserWarning, match="every label of its batch is -100"):
            run.train()
        assert run._lion.has_momentum
        assert logged(run, "skipped_steps") == [0, 0, 0]

    def test_no_labels_at_all_is_one(self, tmp_path):
        data = sequences().map(lambda row: {"labels": [-100] * len(row["labels"])})
        with pytest.raises(TrainingError, match="every label is -100"), pytest.warns(UserWarning, match="were zero"):
            trainer(tmp_path, trainer_options={"train_dataset": data}, max_steps=20).train()

    def test_training_twice_goes_on(self, tmp_path):
        run = trainer(tmp_path)
        run.train()
        before = contents(run.model)
        first = run._lion
        run.train()
        assert run._lion is first
        with pytest.raises(AssertionError):
            assert_equal(run.model, before)
        loss = run.model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss
        loss.backward()
        assert run.model.model.layers[0].mlp.up_proj.weight.grad is not None  # the hooks are gone


class TestProof:
    def test_weights_that_do_not_move(self, tmp_path, monkeypatch):
        update = QuantizedLion._update

        def only_floats(self, parameter, *args):
            if not isinstance(parameter, Int8Weight):
                update(self, parameter, *args)

        monkeypatch.setattr(QuantizedLion, "_update", only_floats)
        with pytest.raises(TrainingError, match="none of the 14 trained int8 tensors has moved"):
            trainer(tmp_path).train()

    def test_a_frozen_weight_that_moves(self, tmp_path, monkeypatch):
        model = int8_llama()
        frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        step = QuantizedLion.step

        def damaging(self, closure=None):
            frozen.codes.add_(1)
            return step(self, closure)

        monkeypatch.setattr(QuantizedLion, "step", damaging)
        with pytest.raises(TrainingError, match=r"frozen, first model\.layers\.0\.mlp\.up_proj\.weight"):
            trainer(tmp_path, model).train()

    def test_warm_up_from_zero_is_no_failure(self, tmp_path):
        trainer(tmp_path, max_steps=3, warmup_steps=2, lr_scheduler_type="linear").train()

    def test_frozen_weights_stay(self, tmp_path):
        model = int8_llama()
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_(False)
        before = contents(model)
        trainer(tmp_path, model).train()
        after = contents(model)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert not any(".layers.0." in name for name in moved)


class TestCheckpoints:
    @pytest.mark.parametrize(
        "settings",
        ({"gradient_accumulation_steps": 2}, FUSED, {"rounding": "error_feedback", "refresh_steps": 3}),
        ids=str,
    )
    def test_resuming_is_bit_equal(self, tmp_path, settings):
        settings = {**CHECKPOINTS, "save_steps": 3, "max_steps": 6, "lr_scheduler_type": "linear", **settings}
        whole = trainer(tmp_path / "whole", **settings)
        whole.train()
        shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
        half = trainer(tmp_path / "half", int8_llama(seed=1), **settings)
        half.train(resume_from_checkpoint=True)
        assert_equal(half.model, whole.model)
        assert logged(half, "loss") == logged(whole, "loss")
        states = [run._lion.state_dict()["state"] for run in (half, whole)]
        for number, state in states[0].items():
            assert all(torch.equal(tensor, states[1][number][name]) for name, tensor in state.items())
            assert state["momentum"].dtype == torch.int8

    def test_there_must_be_one_to_resume_from(self, tmp_path):
        with pytest.raises(ValueError, match="No complete checkpoint found"):
            trainer(tmp_path / "none").train(resume_from_checkpoint=True)

    def test_the_best_is_loaded_at_the_end(self, tmp_path):
        options = {**CHECKPOINTS, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        # the loss of the eval set, negated by choosing the greater one: the first checkpoint is the best
        run = trainer(tmp_path, **options, greater_is_better=True, metric_for_best_model="eval_loss", max_steps=6)
        run.train()
        assert run.state.best_model_checkpoint.endswith("checkpoint-2")
        assert_equal(run.model, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"))

    @pytest.mark.parametrize("other", (QFTConfig(outlier_ratio=0.0), QFTConfig(embeddings=True)), ids=vars)
    def test_of_another_policy(self, tmp_path, other):
        trainer(tmp_path / "first", int8_llama(other), **CHECKPOINTS).train()
        with pytest.raises(ValueError, match="is a checkpoint of another policy: model"):
            trainer(tmp_path, **CHECKPOINTS).train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-2")

    def test_of_another_head(self, tmp_path):
        family_trainer(tmp_path / "first", "BERT tokens", int8_model("BERT tokens"), **CHECKPOINTS).train()
        run = family_trainer(tmp_path, "BERT classifier", int8_model("BERT classifier"), **CHECKPOINTS)
        before = contents(run.model)
        message = "another model than this BertForSequenceClassification: .* keys, first bert.pooler"
        with pytest.raises(ValueError, match=message):
            run.train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-2")
        assert_equal(run.model, before)

    def test_saved_models_come_back(self, tmp_path):
        run = trainer(tmp_path / "out", trainer_options={"processing_class": tiny_tokenizer()})
        run.train()
        run.save_model(tmp_path / "saved")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert_equal(loaded, run.model)
        trainer(tmp_path / "on", loaded, max_steps=1).train()
        assert (tmp_path / "saved" / "tokenizer.json").exists()

    def test_an_interrupted_save_leaves_the_last_one(self, tmp_path, monkeypatch):
        run = trainer(tmp_path / "out", max_steps=1)
        run.train()
        run.save_model(tmp_path / "saved")
        before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
        run.train()

        def dies(tensors, filename, metadata=None):
            with open(filename, "wb") as file:
                file.write(b"half")
            raise OSError("no space left")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", dies)
        with pytest.raises(OSError, match="no space left"):
            run.save_model(tmp_path / "saved")
        assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == before
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    def test_a_readme_that_cannot_be_read_is_left_as_it_is(self, tmp_path):
        run = trainer(tmp_path / "out", max_steps=1)
        (tmp_path / "out" / "README.md").write_bytes(b"caf\xe9")
        run.train()
        with pytest.warns(UserWarning, match="model card in .* was left as it is"):
            run.save_model()
        with pytest.warns(UserWarning, match="model card in .* was left as it is"):
            run.create_model_card()
        assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), run.model)
        assert (tmp_path / "out" / "README.md").read_bytes() == b"caf\xe9"

    def test_what_a_killed_run_left_of_trying_is_removed(self, tmp_path):
        left = tmp_path / ".dry-run.abcdefgh.partial"
        left.mkdir()
        trainer(tmp_path, max_steps=1).train()
        assert not left.exists()

    def test_what_cannot_be_saved_is_noticed_before_the_first_step(self, tmp_path):
        class Broken:
            def save_pretrained(self, directory):
                raise ValueError("a tokenizer that cannot be saved")

            def __call__(self, *args, **kwargs):
                raise NotImplementedError

        run = trainer(tmp_path, trainer_options={"processing_class": Broken()})
        with pytest.raises(RuntimeError, match="tried before the first step: a tokenizer that cannot be saved"):
            run.train()
        assert run.state.global_step == 0
        assert not list(tmp_path.iterdir())
        assert not run.model.hf_quantizer.only_first_rows

    @pytest.mark.parametrize(
        ("change", "message"),
        (
            (lambda m: setattr(m, "lm_head", torch.nn.Linear(64, 50, bias=False)), r"lm_head\.weight .*\(128, 64\)"),
            (lambda m: setattr(m, "added", torch.nn.Embedding(3, 3)), r"unexpected keys, first added\.weight"),
            (
                lambda m: setattr(m.model.layers[0], "mlp", torch.nn.Identity()),
                r"missing keys, first model\.layers\.0",
            ),
        ),
    )
    def test_what_cannot_be_read_back_is_noticed_before_the_first_step(self, tmp_path, change, message):
        model = int8_llama()
        change(model)
        run = trainer(tmp_path, model)
        with pytest.raises(RuntimeError, match=rf"cannot be read back, tried before the first step: .*{message}"):
            run.train()
        assert run.state.global_step == 0
        assert not list(tmp_path.iterdir())

    def test_what_a_checkpoint_could_not_say_is_noticed_before_the_first_step(self, tmp_path):
        model = int8_llama()
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.dequantize())
        with pytest.raises(RuntimeError, match="cannot be saved, tried before the first step: 1 weights, first"):
            trainer(tmp_path, model).train()

    @pytest.mark.parametrize("family", ("Mixtral", "NomicBERT classifier", "Qwen2.5-VL", "T5"))
    def test_trying_takes_next_to_nothing(self, tmp_path, family):
        model = int8_model(family)
        with first_rows_only(model):
            model.save_pretrained(tmp_path)
        # of a tensor of experts, one row of one expert
        sizes = [tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()]
        assert max(sizes) <= max(tensor.shape[-1] for tensor in model.state_dict().values() if tensor.ndim)
        before = contents(model)
        assert peak_bytes(lambda: require_readable(model, tmp_path)) < 0.02 * sum(t.nbytes for t in before.values())
        assert_equal(model, before)
        model.save_pretrained(tmp_path / "whole")
        assert_equal(type(model).from_pretrained(tmp_path / "whole"), model)

    def test_room_on_the_disk(self, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"A checkpoint takes 0\.0 GB"):
            trainer(tmp_path).train()


class TestReport:
    @pytest.mark.parametrize("settings", ({}, FUSED, {"state_bits": 32}, {"rounding": "error_feedback"}), ids=str)
    def test_states_are_what_the_tensors_hold(self, tmp_path, settings, caplog):
        held = {}

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                entries = run._lion.gradients._entries.values()
                held["gradients"] = allocated(tensor for entry in entries for tensor in (entry.codes, entry.scales))

        run = trainer(tmp_path, trainer_options={"callbacks": [Look()]}, **settings)
        with caplog.at_level(logging.INFO, "peft_quant.trainers.qft"):
            run.train()
        rows = {row.what: row for row in run.memory_report.rows}
        parameters = list(run.model.parameters())
        int8 = [p for p in parameters if isinstance(p, Int8Weight)]
        floats = [p for p in parameters if not isinstance(p, Int8Weight)]
        states = [tensor for state in run._lion.state.values() for tensor in state.values()]
        assert rows["weights"].bytes == allocated(p.codes for p in int8)
        assert rows["scales"].bytes == allocated(t for p in int8 for name, t in p.parts.items() if name != "codes")
        assert rows["rest of the model"].bytes == allocated([*floats, *run.model.buffers()])
        assert rows["optimizer"].bytes == allocated(states)
        if settings != FUSED:
            # the last one may be there in float as well
            assert 0 <= rows["gradients"].bytes - held["gradients"] <= max(p.nbytes for p in parameters)
        assert str(run.memory_report) in caplog.text
        assert "of fp32 AdamW" in caplog.text

    def test_is_the_estimate_of_the_config(self, tmp_path):
        model = convert_to_int8(float_llama().bfloat16())
        run = trainer(tmp_path, model, gradient_checkpointing=True, max_steps=1)
        run.train()
        batch, sequence = run.args.per_device_train_batch_size, len(run.train_dataset[0]["input_ids"])
        assert run.memory_report == estimate_memory(model.config, "qft-stack", batch=batch, sequence=sequence)

    @pytest.mark.parametrize(("rounding", "rate"), (("stochastic", 1e-9), ("nearest", 1e-5)))
    def test_a_learning_rate_that_moves_nothing(self, tmp_path, rounding, rate):
        with pytest.warns(UserWarning, match=rf"learning_rate={rate:g} .* moves \d.* of the int8 weights in an epoch"):
            trainer(tmp_path, learning_rate=rate, rounding=rounding).train()

    def test_a_useful_one_is_not_warned_of(self, tmp_path, recwarn):
        trainer(tmp_path).train()
        assert not [warning for warning in recwarn if "hardly train" in str(warning.message)]

    @pytest.mark.parametrize("rate", (1e-9, 1e-3))
    def test_negative_scales_count_by_their_size(self, tmp_path, recwarn, rate):
        model = convert_to_int8(load(save_tiny_llama(tmp_path / "base", 8, signed=True), bits=8))
        trainer(tmp_path, model, learning_rate=rate).train()
        warned = [warning for warning in recwarn if "hardly train" in str(warning.message)]
        assert bool(warned) == (rate == 1e-9)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        (
            ({"fused": True, "max_grad_norm": 0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
            ({"fused": True}, r"max_grad_norm=1\.0 needs the norm of all gradients"),
            ({"max_parameter_norm": 1.0}, r"max_parameter_norm=1\.0 belongs to fused=True"),
            ({"fp16": True}, "fp16 needs its loss scaled"),
            ({"state_bits": 4}, "state_bits=4: use one of 8, 32"),
            ({"rounding": "up"}, "rounding='up': use one of stochastic"),
            ({"lion_beta1": 1.0}, "lion_beta1=1"),
            ({"refresh_steps": -1}, "refresh_steps=-1"),
        ),
    )
    def test_arguments(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            QFTTrainingArguments(str(tmp_path), use_cpu=True, **settings)

    def test_help_is_in_the_metadata(self):
        own = QFTTrainingArguments.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
        assert all(QFTTrainingArguments.__dataclass_fields__[name].metadata["help"] for name in own)
        assert "rounding" in own

    def test_optimizers_from_outside(self, tmp_path):
        model = int8_llama()
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        for options in (
            {"optimizers": (adam, None)},
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})},
        ):
            with pytest.raises(ValueError, match="weights in int8 need QuantizedLion"):
                trainer(tmp_path, model, trainer_options=options)
        with pytest.raises(ValueError, match="optim='sgd' was asked for"):
            trainer(tmp_path, model, optim="sgd")

    def test_models_and_arguments_of_other_kinds(self, tmp_path):
        with pytest.raises(ValueError, match="has no weights in int8: use `convert_to_int8"):
            trainer(tmp_path, float_llama())
        with pytest.raises(TypeError, match="use QFTTrainingArguments"):
            QFTTrainer(int8_llama(), TrainingArguments(str(tmp_path), use_cpu=True))

    def test_several_devices(self, tmp_path):
        run = trainer(tmp_path)
        run.args._n_gpu = 2
        with pytest.raises(ValueError, match="trains on one device, and this run has 2"):
            _check_arguments(run)


@dataclass
class SFTArguments(SFTConfig, QFTTrainingArguments):
    pass


class QFTSFTTrainer(QFTTrainerMixin, SFTTrainer):
    pass


def test_trls_trainer(tmp_path):
    texts = [" ".join(f"w{i}" for i in range(start, start + 16)) for start in range(0, 96, 6)]
    settings = {**SETTINGS, **CHECKPOINTS, "learning_rate": 1e-3}
    arguments = SFTArguments(str(tmp_path / "out"), max_steps=12, **settings)
    assert (arguments.gradient_checkpointing, arguments.bf16) == (True, True)  # TRL's defaults
    run = QFTSFTTrainer(
        int8_llama(),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tiny_tokenizer(),
    )
    assert isinstance(run.model.model.layers[0].mlp.up_proj.weight, Int8Weight)
    run.train()
    found = logged(run, "loss")
    assert found[-1] < 0.8 * found[0]
    run.save_model(tmp_path / "saved")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), run.model)


def test_state_is_json(tmp_path):
    run = trainer(tmp_path, **CHECKPOINTS)
    run.train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][0]["skipped_steps"] == 0
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert peft_quant.QFTTrainer is QFTTrainer
