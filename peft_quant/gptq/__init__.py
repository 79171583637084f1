"""The packed format: GPTQ layers and checkpoints, read by what their tensors say."""

from .check import InvalidCheckpointError, PackedTensors
from .view import PackedFormat, RepackedLayerError, dequantize, is_packed, linear, packed_tensors, read_format


__all__ = [
    "InvalidCheckpointError",
    "PackedFormat",
    "PackedTensors",
    "RepackedLayerError",
    "dequantize",
    "is_packed",
    "linear",
    "packed_tensors",
    "read_format",
]
