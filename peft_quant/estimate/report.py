"""What a training run holds in memory, as a table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..tables import text_table
from . import count


_FP32_ADAM = 16  # bytes a parameter: weight, gradient and two moments
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


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
        apart: bytes of the rows that are not live at the peak.
        peak_known: whether a step was counted; without it, the rows are those of the states alone.
    """

    rows: Sequence[MemoryRow]
    parameters: int
    apart: int = 0
    peak_known: bool = True

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return sum(row.bytes for row in self.rows if row.state)

    @property
    def total(self) -> int:
        """Bytes live at the peak, as estimated; of the states alone if the peak is not known."""
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
        cells.append(("estimated peak", "", "", f"{self.total / 1e6:,.1f}" if self.peak_known else "not estimated"))
        return text_table(cells, left=2)


def make_report(
    peaks: Mapping[Hashable, count.Amounts], parameters: int, precision_of: Mapping[str, str]
) -> MemoryReport:
    """The states as they are between backward and the optimizer's step, and the rest as it is at the peak.

    Args:
        peaks: amounts by the event they were counted at, as `Subject.train` or `Subject.states` gives them.
        parameters: number of the model's.
        precision_of: how the values of each kind are held.
    """
    states = {kind: amount for kind, amount in peaks[count.AFTER_BACKWARD].items() if kind in count.STATES}
    counted = (amounts for event, amounts in peaks.items() if event != count.AFTER_BACKWARD)
    peak = max(counted, key=count.total_bytes, default=states)
    # gradients come as activations go
    gradients = max(states[count.GRADIENTS], peak[count.GRADIENTS])
    amounts = {**peak, **states, count.GRADIENTS: gradients}
    rows = [
        MemoryRow(kind, precision_of[kind], values, size, kind in count.STATES)
        for kind, (size, values) in amounts.items()
        if size
    ]
    return MemoryReport(rows, parameters, gradients[0] - peak[count.GRADIENTS][0], peak_known=peak is not states)


def precisions(
    method: str, optimizer: str = "adamw", bits: int | None = None, dtype: str = "bf16", state_bits: int = 8
) -> dict[str, str]:
    """How the values of each kind are held; `bits` are a GPTQ weight's, `state_bits` those of QFT's momentum."""
    blocks, mixed = "int8, fp32 scale a block", "fp32" if dtype == "fp32" else f"{dtype}, fp32"
    weights, scales = {
        "lora": ("bf16", ""),
        "qlora": ("NF4", "8 bits for 64, fp32 for 256 of these"),
        "qft-stack": ("int8", "fp32, outliers"),
        "qft-fused": ("int8", "fp32, outliers"),
    }.get(method, (f"GPTQ, {bits} bits", "fp16, zero points, groups"))
    states = "8 bits, fp32 scale a block" if optimizer == "adamw8bit" else "fp32"
    if method.startswith("qft"):
        states = blocks if state_bits == 8 else "fp32"
    return {
        count.WEIGHTS: weights,
        count.SCALES: scales,
        count.REST: dtype,
        count.ADAPTER: "fp32",
        count.GRADIENTS: {"qft-stack": blocks, "qft-fused": dtype}.get(method, "fp32"),
        count.OPTIMIZER: states,
        count.ACTIVATIONS: mixed,
        count.DECODED: dtype,
        count.LOGITS: f"{mixed}, gradients",
    }


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))
