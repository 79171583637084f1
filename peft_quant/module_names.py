"""Names of modules: the decoder block of a layer, the layer of an adapter's tensor, and an order for names."""

from __future__ import annotations

import re
from typing import NamedTuple


SCALE_DELTAS = "peqa_scales"
LOW_RANK = ("lora_A.weight", "lora_B.weight")
"""The parameters of an adapted layer, as they are named in the file of an adapter."""

PEFT_PREFIX = "base_model.model."
_IN_BLOCK = re.compile(r"(?P<blocks>.*?)\.(?P<position>\d+)\.(?P<layer>.+)")


class Block(NamedTuple):
    """A member of a model's outermost list of modules.

    Attributes:
        blocks: name of the list, such as `"model.layers"`.
        position: the block's, in it.
    """

    blocks: str
    position: int

    def __str__(self) -> str:
        return f"{self.blocks}.{self.position}"


def split_block(name: str) -> tuple[Block | None, str]:
    """The block of a layer, if it is in one, and the layer's name there, or its whole name."""
    match = _IN_BLOCK.fullmatch(name)
    return (Block(match["blocks"], int(match["position"])), match["layer"]) if match else (None, name)


def split_adapter_key(key: str) -> tuple[str, str]:
    """The name in the base of what a tensor of a saved adapter belongs to, and which parameter of an adapter it is.

    That is the name of a layer and `SCALE_DELTAS` or one of `LOW_RANK`, or the tensor's name without PEFT's prefix and
    `""` for tensors of another kind, such as those of `modules_to_save`.
    """
    name = key.removeprefix(PEFT_PREFIX)
    for parameter in (SCALE_DELTAS, *LOW_RANK):
        if name.endswith(f".{parameter}"):
            return name.removesuffix(f".{parameter}"), parameter
    return name, ""


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
