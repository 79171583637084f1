"""What a checkpoint or an adapter is, read from its files."""

from .changes import LayerChange, cosine_similarities, layer_changes


__all__ = ["LayerChange", "cosine_similarities", "layer_changes"]
