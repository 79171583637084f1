"""What a training run holds in memory, from plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..tables import text_table


_FP32_ADAM = 16  # bytes a parameter: weight, gradient and two moments


@dataclass(frozen=True)
class MemoryRow:
    """One kind of tensor.

    Attributes:
        what: its name.
        precision: how its values are held.
        values: how many there are.
        bytes: what they take, scales included.
        state: whether it lasts from step to step (weights, gradients, momentum), or comes and goes within one.
    """

    what: str
    precision: str
    values: int
    bytes: int
    state: bool


@dataclass(frozen=True)
class MemoryReport:
    """What is trained in which precision, and what it takes.

    Attributes:
        rows: what there is.
        parameters: number of the model's parameters, those tied counted once.
        apart: bytes of the rows that are not there when most is.
    """

    rows: Sequence[MemoryRow]
    parameters: int
    apart: int = 0

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return sum(row.bytes for row in self.rows if row.state)

    @property
    def total(self) -> int:
        """Bytes that are there at once: an estimate of the peak."""
        return sum(row.bytes for row in self.rows) - self.apart

    @property
    def share_of_adam(self) -> float:
        """The states as a share of those of AdamW in fp32."""
        return self.states / (_FP32_ADAM * self.parameters)

    def __str__(self) -> str:
        cells = [("", "precision", "values", "MB")]
        cells += [(row.what, row.precision, f"{row.values:,}", f"{row.bytes / 1e6:,.1f}") for row in self.rows]
        cells.append(("states", f"{self.share_of_adam:.1%} of fp32 AdamW", "", f"{self.states / 1e6:,.1f}"))
        if self.apart:
            cells.append(("not at the peak", "", "", f"{-self.apart / 1e6:,.1f}"))
        cells.append(("estimated peak", "", "", f"{self.total / 1e6:,.1f}"))
        return text_table(cells, left=2)
