"""The training report as the Trainer and trainers derived from it make it."""

import re
import sys

import pytest
import qft_models
import torch
from gptq_models import float_llama, load, tiny_tokenizer
from peft import get_peft_model
from quick_training import SETTINGS, sequences
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from peft_quant import DistillationTrainer, DistillationTrainingArguments, LRECConfig, PEQAConfig, ReportCallback


PROMPTS = ["w5 w6 w7", "w40 w41 w42"]

pytestmark = pytest.mark.filterwarnings("error:.*of the training report")


def callback(path=None, prompts=PROMPTS, **options):
    return ReportCallback(path, prompts, tokenizer=tiny_tokenizer(), max_new_tokens=8, **options)


def trainer(checkpoint, directory, config=None, callbacks=None, trainer_class=Trainer, **options):
    set_seed(0)
    settings = {**SETTINGS, "learning_rate": 2e-3, "max_steps": 4, **options}
    arguments_class = settings.pop("arguments_class", TrainingArguments)
    data = {"train_dataset": sequences(), "eval_dataset": sequences(4)}
    data |= {name: settings.pop(name) for name in ("teacher", "eval_dataset") if name in settings}
    model = get_peft_model(load(checkpoint), config or PEQAConfig(task_type="CAUSAL_LM"))
    arguments = arguments_class(str(directory), **settings)
    return trainer_class(model, arguments, callbacks=[callback()] if callbacks is None else callbacks, **data)


def read(directory):
    return (directory / "training_report.html").read_text(encoding="utf-8")


def sections(text):
    return re.findall(r'<section id="(\w+)">', text)


def facts(text):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))


def cells(text, section):
    """Rows of a section's table."""
    table = text[text.index(f'<section id="{section}">') :].partition("</section>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")]
    return [row for row in rows if row]


def trained(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "config", (PEQAConfig(task_type="CAUSAL_LM"), LRECConfig(task_type="CAUSAL_LM", lora_dropout=0.2))
)
def test_training_gives_the_same_bits(checkpoint, tmp_path, config):
    results = []
    for callbacks in ([], [callback()]):
        run = trainer(checkpoint, tmp_path / str(len(callbacks)), config, callbacks, eval_strategy="epoch")
        run.train()
        assert not run.args.eval_on_start
        results.append((trained(run), [entry["loss"] for entry in run.state.log_history if "loss" in entry]))
    (without, losses), (with_report, same_losses) = results
    assert losses == same_losses
    assert all(torch.equal(with_report[name], tensor) for name, tensor in without.items())


def test_qft_gives_the_same_bits(tmp_path):
    results = []
    for callbacks in ([], [callback()]):
        set_seed(0)
        options = {"trainer_options": {"callbacks": callbacks}, "eval_strategy": "epoch"}
        run = qft_models.trainer(tmp_path / str(len(callbacks)), **options)
        run.train()
        results.append(qft_models.contents(run.model))
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


def test_modes_of_modules_come_back(checkpoint, tmp_path):
    class Modes(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.train().base_model.model.model.layers[0].eval()
            self.before = {name: module.training for name, module in model.named_modules()}

        def on_epoch_begin(self, args, state, control, model, **kwargs):
            self.after = {name: module.training for name, module in model.named_modules()}

    modes = Modes()
    trainer(checkpoint, tmp_path, callbacks=[modes, callback()], max_steps=1).train()
    assert modes.after == modes.before
    assert set(modes.before.values()) == {False, True}


class TestContent:
    def test_peqa(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path, eval_strategy="steps", eval_steps=2)
        run.train()
        text = read(tmp_path)
        assert sections(text) == ["summary", "training", "evaluation", "memory", "changes", "samples"]
        known = facts(text)
        assert known["Method"] == "PEQA"
        assert known["Model"] == checkpoint.name
        assert known["Base format"] == "GPTQ, 4 bits, groups of 32, symmetric"
        values = sum(p.numel() for p in trained(run).values())
        assert known["Trained"] == f"{values:,} values, fp32, {4 * values / 1000:.3g} kB"
        assert known["Steps"] == "4 of 4, epoch 1"
        assert "finished, 4 steps" in text

        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        assert len(losses) == 3  # one before the first step
        perplexities = [f"{torch.tensor(loss).exp():.4g}" for loss in (losses[0], losses[-1])]
        assert cells(text, "evaluation") == [
            ["evaluation set", *perplexities, f"{losses[0]:.4g}", f"{losses[-1]:.4g}"]
        ]
        assert all(prompt in text for prompt in PROMPTS)

        memory = {row[0]: row[1:4] for row in cells(text, "memory")}
        assert memory["packed weights"][:2] == ["4 bits, fp16 scales", "61,440"]  # 7 matrices in each of 2 layers
        assert (
            memory["gradients"] == memory["trained weights"] == ["fp32", f"{values:,}", f"{4 * values / 1000:.3g} kB"]
        )
        # two moments, and a count for each of the 14 tensors
        assert memory["optimizer state"] == ["fp32", f"{2 * values + 14:,}", f"{4 * (2 * values + 14) / 1000:.3g} kB"]
        assert "measured peak" in memory

    def test_lrec_from_the_float_model(self, checkpoint, tmp_path):
        run = trainer(
            checkpoint,
            tmp_path,
            LRECConfig(task_type="CAUSAL_LM", r=4),
            trainer_class=DistillationTrainer,
            arguments_class=DistillationTrainingArguments,
            teacher=float_llama(),
            eval_strategy="steps",
            eval_steps=2,
        )
        run.train()
        text = read(tmp_path)
        assert "Terms of the loss" in text
        assert "Size of the adapter" in text
        entropies = [entry["eval_ce"] for entry in run.state.log_history if "eval_ce" in entry]
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_ce" in entry]
        assert abs(losses[0] - entropies[0]) > 0.1  # the loss is no perplexity, the cross entropy is
        assert cells(text, "evaluation")[0][1] == f"{torch.tensor(entropies[0]).exp():.4g}"

    def test_qft(self, tmp_path):
        run = qft_models.trainer(tmp_path, trainer_options={"callbacks": [callback()]}, eval_strategy="epoch")
        run.train()
        text = read(tmp_path)
        assert facts(text)["Method"] == "QFT"
        assert "int8" in facts(text)["Trained"]
        rows = {row[0]: row[2] for row in cells(text, "memory")}
        expected = {row.what: f"{row.values:,}" for row in run.memory_report.rows}
        assert {what: rows[what] for what in expected} == expected
        assert "Share of the int8 codes that changed" in text

    def test_trl(self, model, tmp_path):
        arguments = SFTConfig(output_dir=tmp_path, max_steps=2, **SETTINGS)
        from datasets import Dataset

        texts = [" ".join(f"w{i}" for i in range(start, start + 16)) for start in range(0, 96, 6)]
        run = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tiny_tokenizer(),
            peft_config=PEQAConfig(task_type="CAUSAL_LM"),
            callbacks=[ReportCallback(prompts=PROMPTS, max_new_tokens=4)],
        )
        run.train()
        text = read(tmp_path)
        assert sections(text) == ["summary", "training", "memory", "changes", "samples"]
        assert int(facts(text)["Tokens"]) > 0

    def test_nothing_to_evaluate_and_nothing_to_ask(self, checkpoint, tmp_path):
        trainer(checkpoint, tmp_path, callbacks=[ReportCallback()], eval_dataset=None).train()
        assert sections(read(tmp_path)) == ["summary", "training", "memory", "changes"]

    def test_several_evaluation_sets(self, checkpoint, tmp_path):
        sets = {"first": sequences(4), "second": sequences(2)}
        trainer(checkpoint, tmp_path, eval_strategy="epoch", eval_dataset=sets).train()
        assert [row[0] for row in cells(read(tmp_path), "evaluation")] == ["first", "second"]

    def test_evaluations_around_training(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path)
        before = run.evaluate()["eval_loss"]
        run.train()
        after = run.evaluate()["eval_loss"]
        expected = [f"{before:.4g}", f"{after:.4g}"]
        assert cells(read(tmp_path), "evaluation")[0][3:] == expected
        run.evaluate(sequences(2))  # another set is not what was evaluated before
        assert cells(read(tmp_path), "evaluation")[0][3:] == expected

    def test_another_set_after_training(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path, eval_strategy="epoch")
        run.train()
        expected = cells(read(tmp_path), "evaluation")
        run.evaluate(sequences(2))
        assert cells(read(tmp_path), "evaluation") == expected
        run.evaluate()
        assert cells(read(tmp_path), "evaluation") == expected

    def test_after_is_the_best_model(self, checkpoint, tmp_path):
        saved = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        first_is_best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
        run = trainer(checkpoint, tmp_path, load_best_model_at_end=True, **first_is_best, **saved)
        run.train()
        losses = [entry["eval_loss"] for entry in run.state.log_history if entry.get("eval_loss") and entry["step"]]
        assert max(losses) > losses[-1]
        assert cells(read(tmp_path), "evaluation")[0][4] == f"{max(losses):.4g}"


class TestResuming:
    OPTIONS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}

    def test_the_whole_run_is_reported(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path, **self.OPTIONS)
        run.train()
        whole = read(tmp_path)
        again = trainer(checkpoint, tmp_path, **self.OPTIONS)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        resumed = read(tmp_path)
        assert cells(resumed, "evaluation") == cells(whole, "evaluation")
        assert sections(resumed) == sections(whole)
        samples = [text[text.index('<section id="samples">') :].partition("<footer")[0] for text in (whole, resumed)]
        assert samples[0] == samples[1]

    @pytest.mark.parametrize("restore", (False, True))
    def test_from_a_checkpoint_without_a_report(self, checkpoint, tmp_path, restore):
        trainer(checkpoint, tmp_path, callbacks=[], **self.OPTIONS).train()
        options = {**self.OPTIONS, "restore_callback_states_from_checkpoint": restore}
        again = trainer(checkpoint, tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert cells(read(tmp_path), "evaluation")[0][1] == ""

    def test_a_callback_that_transformers_restores(self, checkpoint, tmp_path):
        trainer(checkpoint, tmp_path, **self.OPTIONS).train()
        whole = read(tmp_path)
        options = {**self.OPTIONS, "restore_callback_states_from_checkpoint": True}
        again = trainer(checkpoint, tmp_path, **options)
        with pytest.warns(UserWarning, match="2 prompts and no tokenizer"):  # it made a callback of its own
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        resumed = read(tmp_path)
        assert cells(resumed, "evaluation") == cells(whole, "evaluation")
        assert resumed.count("before</h3>") == 2
        assert "after</h3>" not in resumed


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


class TestNotToTheEnd:
    def test_interrupted(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path, callbacks=[callback(), Interrupt()], save_strategy="steps", save_steps=2)
        with pytest.raises(KeyboardInterrupt):
            run.train()
        text = read(tmp_path)
        assert "in training, step 2 of 4" in text
        assert text.count("before</h3>") == 2
        assert "after</h3>" not in text

    def test_stopped_early(self, checkpoint, tmp_path):
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        callbacks = [callback(), EarlyStoppingCallback(1, early_stopping_threshold=100.0)]
        trainer(checkpoint, tmp_path, None, callbacks, load_best_model_at_end=True, **options).train()
        assert "stopped, step 2 of 4" in read(tmp_path)


class TestTrouble:
    @pytest.mark.filterwarnings("default:.*of the training report")
    def test_a_report_that_cannot_be_written_is_a_warning(self, checkpoint, tmp_path):
        (tmp_path / "file").write_text("")
        run = trainer(checkpoint, tmp_path / "run", callbacks=[callback(tmp_path / "file" / "report.html")])
        with pytest.warns(UserWarning, match=r"of the training report: (NotADirectory|FileExists)Error.* goes on"):
            run.train()
        assert run.state.global_step == 4

    @pytest.mark.filterwarnings("default:.*of the training report")
    def test_a_prompt_that_cannot_be_answered_is_a_warning(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path, callbacks=[callback(prompts=[""])])
        with pytest.warns(UserWarning, match="Samples of the training report"):
            run.train()
        assert sections(read(tmp_path)) == ["summary", "training", "memory", "changes"]

    def test_prompts_need_a_tokenizer(self, checkpoint, tmp_path):
        run = trainer(checkpoint, tmp_path, callbacks=[ReportCallback(prompts=PROMPTS)])
        with pytest.raises(ValueError, match="2 prompts and no tokenizer: pass `tokenizer`"):
            run.train()

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match="pip install matplotlib"):
            ReportCallback()


def test_only_the_main_process_writes(checkpoint, tmp_path):
    run = trainer(checkpoint, tmp_path, eval_strategy="epoch", save_strategy="epoch")
    run.is_world_process_zero = lambda: False
    run.train()
    assert not (tmp_path / "training_report.html").exists()
    assert any(entry.get("eval_loss") and entry["step"] == 0 for entry in run.state.log_history)


def test_path(checkpoint, tmp_path):
    path = tmp_path / "reports" / "run.html"
    trainer(checkpoint, tmp_path / "run", callbacks=[callback(path)]).train()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "shown"),
    (
        (
            ["/home/user/train.py", "--output_dir", "/home/user/out", "--lr=1e-3"],
            "python train.py --output_dir out --lr=1e-3",
        ),
        (["train.py", "--hub-token", "abc", "--seed", "1"], "python train.py --hub-token &#39;***&#39; --seed 1"),
        (["train.py", "--hub_token=abc", "hf_abc"], "python train.py &#39;--hub_token=***&#39; &#39;***&#39;"),
        (["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"], None),
    ),
)
def test_command(checkpoint, tmp_path, monkeypatch, words, shown):
    monkeypatch.setattr(sys, "argv", words)
    trainer(checkpoint, tmp_path, callbacks=[ReportCallback()], max_steps=1).train()
    found = re.search(r'<pre class="command">(.*?)</pre>', read(tmp_path))
    assert (found and found[1]) == shown
