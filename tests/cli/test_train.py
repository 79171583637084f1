"""`peft-quant train`."""

import json
from pathlib import Path

import pytest
import torch
from gptq_models import load
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_quant import Int8Weight


ROOT = Path(__file__).parents[2]
STEPS = ("--sequence_length", 16, "--max_steps", 4, "--per_device_train_batch_size", 4, "--use_cpu")


@pytest.fixture
def train(run, models, text, tmp_path):
    def train(method, *options, output=tmp_path / "out", model=models / "base"):
        own = ("--model", model, "--data", text, "--output", output)
        return run("train", method, *own, *STEPS, "--learning_rate", 1e-2, *options)

    return train


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_equal(directory, other):
    trained, expected = tensors(directory), tensors(other)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())


class TestMethods:
    @pytest.mark.parametrize(("method", "options"), (("peqa", ()), ("lrec", ("--r", 4, "--use_rslora"))))
    def test_adapters(self, train, models, tmp_path, method, options):
        result = train(method, *options)
        assert result.code == 0, result.stderr
        before, after = (float(cells[0]) for cells in result.table.values())
        assert after < before
        assert list(result.table) == ["before", method.upper()]
        model = PeftModel.from_pretrained(load(models / "base"), tmp_path / "out")
        config = model.peft_config["default"]
        assert config.peft_type.value == method.upper()
        assert config.task_type == "CAUSAL_LM"
        assert all(getattr(config, name.strip("-")) for name in options[::2] if isinstance(name, str))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer("w0 w1").input_ids == [3, 4]

    @pytest.mark.parametrize("base", ("float", "base"))
    def test_int8(self, train, models, tmp_path, base):
        options = ("--outlier_ratio", 0, "--max_grad_norm", 0, "--fused", "--lion_beta1", 0.8)
        result = train("qft", *options, "--learning_rate", "1e-3", model=models / base)
        assert result.code == 0, result.stderr
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.quantization_config.outlier_ratio == 0
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, Int8Weight)
        # and that goes on
        again = train("qft", "--learning_rate", "1e-3", model=tmp_path / "out", output=tmp_path / "again")
        assert again.code == 0, again.stderr
        assert float(again.table["before"][0]) == pytest.approx(float(result.table["QFT"][0]), rel=1e-3)

    def test_the_card(self, train, tmp_path, text):
        train("peqa")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "peft-quant train peqa --model base --data counting.txt --sequence_length 16 --max_steps 4" in card
        assert "--use_cpu true" in card
        assert "counting.txt, held-out part" in card
        assert str(text.parent) not in card
        assert str(tmp_path) not in card

    def test_a_float_model_has_no_scales(self, train, models):
        result = train("peqa", model=models / "float")
        assert result.code == 1
        assert "is not a GPTQ checkpoint" in result.stderr
        assert "peft-quant quantize" in result.stderr


class TestTexts:
    def test_formats_give_the_same(self, train, tmp_path, rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"words": row}) + "\n" for row in rows))
        (tmp_path / "rows.csv").write_text("number,words\n" + "".join(f"{i},{row}\n" for i, row in enumerate(rows)))
        train("peqa")
        for kind in ("jsonl", "csv"):
            file = tmp_path / f"rows.{kind}"
            result = train("peqa", "--data", file, "--column", "words", output=tmp_path / kind)
            assert result.code == 0, result.stderr
            assert_equal(tmp_path / kind, tmp_path / "out")
