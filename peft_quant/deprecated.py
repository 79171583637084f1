"""Deprecated names and module paths, which work until the next release, with a warning. Imports nothing heavy."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


NAMES = {
    "LRECTrainer": "DistillationTrainer",
    "LRECTrainingArguments": "DistillationTrainingArguments",
    "QFTArguments": "QFTTrainingArguments",
    "QFTMixin": "QFTTrainerMixin",
    "quantize_model": "convert_to_int8",
}
MODULES = {
    "peft_quant.callbacks": "peft_quant",
    "peft_quant.loading": "peft_quant.evaluation.loading",
    "peft_quant.perplexity": "peft_quant.evaluation.perplexity",
    "peft_quant.qft.trainer": "peft_quant",
    "peft_quant.report": "peft_quant",
    "peft_quant.resume": "peft_quant.trainers.interrupt",
    "peft_quant.text": "peft_quant.evaluation.text",
    "peft_quant.tuners.lrec.correction": "peft_quant",
    "peft_quant.tuners.lrec.teacher": "peft_quant.trainers.distillation.cache",
    "peft_quant.tuners.peqa.merge": "peft_quant.export.merge",
}
"""Old module paths, and the modules that now have their public names."""


def new_name(name: str) -> str:
    """The current name of a member of `peft_quant`; warns if the given one is old."""
    if name not in NAMES:
        return name
    _warn(f"peft_quant.{name}", f"peft_quant.{NAMES[name]}", stacklevel=4)
    return NAMES[name]


def find_old_modules() -> None:
    """Make the old module paths importable."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldModules())


class _OldModules(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        new = MODULES[module.__name__]
        _warn(module.__name__, new, stacklevel=3)

        def get(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(import_module(new), name)

        module.__getattr__ = get  # type: ignore[method-assign]


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes with the next release.", FutureWarning, stacklevel)
