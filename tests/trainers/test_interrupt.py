import os
import signal

import pytest
import torch
from peft import get_peft_model
from quick_training import SETTINGS, sequences
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_quant import PEQAConfig
from peft_quant.trainers.interrupt import SaveOnInterrupt, last_complete_checkpoint


class Interrupt(TrainerCallback):
    """Sends SIGINT within the given steps, as often as given."""

    def __init__(self, times):
        self.times = times

    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(self.times.get(state.global_step, 0)):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def trainer(model, tmp_path):
    def trainer(times):
        arguments = TrainingArguments(str(tmp_path), **{**SETTINGS, "save_strategy": "steps", "max_steps": 6})
        peft_model = get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM"))
        return Trainer(peft_model, arguments, train_dataset=sequences(), callbacks=[Interrupt(times)])

    return trainer


def test_a_checkpoint_after_the_step_that_was_interrupted(trainer, tmp_path):
    run = trainer({2: 1})
    interrupt = SaveOnInterrupt(run)
    before = signal.getsignal(signal.SIGINT)
    with interrupt.listening():
        run.train()
    assert interrupt.saved
    assert signal.getsignal(signal.SIGINT) is before
    assert run.state.global_step == 3
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert torch.load(tmp_path / "checkpoint-3" / "scheduler.pt")["last_epoch"] == 3


def test_one_that_is_left_alone(trainer):
    run = trainer({})
    interrupt = SaveOnInterrupt(run)
    with interrupt.listening():
        run.train()
    assert not interrupt.saved
    assert run.state.global_step == 6


def test_the_second_one_does_not_wait(trainer, tmp_path):
    run = trainer({2: 2})
    interrupt = SaveOnInterrupt(run)
    with pytest.raises(KeyboardInterrupt), interrupt.listening():
        run.train()
    assert not interrupt.saved
    assert last_complete_checkpoint(tmp_path) is None


def test_one_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("content", ("[]", "5", "[" * 10**5, '{"epoch": ', "9" * 5000))
def test_one_with_a_damaged_state_is_passed_over(tmp_path, caplog, content):
    for step, state in ((2, "{}"), (10, content)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10 is incomplete and was skipped" in caplog.text


@pytest.mark.parametrize(
    "name", ("checkpoint-²", "checkpoint-٣", "checkpoint--1", "checkpoint-1e3", "checkpoint-" + "9" * 200)
)
def test_folders_of_other_names_are_passed_over(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) is None
