"""The packed format: GPTQ layers and checkpoints, read from their tensors."""

from .check import InvalidCheckpointError, PackedTensors
from .layer import (
    PackedFormat,
    RepackedLayerError,
    dequantize,
    is_packed,
    linear,
    lora_linear,
    packed_tensors,
    read_format,
)
from .prepare import prepare_gptq_for_training, restore_gptq_forward


__all__ = [
    "InvalidCheckpointError",
    "PackedFormat",
    "PackedTensors",
    "RepackedLayerError",
    "dequantize",
    "is_packed",
    "linear",
    "lora_linear",
    "packed_tensors",
    "prepare_gptq_for_training",
    "read_format",
    "restore_gptq_forward",
]
