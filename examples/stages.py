"""What the examples share: a quiet environment, their options, stages that are not done twice, and loading."""

from __future__ import annotations

import argparse
import atexit
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GPTQMODEL_DISABLE_GIL_WARNING", "1")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # or the first packing compiles C++ for a minute
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
for noisy in ("torchao", "torch.utils._pytree", "optimum"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

import torch  # noqa: E402
from logbar import LogBar  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402


LogBar.shared().setLevel("ERROR")
transformers_logging.set_verbosity_error()


def parse(parser: argparse.ArgumentParser, name: str, **smoke: Any) -> argparse.Namespace:
    """The options of an example, and those that all have: `--work-dir` and `--smoke`.

    Args:
        name: of the example.
        smoke: what `--smoke` puts in the place of other options' defaults.
    """
    parser.add_argument("--work-dir", type=Path, default=Path(".cache", name))
    parser.add_argument(
        "--smoke", action="store_true", help="all of it in seconds: a tiny random model, generated texts, few steps"
    )
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(work_dir=temporary_directory(), **smoke)
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def temporary_directory() -> Path:
    """A new directory that is gone when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="peft_quant-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def digest(**settings: Any) -> str:
    """A short name for what decides a run."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Stages:
    """Results of the stages, with their seconds and peak memory, kept in a JSON file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def run(self, name: str, function: Callable[[], Any], artifact: Path | None = None) -> Any:
        """The result of a stage (JSON): from the file, if it is there and so is what the stage made."""
        if name not in self.results or (artifact is not None and not artifact.exists()):
            print(f"\n== {name}", flush=True)
            start = time.perf_counter()
            value = function()
            unit = 1 if sys.platform == "darwin" else 1024
            self.results[name] = {
                "value": value,
                "seconds": round(time.perf_counter() - start, 1),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2),
            }
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.results, indent=2))
            temporary.replace(self.file)
        return self.results[name]["value"]


def versions() -> str:
    packages = ("peft-quant", "peft", "transformers", "torch", "gptqmodel", "optimum")
    threads = f"{torch.get_num_threads()} threads" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    return f"{threads}; " + ", ".join(f"{package} {version(package)}" for package in packages)
