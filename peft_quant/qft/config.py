"""Configuration of QFT's int8 weights."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "qft"


class QFTConfig(QuantizationConfigMixin):
    """Which weights of a model are int8, and how: the `quantization_config` of QFT.

    With it, `from_pretrained` quantizes a float checkpoint layer by layer while loading, so that the whole float model
    is never on the device; [`convert_to_int8`] converts a model in memory. The `config.json` of an int8 checkpoint
    contains it.

    Args:
        outlier_ratio (`float`): Share of each row's weights, the largest ones, that stay in float; 0 for none.
        embeddings (`bool`): Whether embeddings, and a head tied to them, are int8 too.
        modules_to_not_convert (`list[str]`, *optional*): Names, or name endings, of further modules to leave in float,
            with or without the prefix of the base model.
        experts_apart (`bool`): Whether the experts of a mixture are separate modules, converted to int8 like any
            layer. In transformers all experts of a layer are one tensor, which stays in float. [`convert_to_int8`]
            detects this by itself.

    Raises:
        ValueError: `outlier_ratio` is not between 0 and 0.5, or an argument is of another type.
    """

    def __init__(
        self,
        /,  # a file may have a key of this name
        outlier_ratio: float = 0.01,
        embeddings: bool = False,
        modules_to_not_convert: list[str] | None = None,
        experts_apart: bool = False,
        **_: Any,
    ) -> None:
        if type(outlier_ratio) not in (int, float) or not 0 <= outlier_ratio <= 0.5:
            raise ValueError(f"outlier_ratio={outlier_ratio!r}: use a share of 0 to 0.5; the method's is 0.01.")
        for name, value in (("embeddings", embeddings), ("experts_apart", experts_apart)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: use True or False.")
        kept = modules_to_not_convert
        if kept is not None and not (
            isinstance(kept, (list, tuple, set)) and all(isinstance(name, str) for name in kept)
        ):
            raise ValueError(f"modules_to_not_convert={kept!r}: use a list of names.")
        self.quant_method: Any = QUANT_METHOD
        self.outlier_ratio = outlier_ratio
        self.embeddings = embeddings
        self.modules_to_not_convert = modules_to_not_convert
        self.experts_apart = experts_apart
