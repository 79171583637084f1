"""What short training runs of the tests have in common."""

import torch
from datasets import Dataset


SETTINGS = {
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def logged(trainer, name):
    """What a trainer logged under a name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def sequences(count=16, length=16):
    """Counting upwards: something a small model can learn."""
    start = torch.randint(3, 100, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + torch.arange(length)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})
