"""Random GPTQ layers and models in the place of those that PEFT's tests use.

The models start from weights as large as theirs, transformers' defaults: tolerances of the tests are absolute.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from gptq_models import quantize, tiny_config
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel


GROUP_SIZE = 16
SCALE_DTYPE = torch.bfloat16
"""Scales of so few bits, times codes of 4, fit fp16: gptqmodel's kernel, which multiplies in fp16, is exact then."""

MULTIPLE = 32
"""Features of gptqmodel's layers come in multiples of this."""

LLAMA, OPT, DEEP_OPT, LORA_ADAPTER = "models/llama", "models/opt", "models/deep_opt", "models/lora"
"""Directories, relative to the one the tests run in."""


def round_up(features: int) -> int:
    return -(-features // MULTIPLE) * MULTIPLE


def pad(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(x, (0, -x.shape[-1] % MULTIPLE))


@torch.no_grad()
def gptq_linear(in_features: int, out_features: int, bias: bool = True) -> TorchLinear:
    """A 4-bit layer, the same for the same arguments: adapters are bound to the base they were made on."""
    with torch.random.fork_rng():
        torch.manual_seed(out_features)
        dense = nn.Linear(in_features, out_features, bias=bias)
    packed = quantize(dense.weight.t() * 2, 4, GROUP_SIZE, zero_offset=0, scale_dtype=SCALE_DTYPE)
    layer = TorchLinear(4, GROUP_SIZE, True, False, in_features, out_features, bias=bias)
    for name, tensor in packed.tensors.items():
        getattr(layer, name).data = tensor.half() if name == "scales" else tensor.clone()
    if bias:
        layer.bias.data = dense.bias.half()
    layer.post_init()
    return layer


def frozen_parameter() -> nn.Parameter:
    """For models of GPTQ layers alone, which have no parameter: PEFT's LoRA takes the device of the first."""
    return nn.Parameter(torch.zeros(1), requires_grad=False)


class PaddedModule(nn.Module):
    """A module whose inputs are filled up with zeros to as many features as GPTQ layers can have."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = frozen_parameter()

    def __call__(self, *args, **kwargs):
        args = [pad(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
        return super().__call__(*args, **kwargs)


class PaddedLinear:
    """Stands for `nn.Linear` in modules of PEFT's tests: a GPTQ layer with features rounded up."""

    def __new__(cls, in_features: int, out_features: int, bias: bool = True):
        return gptq_linear(round_up(in_features), round_up(out_features), bias)


GPTQ_NN = SimpleNamespace(**{**vars(nn), "Linear": PaddedLinear, "Module": PaddedModule})
"""`torch.nn`, for test modules that define models of linear layers."""


class MLP(nn.Module):
    """PEFT's model of that name, with GPTQ layers `lin0` and `lin1`, or a float `lin1` to be in `modules_to_save`."""

    float_head = False

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = gptq_linear(32, 32, bias)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.lin1 = (nn.Linear if self.float_head else gptq_linear)(32, 8, bias=bias)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float
        self.frozen = frozen_parameter()

    def forward(self, X):  # noqa: N803
        x = self.relu(self.lin0(pad(X.to(self.dtype)) / 32))
        return self.sm(self.lin1(self.drop(x)))


class MLPWithFloatHead(MLP):
    float_head = True


class MLP_2x_same_shape(nn.Module):  # noqa: N801
    """PEFT's model of that name."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.frozen = frozen_parameter()
        for name in ("lin0", "lin1", "lin2", "lin3"):
            setattr(self, name, gptq_linear(32, 32, bias))

    def forward(self, X):  # noqa: N803
        x = pad(X.float()) / 32
        for name in ("lin0", "lin1", "lin2", "lin3"):
            x = torch.relu(self.get_submodule(name)(x))
        return x


class Block(nn.Module):
    def __init__(self, size: int, bias: bool, float_layers: tuple[str, ...]) -> None:
        super().__init__()
        for name in ("lin0", "lin1"):
            setattr(self, name, (nn.Linear if name in float_layers else gptq_linear)(size, size, bias=bias))

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


class DeepMLP(nn.Module):
    """PEFT's model of that name; layers that its tests put into `modules_to_save` are float ones."""

    float_layers: dict[int, tuple[str, ...]] = {}

    def __init__(self, bias: bool = True, num_hidden_layers: int = 12, size: int = MULTIPLE) -> None:
        super().__init__()
        self.size = round_up(size)
        every = self.float_layers.get(-1, ())
        self.layers = nn.ModuleList(
            Block(self.size, bias, self.float_layers.get(i, every)) for i in range(num_hidden_layers)
        )
        self.out = nn.Linear(self.size, 2, bias=bias)

    def forward(self, X):  # noqa: N803
        x = nn.functional.pad(X.float(), (0, self.size - X.shape[-1]))
        for layer in self.layers:
            x = layer(x)
        return torch.log_softmax(self.out(x), dim=-1)


class DummyModel(nn.Module):
    """PEFT's model of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, MULTIPLE)
        self.linear = gptq_linear(MULTIPLE, MULTIPLE)
        self.linear2 = nn.Linear(MULTIPLE, MULTIPLE)  # only ever in `modules_to_save`
        self.lm_head = nn.Linear(MULTIPLE, MULTIPLE)

    def forward(self, input_ids):
        return self.lm_head(self.linear(self.embedding(input_ids)))


def tiny_opt(layers: int) -> OPTForCausalLM:
    config = OPTConfig(
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(config)


def save_quantized(model: PreTrainedModel, directory: Path, checkpoint_format: str) -> None:
    """Write a model as a GPTQ checkpoint that loads, without further arguments, with gptqmodel's torch layers."""
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            weight = tensors.pop(f"{name}.weight").float().t()
            packed = quantize(
                weight, 4, GROUP_SIZE, zero_offset=int(checkpoint_format == "gptq"), scale_dtype=SCALE_DTYPE
            )
            tensors |= {f"{name}.{key}": tensor for key, tensor in packed.tensors.items()}
            tensors[f"{name}.scales"] = packed.tensors["scales"].half()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": checkpoint_format,
        "backend": "gptq_torch",
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def save_models(directory: Path) -> None:
    """Write what PEFT's tests would download."""
    torch.manual_seed(0)
    for name, model, checkpoint_format in (
        (LLAMA, LlamaForCausalLM(tiny_config(initializer_range=0.02)), "gptq"),
        (OPT, tiny_opt(layers=5), "gptq_v2"),
        (DEEP_OPT, tiny_opt(layers=12), "gptq_v2"),
    ):
        (directory / name).mkdir(parents=True)
        save_quantized(model, directory / name, checkpoint_format)
    LoraConfig().save_pretrained(directory / LORA_ADAPTER)
