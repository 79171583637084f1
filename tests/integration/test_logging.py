"""What the Trainer reports to TensorBoard."""

import pytest
from datasets import Dataset
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments

from peft_quant import PEQAConfig


def test_tensorboard_gets_every_loss(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    ids = [list(range(start, start + 16)) for start in range(3, 99, 6)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        max_steps=3,
        logging_steps=1,
        report_to="tensorboard",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    tuned = get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM"))
    run = Trainer(tuned, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    run.train()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    expected = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(expected) == 3
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(expected)
