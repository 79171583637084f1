"""The example under FSDP2 with two processes on a CPU, against one process that holds the whole model."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_assets import GPTQ_MODEL


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "multi_gpu" / "multi_gpu.py"
ROW = re.compile(r"^\| \d \| \S+ \| (\S+) \| \S+ \|$", re.MULTILINE)


def run(assets, out, *command):
    """Run the example and return the adapter it saved, and the MB of packed tensors that each process held."""
    options = ["--model", assets / GPTQ_MODEL, "--data", assets / "king-james", "--steps", 3, "--sequence-length", 64]
    options += ["--out", out]
    result = subprocess.run(
        [sys.executable, *map(str, [*command, *options])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return load_file(out / "adapter" / "adapter_model.safetensors"), [float(row) for row in ROW.findall(result.stdout)]


def test_sharded_training_is_that_of_the_whole_model(assets, tmp_path):
    whole, (of_whole,) = run(assets, tmp_path / "whole", SCRIPT, "--batch-size", "4")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "accelerate.commands.launch", "--config_file", SCRIPT.with_name("fsdp2.yaml"))
    wrapper = Path(__file__).with_name("sharded_on_cpu.py")
    sharded, of_shards = run(assets, tmp_path / "sharded", *launcher, "--main_process_port", port, wrapper, SCRIPT)
    assert len(of_shards) == 2
    assert max(of_shards) < 0.6 * of_whole
    assert sum(of_shards) < 1.01 * of_whole
    assert whole.keys() == sharded.keys()
    for name, delta in whole.items():
        assert delta.any()
        # sums over the batch and over the gradients' norm are in another order
        torch.testing.assert_close(sharded[name], delta, rtol=1e-3, atol=1e-3 * delta.abs().max().item())
