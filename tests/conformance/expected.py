"""The list of expected failures, `expected.txt`."""

from __future__ import annotations

import re
from pathlib import Path


def expected_failures(method: str) -> list[tuple[str, str]]:
    """A method's entries: a regular expression to search in test ids, and the reason."""
    entries = []
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            methods, pattern, reason = re.split(r"\s{2,}", line, maxsplit=2)
            if method in methods.split(","):
                entries.append((pattern, reason))
    return entries
