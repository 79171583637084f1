"""What is known of versions, optional packages and the process."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version


__version__ = "0.1.0"

PEFT_SUPPORTED = ("0.20.0", "0.22.0")
NEWEST_TESTED = {
    "accelerate": "1.15",
    "gptqmodel": "7.7",
    "optimum": "2.3",
    "torch": "2.14",
    "transformers": "5.24",
}
"""Of what is installed beside PEFT: newer patch releases count as tested."""


def require_supported_peft() -> None:
    """Raise an `ImportError` unless the installed PEFT is one this package was tested with."""
    installed = version("peft")
    oldest, too_new = PEFT_SUPPORTED
    if not Version(oldest) <= Version(installed) < Version(too_new):
        raise ImportError(
            f"peft_quant needs peft >= {oldest}, < {too_new}, found {installed}: "
            f'`pip install "peft>={oldest},<{too_new}"`.'
        )


def warn_of_untested_versions() -> None:
    """Warn of installed packages that are newer than those this package was tested with."""
    newer = []
    for package, newest in NEWEST_TESTED.items():
        try:
            installed = Version(version(package))
        except PackageNotFoundError:
            continue
        if installed.release[:2] > Version(newest).release:
            newer.append(f"{package} {installed} (tested up to {newest})")
    if newer:
        warnings.warn(
            f"peft_quant {__version__} was not tested with {', '.join(newer)}: if something fails, install the tested "
            "versions, or a newer peft_quant.",
            stacklevel=3,
        )


def is_command_line() -> bool:
    """Whether this process was started as `peft-quant` or `python -m peft_quant`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python looks for the module to run, which comes before its arguments
        return sys.orig_argv[-len(sys.argv)] == "peft_quant"
    return Path(program).name in ("peft-quant", "peft-quant.exe")
