"""How far an adapter moved each layer.

PEQA adds a delta `D` to the scales `s`, `[G, N]`, of a layer; LREC and LoRA add `dW = c * B A` to its weight `W`,
`[N, K]`, with `c` the scaling, `B` `[N, R]` and `A` `[R, K]`. Products of such changes need no dense matrix:

    <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))

elementwise over `[R1, R2]`, and the squared singular values of `B A` are the eigenvalues of
`(A A^T)^(1/2) B^T B (A A^T)^(1/2)`, `[R, R]`. Arithmetic is in fp64, as Gram matrices square the condition number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..gptq import PackedFormat, PackedTensors
from ..gptq.layer import dequantize_tensors
from ..module_names import LOW_RANK, SCALE_DELTAS, split_adapter_key
from ..ops import newly_clamped, round_scales
from ..patterns import matching_key, require_quick_patterns


BaseLayer = Callable[[str], "tuple[PackedTensors, PackedFormat]"]
"""Returns a layer of the base, given its name."""

_DEFAULT_ALPHA = 8  # of LoRA


@dataclass(frozen=True)
class LayerChange:
    """The change that an adapter makes to one layer.

    Attributes:
        name: the layer's name in the base.
        values: how many values the adapter trains in it.
        absolute: root mean square of the scale deltas, or Frobenius norm of `dW`.
        relative: `sqrt(mean((D / s)^2))` of the scales, or `|dW| / |W|` in the Frobenius norm; None without the base.
        stored: share of the scales whose stored value changes; None without the base and for low-rank adapters.
        clamped: number of the scales that reach the smallest or largest value that the base can store; None as above.
        rank: the rank of a low-rank adapter, else None.
        scaling: the factor `c` of a low-rank adapter, else None.
        stable_rank: `|dW|_F^2 / |dW|_2^2`, from 1 to the rank: how many directions share the change. None for scales
            and where `dW` is zero.
    """

    name: str
    values: int
    absolute: float
    relative: float | None = None
    stored: float | None = None
    clamped: int | None = None
    rank: int | None = None
    scaling: float | None = None
    stable_rank: float | None = None


def layer_changes(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | Any, base: BaseLayer | None = None
) -> list[LayerChange]:
    """How far a PEQA, LREC or LoRA adapter moved each layer.

    Args:
        tensors: the adapter's tensors, named as in its file or in `get_peft_model_state_dict`. Those that belong to no
            GPTQ layer, such as `modules_to_save`, are ignored.
        config: the adapter's configuration: a `PeftConfig`, or the content of `adapter_config.json`.
        base: returns the base's packed tensors, without the adapter, and their format, given the name of a layer. For
            a model in memory it is
            `lambda name: (model.get_submodule(name).base_tensors(), model.get_submodule(name).packed)`,
            with `model` the adapted model within the `PeftModel`.

    Returns:
        One entry per layer, in the order of the tensors.

    Raises:
        ValueError: an A without its B or the reverse, shapes that do not fit each other or the base, or non-finite
            values.
    """
    layers = split_layers(tensors)
    options = _options(config, layers)
    return [
        (_scale_change if len(parts) == 1 else _low_rank_change)(name, parts, options, base)
        for name, parts in layers.items()
    ]


def cosine_similarities(
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    configs: tuple[Mapping[str, Any] | Any, Mapping[str, Any] | Any],
) -> dict[str, float]:
    """Cosine similarities of the changes of two adapters: of each layer and, under the name `""`, of all together.

    Scale deltas are compared as vectors, and `dW` as matrices. Layers that only one adapter changes, or that both
    change in different ways, are left out, and so are zero changes.
    """
    pair = [split_layers(tensors) for tensors in (first, second)]
    options = [_options(config, layers) for config, layers in zip(configs, pair)]
    cosines, totals = {}, [0.0, 0.0, 0.0]
    for name, parts in pair[0].items():
        others = pair[1].get(name)
        if others is None or len(others) != len(parts):
            continue
        scalings = [_scaling(name, layer, option) for layer, option in zip((parts, others), options)]
        products = [
            scalings[i] * scalings[j] * _inner(left, right)
            for i, left, j, right in ((0, parts, 1, others), (0, parts, 0, parts), (1, others, 1, others))
        ]
        totals = [total + product for total, product in zip(totals, products)]
        if products[1] and products[2]:
            cosines[name] = products[0] / math.sqrt(products[1] * products[2])
    if totals[1] and totals[2]:
        cosines[""] = totals[0] / math.sqrt(totals[1] * totals[2])
    return cosines


def split_layers(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
    """The adapter's tensors by the name of their layer in the base: `(D,)` or `(A, B)`.

    Raises:
        ValueError: an A without its B or the reverse, ranks that do not fit, no values, or non-finite ones.
    """
    layers: dict[str, tuple[torch.Tensor, ...]] = {}
    for key, tensor in tensors.items():
        name, parameter = split_adapter_key(key)
        if parameter == SCALE_DELTAS:
            layers[name] = (tensor,)
        elif parameter in LOW_RANK and tensor.ndim == 2:  # convolutions have other shapes
            a, b = (key.removesuffix(parameter) + other for other in LOW_RANK)
            partner = b if key == a else a
            if partner not in tensors:
                raise ValueError(f"The adapter has {key} but no {partner}: it is damaged, save or download it again.")
            layers[name] = (tensors[a], tensors[b])
    for name, parts in layers.items():
        bad = sum(part.numel() - int(torch.isfinite(part).sum()) for part in parts)
        if bad:
            raise ValueError(
                f"The adapter holds {bad} NaN or infinite values for {name}: it is damaged or its training diverged. "
                "Use an earlier checkpoint."
            )
        if any(part.numel() == 0 for part in parts):
            raise ValueError(f"The adapter holds no values for {name}: it is damaged, save or download it again.")
        if len(parts) == 2 and parts[0].shape[:1] != parts[1].shape[1:]:
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(f"A and B of {name} have shapes {shapes}, not [R, K] and [N, R]: the adapter is damaged.")
    return layers


def _options(config: Mapping[str, Any] | Any, layers: Collection[str]) -> Mapping[str, Any]:
    """The options of a configuration, whose `alpha_pattern` can be matched with the layers."""
    options = config if isinstance(config, Mapping) else config.to_dict()
    require_quick_patterns({"alpha_pattern": options.get("alpha_pattern")}, layers)
    return options


def _scale_change(
    name: str, parts: Sequence[torch.Tensor], options: Mapping[str, Any], base: BaseLayer | None
) -> LayerChange:
    delta = parts[0].detach()
    absolute = _rms(delta)
    if base is None:
        return LayerChange(name, delta.numel(), absolute)
    scales = base(name)[0].scales.detach().to(delta.device)
    _require_shape(name, delta.shape, scales.shape)
    serving = options.get("serving_dtype")
    dtypes = scales.dtype, getattr(torch, serving) if serving else None
    values = scales.float() + delta.float()
    tuned, untuned = (round_scales(rounded, scales, *dtypes) for rounded in (values, scales.float()))
    return LayerChange(
        name,
        delta.numel(),
        absolute,
        relative=_rms(delta / scales.float()),
        stored=float((tuned != untuned).double().mean()),
        clamped=int(newly_clamped(values, scales, *dtypes).sum()),
    )


def _low_rank_change(
    name: str, parts: Sequence[torch.Tensor], options: Mapping[str, Any], base: BaseLayer | None
) -> LayerChange:
    a, b = parts
    scaling = _scaling(name, parts, options)
    squares = _squared_singular_values(a, b)
    norm = abs(scaling) * math.sqrt(float(squares.sum()))
    largest = float(squares.max())
    relative = None
    if base is not None:
        tensors, packed = base(name)
        _require_shape(name, (b.shape[0], a.shape[1]), (packed.out_features, packed.in_features))
        of_base = float(torch.linalg.vector_norm(dequantize_tensors(tensors, packed), dtype=torch.float64))
        relative = norm / of_base if of_base else None
    return LayerChange(
        name,
        a.numel() + b.numel(),
        norm,
        relative=relative,
        rank=a.shape[0],
        scaling=scaling,
        stable_rank=float(squares.sum()) / largest if largest else None,
    )


def _scaling(name: str, parts: Sequence[torch.Tensor], options: Mapping[str, Any]) -> float:
    """LoRA's scaling factor; 1 for scale deltas."""
    if len(parts) == 1:
        return 1.0
    rank, alphas = parts[0].shape[0], options.get("alpha_pattern") or {}
    key = matching_key(alphas, name)
    alpha = options.get("lora_alpha", _DEFAULT_ALPHA) if key is None else alphas[key]
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _inner(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Inner product of two changes of the same kind and layer, without their scalings."""
    if len(first) == 1:
        return float((first[0].detach().double() * second[0].detach().double()).sum())
    (a1, b1), (a2, b2) = ([part.detach().double() for part in parts] for parts in (first, second))
    return float(((b1.t() @ b2) * (a1 @ a2.t())).sum())


def _squared_singular_values(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The squared singular values of `B A`, fp64 `[R]`."""
    a, b = a.detach().double(), b.detach().double()
    values, vectors = torch.linalg.eigh(a @ a.t())
    root = vectors * values.clamp(min=0).sqrt()
    return torch.linalg.eigvalsh(root.t() @ (b.t() @ b) @ root).clamp(min=0)


def _rms(tensor: torch.Tensor) -> float:
    return math.sqrt(float(tensor.double().square().mean()))


def _require_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"The adapter changes a {name} of shape {tuple(shape)}, the base has {tuple(expected)}: it was trained on "
            "another base model."
        )
