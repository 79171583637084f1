"""One training step of a Llama of random packed weights: time and peak memory.

    python benchmarks/train_step.py --method peqa lora lora-bf16 --bits 4 --seq 2048 --checkpointing 0 1

| method | what trains |
|---|---|
| `peqa` | fp32 deltas of all scales, through peft_quant |
| `lora` | PEFT's LoRA (rank 16, fp32, autocast to bf16) on packed layers prepared by `prepare_gptq_for_training` |
| `lora-bf16` | the same on dense bf16 layers |

A step is forward, backward, fused AdamW and zero_grad; medians over --steps after three steps to warm up. GB = 1e9
bytes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from record import append, device_name
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_quant
from peft_quant.ops.packing import pack_zeros


SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PackedLinear(nn.Module):
    """A GPTQ layer of random codes, symmetric, v1 zero points."""

    def __init__(self, rows: int, columns: int, bits: int, group_size: int, device: str) -> None:
        super().__init__()
        group_size = rows if group_size == -1 else group_size
        shape = (rows * bits // 32, columns)
        words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
        zeros = torch.full((rows // group_size, columns), 2 ** (bits - 1), device=device)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", pack_zeros(zeros, bits, 1))
        scales = torch.rand(rows // group_size, columns, device=device).add_(0.5).mul_(0.02 / 2 ** (bits - 1))
        self.register_buffer("scales", scales.half())
        self.register_buffer("g_idx", (torch.arange(rows, device=device) // group_size).int())
        self.infeatures, self.outfeatures, self.bits = rows, columns, bits
        self.checkpoint_format = "gptq"
        self.QUANT_TYPE = "random"


def build(shape: str, bits: int | None, group_size: int, device: str) -> LlamaForCausalLM:
    """The model in bf16, its blocks' linear layers packed unless `bits` is None."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False, **SHAPES[shape])
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    if bits is not None:
        for block in model.model.layers:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear):
                    parent, _, child = name.rpartition(".")
                    packed = PackedLinear(module.in_features, module.out_features, bits, group_size, device)
                    setattr(block.get_submodule(parent), child, packed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty_like(parameter, device=device).normal_(std=0.02)
                setattr(
                    module, name, nn.Parameter(value.fill_(1.0) if value.ndim == 1 else value, requires_grad=False)
                )
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def adapt(model: LlamaForCausalLM, method: str) -> Any:
    if method == "peqa":
        return get_peft_model(model, peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=PROJECTIONS)
    if method == "lora":
        config._register_custom_module({PackedLinear: GPTQLoraLinear})
        peft_quant.prepare_gptq_for_training(model)
    return get_peft_model(model, config)


def measure(arguments: argparse.Namespace, method: str, checkpointing: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = None if method.endswith("bf16") else arguments.bits
    model = build(arguments.shape, bits, arguments.group, device)
    model_bytes = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    model = adapt(model, method).train()
    if checkpointing:
        model.enable_input_require_grads()
        # nothing random in a block, so that no random state need be kept
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    if arguments.compile:
        base = model.get_base_model()
        base.loss_function = torch.compile(base.loss_function)
        for block in base.model.layers:
            block.compile(fullgraph=True, mode=arguments.compile)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device == "cuda")
    ids = torch.randint(0, 32000, (arguments.batch, arguments.seq), device=device)

    def event() -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    steps = []
    for step in range(arguments.steps + 3):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
        marks = [event()]
        with torch.autocast(device, torch.bfloat16, enabled=method.startswith("lora")):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        marks.append(event())
        loss.backward()
        marks.append(event())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(event())
        torch.cuda.synchronize()
        if step >= 3:
            steps.append([a.elapsed_time(b) for a, b in pairwise(marks)])
    forward, backward, update = (statistics.median(times) for times in zip(*steps))
    total = statistics.median(sum(times) for times in steps)
    row = {
        "method": method,
        "peer": "peft" if method == "lora-bf16" else "ours",
        "bits": bits or 16,
        "group": arguments.group if bits else None,
        "layers": SHAPES[arguments.shape]["num_hidden_layers"],
        "batch": arguments.batch,
        "seq": arguments.seq,
        "checkpointing": checkpointing,
        "step_ms": round(total, 1),
        "fwd_ms": round(forward, 1),
        "bwd_ms": round(backward, 1),
        "opt_ms": round(update, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "model_gb": round(model_bytes / 1e9, 2),
    }
    append("train_step", arguments.out, **row)
    print(row, f"loss {loss.item():.2f}", arguments.compile or "eager", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["peqa", "lora", "lora-bf16"])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--checkpointing", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--compile", choices=("default", "reduce-overhead"), help="compile each decoder layer and the loss"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    print(device_name(), flush=True)
    for method in arguments.method:
        for checkpointing in arguments.checkpointing:
            try:
                measure(arguments, method, checkpointing)
            except torch.OutOfMemoryError as error:
                print(f"{method}, checkpointing {checkpointing}: {error!r}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
