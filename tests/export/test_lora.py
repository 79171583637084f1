"""LREC adapters as LoRA adapters."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gptq_models import load
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from peft_quant import LRECConfig, PEQAConfig, export_lora, prepare_gptq_for_training


SERVE = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig

base, adapter, input_file, output_file = sys.argv[1:]
kernel = GPTQConfig(bits=4, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=kernel, dtype=torch.float32).eval()
input_ids = load_file(input_file)["input_ids"]
with torch.no_grad():
    unadapted = model(input_ids).logits
    adapted = PeftModel.from_pretrained(model, adapter).eval()(input_ids).logits
assert "peft_quant" not in sys.modules
save_file({"unadapted": unadapted, "adapted": adapted}, output_file)
"""

PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True, "lora_alpha": 1}


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids).logits


def tuned(checkpoint, **options):
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, **options}
    return get_peft_model(load(checkpoint), LRECConfig(**options)).eval()


@pytest.mark.parametrize("options", ({"lora_alpha": 1}, {**PATTERNS, "modules_to_save": ["lm_head"]}), ids=str)
def test_a_process_without_peft_quant_computes_the_same(checkpoint, tmp_path, input_ids, options):
    model = tuned(checkpoint, **options)
    model.save_pretrained(tmp_path / "adapter")
    assert export_lora(tmp_path / "adapter", tmp_path / "lora") == tmp_path / "lora"

    save_file({"input_ids": input_ids}, tmp_path / "input.safetensors")
    arguments = [checkpoint, *(tmp_path / name for name in ("lora", "input.safetensors", "output.safetensors"))]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SERVE, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    served = load_file(tmp_path / "output.safetensors")
    expected = logits(model, input_ids)
    # gptqmodel's kernel forms scale * (q - z) in fp16: 2 ** -11 of each weight, through two blocks
    tolerance = 0.01 * expected.abs().max().item()
    torch.testing.assert_close(served["adapted"], expected, rtol=0, atol=tolerance)
    assert (served["adapted"] - served["unadapted"]).abs().max() > 20 * tolerance


def test_in_the_same_arithmetic_lora_gives_the_same_logits(checkpoint, tmp_path, input_ids):
    model = tuned(checkpoint, **PATTERNS)
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    lora = PeftModel.from_pretrained(prepare_gptq_for_training(load(checkpoint)), tmp_path / "lora")
    assert lora.peft_config["default"].peft_type == PeftType.LORA
    torch.testing.assert_close(logits(lora, input_ids), logits(model, input_ids))


def test_the_files_are_those_of_lora(checkpoint, tmp_path):
    tuned(checkpoint, **PATTERNS).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "peft_quant_facts.json",
    ]
    adapter, lora = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "lora"))
    assert adapter.keys() == lora.keys()
    assert all(torch.equal(lora[name], tensor) for name, tensor in adapter.items())
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written["base_model_name_or_path"] == str(checkpoint)
    assert written["inference_mode"]
    assert not {"base_quantization", "init_lrec_weights"} & written.keys()
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert type(config) is LoraConfig
    assert {name: getattr(config, name) for name in PATTERNS} == PATTERNS


def contents(directory):
    """Bytes of the tensors, and the config, whose `target_modules` are a set: in a file they come in any order."""
    config = json.loads((directory / "adapter_config.json").read_text())
    targets = sorted(config.pop("target_modules"))
    return (directory / "adapter_model.safetensors").read_bytes(), config, targets


def test_saved_as_lora(checkpoint, tmp_path):
    tuned(checkpoint, **PATTERNS).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "exported")
    model = tuned(checkpoint, **PATTERNS, save_as_lora=True)
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "exported")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "import peft_quant" not in card
    assert model.peft_config["default"].base_quantization["fingerprint"] in card
    # a model that has been saved so is still LREC's
    assert model.peft_config["default"].peft_type == PeftType.LREC
    export_lora(model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "exported")


def test_training_resumes_from_what_was_saved_as_lora(checkpoint, tmp_path):
    def train(steps, resume=None):
        model = tuned(checkpoint, save_as_lora=True).train()
        arguments = TrainingArguments(
            tmp_path / "out", max_steps=steps, save_steps=2, report_to="none", lr_scheduler_type="constant"
        )
        rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(8)]
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    through = get_peft_model_state_dict(train(4))
    resumed = get_peft_model_state_dict(train(4, str(tmp_path / "out" / "checkpoint-2")))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in through.items())


def test_any_adapter_of_a_model(checkpoint, tmp_path):
    model = tuned(checkpoint)
    model.add_adapter("other", LRECConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    for name in ("default", "other"):
        export_lora(model, tmp_path / name, adapter_name=name)
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        saved = weights["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
        assert torch.equal(saved, layer.lora_A[name].weight)
    with pytest.raises(ValueError, match=r"\['default', 'other'\] - got \['absent'\]"):
        export_lora(model, tmp_path / "absent", adapter_name="absent")


def test_written_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    tuned(checkpoint).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("peft_quant.export.lora.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_bad_input(checkpoint, tmp_path):
    get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "peqa")
    with pytest.raises(ValueError, match=r"is a PEQA adapter\. Only LREC adapters"):
        export_lora(tmp_path / "peqa", tmp_path / "lora")
    tuned(checkpoint).save_pretrained(tmp_path / "adapter")
    (tmp_path / "lora").mkdir()
    with pytest.raises(FileExistsError, match="lora exists already"):
        export_lora(tmp_path / "adapter", tmp_path / "lora")
