"""The example's two configurations of accelerate, with two processes on a CPU each."""

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "multi_gpu"
ROW = re.compile(r"^\| (\d) \| \S+ \| (\S+) \| \S+ \|$", re.MULTILINE)


def launch(config, out, *script):
    """Run the example and return the adapter it saved, and the MB of packed tensors that each process held."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--config_file", EXAMPLE / config, "--num_processes", "2", "--main_process_port", port]
    command = ["-m", "accelerate.commands.launch", *options, *script, "--smoke", "--work-dir", out]
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    held = [float(megabytes) for _, megabytes in sorted(ROW.findall(result.stdout))]
    return load_file(out / "adapter" / "adapter_model.safetensors"), held


def test_sharded_training_is_that_of_whole_models(tmp_path):
    script = EXAMPLE / "multi_gpu.py"
    with ThreadPoolExecutor() as pool:
        ddp = pool.submit(launch, "ddp.yaml", tmp_path / "ddp", script)
        fsdp = pool.submit(launch, "fsdp2.yaml", tmp_path / "fsdp2", ROOT / "tests/examples/sharded_on_cpu.py", script)
    (whole, of_whole), (sharded, of_shards) = ddp.result(), fsdp.result()
    assert of_whole[0] == of_whole[1] > 0
    assert max(of_shards) < 0.6 * of_whole[0]
    assert sum(of_shards) < 1.01 * of_whole[0]
    assert whole.keys() == sharded.keys()
    for name, delta in whole.items():
        assert delta.any()
        # the norm that gradients are clipped by is a sum in another order
        torch.testing.assert_close(sharded[name], delta, rtol=1e-3, atol=1e-3 * delta.abs().max().item())
