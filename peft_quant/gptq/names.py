"""Names of layers in a checkpoint's files and in the model that transformers loads from them.

They differ where transformers renames tensors on loading, where a model has a head that the checkpoint lacks or the
reverse, and in mixtures of experts: transformers holds all experts of a layer in one tensor, while GPTQ packs each
expert separately. Names in a model are those of the model with its experts as separate modules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..reading import InvalidFileError
from .checkpoint import Checkpoint


# the projections of an expert, by the tensor that holds them for all experts
_PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


def renamings(model: PreTrainedModel) -> list[WeightRenaming]:
    """How transformers renames the tensors of a checkpoint for a model, expert by expert where it has experts."""
    each = with_experts_apart(get_model_conversion_mapping(model))
    return [conversion for conversion in each if isinstance(conversion, WeightRenaming)]


def conversions_of(model: PreTrainedModel, **options: Any) -> list[Any]:
    """How transformers converts the tensors of a checkpoint for a model, whose experts may be separate modules.

    Args:
        model: the model.
        options: options of `get_model_conversion_mapping`.
    """
    conversions = get_model_conversion_mapping(model, **options)
    return with_experts_apart(conversions) if has_experts_apart(model) else conversions


def has_experts_apart(model: nn.Module) -> bool:
    """Whether a model has experts that are separate modules."""
    return any(re.search(r"\.experts\.\d+$", name) for name, _ in model.named_modules())


def with_experts_apart(conversions: Iterable[Any]) -> list[Any]:
    """Conversions for a model whose experts are separate modules, given those for the model as transformers has it."""
    return [
        each
        for conversion in conversions
        for each in (isinstance(conversion, WeightConverter) and of_experts(conversion)) or [conversion]
    ]


def of_experts(conversion: WeightConverter) -> list[WeightRenaming]:
    """The renamings, expert by expert, that replace a conversion which stacks the projections of all experts.

    Empty for any other conversion.
    """
    target = conversion.target_patterns[0]
    stacked, _, tensor = target.rpartition(".")
    sources = [source for source in conversion.source_patterns if source.endswith(".weight")]
    names = _PROJECTIONS.get(tensor, ())
    if (
        len(conversion.target_patterns) != 1
        or len(names) != len(sources)
        or not all(".*." in name for name in sources)
    ):
        return []
    found = []
    for source, name in zip(sources, names):
        projection = source.removesuffix("weight").replace(".*.", r".(\d+).", 1)
        renaming = WeightRenaming(projection, rf"{stacked}.\1.{name}.".replace("\\.", "."))
        renaming.scope_prefix, renaming.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        found.append(renaming)
    return found


def loaded_names(layers: Iterable[str], model: PreTrainedModel, known: Container[str] | None = None) -> dict[str, str]:
    """The names of a checkpoint's layers in a model, by their names in its files.

    Args:
        layers: names in the files.
        model: the model, which may be on the meta device and without packed layers.
        known: layers that the model has; by default the names of its modules.

    Returns:
        A name for each layer, known or not.
    """
    weights: Any = _Weights({name for name, _ in model.named_modules()} if known is None else known)
    rules, prefix = renamings(model), model.base_model_prefix
    renamed = {layer: rename_source_key(f"{layer}.weight", rules, [], prefix, weights)[0] for layer in layers}
    return {layer: name.removesuffix(".weight") for layer, name in renamed.items()}


def missing_layers(model: PreTrainedModel, layers: Iterable[str], present: Container[str]) -> list[str]:
    """The packed layers of a checkpoint that a model needs and lacks.

    Layers that the model's class has no place for, such as an output head, are not needed, nor are those that
    transformers ignores on purpose.

    Args:
        model: the model, with or without adapters.
        layers: names of the checkpoint's packed layers in the model.
        present: names of the model's layers.
    """
    places = {name.replace(".base_layer", "") for name, _ in model.named_modules()} - {""}
    unused = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return [
        name
        for name in layers
        if name not in present
        and not places.isdisjoint(_within(name))
        and not any(pattern.search(f"{name}.weight") for pattern in unused)
    ]


def _within(name: str) -> Iterator[str]:
    """The name, and the names of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


class _Weights:
    """A state dict of layers' weights, as far as `rename_source_key` needs one."""

    def __init__(self, layers: Container[str]) -> None:
        self.layers = layers

    def get(self, name: str) -> bool | None:
        return name.removesuffix(".weight") in self.layers or None


class StoredNames:
    """Maps names in a model to names in the files of its checkpoint, without loading the model.

    Names are looked up as they are, or else as transformers maps them for the class that `architectures` in
    config.json names, and for the class of an adapter's task.

    Args:
        checkpoint: the checkpoint.
        task_type: the adapter's task, as PEFT names it.
    """

    def __init__(self, checkpoint: Checkpoint, task_type: str | None) -> None:
        self.checkpoint = checkpoint
        self._task_type = task_type

    def layers(self, layers: Collection[str]) -> dict[str, str]:
        """Names of packed layers in the files, by their names in the model. Missing ones are left out."""
        return self._find(layers, set(self.checkpoint.packed_layers))

    def tensors(self, names: Collection[str]) -> dict[str, str]:
        """Names of tensors in the files, by their names in the model. Missing ones are left out."""
        stored = {name.rpartition(".")[0] for name in self.checkpoint.tensors}
        modules = self._find({name.rpartition(".")[0] for name in names}, stored)
        found = {}
        for name in names:
            module, _, attribute = name.rpartition(".")
            if module in modules and f"{modules[module]}.{attribute}" in self.checkpoint.tensors:
                found[name] = f"{modules[module]}.{attribute}"
        return found

    def ties(self) -> dict[str, str]:
        """Tied tensors of the model, as pairs of names."""
        return next((dict(model.all_tied_weights_keys) for model in self._models()), {})

    def _find(self, wanted: Collection[str], stored: set[str]) -> dict[str, str]:
        if stored.issuperset(wanted):
            return {name: name for name in wanted}
        found: dict[str, str] = {}
        for model in self._models():
            names = {name: layer for layer, name in loaded_names(stored, model, set(wanted)).items()}
            found = max(found, {name: names[name] for name in wanted if name in names}, key=len)
            if len(found) == len(wanted):
                break
        return found

    def _models(self) -> Iterator[PreTrainedModel]:
        """Models without values, of the classes that the checkpoint may be loaded as.

        Raises:
            InvalidFileError: transformers cannot make a model of the checkpoint's `config.json`.
        """
        file = self.checkpoint.directory / "config.json"
        try:
            config = AutoConfig.from_pretrained(self.checkpoint.directory, trust_remote_code=False)
            for holder in (config, config.get_text_config()):
                if hasattr(holder, "quantization_config"):
                    del holder.quantization_config
            layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
            if layers > len(self.checkpoint.tensors):
                raise ValueError(f"it has {layers} layers, and the files have {len(self.checkpoint.tensors)} tensors")
            classes = [getattr(transformers, name, None) for name in config.architectures or ()]
            auto_class = getattr(transformers, _AUTO_CLASSES.get(self._task_type or "", "AutoModel"))
            if type(config) in auto_class._model_mapping:
                classes.append(auto_class._model_mapping[type(config)])
            for model_class in dict.fromkeys(classes):
                if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
                    with torch.device("meta"):
                        yield model_class(copy.deepcopy(config))
        except Exception as error:  # transformers raises any, depending on what is wrong
            raise InvalidFileError(
                f"{file} does not describe a model that transformers can make ({error}): it is damaged, or for "
                "another version of transformers."
            ) from error


_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
