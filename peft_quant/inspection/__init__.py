"""Inspection of checkpoints and adapters, from their files."""

from .adapter import AdapterComparison, AdapterInspection, compare_adapters, inspect_adapter
from .changes import LayerChange, cosine_similarities, layer_changes
from .checkpoint import CheckpointInspection, LayerStatistics, inspect_checkpoint
from .files import is_adapter


__all__ = [
    "AdapterComparison",
    "AdapterInspection",
    "CheckpointInspection",
    "LayerChange",
    "LayerStatistics",
    "compare_adapters",
    "cosine_similarities",
    "inspect_adapter",
    "inspect_checkpoint",
    "is_adapter",
    "layer_changes",
]
