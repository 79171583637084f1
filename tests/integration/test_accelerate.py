"""Training under `accelerate launch`: one process, and two that share every batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from gptq_models import load
from peft import PeftModel
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_peqa.py")


def launch(checkpoint, out, processes, batch_size):
    """Run the script and return the tensors that each process trained."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `--cpu` starts one process whatever `--num_processes` says; with `--multi_gpu` the script's `use_cpu` decides
    device = ["--cpu"] if processes == 1 else ["--multi_gpu", "--main_process_port", str(port)]
    options = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *device, *options, "--dynamo_backend", "no"]
        + [str(argument) for argument in (SCRIPT, checkpoint, out, batch_size)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [load_file(out / f"process{rank}of{processes}.safetensors") for rank in range(processes)]


def test_two_processes_train_what_one_does(checkpoint, tmp_path):
    (alone,) = launch(checkpoint, tmp_path / "one", 1, 8)
    first, second = launch(checkpoint, tmp_path / "two", 2, 4)
    assert all(delta.any() for delta in alone.values())
    assert alone.keys() == first.keys() == second.keys()
    for name, delta in alone.items():
        assert torch.equal(first[name], second[name]), name
        # the order of sums differs
        torch.testing.assert_close(first[name], delta, rtol=1e-4, atol=1e-4 * delta.abs().max().item())

    loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path / "two" / "adapter")
    for name, delta in first.items():
        assert torch.equal(loaded.get_parameter(name), delta)
