"""Entry of this package's methods and of their model cards into PEFT. The only file that writes into another package.

PEFT has no plugin mechanism, so a method joins by becoming a real member of the `PeftType` enumeration (a bare string
fails in PEFT's card tagging and in transformers' adapter code) and by `register_peft_method`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from .compat import let_enum_find


def add_peft_type(name: str) -> PeftType:
    """Add a member to `PeftType`, or return the one of that name."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    let_enum_find(PeftType, member)
    return member


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Register a method with PEFT. Registering the same method again changes nothing.

    Raises:
        RuntimeError: the installed PEFT has a method of that name itself.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
    if registered is config_class:
        return
    if registered is not None:
        raise RuntimeError(
            f"PEFT has a method named {name.upper()} already ({registered.__module__}). Use PEFT's own, or install a "
            "release of peft_quant made for this version of PEFT."
        )
    register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)


def allow_hotswap(peft_type: PeftType, options: list[str]) -> None:
    """Let PEFT hot-swap adapters of a method with LoRA's tensors and options.

    Args:
        peft_type: the method's type.
        options: options of its own in which two adapters must agree, beside those of LoRA.
    """
    CONFIG_KEYS_TO_CHECK[peft_type] = [*CONFIG_KEYS_TO_CHECK[PeftType.LORA], *options]


def register_quantization(method: str, config_class: type[Any], quantizer_class: type[HfQuantizer]) -> None:
    """Register a quantization with transformers. Registering the same one again changes nothing.

    Args:
        method: its `quant_method`.
        config_class: of its quantization configs.
        quantizer_class: what loads and saves its checkpoints.

    Raises:
        RuntimeError: the installed transformers has a quantization of that name itself.
    """
    registered = AUTO_QUANTIZER_MAPPING.get(method)
    if registered is quantizer_class:
        return
    if registered is not None:
        raise RuntimeError(
            f"transformers has a quantization named {method} already ({registered.__module__}). Install a release of "
            "peft_quant made for this version of transformers."
        )
    register_quantization_config(method)(config_class)
    register_quantizer(method)(quantizer_class)


def replace_quantizer(method: str, quantizer_class: type[HfQuantizer]) -> None:
    """Let transformers load the checkpoints of a quantization by a class derived from its own. Idempotent.

    Where another package has put its own quantizer in that place, it stays.

    Args:
        method: the `quant_method` of the checkpoints.
        quantizer_class: derived from transformers' own quantizer.
    """
    if issubclass(quantizer_class, AUTO_QUANTIZER_MAPPING[method]):
        AUTO_QUANTIZER_MAPPING[method] = quantizer_class


AdapterCheck = Callable[[PreTrainedModel | PeftModel, str, str, PeftConfig | None, dict[str, Any]], None]

_CHECKS = "_peft_quant_checks_adapters"


def check_adapters(check: AdapterCheck) -> None:
    """Have each saved adapter checked before its weights are loaded, by PEFT or by transformers. Idempotent.

    Args:
        check: `check(model, path, adapter_name, config, hub_options)`, given the directory or Hub id of the adapter,
            the configuration that it is to be loaded under instead of its own, if there is one, and options for the
            Hub.
    """
    model_class: Any = PreTrainedModel
    if _CHECKS in vars(PeftModel):
        return
    setattr(PeftModel, _CHECKS, True)
    stock_of_peft, stock_of_transformers = PeftModel.load_adapter, model_class.load_adapter

    @wraps(stock_of_peft)
    def load_into_peft_model(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        hub_options = self._split_kwargs(kwargs)[0]
        check(self, os.fspath(model_id), adapter_name, self.peft_config.get(adapter_name), hub_options)
        return stock_of_peft(self, model_id, adapter_name, *args, **kwargs)

    @wraps(stock_of_transformers)
    def load_into_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature(stock_of_transformers).bind(self, *args, **kwargs).arguments
        path = given.get("peft_model_id") or getattr(given.get("load_config"), "pretrained_model_name_or_path", None)
        if path is not None and given.get("adapter_state_dict") is None:
            name = given.get("adapter_name") or "default"
            check(self, os.fspath(path), name, given.get("peft_config"), dict(given.get("adapter_kwargs") or {}))
        return stock_of_transformers(self, *args, **kwargs)

    PeftModel.load_adapter = load_into_peft_model
    model_class.load_adapter = load_into_model


def ask_for_weight(knows: Callable[[nn.Module], bool]) -> None:
    """Let adapters of any method have the `weight` that their base layer says, where PEFT takes its packed integers.

    Models such as T5 cast activations to the dtype of `weight`. Asking again changes nothing.

    Args:
        knows: whether a base layer, a GPTQ one, says what its `weight` is.
    """
    stock = BaseTunerLayer.weight.fget
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def weight(self: BaseTunerLayer) -> Any:
        layer = self.get_base_layer()
        return layer.weight if knows(layer) else stock(self)

    BaseTunerLayer.weight = property(weight)


CardWriter = Callable[[BaseTuner, Path, list[str], str | None], None]

_README = "README.md"
_PATCHED = "_peft_quant_writes_cards"

_card_writers: dict[type[BaseTuner], CardWriter] = {}
_cards: WeakKeyDictionary[PeftModel, dict[Path, str]] = WeakKeyDictionary()  # by directory, the last one last
_saving: WeakKeyDictionary[PeftModel, list[Path]] = WeakKeyDictionary()  # cards that are due once the adapter is saved


def write_cards(tuner_class: type[BaseTuner], write: CardWriter) -> None:
    """Let the models of a tuner write their own model cards, in `save_pretrained` and both ways to push to the Hub.

    PEFT writes a model's card before the adapter is saved; transformers writes another one over it in `push_to_hub`,
    and so does its Trainer, before it asks PEFT for an update. Models of other tuners do all of this as before.

    Args:
        tuner_class: the tuner; its subclasses are meant too.
        write: `write(tuner, directory, earlier, repository)` writes a directory's card, given earlier cards of the
            model, by importance, and the Hub id it goes to, if that is known. A `ValueError` becomes a warning.
    """
    _card_writers[tuner_class] = write
    if _PATCHED in vars(PeftModel):
        return
    setattr(PeftModel, _PATCHED, True)
    stock_save, stock_card = PeftModel.save_pretrained, PeftModel.create_or_update_model_card
    stock_upload = PeftModel._upload_modified_files

    @wraps(stock_save)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if _card_writer(self) is None:
            return stock_save(self, *args, **kwargs)
        _saving[self] = []
        try:
            result = stock_save(self, *args, **kwargs)
        finally:
            due = _saving.pop(self)
        for directory in due:
            _write_card(self, directory, [*_read(directory), *_cards_elsewhere(self, directory)])
        return result

    @wraps(stock_card)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if _card_writer(self) is None:
            stock_card(self, output_dir)
            return
        directory = Path(output_dir)
        if self in _saving:
            _saving[self].append(directory)
            return
        before = _cards.get(self, {}).get(directory.resolve())
        _write_card(self, directory, [*([before] if before else []), *_read(directory)])

    @wraps(stock_upload)
    def _upload_modified_files(
        self: PeftModel, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if _card_writer(self) is not None:
            directory = Path(working_dir)  # a temporary one, where the repository's card lies over the one just saved
            saved = _cards.get(self, {}).pop(directory.resolve(), None)
            _write_card(self, directory, [*_read(directory), *([saved] if saved else [])], repo_id)
            _cards.get(self, {}).pop(directory.resolve(), None)
        return stock_upload(self, working_dir, repo_id, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained
    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files


def write_cards_of_quantized(
    quantizer_class: type[HfQuantizer], write: Callable[[PreTrainedModel, Path, list[str], str], None]
) -> None:
    """Let models of a quantizer push model cards of their own to the Hub. Registering again changes nothing.

    transformers writes a card of its own in `push_to_hub`. Models of other quantizers do that as before.

    Args:
        quantizer_class: the quantizer.
        write: `write(model, directory, earlier, repository)` writes a directory's card, given earlier cards of the
            model and the Hub id it goes to. A `ValueError` becomes a warning.
    """
    model_class: Any = PreTrainedModel
    if _PATCHED in vars(model_class):
        return
    setattr(model_class, _PATCHED, True)
    stock_upload = model_class._upload_modified_files

    @wraps(stock_upload)
    def _upload_modified_files(
        self: PreTrainedModel, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(getattr(self, "hf_quantizer", None), quantizer_class):
            directory = Path(working_dir)
            try:
                write(self, directory, _read(directory), repo_id)
            except ValueError as error:
                warnings.warn(f"The model card of {repo_id} was left as it is. {error}", stacklevel=3)
        return stock_upload(self, working_dir, repo_id, *args, **kwargs)

    model_class._upload_modified_files = _upload_modified_files


def _card_writer(model: PeftModel) -> CardWriter | None:
    tuner = type(model.base_model)
    return next((write for tuner_class, write in _card_writers.items() if issubclass(tuner, tuner_class)), None)


def _write_card(model: PeftModel, directory: Path, earlier: list[str], repository: str | None = None) -> None:
    writer = _card_writer(model)
    if writer is None:
        return
    try:
        writer(model.base_model, directory, earlier, repository)
    except ValueError as error:
        warnings.warn(f"The model card in {directory} was left as it is. {error}", stacklevel=3)
        return
    cards = _cards.setdefault(model, {})
    cards.pop(directory.resolve(), None)
    cards[directory.resolve()] = (directory / _README).read_text(encoding="utf-8")


def _read(directory: Path) -> list[str]:
    card = directory / _README
    return [card.read_text(encoding="utf-8")] if card.is_file() else []


def _cards_elsewhere(model: PeftModel, directory: Path) -> list[str]:
    """The model's card in the directory it was last saved to, another one, as that now is."""
    others = [other for other in _cards.get(model, {}) if other != directory.resolve() and (other / _README).is_file()]
    return _read(others[-1]) if others else []
