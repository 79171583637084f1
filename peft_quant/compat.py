"""What is known of versions and optional packages."""

from __future__ import annotations

from importlib.metadata import version

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
