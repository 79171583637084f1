"""Base class of GPTQ linear layers with adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .. import gptq
from ..gptq.dtypes import Apply, after_cast, weight_without_values, without_cast


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A GPTQ linear layer with adapters.

    Attributes:
        base_layer: the GPTQ layer.
        packed: format of the packed weight.
        activation_dtype: the dtype that the model computes in, also that of `weight`.
        first_to_move: the containers in `adapter_layer_names` whose parameters the first optimizer step must change.
    """

    base_layer: nn.Module
    packed: gptq.PackedFormat
    activation_dtype: torch.dtype = torch.float32
    first_to_move: tuple[str, ...]
    adapter_layer_names: tuple[str, ...]

    active_adapters: list[str]
    merged_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    unmerge: Callable[[], None]
    update_layer: Callable[..., None]

    def adapted_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Map `[..., K]` to `[..., N]` with the given adapters, all known to the layer and none merged."""
        raise NotImplementedError

    def known_adapters(self, adapter_names: list[str]) -> list[str]:
        """The given adapters that the layer has."""
        raise NotImplementedError

    def base_tensors(self) -> gptq.PackedTensors:
        """The packed tensors of the base model, whether or not adapters are merged into them."""
        return gptq.packed_tensors(self.get_base_layer())

    @property
    def weight(self) -> torch.Tensor:
        """A tensor without values, for code that needs the shape, device or dtype of the weight."""
        return weight_without_values(self.get_base_layer(), self.packed, self.activation_dtype)

    def kept_from_casts(self) -> list[torch.Tensor]:
        """The layer's tensors that keep their dtype when the model is cast."""
        return [gptq.packed_tensors(self.get_base_layer()).scales]

    def _apply(self, fn: Apply, recurse: bool = True) -> Any:
        self.activation_dtype = after_cast(fn, self.activation_dtype)
        return super()._apply(without_cast(fn, self.kept_from_casts()), recurse)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Change the dtype of an adapter's parameters in place."""
        for container in self.adapter_layer_names:
            adapters = getattr(self, container)
            if adapter_name in adapters:
                adapter = adapters[adapter_name]
                for parameter in [adapter] if isinstance(adapter, nn.Parameter) else adapter.parameters():
                    parameter.data = parameter.data.to(dtype)

    def enable_adapters(self, enabled: bool) -> None:
        if self.merged and not enabled:
            self.unmerge()  # PEFT does it in forward, which may run in several threads
        super().enable_adapters(enabled)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            return self.adapted_forward(x, [])
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names)
        return self.adapted_forward(x, [] if self.merged else self.known_adapters(self.active_adapters))

    def _mixed_batch_forward(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        outputs: dict[str, torch.Tensor] = {}
        rows = torch.empty(len(x), dtype=torch.long)
        order: list[int] = []
        for name in dict.fromkeys(adapter_names):
            indices = [i for i, sample_adapter in enumerate(adapter_names) if sample_adapter == name]
            outputs[name] = self.adapted_forward(x[indices], self.known_adapters([name]))
            order += indices
        rows[torch.tensor(order)] = torch.arange(len(x))
        return torch.cat(list(outputs.values()))[rows.to(x.device)]

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight, decoded: fp32 `[out_features, in_features]`."""
        return gptq.dequantize(self.get_base_layer(), self.packed)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        raise TypeError("The weight of a GPTQ layer is packed; it cannot be replaced by a dense one.")


def check_finite(owner: str, tensor: torch.Tensor) -> None:
    """Raise a `ValueError` that names the owner if an adapter's tensor holds NaN or infinite values."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise ValueError(
            f"{owner} holds {bad} NaN or infinite values among {tensor.numel()}, so it is damaged or its training "
            "diverged. Use an earlier checkpoint, or train again with a lower learning rate."
        )
