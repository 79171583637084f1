"""Inspection of adapters: base, size, and how far each layer moved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..adapter_files import check_adapter_config, check_adapter_dtypes, is_ours
from ..gptq.base_record import Layers, describe_checkpoint, difference, stored_layers
from ..gptq.checkpoint import Checkpoint, read_tensors
from ..gptq.names import StoredNames
from ..module_names import natural_order, split_block
from ..reading import read_json
from ..tables import bullet_list, format_number, format_value, text_table
from .changes import LayerChange, cosine_similarities, layer_changes, split_layers
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_directory, open_checkpoint


_METHODS = {"PEQA": "PEQA adapter", "LREC": "LREC adapter", "LORA": "LoRA adapter"}


@dataclass(frozen=True)
class AdapterInspection:
    """An adapter of PEQA or LREC, or a LoRA adapter such as `export_lora` writes.

    Attributes:
        path: directory or Hub id.
        method: `"PEQA"`, `"LREC"` or `"LORA"`.
        base_name: the adapter's name for its base.
        base_quantization: recorded format and fingerprint of its base; None if not recorded.
        fits_base: whether the given base has that fingerprint; None without a base or a fingerprint.
        version: version of peft_quant that saved it; None if not recorded.
        bytes: size of its tensors.
        values: number of values in its tensors.
        other_values: number of these in other modules than GPTQ layers.
        changes: change of each GPTQ layer, in the model's order; relative changes need the adapter's base.
        notes: remarks.
    """

    path: str
    method: str
    base_name: str | None
    base_quantization: Mapping[str, Any] | None
    fits_base: bool | None
    version: str | None
    bytes: int
    values: int
    other_values: int
    changes: tuple[LayerChange, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        made = f", by peft_quant {self.version}" if self.version else ""
        base = {True: ", the one given", False: ", another one than given", None: ""}[self.fits_base]
        rows = [
            ("base", f"{self.base_name or 'not named'}{base}"),
            *((name, format_value(value)) for name, value in (self.base_quantization or {}).items()),
            ("size", f"{self.bytes / 1e6:,.1f} MB, {self.values:,} values in {len(self.changes)} layers"),
        ]
        if self.other_values:
            rows.append(("of other modules", f"{self.other_values:,} values"))
        if self.method != "PEQA":
            for what in ("rank", "scaling"):
                found = sorted({getattr(change, what) for change in self.changes})
                rows.append((what, ", ".join(f"{value:g}" for value in found)))
        parts = [f"{self.path}: {_METHODS[self.method]}{made}\n{text_table(rows, left=2)}"]
        if self.changes:
            parts.append(self._module_table())
        if self.notes:
            parts.append(bullet_list("notes", self.notes))
        return "\n\n".join(parts)

    def _module_table(self) -> str:
        modules: dict[str, list[LayerChange]] = {}
        for change in self.changes:
            modules.setdefault(split_block(change.name)[1], []).append(change)
        rows: list[tuple[str, ...]] = [
            ("module", "layers", "change: mean", "least", "most", "most in", *_extra_columns(self.changes))
        ]
        for module, changes in modules.items():
            most = max(changes, key=_size)
            rows.append(
                (
                    module,
                    str(len(changes)),
                    *(_percent(most, value) for value in (_mean(map(_size, changes)), min(map(_size, changes)))),
                    _percent(most, _size(most)),
                    most.name,
                    *_extra_columns(self.changes, changes),
                )
            )
        return f"{_caption(self.changes)}\n{text_table(rows)}"

    def layer_table(self) -> str:
        """A table with one row per layer."""
        if not self.changes:
            return "no GPTQ layer is changed"
        rows: list[tuple[str, ...]] = [("layer", "values", "change", *_extra_columns(self.changes))]
        rows += [
            (
                change.name,
                f"{change.values:,}",
                _percent(change, _size(change)),
                *_extra_columns(self.changes, [change]),
            )
            for change in self.changes
        ]
        return f"{_caption(self.changes)}\n{text_table(rows)}"


@dataclass(frozen=True)
class AdapterComparison:
    """Two adapters side by side.

    Attributes:
        first: the first adapter.
        second: the second adapter.
        cosines: cosine similarity of the changes, by layer, for layers that both change in the same way.
        cosine: cosine similarity over all these layers; None if there are none.
    """

    first: AdapterInspection
    second: AdapterInspection
    cosines: Mapping[str, float]
    cosine: float | None

    def __str__(self) -> str:
        similarity = "cosine of the changes: " + (
            "none, as no layer is changed by both in the same way" if self.cosine is None else f"{self.cosine:.3f}"
        )
        return f"{self.first}\n\n{self.second}\n\n{similarity}\n{self.layer_table()}"

    def layer_table(self) -> str:
        """A table with one row per layer of either adapter."""
        by_name = [{change.name: change for change in side.changes} for side in (self.first, self.second)]
        rows: list[tuple[str, ...]] = [("layer", "first", "second", "cosine")]
        for name in sorted({*by_name[0], *by_name[1]}, key=natural_order):
            pair = [side.get(name) for side in by_name]
            sizes = [_percent(change, _size(change)) if change else "-" for change in pair]
            rows.append((name, *sizes, format_number(self.cosines.get(name), ".3f")))
        return text_table(rows)


def inspect_adapter(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AdapterInspection:
    """Inspect an adapter: its base, its size, and how far it moved each layer.

    Reads files only: needs neither a GPU nor a GPTQ package, and memory for the adapter and one layer of the base.

    Args:
        path: directory or Hub id of a PEQA, LREC or LoRA adapter.
        base: directory or Hub id of its GPTQ base, in safetensors. Its weights are read, and changes are also given
            relative to them.
        revision: branch, tag or commit of `path`, if it is a Hub id.
        token: Hub token.

    Raises:
        FileNotFoundError: no `adapter_config.json` or `adapter_model.safetensors`.
        InvalidFileError: a file is damaged; `InvalidCheckpointError` for the weights.
        ValueError: the adapter is of another method.
    """
    return _inspect(path, base, revision, token)[0]


def compare_adapters(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AdapterComparison:
    """Inspect two adapters and compare their changes.

    Args:
        first: directory or Hub id of an adapter.
        second: directory or Hub id of another one.
        base: as in [`inspect_adapter`], for both; not used for an adapter of another base.
        revision: branch, tag or commit of the adapters that are Hub ids.
        token: Hub token.

    Raises:
        FileNotFoundError: as [`inspect_adapter`].
        InvalidFileError: as [`inspect_adapter`].
        ValueError: as [`inspect_adapter`], or the adapters' shapes differ in a layer.
    """
    (one, *of_one), (other, *of_other) = (_inspect(path, base, revision, token) for path in (first, second))
    cosines = cosine_similarities(of_one[0], of_other[0], (of_one[1], of_other[1]))
    return AdapterComparison(one, other, {name: cosines[name] for name in cosines if name}, cosines.get(""))


def _inspect(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None, revision: str | None, token: str | bool | None
) -> tuple[AdapterInspection, dict[str, torch.Tensor], dict[str, Any]]:
    """The inspection, the adapter's tensors and its configuration."""
    directory = adapter_directory(path, revision, token)
    config = _read_config(directory)
    file = directory / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {ADAPTER_WEIGHTS}. Adapters in pickle format (*.bin) are not read.")
    check_adapter_dtypes(file, {name: tensor.torch_dtype for name, tensor in read_tensors([file]).items()})
    tensors = load_file(file)
    layers = split_layers(tensors)
    recorded = config.get("base_quantization")
    fits, differs, of_base = None, None, None
    notes = []
    if base is not None:
        of_base, differs = _compare(open_checkpoint(base, None, token), layers, config)
        fits = None if recorded is None else differs is None
    if differs:
        notes.append(
            f"{base} is not the base this adapter was trained on ({differs}): changes are not given relative to it."
        )
    if of_base is not None and recorded is None:
        notes.append(f"The adapter does not record its base's fingerprint: whether it is for {base} is not known.")
    readable = None if of_base is None or differs else of_base.__getitem__
    changes = sorted(layer_changes(tensors, config, readable), key=lambda change: natural_order(change.name))
    values = sum(tensor.numel() for tensor in tensors.values())
    unmoved = sum(change.absolute == 0 for change in changes)
    if unmoved:
        notes.append(f"{unmoved} of {len(changes)} layers have not moved at all.")
    clamped = [change for change in changes if change.clamped]
    if clamped:
        count = sum(change.clamped or 0 for change in clamped)
        notes.append(
            f"{count:,} scales in {len(clamped)} layers have reached the smallest or largest value that the base can "
            "store, as with too high a learning rate."
        )
    inspection = AdapterInspection(
        path=os.fspath(path),
        method=config["peft_type"],
        base_name=config.get("base_model_name_or_path"),
        base_quantization=recorded,
        fits_base=fits,
        version=config.get("peft_quant_version"),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        values=values,
        other_values=values - sum(change.values for change in changes),
        changes=tuple(changes),
        notes=tuple(notes),
    )
    return inspection, tensors, config


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {ADAPTER_CONFIG}: pass the directory of an adapter.")
    config = read_json(file)
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"{directory} is a {method} adapter: only PEQA, LREC and LoRA adapters can be inspected.")
    if config.get("use_dora"):
        raise ValueError(f"{directory} is a DoRA adapter, whose changes are not the products of its two matrices.")
    check_adapter_config(file, config, ours=is_ours(config))
    return config


def _compare(checkpoint: Checkpoint, layers: Iterable[str], config: dict[str, Any]) -> tuple[Layers, str | None]:
    """The layers of a base that an adapter changes, and how the base differs from the recorded one."""
    layers = list(layers)
    names = StoredNames(checkpoint, config.get("task_type")).layers(layers)
    missing = [name for name in layers if name not in names]
    if missing:
        return {}, f"it has no packed layer {missing[0]}"
    of_base = stored_layers(checkpoint, names)
    recorded = config.get("base_quantization")
    return of_base, None if recorded is None else difference(
        recorded, of_base, describe_checkpoint(checkpoint, of_base)
    )


def _size(change: LayerChange) -> float:
    return change.absolute if change.relative is None else change.relative


def _percent(change: LayerChange, value: float) -> str:
    return f"{value:.3g}" if change.relative is None else f"{value:.2%}"


def _caption(changes: Sequence[LayerChange]) -> str:
    scales = changes[0].rank is None
    if changes[0].relative is None:
        return f"change of each layer: {'root mean square of the deltas of scales' if scales else '|dW|'}"
    return f"change of each layer: {'sqrt(mean((delta / scale)^2))' if scales else '|dW| / |W|'}"


def _extra_columns(changes: Sequence[LayerChange], rows: Sequence[LayerChange] = ()) -> tuple[str, ...]:
    """The extra columns of these changes: the headings, or the means over some rows."""
    columns = {"stored": ("scales that change in the file", ".1%"), "stable_rank": ("stable rank", ".1f")}
    shown = {name: column for name, column in columns.items() if any(getattr(c, name) is not None for c in changes)}
    if not rows:
        return tuple(heading for heading, _ in shown.values())
    means = []
    for name, (_, form) in shown.items():
        known = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        means.append(format_number(_mean(known) if known else None, form))
    return tuple(means)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
