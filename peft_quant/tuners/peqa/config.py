"""Configuration of PEQA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from ...compat import __version__
from ...docstrings import help_from_docstring


@help_from_docstring
@dataclass
class PEQAConfig(PeftConfig):
    """Configuration of a [`PEQAModel`], which fine-tunes the quantization scales of a GPTQ model.

    This is PEQA (Kim et al., 2023, arXiv 2305.14152).

    Args:
        target_modules (`list[str]` or `str`, *optional*):
            GPTQ layers to adapt: names or name endings (list), or a regular expression (str). By default, and for
            `"all-linear"`, every GPTQ layer except the output embedding, for every architecture.
        exclude_modules (`list[str]` or `str`, *optional*): Layers to leave out, specified like `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the transformer blocks to adapt; all by default. Not with a regular expression in
            `target_modules`.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of transformer blocks, if it is not a common one. Needs `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and save with the adapter, for instance a classification head.
        serving_dtype (`str`, *optional*):
            `"bfloat16"` if the merged model will be served in bf16: training then also rounds scales to bf16, starting
            with those of the base, so that serving in bf16 changes nothing. By default training uses the scales as the
            checkpoint stores them (fp16).
        init_weights (`bool`):
            Initialize the deltas to zero, which leaves the model unchanged. `False` draws them at random; for tests
            only.
        base_quantization (`dict`, *optional*):
            Filled in by the library: format and fingerprint of the base model, checked when the adapter is loaded.
            Fields that the library filled in, `target_modules` included, are recomputed when the same object is used
            on another base.
        peft_quant_version (`str`, *optional*):
            Filled in by the library: the version of peft_quant that created the adapter. In the saved file it tells
            which package to import before PEFT can load the adapter.

    Raises:
        ValueError: values contradict each other or are not among those named above.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    serving_dtype: str | None = None
    init_weights: bool = True
    base_quantization: dict[str, Any] | None = None
    peft_quant_version: str | None = None

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
