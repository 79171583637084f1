"""The rows of the matrix: methods on packed formats, kinds of layer and architectures.

`Row.base()` gives the same model at every call, as loading the same checkpoint does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from auto_gptq_layers import auto_gptq_linear
from defuser import convert_model
from gptq_models import Packed, PlainLayer, load, quantize, save_tiny_llama, tiny_config
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peft_quant import LRECConfig, LRECModel, PEQAConfig, PEQAModel
from peft_quant.tuners.lrec import LRECLinear
from peft_quant.tuners.peqa import PEQALinear


@dataclass(frozen=True)
class Method:
    name: str
    config_class: type[PeftConfig]
    tuner_class: type[BaseTuner]
    layer_class: type[nn.Module]
    identity: dict[str, Any]
    changed: dict[str, Any]
    prefix: str
    tensors: tuple[str, ...]
    """What an adapter has for a layer, in the names of its file."""
    by_adapter: tuple[str, ...]
    """Attributes of a layer that hold something for every adapter."""
    learning_rate: float

    def config(self, *, changed: bool = False, **options: Any) -> PeftConfig:
        return self.config_class(**{**(self.changed if changed else self.identity), **options})

    def tuned(self, model: nn.Module, **options: Any) -> PeftModel:
        """The model under an adapter that changes it, as training would."""
        torch.manual_seed(0)
        return get_peft_model(model, self.config(changed=True, **options)).eval()

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: module for name, module in model.named_modules() if isinstance(module, self.layer_class)}

    def parameters(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Those of its adapters."""
        return {name: p for name, p in model.named_parameters() if self.prefix in name}


METHODS = {
    "PEQA": Method(
        "PEQA",
        PEQAConfig,
        PEQAModel,
        PEQALinear,
        identity={},
        changed={"init_weights": False},
        prefix="peqa_",
        tensors=("peqa_scales",),
        by_adapter=("peqa_scales", "serving_dtype"),
        learning_rate=2e-3,
    ),
    "LREC": Method(
        "LREC",
        LRECConfig,
        LRECModel,
        LRECLinear,
        identity={"r": 4},
        changed={"r": 4, "init_lora_weights": False},
        prefix="lora_",
        tensors=("lora_A.weight", "lora_B.weight"),
        by_adapter=("lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha", "use_rslora"),
        learning_rate=1e-2,
    ),
}


@dataclass(frozen=True)
class Row:
    method: Method
    make_base: Callable[[], nn.Module]
    task_type: str = "CAUSAL_LM"
    lose_samples: bool = False
    """Whether layers get tokens without being told which sample they are of."""

    def base(self) -> nn.Module:
        return copy.deepcopy(made(self.make_base))

    def config(self, **options: Any) -> PeftConfig:
        return self.method.config(task_type=self.task_type, **options)

    def tuned(self, **options: Any) -> PeftModel:
        return self.method.tuned(self.base(), task_type=self.task_type, **options)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        return self.method.layers(model)

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "labels": ids if self.task_type == "CAUSAL_LM" else torch.tensor([0, 1])}

    def logits(self, model: nn.Module, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=self.batch["input_ids"], **options).logits


def pack(model: nn.Module, make_layer: Callable[[Packed, torch.Tensor | None], nn.Module]) -> nn.Module:
    """Pack every linear layer inside the blocks of a float model, in 4 bits and groups of 32."""
    for name, module in list(model.named_modules()):
        in_blocks = any(part.isdigit() for part in name.split("."))
        if in_blocks and isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.t()
            bias = None if module.bias is None else module.bias.data
            model.set_submodule(name, make_layer(quantize(weight, 4, 32), bias))
    return model.requires_grad_(False).eval()


def auto_gptq_layer(packed: Packed, bias: torch.Tensor | None) -> nn.Module:
    rows, columns = packed.codes.shape
    layer = auto_gptq_linear("cuda")(4, 32, rows, columns, bias is not None, weight_dtype=torch.float32)
    for name, tensor in packed.tensors.items():
        setattr(layer, name, tensor)
    return layer


def architecture(model_class: type[nn.Module], config: Any, make_layer: Any = PlainLayer) -> nn.Module:
    torch.manual_seed(0)
    return pack(model_class(config), make_layer)


def mixture_of_experts() -> nn.Module:
    """Experts as modules of their own, as gptqmodel makes them before it quantizes."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, num_local_experts=4)
    )
    convert_model(model)
    return pack(model, PlainLayer)


def checkpoint(**options: Any) -> nn.Module:
    """A checkpoint that transformers loads into gptqmodel's torch layers."""
    with TemporaryDirectory() as directory:
        return load(save_tiny_llama(Path(directory, "llama"), **options), options.get("bits", 4))


@cache
def made(make_base: Callable[[], nn.Module]) -> nn.Module:
    return make_base()


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}

FORMATS = {
    "2 bits": {"bits": 2},
    "3 bits": {"bits": 3},
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8},
    "per channel": {"group_size": -1},
    "ragged": {"group_size": 64},
    "asymmetric": {"symmetric": False},
    "act-order": {"act_order": True},
    "gptq_v2": {"checkpoint_format": "gptq_v2"},
    "3 bits, act-order, asymmetric, v2": {
        "bits": 3, "act_order": True, "symmetric": False, "checkpoint_format": "gptq_v2",
    },
}  # fmt: skip
ARCHITECTURES = {
    "auto-gptq's layer": partial(architecture, LlamaForCausalLM, tiny_config(), auto_gptq_layer),
    "Qwen3": partial(
        architecture,
        Qwen3ForCausalLM,
        Qwen3Config(**SIZES, intermediate_size=96, num_key_value_heads=2, head_dim=16),
    ),
    "Mixtral": mixture_of_experts,
    "GPT-2": partial(architecture, GPT2LMHeadModel, GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128)),
    "OPT": partial(
        architecture,
        OPTForCausalLM,
        OPTConfig(**SIZES, ffn_dim=96, dropout=0.0, word_embed_proj_dim=64, max_position_embeddings=64),
    ),
    "BERT": partial(
        architecture,
        BertForSequenceClassification,
        BertConfig(**SIZES, intermediate_size=96, num_labels=2, initializer_range=0.2),
    ),
}
BASES = {name: partial(checkpoint, **options) for name, options in FORMATS.items()} | ARCHITECTURES
ROWS = {
    f"{method_name}, {base_name}": Row(
        method,
        base,
        task_type="SEQ_CLS" if base_name == "BERT" else "CAUSAL_LM",
        lose_samples=base_name in ("Mixtral", "OPT"),
    )
    for method_name, method in METHODS.items()
    for base_name, base in BASES.items()
}
