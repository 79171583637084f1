"""PEQA layers."""

from __future__ import annotations

import warnings
from functools import reduce
from operator import add
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ... import gptq
from ...ops import round_scales_straight_through
from ..layer import AdaptedLinear, check_finite
from .config import PEQAConfig


class PEQALayer(AdaptedLinear):
    """The adapters of a GPTQ layer.

    Each adapter is one delta per scale, `peqa_scales[adapter]` of shape `[groups, out_features]`. The weight is

        W = round(scales + sum of active deltas) * (q - z)

    where `round` returns a value that the checkpoint can store, with the same sign as the base's scale, so that
    merging changes nothing. Its gradient is straight-through.
    """

    adapter_layer_names = ("peqa_scales",)
    other_param_names = ("serving_dtype",)
    first_to_move = ("peqa_scales",)

    def __init__(self, base_layer: nn.Module, packed: gptq.PackedFormat) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.peqa_scales = nn.ParameterDict()
        self.peqa_scales.register_load_state_dict_pre_hook(_refuse_non_finite)
        self.serving_dtype: dict[str, torch.dtype | None] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._unmerged_scales: torch.Tensor | None = None

    @property
    def base_scales(self) -> torch.Tensor:
        """The scales of the base model, `[groups, out_features]`, whether or not adapters are merged into it."""
        scales = gptq.packed_tensors(self.get_base_layer()).scales
        return scales if self._unmerged_scales is None else self._unmerged_scales.to(scales.device)

    def update_layer(self, adapter_name: str, config: PEQAConfig) -> None:
        delta = torch.zeros_like(self.base_scales, dtype=torch.float32)
        if not config.init_weights:
            delta.normal_().mul_(0.1 * self.base_scales.float().abs().mean())
        self.peqa_scales[adapter_name] = nn.Parameter(delta)
        self.serving_dtype[adapter_name] = config.serving_torch_dtype
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version would also cast the fp32 delta to the dtype of `weight`, fp16 on gptqmodel's layers
        delta = self.peqa_scales[adapter_name]
        if not delta.is_meta:
            delta.data = delta.data.to(device or self.base_scales.device)

    def kept_from_casts(self) -> list[torch.Tensor]:
        deltas = list(self.peqa_scales.parameters())
        gradients = [delta.grad for delta in deltas if delta.grad is not None]
        return [*super().kept_from_casts(), *deltas, *gradients]

    def tuned_scales(self, adapter_names: list[str]) -> torch.Tensor:
        """Scales with the given adapters applied: fp32, values that the checkpoint can store, differentiable."""
        delta = reduce(add, (self.peqa_scales[name].float() for name in adapter_names))
        base = self.base_scales.float()
        return round_scales_straight_through(base + delta, base, *self.scale_dtypes(adapter_names))

    def scale_dtypes(self, adapter_names: list[str]) -> tuple[torch.dtype, torch.dtype | None]:
        """The dtype that scales are stored in, and the one that the given adapters are served in, if it is known."""
        serving = (self.serving_dtype[name] for name in adapter_names if self.serving_dtype[name] is not None)
        return self.packed.scale_dtype, next(serving, None)

    def known_adapters(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.peqa_scales]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the tuned scales into the base layer. Deltas of several adapters add up in fp32 and are rounded once.

        Args:
            safe_merge: ignored: values are always checked.
            adapter_names: the adapters to merge; the active ones by default.

        Raises:
            ValueError: an adapter holds NaN or infinite values. The layer is then unchanged.
        """
        adapter_names = self.known_adapters(check_adapters_to_merge(self, adapter_names))
        if not adapter_names:
            return
        all_merged = [*self.merged_adapters, *adapter_names]
        scales = gptq.packed_tensors(self.get_base_layer()).scales
        with torch.no_grad():
            self.check_finite(adapter_names)
            merged = self.tuned_scales(all_merged)
            if self._unmerged_scales is None:
                self._unmerged_scales = scales.clone()
            scales.copy_(merged)
        self.merged_adapters = all_merged

    def check_finite(self, adapter_names: list[str], layer_name: str = "layer") -> None:
        """Raise a `ValueError` that names the adapter if one of them holds NaN or infinite values."""
        for name in self.known_adapters(adapter_names):
            check_finite(f"adapter {name!r} of {layer_name}", self.peqa_scales[name])

    def unmerge(self) -> None:
        """Restore the scales of the base layer, bit by bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            gptq.packed_tensors(self.get_base_layer()).scales.copy_(self.base_scales)
        self._unmerged_scales = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: changing the scales changes the weight by a matrix of full rank."""
        return False


class PEQALinear(PEQALayer):
    """A GPTQ linear layer with PEQA adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PEQAConfig, packed: gptq.PackedFormat
    ) -> None:
        super().__init__(base_layer, packed)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        scales = self.tuned_scales(adapter_names) if adapter_names else None
        return gptq.linear(self.get_base_layer(), self.packed, x, scales)

    def base_tensors(self) -> gptq.PackedTensors:
        return super().base_tensors()._replace(scales=self.base_scales)

    def __repr__(self) -> str:
        return "peqa." + super().__repr__()


def _refuse_non_finite(module: nn.ParameterDict, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    for name in module:
        if prefix + name in state_dict:
            check_finite(prefix + name, state_dict[prefix + name])
