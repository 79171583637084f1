"""A dry run of saving a model and loading it back, without its values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from ..gptq.checkpoint import read_tensors
from .checkpoint import layout_difference, loading_difference


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def first_rows_only(model: PreTrainedModel) -> Iterator[None]:
    """Make `save_pretrained` write only the first row of every tensor, under its name in the model."""
    saving: Any = model
    conversions = saving._weight_conversions
    saving.hf_quantizer.only_first_rows, saving._weight_conversions = True, []  # conversions need whole tensors
    try:
        yield
    finally:
        saving.hf_quantizer.only_first_rows, saving._weight_conversions = False, conversions


def require_readable(model: PreTrainedModel, directory: Path) -> None:
    """Check that a saved model can be loaded, on the meta device, from names and shapes alone.

    Args:
        model: the model.
        directory: its checkpoint, written with [`first_rows_only`].

    Raises:
        ValueError: the loaded model would differ from this one.
        Exception: any error of `from_pretrained`.
    """
    written = read_tensors(directory.glob("*.safetensors"))
    saving: Any = model
    tensors, _ = saving.hf_quantizer.get_state_dict_and_metadata(model)
    shapes = {name: torch.empty_like(tensors[name], device="meta") for name in written}
    model_class: Any = type(model)
    loaded, found = model_class.from_pretrained(
        None,
        config=type(model.config).from_pretrained(directory),
        state_dict=revert_weight_conversion(model, shapes),
        device_map="meta",
        ignore_mismatched_sizes=True,  # reported by the error below
        output_loading_info=True,
    )
    del found["mismatched_keys"]
    before, after = model.state_dict(), loaded.state_dict()
    for name, tensor in before.items():
        if name in after and after[name].shape != tensor.shape:
            raise ValueError(f"{name} would have the shape {tuple(after[name].shape)}, not {tuple(tensor.shape)}")
    difference = loading_difference(found) or layout_difference(model, loaded)
    if difference:
        raise ValueError(difference)
