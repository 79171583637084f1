"""Fine-tuning of large language models whose weights stay quantized, as a plugin of PEFT.

Importing this package registers its methods with PEFT; use them through `get_peft_model` and `PeftModel`.
"""

from typing import TYPE_CHECKING, Any

from .compat import __version__ as __version__
from .compat import is_command_line, require_supported_peft, warn_of_untested_versions


if TYPE_CHECKING:
    from .estimate import estimate_memory
    from .export.card import write_model_card
    from .export.int8 import export_qft
    from .export.lora import export_lora
    from .export.merge import merge_checkpoint
    from .first_step import TrainingError
    from .gptq import InvalidCheckpointError, RepackedLayerError, prepare_gptq_for_training, restore_gptq_forward
    from .inspection import compare_adapters, inspect_adapter, inspect_checkpoint
    from .plots.layer_changes import plot_layer_changes
    from .plots.layer_errors import plot_layer_errors
    from .qft import Int8Weight, QFTConfig, QuantizedLion, quantize_model
    from .trainers.distillation.cache import cache_teacher
    from .trainers.distillation.trainer import LRECTrainer, LRECTrainingArguments
    from .trainers.qft import QFTArguments, QFTMixin, QFTTrainer
    from .trainers.report.callback import ReportCallback
    from .tuners.hotswap import hotswap_adapter
    from .tuners.lrec import LRECConfig, LRECModel
    from .tuners.lrec.initialization import initialize_lrec_weights
    from .tuners.peqa import PEQAConfig, PEQAModel

__all__ = [
    "Int8Weight",
    "InvalidCheckpointError",
    "LRECConfig",
    "LRECModel",
    "LRECTrainer",
    "LRECTrainingArguments",
    "PEQAConfig",
    "PEQAModel",
    "QFTArguments",
    "QFTConfig",
    "QFTMixin",
    "QFTTrainer",
    "QuantizedLion",
    "RepackedLayerError",
    "ReportCallback",
    "TrainingError",
    "cache_teacher",
    "compare_adapters",
    "estimate_memory",
    "export_lora",
    "export_qft",
    "hotswap_adapter",
    "initialize_lrec_weights",
    "inspect_adapter",
    "inspect_checkpoint",
    "merge_checkpoint",
    "plot_layer_changes",
    "plot_layer_errors",
    "prepare_gptq_for_training",
    "quantize_model",
    "restore_gptq_forward",
    "write_model_card",
]

# imported when asked for: transformers' Trainer takes longer to import than all else here, and the command line must
# answer `--help` before any of it
_LAZY = {
    "Int8Weight": "qft",
    "InvalidCheckpointError": "gptq",
    "LRECConfig": "tuners.lrec",
    "LRECModel": "tuners.lrec",
    "LRECTrainer": "trainers.distillation.trainer",
    "LRECTrainingArguments": "trainers.distillation.trainer",
    "PEQAConfig": "tuners.peqa",
    "PEQAModel": "tuners.peqa",
    "QFTArguments": "trainers.qft",
    "QFTConfig": "qft",
    "QFTMixin": "trainers.qft",
    "QFTTrainer": "trainers.qft",
    "QuantizedLion": "qft",
    "RepackedLayerError": "gptq",
    "ReportCallback": "trainers.report.callback",
    "TrainingError": "first_step",
    "cache_teacher": "trainers.distillation.cache",
    "compare_adapters": "inspection",
    "estimate_memory": "estimate",
    "export_lora": "export.lora",
    "export_qft": "export.int8",
    "hotswap_adapter": "tuners.hotswap",
    "initialize_lrec_weights": "tuners.lrec.initialization",
    "inspect_adapter": "inspection",
    "inspect_checkpoint": "inspection",
    "merge_checkpoint": "export.merge",
    "plot_layer_changes": "plots.layer_changes",
    "plot_layer_errors": "plots.layer_errors",
    "prepare_gptq_for_training": "gptq",
    "quantize_model": "qft",
    "restore_gptq_forward": "gptq",
    "write_model_card": "export.card",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


if not is_command_line():
    register_methods()
