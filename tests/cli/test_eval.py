"""`peft-quant eval`."""

import math

import pytest
import torch
from gptq_models import tiny_tokenizer
from peft import get_peft_model

from peft_quant import LRECConfig, PEQAConfig, convert_to_int8
from peft_quant.evaluation.loading import load_model


@pytest.fixture
def evaluate(run, text):
    def evaluate(*models, options=()):
        return run("eval", *models, "--data", text, "--split", "train", "--sequence_length", 16, "--json", *options)

    return evaluate


def values(result):
    assert result.code == 0, result.stderr
    return {(row["model"], row["dtype"]): row["perplexity"] for row in result.json["results"]}


def test_every_kind_of_model(evaluate, models, tmp_path):
    torch.manual_seed(0)
    config = PEQAConfig(task_type="CAUSAL_LM", init_weights=False)
    peqa = get_peft_model(load_model(models / "base"), config)
    peqa.save_pretrained(tmp_path / "adapter")
    merged = peqa.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    convert_to_int8(load_model(models / "float")).save_pretrained(tmp_path / "int8")
    for name in ("merged", "int8"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    names = [str(models / "float"), str(models / "base"), *(str(tmp_path / n) for n in ("adapter", "merged", "int8"))]
    found = values(evaluate(*names))
    assert [name for name, _ in found] == names
    original, base, adapter, merged, int8 = found.values()
    assert len({original, base, adapter}) == 3
    assert merged == pytest.approx(adapter, rel=1e-2)  # gptqmodel's kernel computes in fp16
    assert int8 == pytest.approx(original, rel=2e-2)


def test_as_it_is_served(evaluate, models):
    name = str(models / "base")
    found = values(evaluate(name, options=("--dtype", "fp32", "--dtype", "fp16", "--dtype", "bf16")))
    assert [dtype for _, dtype in found] == ["fp32", "fp16", "bf16"]
    fp32, fp16, bf16 = found.values()
    assert 0 < abs(fp16 - fp32) < abs(bf16 - fp32) < 0.2 * fp32


def test_windows_and_rows(run, models, text):
    own = ("eval", models / "base", "--data", text, "--split", "train", "--sequence_length", 16)
    whole, some = run(*own), run(*own, "--windows", 5)
    assert some.table[str(models / "base")][-1] == str(5 * 15)
    assert whole.table[str(models / "base")][-1] == str(64 * 15)
    assert some.table != whole.table


def test_options_from_a_file(run, models, text, tmp_path):
    (tmp_path / "eval.yaml").write_text(
        f"data: {text}\nsplit: train\nsequence_length: 16\nwindows: 5\ndtype: [fp32, bf16]\n"
    )
    result = run("eval", models / "base", "--config", tmp_path / "eval.yaml", "--windows", 4)
    assert result.code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "base" in line]
    assert [line.split(" | ")[1] for line in lines] == ["fp32", "bf16"]
    assert all(line.endswith(f"{4 * 15} |") for line in lines)


def test_an_unknown_key(run, models, tmp_path):
    (tmp_path / "eval.yaml").write_text("datta: x\n")
    result = run("eval", models / "base", "--config", tmp_path / "eval.yaml")
    assert result.code == 2
    assert "has the key datta; known are batch_size, column, data" in result.stderr


def test_a_config_file_that_is_missing(run, models, tmp_path):
    result = run("eval", models / "base", "--config", tmp_path / "eval.yaml")
    assert result.code == 2
    assert "does not exist" in result.stderr


def test_a_model_that_is_missing(evaluate, tmp_path):
    result = evaluate(tmp_path / "nothing")
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_an_adapter_brings_no_tokenizer(evaluate, models, tmp_path):
    get_peft_model(load_model(models / "base"), LRECConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(
        tmp_path / "lrec"
    )
    found = values(evaluate(tmp_path / "lrec", models / "base"))
    assert math.isclose(*found.values(), rel_tol=1e-2)
