"""Fine-tuning of large language models whose weights stay quantized, as a plugin of PEFT.

Importing this package registers its methods with PEFT; use them through `get_peft_model` and `PeftModel`.
"""

from typing import TYPE_CHECKING, Any

from .compat import __version__ as __version__
from .compat import require_supported_peft


require_supported_peft()

from .gptq import (  # noqa: E402
    InvalidCheckpointError,
    RepackedLayerError,
    prepare_gptq_for_training,
    restore_gptq_forward,
)
from .proof import TrainingError  # noqa: E402
from .qft import Int8Weight, QFTConfig, QuantizedLion, export_qft, quantize_model  # noqa: E402
from .report import plot_layer_errors, write_model_card  # noqa: E402
from .tuners.hotswap import hotswap_adapter  # noqa: E402
from .tuners.lrec import LRECConfig, LRECModel, export_lora, initialize_lrec_weights  # noqa: E402
from .tuners.peqa import PEQAConfig, PEQAModel, merge_checkpoint  # noqa: E402


if TYPE_CHECKING:
    from .qft.trainer import QFTArguments, QFTMixin, QFTTrainer
    from .tuners.lrec.correction import LRECTrainer, LRECTrainingArguments
    from .tuners.lrec.teacher import cache_teacher

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
    "TrainingError",
    "cache_teacher",
    "export_lora",
    "export_qft",
    "hotswap_adapter",
    "initialize_lrec_weights",
    "merge_checkpoint",
    "plot_layer_errors",
    "prepare_gptq_for_training",
    "quantize_model",
    "restore_gptq_forward",
    "write_model_card",
]

# imported when asked for: transformers' Trainer takes longer to import than all else here
_LAZY = {
    "LRECTrainer": "tuners.lrec.correction",
    "LRECTrainingArguments": "tuners.lrec.correction",
    "QFTArguments": "qft.trainer",
    "QFTMixin": "qft.trainer",
    "QFTTrainer": "qft.trainer",
    "cache_teacher": "tuners.lrec.teacher",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
