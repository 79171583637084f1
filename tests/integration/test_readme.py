"""The README's code runs as it stands there, on small models under the names it uses."""

import re
from pathlib import Path

import pytest
from gptq_models import float_llama, tiny_tokenizer
from hub_client import fresh_client, run
from hub_server import serve
from transformers import AutoModelForCausalLM


README = Path(__file__).parents[2] / "README.md"
AFTERWARDS = """
from safetensors.torch import load_file

assert "peqa_scales" in " ".join(load_file("adapter/adapter_model.safetensors"))
"""


@pytest.fixture
def environment(checkpoint, tmp_path):
    quantized, dense = tmp_path / "quantized", tmp_path / "dense"
    quantized.mkdir()
    for file in checkpoint.iterdir():
        (quantized / file.name).symlink_to(file)
    float_llama().save_pretrained(dense)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = "w0"
    tokenizer.save_pretrained(quantized)
    names = {"Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4": quantized, "Qwen/Qwen2.5-0.5B-Instruct": dense}
    with serve(names) as endpoint:
        yield fresh_client(endpoint, tmp_path)


def test_the_code_runs_in_its_order(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    result = run("\n".join([*blocks, AFTERWARDS]), environment)
    assert result.returncode == 0, result.stderr
    for directory in ("merged", "tuned-bf16"):
        AutoModelForCausalLM.from_pretrained(tmp_path / directory)
