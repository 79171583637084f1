"""The memory of a training step as a table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..tables import text_table
from . import count


_FP32_ADAM = 16  # bytes per parameter: weight, gradient and two moments
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class MemoryRow:
    """One kind of tensor.

    Attributes:
        what: name of the kind.
        precision: format of the values.
        values: number of values.
        bytes: size in bytes, scales included.
        state: whether it is a state of training (weights, gradients, momentum), not temporary within a step.
    """

    what: str
    precision: str
    values: int
    bytes: int
    state: bool


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a training step by kind of tensor, and its peak.

    Attributes:
        rows: one row per kind of tensor.
        parameters: number of the model's parameters, tied ones counted once.
        apart: bytes of the rows that are not live at the peak.
        peak_known: whether a step was counted; if not, the rows are the states alone.
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
        """Estimated bytes live at the peak; those of the states if the peak is not known."""
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
    """Report the states between backward and the optimizer step, and all other kinds at the peak.

    Args:
        peaks: amounts by event, as returned by `Subject.train` or `Subject.states`.
        parameters: number of the model's parameters.
        precision_of: format of the values of each kind.
    """
    states = {kind: amount for kind, amount in peaks[count.AFTER_BACKWARD].items() if kind in count.STATES}
    counted = (amounts for event, amounts in peaks.items() if event != count.AFTER_BACKWARD)
    peak = max(counted, key=count.total_bytes, default=states)
    # gradients appear while activations are freed, so their maximum may not be at the peak
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
    """The format of each kind's values; `bits` are those of GPTQ weights, `state_bits` those of QFT's momentum."""
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
