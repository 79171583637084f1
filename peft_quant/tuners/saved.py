"""Checks of a saved adapter before it is loaded: its files are sound, it fits the base, and holds what it trained."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..adapter_files import check_adapter_config, check_adapter_dtypes, is_ours
from ..gptq.checkpoint import read_tensors
from ..gptq.source import Source
from ..module_names import LOW_RANK, PEFT_PREFIX, SCALE_DELTAS, split_adapter_key
from ..reading import InvalidFileError, read_json, regular_file, require_plain
from ..registry import check_adapters, read_adapter_configs
from .layer import check_finite
from .model import PackedTuner


_PARAMETERS = {"PEQA": (SCALE_DELTAS,), "LREC": LOW_RANK}
_NO_ADAPTER = "has an adapter_config.json of another kind, or for a newer version of PEFT: save or download it again"
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
_TOKENS = ".trainable_tokens_delta"


def load_config(adapter: str | os.PathLike[str], **hub_options: Any) -> PeftConfig:
    """Load the configuration of a saved adapter of any method.

    Args:
        adapter: directory or Hub id.
        **hub_options: as for [`load_weights`].

    Raises:
        InvalidFileError: `adapter_config.json` is damaged or must not be read, or names no method.
        ValueError: there is none.
    """
    file = Path(adapter, hub_options.get("subfolder") or "", CONFIG_NAME)
    if os.path.lexists(file):  # PEFT takes a link to no regular file for a name on the Hub
        regular_file(file)
    try:
        config = PeftConfig.from_pretrained(os.fspath(adapter), **hub_options)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidFileError(f"{adapter} {_NO_ADAPTER} ({error!r}).") from error
    if config.peft_type is None:
        raise InvalidFileError(f"{adapter} {_NO_ADAPTER}.")
    return config


def load_weights(
    adapter: str | os.PathLike[str], device: str = "cpu", *, pickled: bool = False, **hub_options: Any
) -> dict[str, torch.Tensor]:
    """Load the tensors of a saved adapter, whose file is checked before.

    Args:
        adapter: directory or Hub id.
        device: where to load them.
        pickled: whether to read `adapter_model.bin` if that is all there is, as PEFT does, which unpickles tensors.
        **hub_options: options of `hf_hub_download`, such as `revision`, `subfolder` and `token`.

    Raises:
        InvalidFileError: the file is damaged, missing, or pickled where that is not read.
    """
    file = _weights_file(os.fspath(adapter), _WEIGHTS if pickled else _WEIGHTS[:1], **hub_options)
    if file is None:
        raise InvalidFileError(
            f"{adapter} has no {SAFETENSORS_WEIGHTS_NAME}; pickled weights (*.bin) are not read. Load the adapter and "
            "save it again."
        )
    if file.name == SAFETENSORS_WEIGHTS_NAME:
        check_adapter_dtypes(file, {name: tensor.torch_dtype for name, tensor in read_tensors([file]).items()})
        return load_file(file, device=device)
    try:
        weights = load_peft_weights(os.fspath(adapter), device=device, **hub_options)
        dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    except Exception as error:  # unpickling raises any
        raise InvalidFileError(f"{file} is damaged ({error}): save or download the adapter again.") from error
    check_adapter_dtypes(file, dtypes)
    return weights


def _weights_file(adapter: str, names: Iterable[str], **hub_options: Any) -> Path | None:
    """The first file of these names, downloaded if necessary; None if there is none."""
    folder = Path(adapter, hub_options.get("subfolder") or "")
    for name in names:
        if not os.path.isdir(adapter):
            with suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(adapter, name, **hub_options))
        elif os.path.lexists(folder / name):
            return regular_file(folder / name)
    return None


def require_trained(
    adapter: str, config: Any, weights: Mapping[str, torch.Tensor], base: Callable[[str], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """Check that the tensors of a saved adapter are finite and are those that its configuration trains.

    PEFT also saves embeddings that an adapter does not train, on request and if the vocabulary was resized. They must
    equal the base's.

    Args:
        adapter: name of the adapter in error messages.
        config: its configuration.
        weights: its tensors, by name.
        base: returns the base's tensor of a given name, with the base's number of rows, or None.

    Returns:
        The tensors that differ from the base's, by name without PEFT's prefix.

    Raises:
        ValueError: a tensor is not finite or not trained; the message names it.
    """
    differing: dict[str, torch.Tensor] = {}
    named = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()}
    modules = sorted(config.modules_to_save or [])
    trained = {name for name in named if _is_trained(name, config, modules)}
    tied = {_content(named[name]) for name in trained} if getattr(config, "ensure_weight_tying", False) else set()
    for name, tensor in named.items():
        check_finite(f"{adapter}: {name}", tensor)
        is_trained = name in trained or (bool(tied) and _content(tensor) in tied)
        in_base = None if is_trained else base(name)
        if not is_trained and not _equals_base(tensor, in_base):
            raise ValueError(
                f"{adapter} holds {name}, which its configuration does not train and which is not the base's: it "
                f"would overwrite that. Trained are its layers and modules_to_save={modules}. If it was "
                "trained, name its module there, in adapter_config.json; else save or download the adapter again."
            )
        if in_base is None or in_base.shape != tensor.shape:
            differing[name] = tensor
    return differing


def _is_trained(name: str, config: Any, modules: Iterable[str]) -> bool:
    parameters = _PARAMETERS.get(config.peft_type.value, ())
    if split_adapter_key(name)[1] in parameters or any(f".{module}." in f".{name}" for module in modules):
        return True
    if getattr(config, "trainable_token_indices", None) is not None and name.endswith(_TOKENS):
        return True
    return getattr(config, "bias", "none") != "none" and name.endswith(".bias")


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _equals_base(tensor: torch.Tensor, base: torch.Tensor | None) -> bool:
    """Whether a matrix equals the base's in their common rows, in either dtype."""
    if base is None or base.shape[1:] != tensor.shape[1:] or tensor.ndim != 2:
        return False
    rows = min(len(base), len(tensor))
    saved, stored = tensor[:rows].cpu(), base[:rows].detach().cpu()
    return torch.equal(saved.to(stored.dtype), stored) or torch.equal(saved, stored.to(saved.dtype))


def _read_config(stock: Callable[[str], Any], config_class: type[PeftConfig], file: str) -> Any:
    """Read an `adapter_config.json` as PEFT does, and check it if it is of an adapter of this package."""
    regular_file(file)
    try:
        content = stock(file)
        ours = is_ours(content) or issubclass(config_class, tuple(map(PEFT_TYPE_TO_CONFIG_MAPPING.get, _PARAMETERS)))
        if not ours:
            return content
    except (ValueError, TypeError, AttributeError, RecursionError):
        read_json(file)  # names what is wrong with the file
        raise
    require_plain(content, file)
    check_adapter_config(file, content, ours=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT makes it again, and warns then
            PeftConfig.from_peft_type(**content)
    except Exception as error:  # PEFT's own checks raise any, depending on the option
        raise InvalidFileError(
            f"{file} is not a configuration of an adapter ({error}): it is damaged or was changed. Save or download "
            "the adapter again."
        ) from error
    return content


def _check_saved(
    model: PreTrainedModel | PeftModel, path: str, adapter_name: str, given: Any, hub_options: dict[str, Any]
) -> None:
    """Check an adapter's files before it is loaded; see [`check_adapters`]."""
    try:
        config: Any = PeftConfig.from_pretrained(path, **hub_options)
    except InvalidFileError:
        raise
    except (ValueError, TypeError, KeyError):  # none that PEFT can read, or needs if it is given a configuration
        config = given
    if not issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(config, "peft_type", None), object), PackedTuner):
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = load_weights(path, pickled=True, **hub_options)
    require_trained(path, config, weights, partial(_stored_rows, base))
    recorded = config.base_quantization
    if recorded is None:
        warnings.warn(
            f"{path} does not record the base it was trained on: that it is this model was not checked.", stacklevel=3
        )
    elif given is not None and isinstance(model, PeftModel):
        model.base_model.require_base(adapter_name, recorded, config.base_model_name_or_path)
    elif given is not None:
        given.base_quantization = recorded


def _stored_rows(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """A tensor of a model without adapters, cut to the number of rows in the model's files, if these are known."""
    module, _, attribute = name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(module), attribute, None)
    except AttributeError:
        return None
    if not isinstance(tensor, torch.Tensor):
        return None
    source = Source.of(model, ())
    stored = None if source is None else source.checkpoint.tensors.get(name)
    return tensor if stored is None else tensor[: stored.shape[0]]


read_adapter_configs(_read_config)
check_adapters(_check_saved)
