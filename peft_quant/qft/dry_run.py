"""Whether a model can be saved and read back, tried with next to nothing of its values."""

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
    """Have `save_pretrained` write the first row of every tensor, as the model calls it."""
    saving: Any = model
    conversions = saving._weight_conversions
    saving.hf_quantizer.only_first_rows, saving._weight_conversions = True, []  # these compute with whole tensors
    try:
        yield
    finally:
        saving.hf_quantizer.only_first_rows, saving._weight_conversions = False, conversions


def require_readable(model: PreTrainedModel, directory: Path) -> None:
    """Load what `save_pretrained` would write, from its names and shapes alone: neither values nor memory are needed.

    Args:
        model: the model.
        directory: what was written [`first_rows_only`].

    Raises:
        ValueError: the model would not come back as it is.
        Exception: what `from_pretrained` raises.
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
        ignore_mismatched_sizes=True,  # which shapes are others is said below
        output_loading_info=True,
    )
    del found["mismatched_keys"]
    own, other = model.state_dict(), loaded.state_dict()
    for name in own:
        if name in other and own[name].shape != other[name].shape:
            raise ValueError(f"{name} would have the shape {tuple(other[name].shape)}, not {tuple(own[name].shape)}")
    difference = loading_difference(found) or layout_difference(model, loaded)
    if difference:
        raise ValueError(difference)
