import pytest
from gptq_models import load, save_tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_quant import LRECConfig, PEQAConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("inspected") / "base", 4, 32)


@pytest.fixture(scope="module")
def adapter(base):
    model = get_peft_model(load(base), PEQAConfig(task_type="CAUSAL_LM", init_weights=False))
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


class TestCheckpoints:
    def test_a_summary(self, run, base):
        result = run("inspect", base)
        assert result.code == 0
        assert result.stdout.startswith(f"{base}: GPTQ checkpoint")
        assert "vLLM, NVIDIA GPU" in result.stdout
        assert "model.layers.0.mlp.up_proj" not in result.stdout

    def test_every_layer(self, run, base):
        rows = [line for line in run("inspect", base, "--layers").stdout.splitlines() if line.startswith("model.")]
        assert len(rows) == 14

    def test_json(self, run, base):
        found = run("inspect", base, "--json").json
        assert found["declared"]["bits"] == found["found"]["bits"] == 4
        assert len(found["layers"]) == 14
        assert {row["engine"]: row["serves"] for row in found["engines"]}["ExLlamaV2"] is True

    def test_damage_is_printed_and_exits_with_1(self, run, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        tensors = load_file(directory / "model.safetensors")
        save_file(
            {k: v * 0 if k.endswith(".scales") else v for k, v in tensors.items()}, directory / "model.safetensors"
        )
        result = run("inspect", directory)
        assert result.code == 1
        assert "scales are zero. The checkpoint is damaged" in result.stdout
        assert "- and 4 more" in result.stdout
        assert result.stderr == ""

    @pytest.mark.parametrize("option", ["--base", "--compare", "--plot"])
    def test_options_of_adapters(self, run, base, option, tmp_path):
        result = run("inspect", base, option, tmp_path / "x.png")
        assert result.code == 2
        assert f"{option} is for adapters" in result.stderr

    def test_neither(self, run, tmp_path):
        result = run("inspect", tmp_path)
        assert (result.code, result.stdout) == (1, "")
        assert "no checkpoint or adapter" in result.stderr


class TestAdapters:
    def test_a_summary(self, run, base, adapter):
        result = run("inspect", adapter, "--base", base)
        assert result.code == 0
        assert "PEQA adapter" in result.stdout
        assert "the one given" in result.stdout
        assert len([line for line in result.stdout.splitlines() if line.startswith(("mlp.", "self_attn."))]) == 7

    def test_every_layer(self, run, adapter):
        rows = [line for line in run("inspect", adapter, "--layers").stdout.splitlines() if line.startswith("model.")]
        assert len(rows) == 14

    def test_two_and_their_picture(self, run, base, adapter, tmp_path):
        pytest.importorskip("matplotlib")
        model = get_peft_model(load(base), LRECConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4))
        model.save_pretrained(tmp_path / "branch")
        picture = tmp_path / "two.png"
        result = run("inspect", adapter, "--base", base, "--compare", tmp_path / "branch", "--plot", picture)
        assert result.code == 0
        assert "LREC adapter" in result.stdout
        assert "cosine of the changes: none" in result.stdout
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_json_alone_is_on_stdout(self, run, base, adapter, tmp_path):
        pytest.importorskip("matplotlib")
        result = run("inspect", adapter, "--base", base, "--json", "--plot", tmp_path / "one.png")
        assert len(result.json["changes"]) == 14
        assert result.json["fits_base"] is True
        assert "one.png" in result.stderr
        compared = run("inspect", adapter, "--compare", adapter, "--json").json
        assert compared["cosine"] == pytest.approx(1)
