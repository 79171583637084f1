"""Which engines serve a GPTQ checkpoint: one table, for model cards and inspection.

Every row says only what its sources say; anything else is "not known". Rows age: whoever checks one again updates its
date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


_MARLIN_GROUPS = (-1, 32, 64, 128)
_MARLIN_TILES = "in-features in 128s and out-features in 64s"


@dataclass(frozen=True)
class Packing:
    """The properties of a checkpoint that decide whether an engine serves it.

    Attributes:
        bits: bits per code; None if they vary within the checkpoint, or are unknown.
        group_size: in-features that share a scale, -1 for all of them; None as for `bits`.
        symmetric: whether all zero points are `2 ** (bits - 1)`.
        act_order: whether groups are of in-features in the order of their activations.
        checkpoint_format: `"gptq"` (zero points stored minus one) or `"gptq_v2"`.
        shapes: `(in_features, out_features)` of the packed layers; empty if unknown.
        beyond_config: packed layers that transformers does not expect from the config, in words; empty if none.
    """

    bits: int | None
    group_size: int | None
    symmetric: bool | None
    act_order: bool | None
    checkpoint_format: str = "gptq"
    shapes: frozenset[tuple[int, int]] = frozenset()
    beyond_config: str = ""

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], shapes: Iterable[tuple[int, int]] = (), beyond_config: str = ""
    ) -> Packing:
        """Read a quantization config, or the `base_quantization` of an adapter."""
        bits, group_size = config.get("bits"), config.get("group_size")
        return cls(
            bits if isinstance(bits, int) else None,
            group_size if isinstance(group_size, int) else None,
            symmetric=config.get("sym"),
            act_order=config.get("desc_act"),
            checkpoint_format=config.get("checkpoint_format") or config.get("format") or "gptq",
            shapes=frozenset(shapes),
            beyond_config=beyond_config,
        )

    @property
    def ragged(self) -> bool:
        """Whether the last group of a layer is known to be shorter."""
        size = self.group_size
        return size is not None and size > 0 and any(rows % size for rows, _ in self.shapes)

    def tiles(self, *sizes: tuple[int, int]) -> bool | None:
        """Whether every layer's in- and out-features are multiples of one of the sizes; None if unknown."""
        if not self.shapes:
            return None
        return all(any(rows % k == 0 and columns % n == 0 for k, n in sizes) for rows, columns in self.shapes)


@dataclass(frozen=True)
class EngineVerdict:
    """Whether an engine serves a checkpoint.

    Attributes:
        engine: its name and variant.
        serves: None if not known.
        option: required flag or step, in Markdown; empty if none.
        reason: explanation; may be empty.
        sources: addresses, or names of tests, that say so.
        checked: date on which they were read.
    """

    engine: str
    serves: bool | None
    option: str
    reason: str
    sources: tuple[str, ...]
    checked: str

    def __str__(self) -> str:
        word = {True: "yes", False: "no", None: "not known"}[self.serves]
        return word + (f", with {self.option}" if self.option else "") + (f": {self.reason}" if self.reason else "")


_Rule = Callable[[Packing], tuple[bool | None, str, str]]


def _transformers(packing: Packing) -> tuple[bool | None, str, str]:
    if packing.beyond_config:
        return True, "`import peft_quant`", f"without it, {packing.beyond_config} are not loaded"
    if packing.bits == 4 and packing.group_size == -1:
        return True, "", 'on a CPU with `GPTQConfig(bits=4, backend="gptq_torch")`'
    return True, "", ""


def _vllm(packing: Packing) -> tuple[bool | None, str, str]:
    rule = "4 and 8 bits, symmetric, with or without act-order, in groups of 32, 64, 128 or all"
    if packing.symmetric is None:
        return None, "", rule
    if not packing.symmetric:
        return False, "", rule
    if packing.bits in (2, 3):
        if packing.act_order:
            return False, "", rule
        if packing.group_size == -1 or packing.ragged:
            return None, "", rule
        return True, "`--quantization humming`", "experimental, of a package of its own; Marlin has 4 and 8 bits"
    if packing.group_size not in _MARLIN_GROUPS:
        return False, "", rule
    if packing.ragged:
        return False, "", "the in-features of a layer are no multiple of the group"
    fits = packing.tiles((128, 64))
    if fits or (fits is None and not packing.act_order):
        return True, "", rule
    if packing.group_size == -1:
        return None, "", f"Marlin is for {_MARLIN_TILES}"
    return True, "`--dtype float16`", f"by its ExLlama kernel, which is for fp16; Marlin is for {_MARLIN_TILES}"


def _sglang(packing: Packing) -> tuple[bool | None, str, str]:
    if packing.ragged:
        return False, "", "the in-features of a layer are no multiple of the group"
    if packing.bits not in (4, 8) or not packing.symmetric or packing.group_size not in _MARLIN_GROUPS:
        return True, "`--dtype float16`", "2, 3, 4 and 8 bits by its GPTQ kernel, which is for fp16"
    if packing.tiles((128, 64)):
        return True, "", "4 and 8 bits, symmetric, in groups of 32, 64, 128 or all, by Marlin"
    shape = f"by its GPTQ kernel; Marlin, which it takes unasked, is for {_MARLIN_TILES}"
    return True, "`--quantization gptq --dtype float16`", shape


def _llama_cpp(packing: Packing) -> tuple[bool | None, str, str]:
    if packing.bits == 3:
        return False, "", "3 bits are not implemented"
    decoded = "weights are decoded to floats, which `llama-quantize` rounds again"
    if packing.symmetric is False and packing.checkpoint_format == "gptq":
        return True, "zero points as `gptq_v2`", f"as `gptq`, those that are 0 are misread; {decoded}"
    return True, "", decoded


def _lmdeploy(packing: Packing) -> tuple[bool | None, str, str]:
    rule = "4 bits, symmetric, groups of 128, no act-order; in fp16"
    if (packing.bits, packing.group_size) != (4, 128) or packing.symmetric is False or packing.act_order:
        return False, "", rule
    known = packing.symmetric and packing.checkpoint_format == "gptq"
    return True if known else None, "", rule


def _tgi(packing: Packing) -> tuple[bool | None, str, str]:
    fits = packing.bits in (4, 8) and packing.symmetric and packing.group_size in _MARLIN_GROUPS
    if fits and not packing.ragged and packing.tiles((128, 64), (64, 128)):
        return True, "`--quantize gptq`", "4 and 8 bits, symmetric, by Marlin; in maintenance mode"
    return None, "", "its Marlin kernels do not take it; in maintenance mode"


def _exllamav2(packing: Packing) -> tuple[bool | None, str, str]:
    if packing.bits != 4:
        return False, "", "4 bits only"
    return (True, "", "4 bits only") if packing.checkpoint_format == "gptq" else (None, "", "zero points as `gptq_v2`")


def _exllamav3(packing: Packing) -> tuple[bool | None, str, str]:
    return None, "", "its documentation names its own format, EXL3"


_VLLM_DOCS = "https://docs.vllm.ai/en/stable/api/vllm/model_executor/layers/quantization/auto_gptq/"
_VLLM_KERNELS = (
    "https://github.com/vllm-project/vllm/blob/055e47c28003156421365af985d676fc921cb075/vllm/model_executor/kernels/"
    "linear/mixed_precision"
)
_SGLANG, _QUANTIZATION = "https://github.com/sgl-project/sglang/blob", "python/sglang/srt/layers/quantization"
_LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/00bd27a621f92be9a99d24d7c5117a263b9b3c01/conversion/base.py"
_LMDEPLOY = "https://github.com/InternLM/lmdeploy/blob/02f556b3b12e0ec20c7a561871f1d03d02fc80f0/lmdeploy/turbomind"
_TGI = "https://github.com/huggingface/text-generation-inference/blob/1629d0bb6d04a916bcbf695474a4fcc8acfbcd1e/server"

_ENGINES: tuple[tuple[str, _Rule, tuple[str, ...], str], ...] = (  # name, rule, sources, when they were read
    (
        "transformers 5.23, gptqmodel 7.6, optimum 2.3",
        _transformers,
        ("tests of peft_quant",),
        "2026-11-22",
    ),
    (
        "vLLM, NVIDIA GPU",
        _vllm,
        (
            _VLLM_DOCS,
            "https://github.com/vllm-project/vllm/pull/38288",
            "https://github.com/vllm-project/vllm/pull/34556",
            "https://github.com/vllm-project/vllm/issues/45051",
            f"{_VLLM_KERNELS}/marlin.py",
            f"{_VLLM_KERNELS}/exllama.py",
        ),
        "2026-11-22",
    ),
    (
        "SGLang, NVIDIA GPU",
        _sglang,
        (
            f"{_SGLANG}/0cdfa2f8363e82641db14b68545ea9df27b2a7f4/{_QUANTIZATION}/gptq/gptq.py",
            f"{_SGLANG}/0848df5893cd8b64731ff857b361c8f28a1998a5/{_QUANTIZATION}/gptq/schemes/gptq_linear.py",
            f"{_SGLANG}/006d09616c514cf5a0b0a28ed8d94292256601ea/{_QUANTIZATION}/marlin_utils.py",
        ),
        "2026-11-22",
    ),
    ("llama.cpp, by convert_hf_to_gguf.py", _llama_cpp, (_LLAMA_CPP,), "2026-11-22"),
    ("LMDeploy, TurboMind", _lmdeploy, (f"{_LMDEPLOY}/converter.py",), "2026-11-22"),
    (
        "TGI, NVIDIA GPU",
        _tgi,
        (
            f"{_TGI}/text_generation_server/layers/marlin/gptq.py",
            "https://huggingface.co/docs/text-generation-inference",
        ),
        "2026-11-22",
    ),
    ("ExLlamaV2", _exllamav2, ("https://github.com/turboderp-org/exllamav2/issues/35",), "2026-11-22"),
    ("ExLlamaV3", _exllamav3, ("https://github.com/turboderp-org/exllamav3",), "2026-11-22"),
)


def engine_verdicts(packing: Packing) -> list[EngineVerdict]:
    """Whether each engine serves a checkpoint; not known for bit widths that GPTQ's format does not have.

    Args:
        packing: the checkpoint's properties. Unknown act-order counts as none, unknown shapes as even groups.
    """
    verdicts = []
    for engine, rule, sources, checked in _ENGINES:
        if packing.bits in (2, 3, 4, 8) and packing.group_size is not None:
            serves, option, reason = rule(packing)
        else:
            serves, option, reason = None, "", "bits or groups of several kinds, or unusual ones"
        verdicts.append(EngineVerdict(engine, serves, option, reason, sources, checked))
    return verdicts
