"""`--push-to-hub`, to a hub on loopback."""

from gptq_models import load
from hub_client import client
from hub_server import Hub
from peft import get_peft_model

from peft_quant import PEQAConfig


def test_a_merged_model(run, models, tmp_path):
    config = PEQAConfig(task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(load(models / "base"), config).save_pretrained(tmp_path / "adapter")
    hub = Hub(tmp_path / "hub")
    with client(hub, tmp_path / "home"):
        own = ("merge", models / "base", tmp_path / "adapter", tmp_path / "out", "--push-to-hub", "user/merged")
        assert run(*own, "--dry-run").code == 0
        assert not any(request.startswith("POST") for request in hub.requests)
        result = run(*own)
        assert result.code == 0, result.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written <= hub.files("user/merged").keys() <= {*written, ".gitattributes"}
    assert 'from_pretrained("user/merged"' in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter(run, models, text, tmp_path):
    hub = Hub(tmp_path / "hub")
    with client(hub, tmp_path / "home"):
        own = ("--model", models / "base", "--data", text, "--output", tmp_path / "out", "--sequence_length", 16)
        result = run("train", "peqa", *own, "--max_steps", 2, "--use_cpu", "--push-to-hub", "user/adapter")
        assert result.code == 0, result.stderr
    files = hub.files("user/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert {"tokenizer.json", "peft_quant_facts.json"} <= files.keys()
    assert not any(name.startswith("checkpoint") for name in files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "peft-quant train peqa" in card
    assert str(tmp_path) not in card
