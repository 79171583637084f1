"""What is known of versions, optional packages and the process."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version


__version__ = "0.1.0"

PEFT_SUPPORTED = ("0.20.0", "0.22.0")


def require_supported_peft() -> None:
    """Raise an `ImportError` unless the installed PEFT is one this package was tested with."""
    installed = version("peft")
    oldest, too_new = PEFT_SUPPORTED
    if not Version(oldest) <= Version(installed) < Version(too_new):
        raise ImportError(
            f"peft_quant needs peft >= {oldest}, < {too_new}, found {installed}: "
            f'`pip install "peft>={oldest},<{too_new}"`.'
        )


def is_command_line() -> bool:
    """Whether this process was started as `peft-quant` or `python -m peft_quant`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python looks for the module to run, which comes before its arguments
        return sys.orig_argv[-len(sys.argv)] == "peft_quant"
    return Path(program).name in ("peft-quant", "peft-quant.exe")
