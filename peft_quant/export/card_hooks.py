"""Hooks that write model cards when PEFT and transformers save and push.

PEFT writes a model's card before it saves the adapter. transformers overwrites that card in `push_to_hub`, and so does
its Trainer before it asks PEFT for an update.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from transformers import PreTrainedModel

from ..qft.quantizer import QFTQuantizer
from ..registry import wrap_method
from ..tuners.model import PackedTuner
from .card import FACTS, QFT, Card, best_effort, update_card
from .saving import replaced_adapter, save_whole


Stock = Callable[..., Any]

_written: WeakKeyDictionary[PeftModel, dict[Path, Card]] = WeakKeyDictionary()  # by directory, the most recent last
_due: WeakKeyDictionary[PeftModel, list[Path]] = WeakKeyDictionary()  # cards to write after the weights


def _save_pretrained(stock: Stock, model: PeftModel, /, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(model.base_model, PackedTuner):
        return stock(model, *args, **kwargs)
    _due[model] = []
    try:
        result = save_whole(stock, replaced_adapter, model, *args, **kwargs)
    finally:
        due = _due.pop(model)
    if due:
        directory = Path(signature(stock).bind(model, *args, **kwargs).arguments["save_directory"]).resolve()
        with best_effort(directory):
            elsewhere = [other for other in _written.get(model, {}) if other != directory and other.is_dir()]
            _write_card(model, directory, [Card.read(source) for source in (directory, *elsewhere[-1:])])
    return result


def _create_or_update_model_card(stock: Stock, model: PeftModel, /, output_dir: str) -> None:
    directory = Path(output_dir).resolve()
    if not isinstance(model.base_model, PackedTuner):
        stock(model, output_dir)
    elif model in _due:
        _due[model].append(directory)
    else:
        with best_effort(directory):
            before = _written.get(model, {}).get(directory, Card())
            _write_card(model, directory, [before, Card.read(directory)])


def _upload_adapter(
    stock: Stock, model: PeftModel, /, working_dir: str, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(model.base_model, PackedTuner):
        directory = Path(working_dir).resolve()  # a temporary directory
        saved = _written.get(model, {}).pop(directory, Card())
        with best_effort(repo_id):
            _fetch_facts(directory, repo_id, kwargs)
            _write_card(model, directory, [Card.read(directory), saved], repo_id)
            del _written[model][directory]
    return stock(model, working_dir, repo_id, *args, **kwargs)


def _upload_model(stock: Stock, model: Any, /, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    if isinstance(getattr(model, "hf_quantizer", None), QFTQuantizer):
        with best_effort(repo_id):
            _fetch_facts(Path(working_dir), repo_id, kwargs)
            update_card(working_dir, [Card.read(working_dir)], [model.config._name_or_path], repo_id, {"method": QFT})
    return stock(model, working_dir, repo_id, *args, **kwargs)


def _fetch_facts(directory: Path, repository: str, options: Mapping[str, Any]) -> None:
    """Replace the facts in a directory by those of the repository, as transformers does with its README."""
    facts = directory / FACTS
    facts.unlink(missing_ok=True)
    with suppress(EntryNotFoundError):
        shutil.copyfile(hf_hub_download(repository, FACTS, token=options.get("token")), facts)


def _write_card(model: PeftModel, directory: Path, earlier: Sequence[Card], repository: str | None = None) -> None:
    tuner = model.base_model
    base = getattr(getattr(tuner.model, "config", None), "_name_or_path", None)
    tags = getattr(tuner.model, "model_tags", None)
    config = next(iter(tuner.peft_config.values()))
    facts = {"base_quantization": config.base_quantization}  # a LoRA adapter's configuration lacks it
    update_card(directory, earlier, [base], repository, facts, metadata={"tags": tags or None}, exported=True)
    written = _written.setdefault(model, {})
    written.pop(directory, None)
    written[directory] = Card.read(directory)


wrap_method(PeftModel, "save_pretrained", _save_pretrained)
wrap_method(PeftModel, "create_or_update_model_card", _create_or_update_model_card)
wrap_method(PeftModel, "_upload_modified_files", _upload_adapter)
wrap_method(PreTrainedModel, "_upload_modified_files", _upload_model)
