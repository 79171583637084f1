"""`peft-quant card`."""

import pytest
from gptq_models import load
from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_quant import PEQAConfig


@pytest.fixture
def adapter(models, tmp_path):
    get_peft_model(load(models / "base"), PEQAConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_all_that_can_be_said(run, adapter):
    result = run(
        *("card", adapter, "--license", "apache-2.0", "--language", "en", "--language", "de", "--tag", "bible"),
        *("--base-model", "user/base", "--repository", "user/adapter", "--datasets", "user/data"),
        *("--setting", "steps=40", "--setting", "note=a=b", "--perplexity", "King James=21.99"),
        *("--compared-with", "GPTQ:King James=30.81", "--command", "make it"),
    )
    assert result.code == 0, result.stderr
    card = ModelCard.load(adapter / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en", "de"], ["user/data"])
    assert card.data.base_model == "user/base"
    assert "bible" in card.data.tags
    assert card.data.eval_results[0].metric_value == 21.99
    rows = ("| steps | 40 |", "| note | a=b |", "| GPTQ | 30.81 |", "| this model | 21.99 |")
    for part in (*rows, "make it", "user/adapter"):
        assert part in card.text


def test_from_a_file(run, adapter, tmp_path):
    (tmp_path / "card.yaml").write_text(
        "license: mit\nsetting: {steps: 40}\n"
        "perplexity: {Wikipedia: 26.17}\ncompared_with: {GPTQ: {Wikipedia: 28.22}}\n"
    )
    result = run("card", adapter, "--config", tmp_path / "card.yaml", "--license", "apache-2.0")
    assert result.code == 0, result.stderr
    card = ModelCard.load(adapter / "README.md")
    assert card.data.license == "apache-2.0"
    for part in ("| steps | 40 |", "| GPTQ | 28.22 |", "| this model | 26.17 |"):
        assert part in card.text


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--perplexity", "Wikipedia"), "write NAME=VALUE"),
        (("--perplexity", "Wikipedia=low"), "low is no number"),
        (("--compared-with", "Wikipedia=2"), "write MODEL:TEXT=VALUE"),
    ),
)
def test_wrong_usage(run, adapter, options, message):
    result = run("card", adapter, *options)
    assert result.code == 2
    assert message in result.stderr


def test_no_model(run, tmp_path):
    result = run("card", tmp_path)
    assert result.code == 1
    assert "has neither an adapter_config.json nor a config.json" in result.stderr
