"""What the Trainer reports to MLflow, into a store of files."""

import mlflow
import pytest
from datasets import Dataset
from peft import get_peft_model
from rows import METHODS
from transformers import Trainer, TrainingArguments


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # by default MLflow 3 wants a database
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "adapters")
    mlflow.set_tracking_uri(tmp_path / "mlruns")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("method", METHODS)
def test_mlflow_gets_every_loss(model, client, method, tmp_path):
    ids = [list(range(start, start + 16)) for start in range(3, 99, 6)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run",
        run_name=method,
        max_steps=3,
        logging_steps=1,
        report_to="mlflow",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    tuned = get_peft_model(model, METHODS[method].config(task_type="CAUSAL_LM"))
    trainer = Trainer(tuned, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    trainer.train()

    (run,) = client.search_runs([client.get_experiment_by_name("adapters").experiment_id])
    assert (run.info.run_name, run.info.status) == (method, "FINISHED")
    assert run.data.params["max_steps"] == "3"
    expected = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(expected) == 3
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "loss")] == expected
