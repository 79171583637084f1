"""Every reader of files or strings that others may have written; `harness.py` has the rule they are held to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import typer
from gptq_models import PlainMLP, float_llama, random_packed, tiny_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import nn

import peft_quant
from peft_quant import LRECConfig, PEQAConfig, QFTConfig, convert_to_int8, write_model_card
from peft_quant.cli import app
from peft_quant.cli.options import _read_config, parse_fields
from peft_quant.estimate import Estimate
from peft_quant.evaluation.loading import adapter_base, quantization_of
from peft_quant.export.card import Card, inherited_metadata
from peft_quant.export.lora import export_lora
from peft_quant.export.merge import plan_merge
from peft_quant.gptq.base_record import describe_checkpoint, require_base, stored_layers
from peft_quant.gptq.checkpoint import Checkpoint, packed_layers, quantization_config, read_tensors
from peft_quant.gptq.loading import _make_layer
from peft_quant.gptq.names import StoredNames
from peft_quant.gptq.quantize_resume import FinishedLayers, Layer, count_finished
from peft_quant.gptq.zero_points import declared_format, stored_zero_offset
from peft_quant.inspection import compare_adapters, inspect_adapter, inspect_checkpoint, is_adapter
from peft_quant.module_names import PEFT_PREFIX, natural_order, split_adapter_key, split_block
from peft_quant.qft.checkpoint import PARTS, check_checkpoint
from peft_quant.qft.names import conversions_of
from peft_quant.qft.policy import int8_modules
from peft_quant.qft.quantizer import QFTQuantizer
from peft_quant.reading import read_json
from peft_quant.trainers.distillation.cache import CachedTeacher, cache_teacher
from peft_quant.trainers.interrupt import last_complete_checkpoint
from peft_quant.tuners.hotswap import hotswap_adapter
from peft_quant.tuners.lrec.initialization.float_weights import FloatWeights
from peft_quant.tuners.saved import _check_saved

from .edits import Files
from .harness import Target


TARGETS: dict[str, Target] = {}
Read = Callable[[Path], Any]

_LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
_IN, _OUT, _GROUP = 32, 8, 16


def target(
    seed: Callable[[], Files],
    errors: tuple[type[Exception], ...] = (),
    foreign: tuple[type[Exception], ...] = (),
) -> Callable[[Read], Read]:
    """Make a function of a directory a target of its name."""

    def add(read: Read) -> Read:
        TARGETS[read.__name__] = Target(read.__name__, read, seed, errors, foreign)
        return read

    return add


def _json(value: Any) -> bytes:
    return json.dumps(value, default=list).encode()


def _content(file: Path) -> bytes:
    """The content of a file that the target itself reads; empty if it is anything else than a file."""
    return file.read_bytes() if file.is_file() and not file.is_symlink() else b""


def _value(file: Path) -> dict[str, Any]:
    """The mapping in a file that only carries a value to the target; empty if the file is damaged."""
    try:
        value = json.loads(_content(file))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _existing(directory: Path, name: str) -> list[Path]:
    """The file, as callers that look for it first pass it on."""
    return [directory / name] if (directory / name).exists() else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _under(directory: str, files: Files) -> Files:
    return {f"{directory}/{name}": content for name, content in files.items()}


def _files_in(directory: str, *names: str) -> Files:
    return {name: Path(directory, name).read_bytes() for name in names}


@cache
def _base() -> Files:
    """A GPTQ checkpoint of two packed layers and an embedding."""
    config = tiny_config(hidden_size=_IN, num_hidden_layers=1, vocab_size=8).to_diff_dict()
    config["architectures"] = ["LlamaForCausalLM"]
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": _GROUP,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:7.6.0"]},
    }
    tensors = {"model.embed_tokens.weight": torch.ones(8, _IN, dtype=torch.float16)}
    for seed, layer in enumerate(_LAYERS):
        packed = random_packed(4, _IN, _OUT, seed, group_size=_GROUP)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in packed.tensors.items()}
    return {"config.json": _json(config), "model.safetensors": save(tensors, {"format": "pt"})}


def _sharded() -> Files:
    """The same in two shards, as auto-gptq wrote it: with a config of its own."""
    base, shards = _base(), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    with TemporaryDirectory() as directory:
        Path(directory, "model.safetensors").write_bytes(base["model.safetensors"])
        tensors = {name: t.read() for name, t in read_tensors([Path(directory, "model.safetensors")]).items()}
    config = json.loads(base["config.json"])
    of_shards = [dict(list(tensors.items())[shard::2]) for shard in range(2)]
    index = {name: file for file, part in zip(shards, of_shards) for name in part}
    return {
        "quantize_config.json": _json(config.pop("quantization_config")),
        "config.json": _json(config),
        "model.safetensors.index.json": _json({"metadata": {"total_size": 1}, "weight_map": index}),
        **{file: save(part, {"format": "pt"}) for file, part in zip(shards, of_shards)},
    }


@cache
def _record() -> dict[str, Any]:
    with TemporaryDirectory() as directory:
        for name, content in _base().items():
            Path(directory, name).write_bytes(content)
        checkpoint = Checkpoint.open(directory)
        return describe_checkpoint(checkpoint, stored_layers(checkpoint, dict(zip(_LAYERS, _LAYERS))))


def _adapter(config: Any, parts: dict[str, torch.Tensor], others: dict[str, torch.Tensor] | None = None) -> Files:
    tensors = {f"{PEFT_PREFIX}{layer}.{part}": each.clone() for layer in _LAYERS for part, each in parts.items()}
    options = {**config.to_dict(), "base_model_name_or_path": "user/base"}
    return {"adapter_config.json": _json(options), "adapter_model.safetensors": save({**tensors, **(others or {})})}


def _peqa() -> Files:
    config = PEQAConfig(
        target_modules=["q_proj", "down_proj"], base_quantization=_record(), modules_to_save=["embed_tokens"]
    )
    embedding = {"base_model.model.model.embed_tokens.weight": torch.zeros(8, _IN)}
    return _adapter(config, {"peqa_scales": torch.full((_IN // _GROUP, _OUT), 1e-3)}, embedding)


def _lrec() -> Files:
    config = LRECConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        base_quantization=_record(),
        alpha_pattern={"q_proj": 4},
        rank_pattern={"down_proj": 2},
    )
    return _adapter(config, {"lora_A.weight": torch.ones(2, _IN), "lora_B.weight": torch.ones(_OUT, 2)})


def _lora() -> Files:
    config = LoraConfig(r=2, target_modules="model.*(q|down)_proj", alpha_pattern={"q_proj": 4})
    return {**_lrec(), "adapter_config.json": _json({**config.to_dict(), "base_model_name_or_path": "user/base"})}


def _with_base(adapter: Callable[[], Files]) -> Callable[[], Files]:
    return lambda: _under("base", _base()) | _under("adapter", adapter())


def _no_models() -> Any:
    """A patch without which layers of other names are looked up in a model of transformers."""
    return mock.patch.object(StoredNames, "_models", lambda self: iter(()))


# checkpoints


def _read_checkpoint(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    for name in checkpoint.tensors:
        checkpoint.tensor(name)
    describe_checkpoint(checkpoint, stored_layers(checkpoint, {name: name for name in checkpoint.packed_layers}))


@target(_base, errors=(FileNotFoundError,))
def checkpoint(directory: Path) -> None:
    _read_checkpoint(directory)


@target(_sharded, errors=(FileNotFoundError,))
def sharded_checkpoint(directory: Path) -> None:
    _read_checkpoint(directory)


@target(_base, errors=(FileNotFoundError,))
def inspected_checkpoint(directory: Path) -> None:
    found = inspect_checkpoint(directory)
    str(found), found.layer_table()


@target(_sharded, errors=(FileNotFoundError,))
def inspected_shards(directory: Path) -> None:
    found = inspect_checkpoint(directory)
    str(found), found.layer_table()


@target(_base, errors=(FileNotFoundError,))
def loaded_layers(directory: Path) -> None:
    tensors = read_tensors(_existing(directory, "model.safetensors"))
    for file in _existing(directory, "config.json"):
        config = quantization_config(directory, read_json(file)) or {}
        stored_zero_offset(declared_format(config) or "gptq")
    optimum = SimpleNamespace(group_size=_GROUP, desc_act=False, sym=True)
    linear = nn.Linear(_IN, _OUT, device="meta")
    for layer in packed_layers(tensors):
        _make_layer(linear, layer, layer, tensors, optimum, lambda bits, size: _Kernel)


class _Kernel(nn.Module):
    def __init__(self, *shape: Any, **options: Any) -> None:
        super().__init__()
        self.register_buffer("scales", torch.empty(0, dtype=torch.float16))


@target(lambda: _base() | {"record.json": _json(_record())})
def base_record(directory: Path) -> None:
    layers, found = _known_base()
    require_base(_value(directory / "record.json"), layers, found, "user/base")


@cache
def _known_base() -> tuple[Any, dict[str, Any]]:
    with TemporaryDirectory() as directory:
        for name, content in _base().items():
            Path(directory, name).write_bytes(content)
        layers = stored_layers(Checkpoint.open(directory), dict(zip(_LAYERS, _LAYERS)))
    return layers, _record()


def _float_checkpoint() -> Files:
    tensors = {f"{layer}.weight": torch.ones(_OUT, _IN) for layer in _LAYERS}
    return {"config.json": b"{}", "model.safetensors": save(tensors)}


@target(_float_checkpoint, errors=(FileNotFoundError,))
def float_weights(directory: Path) -> None:
    weights = FloatWeights(directory, dict.fromkeys(_LAYERS, (_OUT, _IN)), "model")
    for layer in _LAYERS:
        weights.error(layer, torch.zeros(_OUT, _IN))


# adapters


_PEFT = (ValueError,)  # which says where it finds no adapter, and what values an option takes


def _inspected(directory: Path) -> None:
    assert is_adapter(directory) or not (directory / "adapter_config.json").is_file()
    found = inspect_adapter(directory)
    str(found), found.layer_table()


@target(_peqa, errors=(FileNotFoundError,))
def inspected_peqa(directory: Path) -> None:
    _inspected(directory)


@target(_lrec, errors=(FileNotFoundError,))
def inspected_lrec(directory: Path) -> None:
    _inspected(directory)


@target(_lora, errors=(FileNotFoundError,))
def inspected_lora(directory: Path) -> None:
    _inspected(directory)


@target(_with_base(_peqa), errors=(FileNotFoundError,))
def inspected_peqa_and_base(directory: Path) -> None:
    with _no_models():
        str(inspect_adapter(directory / "adapter", directory / "base"))


@target(_with_base(_lrec), errors=(FileNotFoundError,))
def inspected_lrec_and_base(directory: Path) -> None:
    with _no_models():
        str(inspect_adapter(directory / "adapter", directory / "base"))


@target(lambda: _under("first", _lrec()) | _under("second", _lora()), errors=(FileNotFoundError,))
def compared_adapters(directory: Path) -> None:
    str(compare_adapters(directory / "first", directory / "second"))


@target(_peqa, foreign=_PEFT)
def peqa_config(directory: Path) -> None:
    PEQAConfig.from_pretrained(str(directory))


@target(_lrec, foreign=_PEFT)
def lrec_config(directory: Path) -> None:
    LRECConfig.from_pretrained(str(directory)).refuse_other_lora_options()


@target(_with_base(_peqa), errors=(FileNotFoundError,), foreign=_PEFT)
def planned_merge(directory: Path) -> None:
    with _no_models():
        plan_merge(directory / "base", directory / "adapter", directory / "out")


def _of_small_model(config: Any) -> tuple[Any, Files]:
    """A small model with an adapter, and the adapter's files."""
    model = get_peft_model(PlainMLP(), config)
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return model, _files_in(directory, "adapter_config.json", "adapter_model.safetensors")


@cache
def _small_peqa() -> tuple[Any, Files]:
    return _of_small_model(PEQAConfig(target_modules=["up", "down"]))


@cache
def _small_lrec() -> tuple[Any, Files]:
    return _of_small_model(LRECConfig(r=2, target_modules=["up", "down"]))


@cache
def _small_model() -> PlainMLP:
    return PlainMLP()


@target(lambda: _small_peqa()[1], foreign=_PEFT)
def loaded_peqa(directory: Path) -> None:
    _check_saved(_small_model(), str(directory), "default", None, {})


@target(lambda: _small_lrec()[1], foreign=_PEFT)
def loaded_lrec(directory: Path) -> None:
    _check_saved(_small_model(), str(directory), "default", None, {})


@target(lambda: _small_peqa()[1], foreign=_PEFT)
def hotswapped_peqa(directory: Path) -> None:
    hotswap_adapter(_small_peqa()[0], str(directory), "default", "cpu")


@target(lambda: _small_lrec()[1], foreign=(*_PEFT, RuntimeError))
def hotswapped_lrec(directory: Path) -> None:
    hotswap_adapter(_small_lrec()[0], str(directory), "default", "cpu")


@target(lambda: _under("adapter", _lrec()), foreign=_PEFT)
def exported_lora(directory: Path) -> None:
    export_lora(directory / "adapter", directory / "out")


# int8 models


@cache
def _float_model() -> Any:
    return float_llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8)


@cache
def _int8() -> Files:
    model = convert_to_int8(float_llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8))
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return _files_in(directory, "config.json", "model.safetensors")


@target(lambda: {**_int8(), "qft.json": _json(json.loads(_int8()["config.json"])["quantization_config"])})
def int8_checkpoint(directory: Path) -> None:
    model = _float_model()
    config = QFTConfig.from_dict(_value(directory / "qft.json"))
    int8 = {f"{name}.weight" for name in int8_modules(model, config)}
    quantizer = QFTQuantizer(config, pre_quantized=True)
    conversions = [*quantizer.get_weight_conversions(), *conversions_of(model)]
    check_checkpoint(_existing(directory, "model.safetensors"), model, conversions, int8)


def _parts() -> Files:
    parts = peft_quant.Int8Weight.from_dense(torch.linspace(-1, 1, 96).view(3, 32), 0.1).parts
    return {"parts.safetensors": save(parts)}


@target(_parts)
def int8_weight(directory: Path) -> None:
    tensors = read_tensors(_existing(directory, "parts.safetensors"))
    parts: Any = {name: tensors[name].read() for name in PARTS if name in tensors}
    if parts.keys() >= {"codes", "scales"}:
        peft_quant.Int8Weight.from_parts(**parts).dequantize()


# caches and interrupted runs


_SAMPLES = [{"input_ids": torch.arange(5)}, {"input_ids": torch.arange(3, 7)}]


@cache
def _teacher() -> Files:
    with TemporaryDirectory() as directory:
        cache_teacher(_float_model(), _SAMPLES, Path(directory, "cache"), k=2)
        return _files_in(str(Path(directory, "cache")), "teacher.json", "shard-00000.safetensors")


def _sign(directory: Path) -> None:
    """Set the digests of shards to those of the files, as whoever changes a shard on purpose would."""
    manifest, shard = directory / "teacher.json", directory / "shard-00000.safetensors"
    old, new = (hashlib.sha256(content).hexdigest() for content in (_teacher()[shard.name], _content(shard)))
    if content := _content(manifest):
        manifest.write_bytes(content.replace(old.encode(), new.encode()))


@target(_teacher)
def cached_teacher(directory: Path) -> None:
    _sign(directory)
    teacher = CachedTeacher(directory)
    str(teacher)
    for sample in _SAMPLES:
        teacher({"input_ids": sample["input_ids"][None]})


@target(_teacher)
def resumed_cache(directory: Path) -> None:
    _sign(directory)
    cache_teacher(_float_model(), _SAMPLES, directory, k=2)


_SETTINGS = {"bits": 4, "group_size": 16, "model": "0" * 32, "layers": 2, "torch": "2.13.0"}


def _unfinished() -> Files:
    scale, zero = torch.full((4, 2), 0.5), torch.full((4, 2), 8.0)
    g_idx = torch.arange(8, dtype=torch.int32) // 4
    with TemporaryDirectory() as directory:
        finished = FinishedLayers(Path(directory, "state"), _SETTINGS)
        finished.save("first", Layer(torch.ones(4, 8), scale, zero, g_idx, mock=False), transposed=False)
        finished.save("second", Layer(torch.full((8, 4), 0.3), scale, zero, g_idx, mock=False), transposed=True)
        return _files_in(str(Path(directory, "state")), "settings.json", "first.safetensors", "second.safetensors")


@target(_unfinished)
def finished_layers(directory: Path) -> None:
    count_finished(directory)
    finished = FinishedLayers(directory, _SETTINGS)
    for name in ("first", "second"):
        finished.load(name)


@target(lambda: {f"checkpoint-{step}/trainer_state.json": b'{"global_step": 2}' for step in (2, 10)})
def resumed_training(directory: Path) -> None:
    last_complete_checkpoint(directory)


# model cards


def _card(files: Files, **facts: Any) -> Files:
    with TemporaryDirectory() as directory:
        for name, content in files.items():
            Path(directory, name).write_bytes(content)
        write_model_card(directory, **facts)
        return _files_in(directory, *files, "README.md", "peft_quant_facts.json")


def _adapter_card() -> Files:
    facts = {"settings": {"lr": 1}, "perplexity": {"text": 2.0}, "compared_with": {"x": {"text": 3.0}}}
    return _card(_peqa(), license="mit", datasets="a/b", **facts)


@target(_adapter_card, errors=(FileNotFoundError,))
def adapter_card(directory: Path) -> None:
    write_model_card(directory, perplexity={"other": 1.0})


@target(lambda: _card(_base(), language=["en", "de"], command="train"), errors=(FileNotFoundError,))
def checkpoint_card(directory: Path) -> None:
    write_model_card(directory, repository="user/merged")


@target(_adapter_card)
def base_card(directory: Path) -> None:
    Card.read(directory)
    json.dumps(inherited_metadata(directory), default=str)  # as the card of a merged model writes it


# the command line and other strings


_TRAIN_YAML = b"""\
model: user/model
learning-rate: 3e-4
max_steps: 40
target_modules: [q_proj, v_proj]
layers_to_transform: 1
lr_scheduler_kwargs: {a: 1}
gradient_checkpointing: true
"""
_WRONG_USAGE = (typer.BadParameter.__base__,)  # click's, with whose exit status and message the command line ends
_CARD_YAML = b"setting: {lr: 1}\ncompared-with:\n  base: {text: 2.5}\nlanguage: [en, de]\nlicense: mit\n"


@cache
def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return group.commands


@dataclass
class _Arguments:
    """A few of the training arguments, whose parser is made for every call."""

    learning_rate: float = 1e-4
    max_steps: int = -1
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: bool = False


@target(
    lambda: {"train.yaml": _TRAIN_YAML, "card.yaml": _CARD_YAML}, errors=(typer.BadParameter,), foreign=_WRONG_USAGE
)
def config_files(directory: Path) -> None:
    contexts = {command: typer.Context(_commands()[command], allow_extra_args=True) for command in ("card", "train")}
    for command, context in contexts.items():
        file = directory / f"{command}.yaml"
        if file.is_file() and not file.is_symlink():  # the caller's own: links may lead anywhere
            _read_config(context, file)
    parse_fields(contexts["train"], LRECConfig, _Arguments)


_WORDS = {
    "estimate": ["model", "--method", "peqa", "--bits", "4", "--gpu-memory", "24GB", "--rank", "16"],
    "card": ["directory", "--setting", "lr=1", "--perplexity", "text=2.5", "--compared-with", "base:text=3"],
    "merge": ["base", "adapter", "out"],
    "eval": ["model", "--data", "text.txt", "--dtype", "fp16", "--windows", "3"],
    "quantize": ["model", "out", "--calibration", "text.txt", "--bits", "4", "--exclude", "lm_head"],
    "train": ["peqa", "--model", "m", "--data", "d", "--output", "o", "--modules_to_save", "[lm_head]"],
    "inspect": ["model", "--json"],
}


@target(lambda: {"words.json": _json(_WORDS)}, errors=(typer.BadParameter,), foreign=(*_WRONG_USAGE, typer.Exit))
def options(directory: Path) -> None:
    for command, words in _value(directory / "words.json").items():
        if command in _commands():
            context = _commands()[command].make_context(command, [str(word) for word in _list(words)])
            if command == "train":
                parse_fields(context, PEQAConfig, _Arguments)


_NAMES = ["model.layers.10.mlp.up", "base_model.model.a.lora_A.weight", "1a2"]


@target(lambda: {"names.json": _json({"names": _NAMES})})
def module_names(directory: Path) -> None:
    names = [str(name) for name in _list(_value(directory / "names.json").get("names"))]
    sorted(names, key=natural_order)
    for name in names:
        split_adapter_key(name)
        str(split_block(name)[0])


# configs of models


def _model_config() -> Files:
    quantization = json.loads(_base()["config.json"])["quantization_config"]
    return {"config.json": _json({**tiny_config().to_diff_dict(), "quantization_config": quantization})}


@target(_model_config, errors=(FileNotFoundError,))
def estimated_config(directory: Path) -> None:
    Estimate(directory, "peqa")


@target(_with_base(_peqa), errors=(FileNotFoundError,))
def evaluated_model(directory: Path) -> None:
    quantization_of(directory / "base")
    adapter_base(directory / "adapter")
