"""Old names and module paths work, and name the new ones."""

import subprocess
import sys
from importlib import import_module

import pytest

import peft_quant
from peft_quant.deprecated import MODULES, NAMES


# what `docs/reference.md` named in them
PUBLISHED = {
    "peft_quant.callbacks": ["ReportCallback"],
    "peft_quant.loading": ["load_model"],
    "peft_quant.perplexity": ["perplexity"],
    "peft_quant.qft.trainer": ["QFTTrainer", "QFTTrainingArguments", "QFTTrainerMixin"],
    "peft_quant.report": ["plot_layer_changes", "plot_layer_errors", "write_model_card"],
    "peft_quant.resume": ["SaveOnInterrupt"],
    "peft_quant.text": ["read_texts", "token_windows"],
    "peft_quant.tuners.lrec.correction": ["DistillationTrainer", "DistillationTrainingArguments"],
    "peft_quant.tuners.lrec.teacher": ["cache_teacher"],
    "peft_quant.tuners.peqa.merge": ["plan_merge", "merge_checkpoint"],
}


@pytest.mark.parametrize("old", NAMES)
def test_names(old):
    with pytest.warns(FutureWarning, match=f"^peft_quant.{old} is now peft_quant.{NAMES[old]};") as warned:
        found = getattr(peft_quant, old)
    assert found is getattr(peft_quant, NAMES[old])
    assert {warning.filename for warning in warned} == {__file__}
    assert old not in peft_quant.__all__


@pytest.mark.parametrize("old", MODULES)
def test_modules(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"^{old} is now {MODULES[old]};") as warned:
        exec(f"import {old}")
    assert len(warned) == 1
    for name in PUBLISHED[old]:
        assert getattr(import_module(old), name) is getattr(import_module(MODULES[old]), name)
    with pytest.raises(ImportError):
        exec(f"from {old} import nothing")


def test_the_warning_names_the_line_that_imports():
    code = "import peft_quant\nfrom peft_quant.resume import SaveOnInterrupt\nfrom peft_quant import QFTTrainer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.count("FutureWarning: peft_quant") == 1
    assert "<string>:2: FutureWarning: peft_quant.resume is now peft_quant.trainers.interrupt" in result.stderr


def test_other_names_are_unknown():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        peft_quant.__getattr__("nothing")
