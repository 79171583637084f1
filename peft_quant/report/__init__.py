"""What was done to a model, as pictures and tables."""

from .card import write_model_card
from .layer_changes import plot_layer_changes
from .layer_errors import plot_layer_errors


__all__ = ["plot_layer_changes", "plot_layer_errors", "write_model_card"]
