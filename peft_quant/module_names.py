"""Names of layers: the decoder block that a layer is in, and an order for them."""

from __future__ import annotations

import re
from typing import NamedTuple


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


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by the numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
