"""Per-layer checkpoints that let an interrupted quantization resume.

optimum's `GPTQQuantizer` goes through a model layer by layer and saves no state. It is saved here, where optimum calls
gptqmodel: the class `GPTQ` takes the inputs of one layer, returns its scales, zero points and groups, and sets its
weight.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..files import new_directory, new_file
from ..reading import InvalidFileError, read_json, regular_file
from ..registry import replace_gptq_solver
from .fingerprint import update_with_samples


logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_LAYER = ".safetensors"
_COMPUTED_BY = ("torch", "transformers", "optimum", "gptqmodel")


@dataclass(frozen=True)
class Layer:
    """A layer after GPTQ.

    Attributes:
        weight: fp32, dequantized, in the shape and memory layout of the layer's own.
        scale: fp32, `[out_features, groups]`.
        zero: fp32, `[out_features, groups]`.
        g_idx: int32, the group of each in-feature.
        mock: whether gptqmodel gave up on calibration here, as it then does for all layers after it.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    g_idx: torch.Tensor
    mock: bool


class FinishedLayers:
    """A directory of finished layers: a safetensors file each, and `settings.json`, which identifies the quantization.

    A file holds codes as uint8, scales and zero points, about one byte per weight; where these do not reproduce the
    weight bit for bit, it holds the weight itself. Files are written atomically, each with a checksum; the first one
    creates the directory.

    Args:
        directory: existing or new.
        settings: everything that determines the layers, as JSON values by name.

    Raises:
        ValueError: `directory` holds something else, or layers of other settings.
    """

    def __init__(self, directory: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self._settings = settings
        if not self.directory.exists():
            return
        found = read_settings(self.directory)
        different = sorted(name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name))
        if different:
            raise ValueError(
                f"{self.directory} is of another quantization: it has "
                f"{', '.join(f'{name}={found.get(name)!r}' for name in different)}; asked for was "
                f"{', '.join(f'{name}={settings.get(name)!r}' for name in different)}. Ask for the same to "
                "resume it, or remove it."
            )

    def load(self, name: str) -> Layer | None:
        """Load a layer to the CPU; None if there is no undamaged file of it.

        Raises:
            InvalidFileError: there is something else than a regular file in its place.
        """
        file = self.directory / f"{name}{_LAYER}"
        if not file.exists():
            return None
        try:
            with safe_open(regular_file(file), framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
                metadata = stored.metadata() or {}
        except SafetensorError:
            metadata = {}
        if not metadata or metadata.get("sha256") != _layer_digest(name, tensors, metadata.get("layout", "")):
            logger.warning("%s is damaged: the layer is quantized again.", file)
            return None
        layout = json.loads(metadata["layout"])
        weight = torch.empty_strided(layout["shape"], layout["stride"])
        rows = tensors.pop("weight", None)
        if rows is None:
            rows = _dequantize(tensors.pop("codes"), **tensors)
        _as_rows(weight, layout["transposed"]).copy_(rows)
        return Layer(weight, **tensors, mock=layout["mock"])

    def save(self, name: str, layer: Layer, transposed: bool) -> None:
        """Save a layer.

        Args:
            name: the layer's name in the model.
            layer: the layer.
            transposed: whether its weight is `[in_features, out_features]`.
        """
        if not self.directory.exists():
            with new_directory(self.directory) as directory:
                (directory / _SETTINGS).write_text(json.dumps(self._settings, indent=2), encoding="utf-8")
        groups = {"scale": layer.scale, "zero": layer.zero, "g_idx": layer.g_idx}
        rows = _as_rows(layer.weight, transposed)
        codes = (rows / layer.scale[:, layer.g_idx] + layer.zero[:, layer.g_idx]).round().clamp(0, 255).to(torch.uint8)
        same = _bits(_dequantize(codes, **groups)).equal(_bits(rows))
        tensors = {**groups, **({"codes": codes} if same else {"weight": rows})}
        layout = json.dumps(
            {
                "shape": list(layer.weight.shape),
                "stride": list(layer.weight.stride()),
                "transposed": transposed,
                "mock": layer.mock,
            }
        )
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        with new_file(self.directory / f"{name}{_LAYER}") as temporary:
            save_file(tensors, temporary, {"layout": layout, "sha256": _layer_digest(name, tensors, layout)})


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a directory of [`FinishedLayers`].

    Raises:
        InvalidFileError: it is not one, or its settings are damaged.
    """
    file = Path(directory) / _SETTINGS
    if not file.is_file():
        raise InvalidFileError(f"{directory} holds no layers of an interrupted quantization: remove it.")
    settings = read_json(file)
    if not isinstance(settings.get("layers"), int):
        raise InvalidFileError(f"{file} does not say how many layers there are: remove {directory}.")
    return settings


def state_beside(out: Path) -> Path:
    """The directory for finished layers of the checkpoint to write at `out`: `OUT.unfinished`."""
    return out.with_name(f"{out.name}.unfinished")


def count_finished(directory: str | os.PathLike[str]) -> tuple[int, int]:
    """Count the layers in a directory of [`FinishedLayers`], and those of the model.

    Raises:
        InvalidFileError: as [`read_settings`].
    """
    total = read_settings(directory)["layers"]
    return len(list(Path(directory).glob(f"*{_LAYER}"))), total


@contextmanager
def resumable(
    model: PreTrainedModel, state: str | os.PathLike[str], calibration: list[str], options: dict[str, Any]
) -> Iterator[None]:
    """Context in which optimum's `GPTQQuantizer` saves each layer it finishes, and loads those already finished.

    A finished layer collects no inputs and solves nothing, and forward passes that would only collect inputs are
    skipped: a finished block costs one forward pass, instead of one for each of its layers and one more.

    Args:
        model: the float model to quantize, in fp32.
        state: directory of [`FinishedLayers`].
        calibration: calibration texts.
        options: all other options that determine the layers, by name.

    Raises:
        ValueError: `state` holds something else, or layers of another model, calibration or version, or with other
            options.
    """
    from optimum.gptq.quantizer import GPTQ
    from optimum.gptq.utils import get_block_name_with_pattern, get_layers

    blocks = list(model.get_submodule(get_block_name_with_pattern(model)).children())
    settings = {
        **options,
        "model": _model_digest(model),
        "calibration": hashlib.sha256(json.dumps(calibration).encode()).hexdigest()[:32],
        "layers": sum(len(get_layers(block)) for block in blocks),
        **{package: version(package) for package in _COMPUTED_BY},
    }
    finished = FinishedLayers(state, settings)
    names = {module: name for name, module in model.named_modules()}
    waiting: list[Any] = []  # layers of the current pass

    class ResumableGPTQ(GPTQ):
        def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
            super().__init__(module, *args, **kwargs)
            self.layer = finished.load(names[module])
            waiting.append(self)

        def add_batch(self, *args: Any, **kwargs: Any) -> None:
            if self.layer is None:
                super().add_batch(*args, **kwargs)

        def fasterquant(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            if self.layer is not None:
                self.qcfg.mock_quantization = self.layer.mock
                self.module.weight.data = self.layer.weight.to(self.module.weight.device)
                return self.layer.scale, self.layer.zero, self.layer.g_idx
            result = super().fasterquant(*args, **kwargs)
            scale, zero, g_idx = result[:3]
            layer = Layer(self.module.weight.data, scale, zero, g_idx, self.qcfg.mock_quantization)
            finished.save(names[self.module], layer, isinstance(self.module, Conv1D))
            return result

        def free(self) -> None:
            waiting.remove(self)
            self.layer = None
            super().free()

    def unless_collected(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if waiting and all(one.layer is not None for one in waiting):
                return None
            return forward(*args, **kwargs)

        return wrapped

    for block in blocks:
        block.forward = unless_collected(block.forward)
    try:
        with replace_gptq_solver(ResumableGPTQ):
            yield
    finally:
        for block in blocks:
            del block.forward  # of the object, which hid that of its class


def _model_digest(model: PreTrainedModel) -> str:
    """Digest of the config and of 256 values of every tensor: independent of the model's directory."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        update_with_samples(digest, tensor)
    return digest.hexdigest()[:32]


def _layer_digest(name: str, tensors: dict[str, torch.Tensor], layout: str) -> str:
    digest = hashlib.sha256(json.dumps([name, layout]).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bits(tensor).numpy().data)
    return digest.hexdigest()


def _as_rows(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A view of a weight as `[out_features, in_features]`."""
    return weight.t() if transposed else weight.flatten(1)


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, g_idx: torch.Tensor) -> torch.Tensor:
    """`scale * (codes - zero)`, as gptqmodel computes it."""
    return scale[:, g_idx] * (codes - zero[:, g_idx])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
