"""Small GPTQ layers and checkpoints, packed by round-to-nearest with this package's own packer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_quant.ops import PackedWeight
from peft_quant.ops.packed.packing import pack_rows, pack_zeros


BITS = (2, 3, 4, 8)
LAYOUTS: dict[str, dict] = {
    "per channel": {"group_size": -1},
    "grouped": {"group_size": 32},
    "ragged": {"group_size": 64},
    "small odd groups": {"group_size": 24},
    "act-order": {"group_size": 32, "act_order": True},
    "ragged act-order": {"group_size": 64, "act_order": True},
    "signed per channel": {"group_size": -1, "signed": True},
    "signed": {"group_size": 32, "signed": True},
    "signed, symmetric, act-order": {"group_size": 32, "act_order": True, "symmetric": True, "signed": True},
}
"""Options of [`random_packed`], for its 96 rows."""

needs_native_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"to change the adapters of a bare model, this transformers asks for PEFT {MIN_PEFT_VERSION}",
)


@dataclass(frozen=True)
class Packed:
    """A quantized weight: the packed tensors and what they stand for."""

    tensors: dict[str, torch.Tensor]
    codes: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    zero_offset: int

    @property
    def weight(self) -> torch.Tensor:
        g_idx = self.tensors["g_idx"].long()
        return self.tensors["scales"].float()[g_idx] * (self.codes - self.zeros[g_idx]).float()

    def operand(self, device: str = "cpu") -> PackedWeight:
        """What operators take: with `g_idx` only in act-order."""
        qweight, qzeros, scales, g_idx = (tensor.to(device) for tensor in self.tensors.values())
        if torch.equal(g_idx.cpu().long(), torch.arange(len(g_idx)) // self.group_size):
            g_idx = None
        return PackedWeight(qweight, qzeros, scales, g_idx, self.bits, self.group_size, self.zero_offset)


def quantize(
    weight: torch.Tensor,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    act_order: bool = False,
    zero_offset: int = 1,
    scale_dtype: torch.dtype = torch.float16,
    signed: bool = False,
) -> Packed:
    """Round a weight `[K, N]` to the nearest GPTQ codes.

    With `signed`, a scale is negative where the largest weight of its group is positive: so AutoRound, which quantizes
    symmetrically, gives this weight the lowest code.
    """
    rows, columns = weight.shape
    group_size = rows if group_size == -1 else group_size
    groups = -(-rows // group_size)
    g_idx = torch.arange(rows) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(rows, generator=torch.Generator().manual_seed(rows))]
    top = 2**bits - 1
    low = torch.stack([weight[g_idx == group].amin(0).clamp(max=0) for group in range(groups)])
    high = torch.stack([weight[g_idx == group].amax(0).clamp(min=0) for group in range(groups)])
    negative = (high >= -low) & signed
    if symmetric:
        scales = torch.maximum(-low, high) * 2 / (top + signed)
        zeros = torch.full((groups, columns), 2 ** (bits - 1))
    else:
        scales = (high - low) / top
        zeros = (torch.where(negative, high, -low) / scales).round().clamp(0, top).int()
    scales = torch.where(negative, -scales.clamp(min=1e-4), scales.clamp(min=1e-4)).to(scale_dtype)
    codes = (weight / scales.float()[g_idx] + zeros[g_idx]).round().clamp(0, top).int()
    tensors = {
        "qweight": pack_rows(codes, bits),
        "qzeros": pack_zeros(zeros, bits, zero_offset),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return Packed(tensors, codes, zeros, bits, group_size, zero_offset)


def random_packed(bits: int, rows: int = 96, columns: int = 64, seed: int = 0, **options) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.1 + torch.randn(columns, generator=generator) * 0.05
    return quantize(weight, bits, **options)


class PlainLayer(nn.Module):
    """The least a GPTQ layer can be: four tensors and the name of the zero point format."""

    def __init__(self, packed: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor.clone())
        self.register_buffer("bias", bias)
        self.checkpoint_format = "gptq" if packed.zero_offset else "gptq_v2"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the forward of a GPTQ layer must not be called")


class PlainMLP(nn.Module):
    """Two packed layers and a float head, as a user's own model might be."""

    def __init__(self, bits: int = 4, **options) -> None:
        super().__init__()
        self.up = PlainLayer(random_packed(bits, 64, 96, seed=1, **options))
        self.down = PlainLayer(random_packed(bits, 96, 64, seed=2, **options))
        torch.manual_seed(3)
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


def tiny_config(**options) -> LlamaConfig:
    """A Llama with grouped-query attention; its 96 intermediate features make groups of 64 ragged."""
    defaults = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**{**defaults, **options})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0` to `w124` as the tokens 3 to 127 of [`tiny_config`]'s vocabulary."""
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(125))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def kept_for_backward(forward: Callable[[], object]) -> dict[int, int]:
    """Bytes of the storages that autograd keeps of a forward pass, by their address."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return kept


def saved_for_backward(model: nn.Module, input_ids: torch.Tensor) -> int:
    """Bytes that autograd keeps of a training forward pass, beside the model's own tensors."""
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = kept_for_backward(lambda: model.train()(input_ids=input_ids, labels=input_ids).loss)
    return sum(size for pointer, size in kept.items() if pointer not in resident)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at once on the CPU within `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


PACKED = [
    f"model.layers.{block}.{name}_proj"
    for block in (0, 1)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
"""The packed layers of [`tiny_config`]'s model."""

DENSE_BYTES = sum(64 * columns for columns in (64, 32, 32, 64, 96, 96, 96)) * 2 * 4
"""fp32 bytes of the packed weights of [`tiny_config`]'s two layers."""


def save_tiny_llama(
    directory: Path,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    checkpoint_format: str = "gptq",
    seed: int = 0,
    shards: int = 1,
    signed: bool = False,
) -> Path:
    """Write a GPTQ checkpoint of a random [`tiny_config`] model."""
    config = tiny_config()
    torch.manual_seed(seed)
    tensors = {name: tensor.half() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float().t()
        zero_offset = int(checkpoint_format == "gptq")
        packed = quantize(weight, bits, group_size, symmetric, act_order, zero_offset, signed=signed)
        for tensor_name, tensor in packed.tensors.items():
            tensors[f"{name.removesuffix('weight')}{tensor_name}"] = tensor
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float16"
    config.quantization_config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": act_order,
        "checkpoint_format": checkpoint_format,
    }
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def float_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    """The model that [`save_tiny_llama`] quantizes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**options)).eval()


def forget_files(model: PreTrainedModel) -> PreTrainedModel:
    """As if the files that a model was loaded from were gone."""
    model.hf_quantizer.checkpoint_files = ()
    model.config._name_or_path = ""
    return model


def load(
    directory: Path, bits: int = 4, backend: str = "gptq_torch", model_class: type = AutoModelForCausalLM, **options
) -> PreTrainedModel:
    """Load a checkpoint as users are told to."""
    kernel = GPTQConfig(bits=bits, backend=backend)
    options = {"dtype": torch.float32, **options}
    return model_class.from_pretrained(directory, quantization_config=kernel, **options).eval()


@torch.no_grad()
def logits(model: nn.Module, input_ids: torch.Tensor, **options) -> torch.Tensor:
    return model(input_ids=input_ids, **options).logits


def assert_loaded(
    model: nn.Module, saved: nn.Module, outputs: Callable[[nn.Module], torch.Tensor], adapter_name: str = "default"
) -> None:
    """An adapter of `model`, with or without PEFT's wrapper, is the one that was saved: bit by bit, and in effect.

    Tensors that stay in the mapping of their file begin at any multiple of 8 bytes, PyTorch's own at multiples of 64.
    How a product of them is summed, and so rounded, may depend on that.
    """
    found, expected = (
        {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
        for state in (get_peft_model_state_dict(model, adapter_name=adapter_name), get_peft_model_state_dict(saved))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    with torch.no_grad():
        torch.testing.assert_close(outputs(model), outputs(saved), rtol=1e-4, atol=1e-4)
