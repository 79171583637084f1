"""Weights of the float model that a GPTQ model was quantized from, one layer at a time."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from huggingface_hub import snapshot_download
from torch import nn

from ....gptq.checkpoint import Checkpoint


_FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FloatWeights:
    """Float weights of the given layers. Those of a checkpoint are read on demand, one tensor at a time.

    Args:
        source: directory or Hub id of a float safetensors checkpoint, sharded or not, or a float model.
        shapes: `(N, K)` of each layer, by its name in the GPTQ model.
        base_model_prefix: prefix of names in a model with a head, absent in a checkpoint of the base model.
        revision: branch, tag or commit, if `source` is a Hub id.
        token: Hub token.

    Raises:
        FileNotFoundError: `source` is a directory without a safetensors checkpoint.
        InvalidCheckpointError: a shard is truncated.
        ValueError: the source lacks layers or has them in other shapes.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | nn.Module,
        shapes: dict[str, tuple[int, int]],
        base_model_prefix: str = "",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        self._shapes: dict[str, tuple[int, ...]]
        self._read: Callable[[str], torch.Tensor]
        if isinstance(source, nn.Module):
            # with every name of a tied weight
            tensors = {**dict(source.named_parameters(remove_duplicate=False)), **dict(source.named_buffers())}
            self._source = type(source).__name__
            self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self._read = lambda name: tensors[name].detach()
        else:
            if not os.path.isdir(source):
                source = snapshot_download(
                    os.fspath(source), revision=revision, token=token, allow_patterns=["*.safetensors", "*.json"]
                )
            checkpoint = Checkpoint.open(source)
            self._source = str(checkpoint.directory)
            self._shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
            self._read = checkpoint.tensor
        found = {layer: self._find(layer, base_model_prefix) for layer in shapes}
        self._names = {layer: name for layer, name in found.items() if name is not None}
        self._check(shapes)

    def __str__(self) -> str:
        return self._source

    def _find(self, layer: str, prefix: str) -> str | None:
        for name in (layer, f"{prefix}.{layer}", layer.removeprefix(f"{prefix}.")):
            if f"{name}.weight" in self._shapes:
                return f"{name}.weight"
        return None

    def _check(self, shapes: dict[str, tuple[int, int]]) -> None:
        missing = [layer for layer in shapes if layer not in self._names]
        if any(f"{layer}.qweight" in self._shapes for layer in missing):
            raise ValueError(f"{self} holds GPTQ-packed weights. Pass the float model that it was quantized from.")
        if missing:
            raise ValueError(
                f"{self} lacks the weights of {len(missing)} of {len(shapes)} adapted layers: "
                f"{_first_of([f'{layer}.weight' for layer in missing])}. If they are fused or tied in its files, or "
                "have other names there, load the float model with `from_pretrained` and pass that; if it has no such "
                "layers, leave them out with `exclude_modules`."
            )
        wrong = [
            f"{layer} has {list(shape)}, the float weight {list(found)}"
            for layer, shape in shapes.items()
            if sorted(found := self._shapes[self._names[layer]]) != sorted(shape)
        ]
        if wrong:
            raise ValueError(
                f"{self} is not the model this GPTQ model was quantized from: {len(wrong)} of {len(shapes)} "
                f"adapted layers have another shape: {_first_of(wrong)}. Pass the float model of the same "
                "architecture and size."
            )

    def error(self, layer: str, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The quantization error of a layer.

        Weights of transformers' `Conv1D` are stored transposed; a square weight is read in the orientation closer to
        the decoded weight.

        Args:
            layer: name of the layer.
            decoded: the layer's decoded weight, fp32 `[N, K]`.

        Returns:
            The float weight, and the float weight minus the decoded one, fp32 `[N, K]`, on the device of `decoded`.

        Raises:
            ValueError: the float weight is offloaded, not floating point, or not finite.
        """
        name = self._names[layer]
        weight = self._read(name)
        if weight.dtype not in _FLOAT_DTYPES or weight.is_meta:
            held = "offloaded" if weight.is_meta else f"held as {weight.dtype}"
            raise ValueError(
                f"{name} of {self} is {held}. Pass the model in float32, bfloat16 or float16, in memory or as files."
            )
        weight = weight.to(decoded.device, torch.float32)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} of {self} holds NaN or infinite values: download it again.")
        candidates = [each for each in (weight, weight.t()) if each.shape == decoded.shape]
        weight = min(candidates, key=lambda each: float((each - decoded).norm()))
        return weight, weight - decoded


def _first_of(items: list[str], shown: int = 5) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
