"""Fine-tuning of large language models whose weights stay quantized, as a plugin of PEFT.

Importing this package registers its methods with PEFT; use them through `get_peft_model` and `PeftModel`.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compat import __version__ as __version__
from .compat import require_supported_peft, warn_of_untested_versions
from .deprecated import find_old_modules, new_name


if TYPE_CHECKING:
    from .estimate import estimate_memory as estimate_memory
    from .export.card import write_model_card as write_model_card
    from .export.int8 import export_qft as export_qft
    from .export.lora import export_lora as export_lora
    from .export.merge import merge_checkpoint as merge_checkpoint
    from .first_step import TrainingError as TrainingError
    from .gptq import InvalidCheckpointError as InvalidCheckpointError
    from .gptq import RepackedLayerError as RepackedLayerError
    from .gptq import prepare_gptq_for_training as prepare_gptq_for_training
    from .gptq import restore_gptq_forward as restore_gptq_forward
    from .inspection import compare_adapters as compare_adapters
    from .inspection import inspect_adapter as inspect_adapter
    from .inspection import inspect_checkpoint as inspect_checkpoint
    from .plots.layer_changes import plot_layer_changes as plot_layer_changes
    from .plots.layer_errors import plot_layer_errors as plot_layer_errors
    from .qft import Int8Weight as Int8Weight
    from .qft import QFTConfig as QFTConfig
    from .qft import QuantizedLion as QuantizedLion
    from .qft import convert_to_int8 as convert_to_int8
    from .reading import InvalidFileError as InvalidFileError
    from .trainers.distillation.cache import cache_teacher as cache_teacher
    from .trainers.distillation.trainer import DistillationTrainer as DistillationTrainer
    from .trainers.distillation.trainer import DistillationTrainingArguments as DistillationTrainingArguments
    from .trainers.qft import QFTTrainer as QFTTrainer
    from .trainers.qft import QFTTrainerMixin as QFTTrainerMixin
    from .trainers.qft import QFTTrainingArguments as QFTTrainingArguments
    from .trainers.report.callback import ReportCallback as ReportCallback
    from .tuners.hotswap import hotswap_adapter as hotswap_adapter
    from .tuners.lrec import LRECConfig as LRECConfig
    from .tuners.lrec import LRECModel as LRECModel
    from .tuners.lrec.initialization import initialize_lrec_weights as initialize_lrec_weights
    from .tuners.peqa import PEQAConfig as PEQAConfig
    from .tuners.peqa import PEQAModel as PEQAModel

# public names by module, which is imported when one is asked for: the command line must answer `--help` at once
_PUBLIC = {
    "estimate": ["estimate_memory"],
    "export.card": ["write_model_card"],
    "export.int8": ["export_qft"],
    "export.lora": ["export_lora"],
    "export.merge": ["merge_checkpoint"],
    "first_step": ["TrainingError"],
    "gptq": ["InvalidCheckpointError", "RepackedLayerError", "prepare_gptq_for_training", "restore_gptq_forward"],
    "inspection": ["compare_adapters", "inspect_adapter", "inspect_checkpoint"],
    "plots.layer_changes": ["plot_layer_changes"],
    "plots.layer_errors": ["plot_layer_errors"],
    "qft": ["Int8Weight", "QFTConfig", "QuantizedLion", "convert_to_int8"],
    "trainers.distillation.cache": ["cache_teacher"],
    "trainers.distillation.trainer": ["DistillationTrainer", "DistillationTrainingArguments"],
    "trainers.qft": ["QFTTrainingArguments", "QFTTrainerMixin", "QFTTrainer"],
    "trainers.report.callback": ["ReportCallback"],
    "reading": ["InvalidFileError"],
    "tuners.hotswap": ["hotswap_adapter"],
    "tuners.lrec": ["LRECConfig", "LRECModel"],
    "tuners.lrec.initialization": ["initialize_lrec_weights"],
    "tuners.peqa": ["PEQAConfig", "PEQAModel"],
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    name = new_name(name)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_methods() -> None:
    """Register PEQA and LREC with PEFT, and int8 checkpoints with transformers.

    Importing the package has done it, but in the package's own command line, whose commands call this.

    Raises:
        ImportError: another version of PEFT than this package was tested with.
    """
    require_supported_peft()
    warn_of_untested_versions()
    from . import gptq, qft  # noqa: F401
    from .gptq.loading import GPTQCheckpointQuantizer
    from .registry import replace_quantizer

    replace_quantizer("gptq", GPTQCheckpointQuantizer)
    from .export import card_hooks  # noqa: F401
    from .tuners import lrec, peqa, saved  # noqa: F401


def _is_command_line() -> bool:
    """Whether this process was started as `peft-quant` or `python -m peft_quant`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python looks for the module to run, which comes before its arguments
        return sys.orig_argv[-len(sys.argv)] == "peft_quant"
    return Path(program).name in ("peft-quant", "peft-quant.exe")


find_old_modules()
if not _is_command_line():
    register_methods()
