"""Inspection of GPTQ checkpoints: format, statistics, and what trains and serves them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..gptq import InvalidCheckpointError, PackedTensors
from ..gptq.check import check_packed_tensors
from ..gptq.checkpoint import LEGACY_CONFIG, Checkpoint
from ..gptq.layer import tensor_format
from ..gptq.zero_points import declared_format, stored_zero_offset
from ..module_names import natural_order, split_block
from ..ops.packed.packing import unpack_rows, unpack_zeros
from ..reading import InvalidFileError
from ..tables import bullet_list, format_number, format_value, text_table
from .engines import EngineVerdict, Packing, engine_verdicts
from .files import open_checkpoint, read_config


_PARTS = {"qweight": "packed integers", "scales": "scales", "qzeros": "zero points", "g_idx": "group indices"}
_REST = "other tensors"
_FORMATS = ("gptq", "gptq_v2")
_DECLARED = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}
_KINDS = {int: "an integer", bool: "true or false"}


@dataclass(frozen=True)
class LayerStatistics:
    """One packed layer, from its tensors.

    Attributes:
        name: the layer's name.
        bits: bits per code.
        in_features: `K`.
        out_features: `N`.
        groups: `G`.
        group_size: in-features that share a scale; `K` if all do. None if the layer is damaged.
        act_order: whether `g_idx` departs from `k // group_size`. None if the layer is damaged.
        zero_points: lowest and highest, decoded in the declared format.
        scale_dtype: dtype of the scales in the file.
        scale_range: lowest and highest finite scale; None if there is none.
        dead_scales: how many scales are zero, NaN or infinite.
        negative_scales: how many of the others are negative.
        saturated: share of the codes that are 0 or `2 ** bits - 1`.
        not_bfloat16: share of the scales that bfloat16 cannot represent.
    """

    name: str
    bits: int
    in_features: int
    out_features: int
    groups: int
    group_size: int | None
    act_order: bool | None
    zero_points: tuple[int, int]
    scale_dtype: str
    scale_range: tuple[float, float] | None
    dead_scales: int
    negative_scales: int
    saturated: float
    not_bfloat16: float

    @property
    def symmetric(self) -> bool:
        return self.zero_points == (1 << (self.bits - 1),) * 2


@dataclass(frozen=True)
class CheckpointInspection:
    """A GPTQ checkpoint.

    Attributes:
        path: directory or Hub id.
        declared: the quantization config.
        found: the same properties of the tensors, where they tell; empty if the tensors were not read.
        layers: statistics of each packed layer; empty if the tensors were not read.
        sizes: bytes of the tensors, by kind; empty if the tensors were not read.
        trainable: values that PEQA trains, and that LREC trains per unit of rank; empty if the tensors were not read.
        training: whether and how each method trains it.
        engines: which engines serve it, from what was found, or else from what is declared.
        errors: damage.
        notes: remarks, such as contradictions between config and tensors.
    """

    path: str
    declared: Mapping[str, Any]
    found: Mapping[str, Any]
    layers: tuple[LayerStatistics, ...]
    sizes: Mapping[str, int]
    trainable: Mapping[str, int]
    training: Mapping[str, str]
    engines: tuple[EngineVerdict, ...]
    errors: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per packed weight, including its share of scales, zero points and group indices."""
        weights = sum(layer.in_features * layer.out_features for layer in self.layers)
        packed = sum(size for part, size in self.sizes.items() if part != _REST)
        return 8 * packed / weights if weights else None

    def __str__(self) -> str:
        parts = [f"{self.path}: GPTQ checkpoint"]
        rows = [("", "declared", f"found in {len(self.layers)} layers")]
        rows += [
            (name, format_value(value), format_value(self.found.get(name, "")))
            for name, value in self.declared.items()
        ]
        parts.append(text_table(rows if self.layers else [row[:2] for row in rows], left=3))
        if self.sizes:
            total = sum(self.sizes.values())
            sizes = [("tensors", "MB", "share")]
            sizes += [(part, f"{size / 1e6:,.1f}", f"{size / max(total, 1):.1%}") for part, size in self.sizes.items()]
            sizes.append(("all", f"{total / 1e6:,.1f}", ""))
            parts.append(text_table(sizes) + f"\n{format_number(self.bits_per_weight, '.2f')} bits a packed weight")
        if self.layers:
            modules: dict[str, list[LayerStatistics]] = {}
            for layer in self.layers:
                modules.setdefault(split_block(layer.name)[1], []).append(layer)
            cells = [(module, str(len(layers)), *_cells(layers)) for module, layers in modules.items()]
            parts.append(text_table([("module", "layers", *_COLUMNS), *cells]))
        parts.append(text_table([("method", "trains it"), *self.training.items()], left=2))
        parts.append(text_table([("engine", "serves it"), *((row.engine, str(row)) for row in self.engines)], left=2))
        sources = [f"{row.engine}, on {row.checked}: {' '.join(row.sources)}" for row in self.engines]
        parts.append(bullet_list("where that was read", sources))
        if self.notes:
            parts.append(bullet_list("notes", self.notes))
        if self.errors:
            parts.append(bullet_list("errors", self.errors))
        return "\n\n".join(parts)

    def layer_table(self) -> str:
        """A table with one row per layer."""
        return text_table([("layer", *_COLUMNS), *((layer.name, *_cells([layer])) for layer in self.layers)])


_COLUMNS = ("bits", "group", "act-order", "K x N", "zero points", "scales", "saturated codes", "dead scales")


def _cells(layers: Sequence[LayerStatistics]) -> tuple[str, ...]:
    """The columns for some layers together."""
    zeros = [zero for layer in layers for zero in layer.zero_points]
    scales = [scale for layer in layers for scale in layer.scale_range or ()]
    shapes = {f"{layer.in_features} x {layer.out_features}" for layer in layers}
    codes = [layer.in_features * layer.out_features for layer in layers]
    saturated = sum(layer.saturated * count for layer, count in zip(layers, codes)) / sum(codes)
    return (
        format_value(_summary(layer.bits for layer in layers)),
        format_value(_summary(layer.group_size or 0 for layer in layers)),
        format_value(any(layer.act_order for layer in layers)),
        shapes.pop() if len(shapes) == 1 else f"{len(shapes)} shapes",
        _range(zeros, "d"),
        _range(scales, ".3g") if scales else "-",
        f"{saturated:.2%}",
        str(sum(layer.dead_scales for layer in layers)),
    )


def _range(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{form}}" if low == high else f"{low:{form}}..{high:{form}}"


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    statistics: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> CheckpointInspection:
    """Inspect a GPTQ checkpoint.

    Compares its config with its tensors, and reports sizes, statistics of each layer, which methods train it and which
    engines serve it. Reads files only: needs neither a GPU nor a GPTQ package, and memory for one layer at a time.
    Damage of tensors, of the index and of what the config declares is listed, not raised.

    Args:
        path: directory or Hub id of the checkpoint, in safetensors.
        statistics: whether to read the tensors. By default they are read from a directory; from a Hub repository, only
            `config.json` is downloaded.
        revision: branch, tag or commit, if `path` is a Hub id.
        token: Hub token.

    Raises:
        FileNotFoundError: there is no `config.json` or, if tensors are read, no `*.safetensors`.
        InvalidFileError: `config.json` or `quantize_config.json` is damaged.
        ValueError: the checkpoint is not GPTQ.
    """
    described = read_config(path, revision, token)
    config, quantization = described.config, described.quantization or {}
    declared_zeros = declared_format(quantization)
    if declared_zeros is None:
        method = quantization.get("quant_method")
        raise ValueError(
            f"{path} is not a GPTQ checkpoint: its config.json says "
            + (
                f"quant_method={method!r}."
                if method
                else "nothing of a quantization. If its files are packed, download "
                "`quantize_config.json` or the whole `config.json` too."
            )
        )
    errors: list[str] = []
    declared = _declared(quantization, declared_zeros, errors)
    if statistics is None:
        statistics = os.path.isdir(path)
    layers: list[LayerStatistics] = []
    sizes: dict[str, int] = {}
    checkpoint = None
    if statistics:
        try:
            checkpoint = open_checkpoint(path, revision, token)
        except InvalidFileError as error:
            errors.append(str(error))
        else:
            sizes, layers = _read(checkpoint, declared_zeros, errors)
    found = _found(layers, declared_zeros)
    notes = _notes(declared, found, layers, config) if found else []
    if checkpoint is not None:
        notes += _notes_of_files(checkpoint)
    if _shifted(layers):
        errors.append(
            "Every zero point is one off the middle: the checkpoint most likely declares the wrong format. "
            f"Set `checkpoint_format` in the quantization_config of its config.json to {found['checkpoint_format']!r}."
        )
    if declared_zeros not in _FORMATS:
        errors.append(
            f"checkpoint_format={declared_zeros!r} is neither gptq nor gptq_v2: convert the checkpoint, or "
            "quantize the model again."
        )
    trainable = _trainable(layers)
    shapes = {(layer.in_features, layer.out_features) for layer in layers}
    beyond_config = "" if checkpoint is None else _beyond_config(checkpoint, layers)
    known = {
        name: found[name] if name in found and found[name] != -1 else declared[name]
        for name in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
    }
    return CheckpointInspection(
        path=os.fspath(path),
        declared=declared,
        found=found,
        layers=tuple(layers),
        sizes=sizes,
        trainable=trainable,
        training=_training(declared, trainable, errors),
        engines=tuple(engine_verdicts(Packing.from_config(known, shapes, beyond_config))),
        errors=tuple(errors),
        notes=tuple(notes),
    )


def _declared(quantization: Mapping[str, Any], zeros: str, errors: list[str]) -> dict[str, Any]:
    """What the quantization config declares, None where that is of another type; appends to `errors`."""
    declared: dict[str, Any] = {"quant_method": quantization["quant_method"]}
    for name, kind in _DECLARED.items():
        value = declared[name] = quantization.get(name)
        if value is not None and type(value) is not kind:
            errors.append(
                f"The quantization config has {name}={value!r:.100}, which is not {_KINDS[kind]}: download it again."
            )
            declared[name] = None
    declared["checkpoint_format"] = zeros
    meta = quantization.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    if writers:
        declared["quantizer"] = ", ".join(map(str, writers if isinstance(writers, list) else [writers]))
    return declared


def _read(checkpoint: Checkpoint, zeros: str, errors: list[str]) -> tuple[dict[str, int], list[LayerStatistics]]:
    """Sizes of the tensors and statistics of the layers; appends to `errors`."""
    names = sorted(checkpoint.packed_layers, key=natural_order)
    sizes = dict.fromkeys([*_PARTS.values(), _REST], 0)
    packed = {f"{name}.{tensor}": part for name in names for tensor, part in _PARTS.items()}
    for name, stored in checkpoint.tensors.items():
        sizes[packed.get(name, _REST)] += stored.end - stored.begin
    layers = []
    for name in names:
        try:
            tensors = checkpoint.packed(name)
            bits = check_packed_tensors(name, PackedTensors(*(tensor.to("meta") for tensor in tensors)))
        except InvalidCheckpointError as error:
            errors.append(str(error))
            continue
        layers.append(_statistics(name, tensors, bits, stored_zero_offset(zeros), errors))
    if not names:
        errors.append("No packed layer: no tensor is named *.qweight.")
    return sizes, layers


def _beyond_config(checkpoint: Checkpoint, layers: list[LayerStatistics]) -> str:
    """Packed layers that transformers, which goes by the config, does not expect."""
    names = [layer.name for layer in layers]
    found = {
        "experts": any(re.search(r"\.experts\.\d+\.", name) for name in names),
        "layers outside of blocks": any(not re.search(r"\.\d+\.", name) for name in names),
        "layers of other bits than declared": len({layer.bits for layer in layers}) > 1,
        "layers without g_idx": any(f"{name}.g_idx" not in checkpoint.tensors for name in names),
        f"layers that {LEGACY_CONFIG} alone declares": "quantization_config" not in checkpoint.config,
    }
    return " and ".join(what for what, is_so in found.items() if is_so)


def _notes_of_files(checkpoint: Checkpoint) -> list[str]:
    notes = []
    if checkpoint.unread:
        files = ", ".join(file.name for file in checkpoint.unread)
        notes.append(f"`from_pretrained` does not read {files}, which was not read here either; merging refuses them.")
    if (checkpoint.directory / LEGACY_CONFIG).is_file() and "quantization_config" not in checkpoint.config:
        notes.append(
            f"The quantization config is only in {LEGACY_CONFIG}, which transformers does not read without "
            'peft_quant: copy it into config.json as `quantization_config`, with `"quant_method": "gptq"`.'
        )
    unordered = sum(f"{name}.g_idx" not in checkpoint.tensors for name in checkpoint.packed_layers)
    if unordered:
        notes.append(f"{unordered} layers have no g_idx: their groups are taken as consecutive rows.")
    return notes


def _statistics(name: str, tensors: PackedTensors, bits: int, offset: int, errors: list[str]) -> LayerStatistics:
    try:
        packed = tensor_format(name, tensors, offset)
    except InvalidCheckpointError as error:
        errors.append(str(error))
        packed = None
    scales = tensors.scales.float()
    finite = scales[torch.isfinite(scales)]
    codes = unpack_rows(tensors.qweight, bits)
    zeros = unpack_zeros(tensors.qzeros, bits, offset)
    return LayerStatistics(
        name=name,
        bits=bits,
        in_features=tensors.g_idx.numel(),
        out_features=tensors.qweight.shape[1],
        groups=tensors.scales.shape[0],
        group_size=packed.group_size if packed else None,
        act_order=packed.act_order if packed else None,
        zero_points=(int(zeros.min()), int(zeros.max())),
        scale_dtype=str(tensors.scales.dtype).removeprefix("torch."),
        scale_range=(float(finite.min()), float(finite.max())) if finite.numel() else None,
        dead_scales=scales.numel() - int((finite != 0).sum()),
        negative_scales=int((finite < 0).sum()),
        saturated=int(((codes == 0) | (codes == (1 << bits) - 1)).sum()) / codes.numel(),
        not_bfloat16=int((finite.bfloat16() != finite).sum()) / scales.numel(),
    )


def _found(layers: list[LayerStatistics], zeros: str) -> dict[str, Any]:
    """The properties of the tensors, named as in configs. Lists where layers differ."""
    sound = [layer for layer in layers if layer.group_size is not None]
    if not sound:
        return {}
    found = {
        "bits": _summary(layer.bits for layer in sound),
        "group_size": _summary([layer.group_size for layer in sound if layer.groups > 1] or [-1]),
        "sym": all(layer.symmetric for layer in sound) or _shifted(layers),
        "desc_act": any(layer.act_order for layer in sound),
    }
    if found["sym"]:
        other = "gptq" if zeros == "gptq_v2" else "gptq_v2"
        found["checkpoint_format"] = other if _shifted(layers) else zeros
    return found


def _shifted(layers: list[LayerStatistics]) -> bool:
    """Whether every zero point is one off the middle, as symmetric ones are when read in the wrong format."""
    return bool(layers) and all(
        low == high and abs(low - (1 << (layer.bits - 1))) == 1
        for layer in layers
        for low, high in [layer.zero_points]
    )


def _notes(
    declared: Mapping[str, Any], found: Mapping[str, Any], layers: list[LayerStatistics], config: Mapping[str, Any]
) -> list[str]:
    """Contradictions between config and tensors, and advice for serving."""
    notes = []
    if declared["sym"] and not found["sym"]:
        low, high = min(layer.zero_points[0] for layer in layers), max(layer.zero_points[1] for layer in layers)
        notes.append(
            f"sym=true is declared, but zero points range over {low}..{high}: kernels that ignore them compute "
            "other outputs."
        )
    if declared["sym"] is False and found["sym"]:
        notes.append("sym=false is declared, but every zero point is the middle: more engines serve sym=true.")
    if declared["desc_act"] and not found["desc_act"]:
        notes.append("desc_act=true is declared, but every g_idx is in order: kernels are faster with false.")
    if declared["desc_act"] is False and found["desc_act"]:
        notes.append(
            "desc_act=false is declared, but g_idx is out of order: kernels that ignore it compute other outputs."
        )
    if found["desc_act"]:
        notes.append("With act-order, weights decode slower on a GPU in training.")
    for name in ("bits", "group_size"):
        # layers whose in-features are one group fit any size from there on
        if declared[name] != found[name] and not (name == "group_size" and found[name] == -1):
            notes.append(f"{name}={declared[name]} is declared, the tensors have {format_value(found[name])}.")
    if any(layer.group_size and layer.in_features % layer.group_size for layer in layers):
        notes.append("The last group of some layers is shorter than the others, which several engines refuse.")
    scales = sum(layer.groups * layer.out_features for layer in layers)
    negative = sum(layer.negative_scales for layer in layers)
    if negative:
        notes.append(
            f"{negative / scales:.1%} of the scales are negative, as in AutoRound's symmetric layers. They train and "
            "merge like any others, and none changes its sign."
        )
    model = config.get("dtype") or config.get("torch_dtype")
    rounded = sum(layer.not_bfloat16 * layer.groups * layer.out_features for layer in layers)
    if model == "bfloat16" and rounded:
        notes.append(
            "config.json says bfloat16, to which engines round the scales by default: "
            f"{rounded / scales:.1%} of them are changed by it. Serve with `--dtype float16`, or train with "
            '`PEQAConfig(serving_dtype="bfloat16")`.'
        )
    return notes


def _trainable(layers: list[LayerStatistics]) -> dict[str, int]:
    """What trains by default: all packed layers except the output head."""
    adapted = [layer for layer in layers if layer.name.rpartition(".")[2] != "lm_head"]
    if not adapted:
        return {}
    return {
        "PEQA": sum(layer.groups * layer.out_features for layer in adapted),
        "LREC": sum(layer.in_features + layer.out_features for layer in adapted),
    }


def _training(declared: Mapping[str, Any], trainable: Mapping[str, int], errors: list[str]) -> dict[str, str]:
    if errors:
        return dict.fromkeys(("PEQA", "LREC", "QFT"), "no: see errors")
    how = f'yes, loaded with `GPTQConfig(bits={format_value(declared["bits"])}, backend="gptq_torch")`'
    peqa, lrec = (
        ""
        if method not in trainable
        else f": {trainable[method]:,} {what}, {4 * trainable[method] / 1e6:,.1f} MB{per}"
        for method, what, per in (("PEQA", "scales", ""), ("LREC", "values", " for each unit of rank"))
    )
    return {"PEQA": how + peqa, "LREC": how + lrec, "QFT": "yes, its weights held in int8: `convert_to_int8`"}


def _summary(values: Iterable[Any]) -> Any:
    different = sorted(set(values))
    return different[0] if len(different) == 1 else different
