"""`merge_checkpoint`: files in, files out."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gptq_models import load, save_tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_quant import InvalidCheckpointError, InvalidFileError, PEQAConfig, inspect_adapter, merge_checkpoint


def tune(base, directory, bits=4, **options):
    """Save an adapter with random deltas, and what PEFT itself makes of it in memory."""
    options = {"task_type": "CAUSAL_LM", "init_weights": False, **options}
    peft_model = get_peft_model(load(base, bits), PEQAConfig(**options))
    peft_model.save_pretrained(directory)
    return peft_model


@pytest.fixture
def adapter(checkpoint, tmp_path):
    tune(checkpoint, tmp_path / "adapter")
    return tmp_path / "adapter"


def tensors(directory):
    merged = {}
    for file in directory.glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def snapshot(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("checkpoint_format", ("gptq", "gptq_v2"))
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "act_order", "signed", "options"),
    (
        (2, 32, False, False, False, {}),
        (3, 64, True, True, False, {"target_modules": ["q_proj", "down_proj"]}),
        (4, -1, True, False, False, {"serving_dtype": "bfloat16"}),
        (8, 32, False, True, False, {"modules_to_save": ["lm_head"]}),
        (4, 32, True, False, True, {}),
        (3, -1, False, False, True, {"serving_dtype": "bfloat16"}),
    ),
)
def test_equals_merging_in_memory(
    tmp_path, checkpoint_format, bits, group_size, symmetric, act_order, signed, options
):
    layout = {"checkpoint_format": checkpoint_format, "shards": 2, "signed": signed}
    base = save_tiny_llama(tmp_path / "base", bits, group_size, symmetric, act_order, **layout)
    peft_model = tune(base, tmp_path / "adapter", bits, **options)
    out = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    peft_model.merge_and_unload().save_pretrained(tmp_path / "in_memory")
    on_files, in_memory, before = (tensors(tmp_path / name) for name in ("out", "in_memory", "base"))
    assert out == tmp_path / "out"
    assert on_files.keys() == in_memory.keys()
    for name in on_files:
        if name != "lm_head.weight":  # trained in fp32 and kept so in memory; the file keeps its dtype
            assert torch.equal(on_files[name], in_memory[name]), name
    changed = {name for name in before if not torch.equal(before[name], on_files[name])}
    assert changed
    assert all(name.endswith(".scales") for name in changed)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_trained_modules_are_written_too(checkpoint, tmp_path):
    peft_model = get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    head = peft_model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(0.5)
    peft_model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], head.half())


def test_needs_no_gptq_package_and_no_loaded_model(checkpoint, adapter, tmp_path):
    code = (
        "import sys; sys.modules['gptqmodel'] = sys.modules['optimum'] = None\n"
        "import peft_quant; peft_quant.merge_checkpoint(*sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, checkpoint, adapter, tmp_path / "out"], check=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


class TestBadInput:
    """Nothing is written, nothing that exists is changed."""

    @pytest.fixture(autouse=True)
    def untouched(self, checkpoint, tmp_path):
        before = snapshot(checkpoint)
        yield
        assert snapshot(checkpoint) == before
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_another_base(self, adapter, tmp_path):
        other = save_tiny_llama(tmp_path / "other", seed=1)
        with pytest.raises(ValueError, match=r"expects \{'bits': 4.*this one is \{"):
            merge_checkpoint(other, adapter, tmp_path / "out")

    def test_a_base_of_another_group_size(self, adapter, tmp_path):
        other = save_tiny_llama(tmp_path / "other", group_size=64)
        with pytest.raises(ValueError, match=r"has shape \(3, 64\).*the base's \(2, 64\).*another base model"):
            merge_checkpoint(other, adapter, tmp_path / "out")

    def test_a_base_without_the_layers(self, checkpoint, adapter, tmp_path):
        state = tensors(checkpoint)
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        save_file({name: state[name] for name in state if ".layers.0." in name}, other / "model.safetensors")
        with pytest.raises(ValueError, match=r"changes 7 layers, model\.layers\.1\..*does not have packed"):
            merge_checkpoint(other, adapter, tmp_path / "out")

    def test_a_float_base(self, checkpoint, adapter, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        config = json.loads((checkpoint / "config.json").read_text())
        del config["quantization_config"]
        (other / "config.json").write_text(json.dumps(config))
        save_file(tensors(checkpoint), other / "model.safetensors")
        with pytest.raises(ValueError, match="is not a GPTQ checkpoint"):
            merge_checkpoint(other, adapter, tmp_path / "out")

    def test_a_truncated_shard(self, adapter, tmp_path):
        base = save_tiny_llama(tmp_path / "base", shards=2)
        shard = base / "model-00002-of-00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(InvalidCheckpointError, match="model-00002-of-00002"):
            merge_checkpoint(base, adapter, tmp_path / "out")

    def test_a_damaged_layer(self, checkpoint, adapter, tmp_path):
        state = tensors(checkpoint)
        state["model.layers.0.mlp.up_proj.g_idx"][0] = 99
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        save_file(state, other / "model.safetensors")
        with pytest.raises(InvalidCheckpointError, match=r"model\.layers\.0\.mlp\.up_proj.*g_idx ranges over 0\.\.99"):
            merge_checkpoint(other, adapter, tmp_path / "out")

    def test_nan_in_the_adapter(self, checkpoint, adapter, tmp_path):
        state = load_file(adapter / "adapter_model.safetensors")
        next(iter(state.values()))[0, 0] = float("nan")
        save_file(state, adapter / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"_proj\.peqa_scales holds 1 NaN or infinite values"):
            merge_checkpoint(checkpoint, adapter, tmp_path / "out")

    @pytest.mark.parametrize("serving_dtype", (None, "bfloat16"))
    def test_clamped_scales_unless_allowed(self, checkpoint, tmp_path, serving_dtype):
        model = tune(checkpoint, tmp_path / "adapter", init_weights=True, serving_dtype=serving_dtype)
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        with torch.no_grad():
            layer.peqa_scales["default"].view(-1)[::3] = -1.0
        model.save_pretrained(tmp_path / "adapter")
        message = r"^64 of 1,920 scales \(3.3%\) have .* 33% of those of model\.layers\.1\.mlp\.up_proj: .* allow_cl"
        with pytest.raises(ValueError, match=message):
            merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "out")
        merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "merged", allow_clamped_scales=True)
        merged = tensors(tmp_path / "merged")["model.layers.1.mlp.up_proj.scales"]
        assert (merged.view(-1)[::3] == 2.0**-24).all()
        notes = inspect_adapter(tmp_path / "adapter", checkpoint).notes
        assert any("64 scales in 1 layers have reached the smallest or largest value" in note for note in notes)

    def test_an_adapter_of_another_method(self, checkpoint, tmp_path):
        lora = get_peft_model(load(checkpoint), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="is a LORA adapter"):
            merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "out")

    @pytest.mark.parametrize(
        "changes",
        (
            {"model_type": "unheard of", "auto_map": {"AutoConfig": "configuration.Config"}},
            {"model_type": []},
            {"hidden_size": "wide"},
            {"hidden_size": 1 << 62},
            {"num_hidden_layers": 10**9},
            {"rope_parameters": 5},
            {"architectures": 5},
            {"architectures": [["LlamaForCausalLM"]]},
        ),
    )
    def test_a_base_whose_config_describes_no_model(self, tmp_path, changes):
        base = save_tiny_llama(tmp_path / "base")
        tune(base, tmp_path / "adapter", modules_to_save=["lm_head"])
        file = base / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(InvalidFileError, match=r"base/config\.json does not describe a model"):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")

    @pytest.mark.parametrize("part", ("qweight", "qzeros", "scales"))
    def test_a_base_that_lacks_a_tensor_of_a_layer(self, adapter, tmp_path, part):
        base = save_tiny_llama(tmp_path / "base")
        stored = tensors(base)
        del stored[f"model.layers.0.mlp.up_proj.{part}"]
        save_file(stored, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj"):
            merge_checkpoint(base, adapter, tmp_path / "out")

    def test_links_that_leave_the_base(self, adapter, tmp_path):
        base = save_tiny_llama(tmp_path / "base")
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "key").write_text("secret")
        for target, message in (("../secret", "to a folder"), ("../secret/key", "to .*, outside of .*base")):
            (base / "assets").symlink_to(target)
            with pytest.raises(InvalidFileError, match=f"assets is a link {message}"):
                merge_checkpoint(base, adapter, tmp_path / "out")
            (base / "assets").unlink()
        assert not (tmp_path / "out").exists()

    def test_links_that_multiply(self, adapter, tmp_path):
        base = save_tiny_llama(tmp_path / "base")
        for name in ("one", "two"):
            (base / name).symlink_to(".")
        with pytest.raises(InvalidFileError, match="is a link to a folder"):
            merge_checkpoint(base, adapter, tmp_path / "out")

    def test_pipes_in_the_base(self, adapter, tmp_path):
        base = save_tiny_llama(tmp_path / "base")
        os.mkfifo(base / "merges.txt")
        with pytest.raises(InvalidFileError, match=r"merges\.txt is not a regular file"):
            merge_checkpoint(base, adapter, tmp_path / "out")

    def test_interrupted_while_writing(self, checkpoint, adapter, tmp_path, monkeypatch):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("peft_quant.export.merge.round_scales", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(checkpoint, adapter, tmp_path / "out")


@pytest.mark.parametrize("name", ("pipeline", "Trainer", "AutoTokenizer", "utils"))
def test_names_in_a_config_are_not_called_unless_they_are_models(tmp_path, name):
    base = save_tiny_llama(tmp_path / "base")
    tune(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")


def test_an_existing_directory_is_never_overwritten(checkpoint, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("work")
    with pytest.raises(FileExistsError, match="out exists already"):
        merge_checkpoint(checkpoint, adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
