"""Module names: the block of a layer, the layer of an adapter's tensor, and natural sorting."""

from __future__ import annotations

import re
from typing import NamedTuple


SCALE_DELTAS = "peqa_scales"
LOW_RANK = ("lora_A.weight", "lora_B.weight")
"""Names of an adapted layer's parameters in an adapter's file."""

PEFT_PREFIX = "base_model.model."
_IN_BLOCK = re.compile(r"(?P<blocks>.*?)\.(?P<position>\d+)\.(?P<layer>.+)")


class Block(NamedTuple):
    """A member of a model's outermost list of modules.

    Attributes:
        blocks: name of the list, such as `"model.layers"`.
        position: index in the list.
    """

    blocks: str
    position: int

    def __str__(self) -> str:
        return f"{self.blocks}.{self.position}"


def split_block(name: str) -> tuple[Block | None, str]:
    """Split a layer's name into its block and its name in the block; without a block, None and the whole name."""
    match = _IN_BLOCK.fullmatch(name)
    return (Block(match["blocks"], int(match["position"])), match["layer"]) if match else (None, name)


def split_adapter_key(key: str) -> tuple[str, str]:
    """Split the key of a saved adapter's tensor into the name of its layer and the kind of adapter parameter.

    The kind is `SCALE_DELTAS` or one of `LOW_RANK`. For other tensors, such as those of `modules_to_save`, the result
    is the tensor's name without PEFT's prefix, and `""`.
    """
    name = key.removeprefix(PEFT_PREFIX)
    for parameter in (SCALE_DELTAS, *LOW_RANK):
        if name.endswith(f".{parameter}"):
            return name.removesuffix(f".{parameter}"), parameter
    return name, ""


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key that orders the numbers in names numerically."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
