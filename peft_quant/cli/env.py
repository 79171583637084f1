"""`peft-quant env`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import typer

from ..compat import __version__
from .console import quiet


_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "gptqmodel",
    "optimum",
    "triton",
    "trl",
    "bitsandbytes",
    "matplotlib",
)


def env() -> None:
    """Print versions, device and threads as a table for a bug report."""
    quiet()
    typer.echo("| what | found |\n|---|---|")
    for name, value in _rows():
        typer.echo(f"| {name} | {value} |")


def _rows() -> Iterator[tuple[str, str]]:
    yield "peft-quant", __version__
    yield "Python", platform.python_version()
    yield "platform", platform.platform()
    for package in _PACKAGES:
        yield package, _state(package)
    torch = sys.modules.get("torch")
    if torch is not None:
        yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
        yield "CUDA", torch.version.cuda or "torch was built without"
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            yield f"GPU {index}", f"{found.name}, {found.total_memory / 1e9:.1f} GB, sm_{found.major}{found.minor}"
        if not torch.cuda.device_count():
            yield "GPU", "none"


def _state(package: str) -> str:
    try:
        installed = version(package)
    except PackageNotFoundError:
        return "not installed"
    try:
        with redirect_stdout(sys.stderr):
            import_module(package)
    except Exception as error:
        return f"{installed}, cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    return installed
