"""Configuration of LREC."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from ...compat import __version__
from ...docstrings import help_from_docstring


# LoRA's options that LREC supports, besides those of every PEFT method
_LORA_OPTIONS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
}

_BIASES = ("none", "all", "lora_only", "lrec_only")  # the last one is PEFT's alias, after the method's name

FLOAT_INITIALIZATIONS = ("svd", "whitened")
"""Initializations that need the float model."""


@help_from_docstring
@dataclass
class LRECConfig(LoraConfig):
    """Configuration of a [`LRECModel`], which trains a low-rank adapter beside the packed weights of a GPTQ model.

    This is the scheme of INT2.1 (Chai et al., 2023, arXiv 2306.08162).

    Args:
        r (`int`): Rank of the adapter.
        lora_alpha (`int`):
            The adapter's output is scaled by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout (`float`): Probability of dropping an element of the adapter's input in training.
        bias (`"none"`, `"all"` or `"lora_only"`):
            Biases to train and save with the adapter, as in LoRA: those of the adapted layers, and with `"all"` also
            those of float modules. Biases of other GPTQ layers stay unchanged. Needs PEFT 0.21.
        use_rslora (`bool`): See `lora_alpha`.
        rank_pattern (`dict`): Ranks of individual layers, by name, name ending or regular expression.
        alpha_pattern (`dict`): `lora_alpha` of individual layers, specified in the same way.
        target_modules (`list[str]` or `str`, *optional*):
            GPTQ layers to adapt: names or name endings (list), or a regular expression (str). By default, and for
            `"all-linear"`, every GPTQ layer except the output embedding, for every architecture.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers to leave out, specified like `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the transformer blocks to adapt. Not with a regular expression in `target_modules`.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of transformer blocks, if it is not a common one. Needs `layers_to_transform`.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and save with the adapter, for instance a classification head.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained, as in LoRA.
        ensure_weight_tying (`bool`): Keep tied embeddings tied if they are in `modules_to_save` or partly trained.
        init_lora_weights (`bool` or `"gaussian"`):
            Initialization of A: `True` as in `nn.Linear`, `"gaussian"` with standard deviation `1 / r`. `False` also
            draws B at random, so that the adapter is not zero; for tests only.
        init_lrec_weights (`str`):
            Initialization of the adapter. `"zero"` leaves the model unchanged. `"svd"` and `"whitened"` are set by
            [`initialize_lrec_weights`], which needs the float weights, and record how the adapter was initialized.
        save_as_lora (`bool`):
            Save the adapter as a LoRA adapter, in the format of [`export_lora`]: PEFT loads it without peft_quant, and
            does not check that the base is the one it was trained on.
        base_quantization (`dict`, *optional*):
            Filled in by the library: format and fingerprint of the base model, checked when the adapter is loaded.
            Fields that the library filled in, `target_modules` included, are recomputed when the same object is used
            on another base.
        base_fingerprint (`str`, *optional*):
            Filled in by the library: the fingerprint of every GPTQ layer of the base model, adapted or not. It must be
            the same for adapters that are hot-swapped.
        peft_quant_version (`str`, *optional*):
            Filled in by the library: the version of peft_quant that created the adapter. In the saved file it tells
            which package to import before PEFT can load the adapter.

    LoRA's other options are refused when the adapter is added to a model.

    Raises:
        ValueError: values contradict each other or are not among those named above.
    """

    target_modules: list[str] | set[str] | str | None = None
    init_lrec_weights: str = "zero"
    save_as_lora: bool = False
    base_quantization: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    peft_quant_version: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = None  # equivalent, and allowed together with `layers_to_transform`
        super().__post_init__()
        self.peft_type = PeftType.LREC
        if self.peft_quant_version is None:
            self.peft_quant_version = __version__
        for rank in (self.r, *self.rank_pattern.values()):
            if rank <= 0:
                raise ValueError(
                    f"r={self.r} and rank_pattern={self.rank_pattern} hold the rank {rank}: use positive integers."
                )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: use a probability of at least 0 and below 1.")
        if self.init_lrec_weights not in ("zero", *FLOAT_INITIALIZATIONS):
            raise ValueError(f"init_lrec_weights={self.init_lrec_weights!r}: use 'zero', 'svd' or 'whitened'.")

    def to_lora(self) -> LoraConfig:
        """The equivalent LoRA configuration, which does not record the base's format and fingerprint."""
        return LoraConfig(**{option.name: getattr(self, option.name) for option in fields(LoraConfig)})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration; with `save_as_lora`, the equivalent LoRA configuration."""
        if self.save_as_lora:
            self.to_lora().save_pretrained(save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, **kwargs)

    def refuse_other_lora_options(self) -> None:
        """Raise a `ValueError` that names a LoRA option, or a value of one, that LREC does not support.

        Called when the adapter is added to a model: the configuration itself accepts everything a `LoraConfig` does.
        """
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} needs a dense base weight to start from or to change; "
                "LREC's base is packed. Use True or 'gaussian'."
            )
        if self.bias not in _BIASES:
            raise ValueError(f"bias={self.bias!r}: use 'none', 'all' or 'lora_only'.")
        accepted = {*_LORA_OPTIONS, *(option.name for option in fields(PeftConfig))}
        default = LoraConfig()
        for option in fields(LoraConfig):
            value = getattr(self, option.name)
            if option.name not in accepted and value != getattr(default, option.name):
                raise ValueError(
                    f"{option.name}={value!r} is an option of LoRA that LREC does not have. Leave it out, or use "
                    "`LoraConfig` with `prepare_gptq_for_training`."
                )
