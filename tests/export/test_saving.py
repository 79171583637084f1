"""Saves by PEFT and transformers that replace older ones as a whole; tests/integration/test_kills.py kills them."""

import pytest
from full_disk import limited_file_size
from gptq_models import load
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from qft_models import assert_equal, int8_llama
from transformers import AutoModelForCausalLM

from peft_quant import LRECConfig, PEQAConfig


@pytest.fixture
def tuned(model):
    return get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM", init_weights=False))


def names(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_several_adapters_beside_other_files(tuned, checkpoint, tmp_path):
    tuned.add_adapter("second", PEQAConfig(task_type="CAUSAL_LM", init_weights=False))
    tuned.save_pretrained(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "adapter_model.safetensors").write_text("of another save")
    before = names(tmp_path)
    tuned.save_pretrained(tmp_path)
    assert names(tmp_path) == before
    loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    found, expected = loaded.state_dict(), tuned.state_dict()
    assert all(found[name].equal(expected[name]) for name in expected if "peqa_scales" in name)


def test_other_processes_write_nothing(tuned, tmp_path):
    tuned.save_pretrained(tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with_other_values = get_peft_model(tuned.unload(), PEQAConfig(task_type="CAUSAL_LM", init_weights=False))
    with_other_values.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_one_format_replaces_the_other(model, tmp_path):
    tuned = get_peft_model(model, LRECConfig(task_type="CAUSAL_LM", r=2))
    tuned.save_pretrained(tmp_path)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(2)
    tuned.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.safetensors" not in names(tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    assert all((tensor == 2).all() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("in_safetensors", (True, False))
def test_a_full_disk_leaves_the_old_adapter(tuned, tmp_path, in_safetensors):
    tuned.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with limited_file_size(5000), pytest.raises((OSError, RuntimeError)):  # by torch.save
        tuned.save_pretrained(tmp_path, safe_serialization=in_safetensors)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("sizes", (("50kB", "1GB"), ("1GB", "50kB"), ("50kB", "30kB")))
def test_int8_shards_replace_others(tmp_path, sizes):
    for seed, size in enumerate(sizes):
        model = int8_llama(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    weights = [name for name in names(tmp_path) if name.endswith(".safetensors")]
    assert ("model.safetensors" in weights) == (len(weights) == 1) == (sizes[1] == "1GB")
