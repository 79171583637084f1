"""Configuration of PEQA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from ...compat import __version__


@dataclass
class PEQAConfig(PeftConfig):
    """Configuration of a [`PEQAModel`], which fine-tunes the quantization scales of a GPTQ model.

    This is PEQA (Kim et al., 2023, arXiv 2305.14152).

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            The GPTQ layers to adapt: names or name endings (list), or a regular expression (str). By default, and for
            `"all-linear"`, every GPTQ layer but the output embedding, for every architecture.
        exclude_modules (`list[str]` or `str`, *optional*):
            The layers to leave out, written as for `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the transformer blocks to adapt. Not with a regular expression in `target_modules`.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of transformer blocks, if it is not a common one. Needs `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train whole and save with the adapter, for instance a classification head.
        serving_dtype (`str`, *optional*):
            `"bfloat16"` if the merged model will be served in bf16: training then sees scales rounded to bf16 as well,
            so that serving changes nothing, and starts from the base as bf16 serves it. By default training sees the
            scales as the checkpoint stores them (fp16).
        init_weights (`bool`):
            Initialize the deltas to zero, which leaves the model unchanged. `False` draws random ones, for tests only.
        base_quantization (`dict`, *optional*):
            Filled in by the library: format and fingerprint of the base model, checked when the adapter is loaded.
            Fields that the library filled in, `target_modules` included, are recomputed when the same object is used
            on another base.
        peft_quant_version (`str`, *optional*):
            Filled in by the library: the version that made the adapter. In the saved file it tells which package to
            import before PEFT can load the adapter.

    Raises:
        ValueError: for values that contradict each other or are not among those named above.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "GPTQ layers to adapt: names, endings, a regular expression or 'all-linear' (default)."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: names, name endings or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to adapt; all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of transformer blocks, if it is not a common one."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train whole and save with the adapter."}
    )
    serving_dtype: str | None = field(
        default=None, metadata={"help": "'bfloat16' if the merged model will be served in bf16."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Initialize the deltas to zero; False draws random ones (for tests)."}
    )
    base_quantization: dict[str, Any] | None = field(
        default=None, metadata={"help": "Format and fingerprint of the base model, filled in by the library."}
    )
    peft_quant_version: str | None = field(
        default=None, metadata={"help": "Version of peft_quant that made the adapter, filled in by the library."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PEQA
        if self.peft_quant_version is None:
            self.peft_quant_version = __version__
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        is_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        for option in ("layers_to_transform", "layers_pattern"):
            if is_regex and getattr(self, option) is not None:
                raise ValueError(
                    f"`{option}` cannot be used when `target_modules` is a str. Put the indices into the regular "
                    f"expression {self.target_modules!r}."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` needs `layers_to_transform`, which is None.")
        if self.serving_dtype not in (None, "bfloat16"):
            raise ValueError(
                f"serving_dtype={self.serving_dtype!r}: use 'bfloat16', or None to serve the scales as stored."
            )

    @property
    def serving_torch_dtype(self) -> torch.dtype | None:
        return None if self.serving_dtype is None else getattr(torch, self.serving_dtype)
