"""LREC layers."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ... import gptq
from ..layer import AdaptedLinear
from .config import LRECConfig


CANNOT_MERGE = (
    "A low-rank change cannot be merged into a GPTQ model: its weights are integers times scales. Keep the adapter "
    "beside the base, or write it as a LoRA adapter for PEFT and inference engines: "
    "`peft_quant.export_lora(adapter, out)`."
)


class LRECLinear(AdaptedLinear, LoraLayer):
    """A GPTQ linear layer with low-rank adapters.

    Each adapter is a pair of matrices, `lora_A[adapter].weight` of shape `[r, in_features]` and
    `lora_B[adapter].weight` of shape `[out_features, r]`:

        y = x @ W + bias + sum over active adapters of scaling * (dropout(x) @ A^T @ B^T)
    """

    first_to_move = ("lora_B",)  # the gradient of A is zero while B is

    in_features: int
    out_features: int
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_dropout: MutableMapping[str, nn.Module]
    lora_A: MutableMapping[str, nn.Linear]  # noqa: N815 (PEFT names it)
    lora_B: MutableMapping[str, nn.Linear]  # noqa: N815
    reset_lora_parameters: Callable[[str, bool | str], None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LRECConfig,
        packed: gptq.PackedFormat,
        *,
        r: int,
        lora_alpha: float,
    ) -> None:
        super().__init__()
        self.packed = packed
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r=r, lora_alpha=lora_alpha)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self.packed.in_features, self.packed.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # no dtype: PEFT would cast the fp32 adapter to that of `weight`, fp16 on gptqmodel's layers
        return gptq.packed_tensors(base_layer).qweight.device, None

    def update_layer(self, adapter_name: str, config: LRECConfig, *, r: int, lora_alpha: float) -> None:
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = config.use_rslora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False, dtype=torch.float32)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False, dtype=torch.float32)
        self.lora_bias[adapter_name] = False
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def free_bias(self) -> None:
        """Turn the base layer's bias, a buffer in GPTQ layers, into a trainable fp32 parameter."""
        base_layer = self.get_base_layer()
        bias = getattr(base_layer, "bias", None)
        if bias is not None and not (isinstance(bias, nn.Parameter) and bias.dtype == torch.float32):
            del base_layer.bias
            base_layer.bias = nn.Parameter(bias.detach().float(), requires_grad=False)

    def known_adapters(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.lora_A]

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        base_layer = self.get_base_layer()
        if not adapter_names:
            return gptq.linear(base_layer, self.packed, x)
        if self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in adapter_names):
            return self._forward_with_dropout(x, adapter_names)
        return gptq.lora_linear(base_layer, self.packed, x, *self._combined(adapter_names))

    def _combined(self, adapter_names: list[str]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A, B and scaling of one adapter that equals the sum of the given ones; ranks add up."""
        if len(adapter_names) == 1:
            (name,) = adapter_names
            scaling = self.scaling[name]
            if not isinstance(scaling, torch.Tensor):
                return self.lora_A[name].weight, self.lora_B[name].weight, scaling
        lora_a = torch.cat([self.lora_A[name].weight for name in adapter_names])
        lora_b = torch.cat([self.lora_B[name].weight * self.scaling[name] for name in adapter_names], dim=1)
        return lora_a, lora_b, 1.0

    def _forward_with_dropout(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        y = gptq.linear(self.get_base_layer(), self.packed, x)
        for name in adapter_names:
            dropped = self.lora_dropout[name](x.to(y.dtype))
            a, b = (matrix[name].weight.to(y.dtype) for matrix in (self.lora_A, self.lora_B))
            y = y + dropped @ a.t() @ b.t() * self.scaling[name]
        return y

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The matrix that an adapter adds to the weight, fp32 `[out_features, in_features]`."""
        return self.lora_B[adapter].weight.float() @ self.lora_A[adapter].weight.float() * self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "lrec." + super().__repr__()
