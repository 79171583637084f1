"""Saved adapters: of which base they are, and what they may hold."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from gptq_models import load, save_tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_quant import LRECConfig, PEQAConfig, export_lora, hotswap_adapter, inspect_adapter, merge_checkpoint


FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD = FIXTURES / "adapters_0_1_0"
OLD_BASE = FIXTURES / "auto_gptq_4bit_asym"
METHODS = {"peqa": PEQAConfig(init_weights=False), "lrec": LRECConfig(r=2, init_lora_weights=False)}
GIVEN = {"peqa": {}, "lrec": {"r": 2}}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def base(checkpoint, tmp_path):
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


@pytest.fixture
def adapter(method, base, tmp_path):
    save(load(base), METHODS[method], tmp_path / "adapter")
    return tmp_path / "adapter"


def save(model, config, directory, **options):
    tuned = get_peft_model(model, type(config)(**{**config.to_dict(), "task_type": "CAUSAL_LM"}))
    tuned.save_pretrained(directory, **options)
    return tuned


def change(directory, changes, file="model.safetensors"):
    tensors = load_file(directory / file)
    save_file({**tensors, **changes(tensors)}, directory / file, {"format": "pt"})


def set_record(adapter, record):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_quantization"] = record
    file.write_text(json.dumps(config))


class TestTheBase:
    @pytest.mark.parametrize(
        "name",
        ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.qweight"),
    )
    def test_one_value_of_another_tensor(self, method, base, tmp_path, name):
        config = METHODS[method]
        config = type(config)(**{**config.to_dict(), "target_modules": ["q_proj"]})
        save(load(base), config, tmp_path / "adapter")
        tensors = load_file(base / "model.safetensors")
        tensors[name].view(-1)[7] += 1
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        message = "trained on another base model: the layers it changes are the same, but other tensors"
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(base), tmp_path / "adapter")
        inspection = inspect_adapter(tmp_path / "adapter", base)
        assert inspection.fits_base is False
        assert "the layers it changes are the same" in inspection.notes[0]
        if method == "peqa":
            with pytest.raises(ValueError, match=message):
                merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")

    @pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
    def test_the_same_one_in_another_dtype(self, base, adapter, dtype):
        PeftModel.from_pretrained(load(base, dtype=dtype), adapter)

    def test_another_one_under_a_given_config(self, method, adapter, tmp_path):
        other = load(save_tiny_llama(tmp_path / "other", seed=1))
        given = type(METHODS[method])(task_type="CAUSAL_LM", **GIVEN[method])
        with pytest.raises(ValueError, match="trained on another base model"):
            PeftModel.from_pretrained(other, adapter, config=given)

    def test_another_one_under_the_config_of_a_live_model(self, method, base, adapter, tmp_path):
        live = get_peft_model(load(base), type(METHODS[method])(task_type="CAUSAL_LM", **GIVEN[method]))
        other = load(save_tiny_llama(tmp_path / "other", seed=1))
        with pytest.raises(ValueError, match="trained on another base model"):
            PeftModel.from_pretrained(other, adapter, config=live.peft_config["default"])

    def test_another_one_in_transformers_under_a_given_config(self, method, adapter, tmp_path):
        other = load(save_tiny_llama(tmp_path / "other", seed=1))
        given = type(METHODS[method])(task_type="CAUSAL_LM", **GIVEN[method])
        with pytest.raises(ValueError, match="trained on another base model"):
            other.load_adapter(str(adapter), peft_config=given)

    def test_the_right_one_under_a_given_config(self, method, base, adapter):
        given = type(METHODS[method])(task_type="CAUSAL_LM", **GIVEN[method])
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            PeftModel.from_pretrained(load(base), adapter, config=given)

    def test_a_deleted_record_is_noticed(self, method, base, adapter, tmp_path):
        set_record(adapter, None)
        with pytest.warns(UserWarning, match="does not record the base it was trained on"):
            PeftModel.from_pretrained(load(base), adapter)
        with pytest.warns(UserWarning, match="does not record the base it was trained on"):
            load(base).load_adapter(str(adapter))
        assert inspect_adapter(adapter, base).fits_base is None
        if method == "peqa":
            with pytest.warns(UserWarning, match="does not record the base it was trained on"):
                merge_checkpoint(base, adapter, tmp_path / "merged")

    @pytest.mark.parametrize("record", ({}, {"fingerprint": 5}))
    def test_a_record_that_is_none_is_refused(self, base, adapter, record):
        set_record(adapter, record)
        with pytest.raises(ValueError, match="has no fingerprint of its base"):
            PeftModel.from_pretrained(load(base), adapter)

    def test_files_that_are_gone_are_noticed(self, base, adapter):
        model = load(base)
        shutil.rmtree(base)
        with pytest.warns(UserWarning, match="cannot be found, or its layers were changed since"):
            PeftModel.from_pretrained(model, adapter)

    def test_a_merged_model_is_a_base_of_its_own(self, base, tmp_path):
        merged = save(load(base), METHODS["peqa"], tmp_path / "first").merge_and_unload()
        save(merged, METHODS["lrec"], tmp_path / "second").unload().save_pretrained(tmp_path / "merged")
        PeftModel.from_pretrained(load(tmp_path / "merged"), tmp_path / "second")
        with pytest.raises(ValueError, match="trained on another base model"):
            PeftModel.from_pretrained(load(base), tmp_path / "second")


class TestAdaptersOfVersion010:
    def test_load(self, method):
        model = PeftModel.from_pretrained(load(OLD_BASE), OLD / method)
        recorded = model.peft_config["default"].base_quantization
        assert len(recorded["fingerprint"]) == 64  # what is saved from now on

    def test_refuse_another_base(self, method, tmp_path):
        with pytest.raises(ValueError, match="trained on another base model"):
            PeftModel.from_pretrained(load(FIXTURES / "auto_gptq_3bit_act_order", 3), OLD / method)

    def test_are_inspected(self, method):
        assert inspect_adapter(OLD / method, OLD_BASE).fits_base is True
        assert inspect_adapter(OLD / method, FIXTURES / "auto_gptq_3bit_act_order").fits_base is False

    def test_merge(self, tmp_path):
        merge_checkpoint(OLD_BASE, OLD / "peqa", tmp_path / "merged")
        with pytest.raises(ValueError, match="another base model"):
            merge_checkpoint(FIXTURES / "auto_gptq_3bit_act_order", OLD / "peqa", tmp_path / "other")

    def test_are_swapped_in(self, tmp_path):
        model = PeftModel.from_pretrained(load(OLD_BASE), OLD / "peqa")
        hotswap_adapter(model, str(OLD / "peqa"), "default")
        model = PeftModel.from_pretrained(load(OLD_BASE), OLD / "lrec")
        with pytest.raises(ValueError, match="saved by an older version"):
            hotswap_adapter(model, str(OLD / "lrec"), "default")


class TestWhatItHolds:
    NAMES = ("model.layers.0.self_attn.q_proj.qweight", "lm_head.weight", "model.norm.weight")

    @pytest.mark.parametrize("name", NAMES)
    def test_a_tensor_that_it_did_not_train(self, method, base, adapter, tmp_path, name):
        changed = load_file(base / "model.safetensors")[name] * 2
        change(adapter, lambda _: {f"base_model.model.{name}": changed}, "adapter_model.safetensors")
        message = f"holds {name}, which its configuration does not train"
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(base), adapter)
        with pytest.raises(ValueError, match=message):
            load(base).load_adapter(str(adapter))
        if method == "peqa":
            with pytest.raises(ValueError, match=message):
                merge_checkpoint(base, adapter, tmp_path / "merged")
            assert not (tmp_path / "merged").exists()

    def test_embeddings_that_were_saved_with_it(self, method, base, tmp_path, input_ids):
        tuned = save(load(base), METHODS[method], tmp_path / "adapter", save_embedding_layers=True).eval()
        assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids).logits, tuned(input_ids).logits)
        if method == "peqa":
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
            before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
            assert {name for name in before if not torch.equal(before[name], after[name])} == {
                name for name in before if name.endswith(".scales")
            }

    def test_a_vocabulary_that_was_resized(self, method, base, tmp_path, input_ids):
        def resized():
            model = load(base)
            model.resize_token_embeddings(130)
            return model

        tuned = save(resized(), METHODS[method], tmp_path / "adapter").eval()
        loaded = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids).logits, tuned(input_ids).logits)
        if method == "peqa":
            with pytest.raises(ValueError, match=r"a vocabulary was resized.*Merge in memory instead"):
                merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")

    @pytest.mark.parametrize("value", (float("nan"), float("inf")))
    def test_values_that_are_not_finite(self, method, base, adapter, tmp_path, value):
        def spoil(tensors):
            name = sorted(tensors)[-1]
            tensors[name].view(-1)[0] = value
            return {name: tensors[name]}

        live = PeftModel.from_pretrained(load(base), adapter)
        change(adapter, spoil, "adapter_model.safetensors")
        uses = {
            "loading": lambda: PeftModel.from_pretrained(load(base), adapter),
            "a second one": lambda: live.load_adapter(adapter, "second"),
            "in transformers": lambda: load(base).load_adapter(str(adapter)),
            "swapping": lambda: hotswap_adapter(live, str(adapter), "default"),
            "inspecting": lambda: inspect_adapter(adapter),
        }
        if method == "peqa":
            uses["merging"] = lambda: merge_checkpoint(base, adapter, tmp_path / "out")
        else:
            uses["exporting"] = lambda: export_lora(adapter, tmp_path / "out")
        for use in uses.values():
            with pytest.raises(ValueError, match="holds 1 NaN or infinite values"):
                use()
        assert not (tmp_path / "out").exists()


class TestMergingOnFiles:
    """What `merge_and_unload` writes with another config or further tensors is named as its work."""

    @pytest.mark.parametrize("module", ("embed_tokens", "lm_head"))
    def test_tied_embeddings(self, tmp_path, module):
        base = tmp_path / "base"
        FAMILIES["Llama, tied embeddings"].save(base)
        tuned = get_peft_model(load(base), PEQAConfig(task_type="CAUSAL_LM", modules_to_save=[module]))
        tuned.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match="Merge in memory instead"):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")

    def test_what_the_base_cannot_hold(self, base, tmp_path):
        tuned = get_peft_model(load(base), PEQAConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
        with torch.no_grad():
            tuned.get_output_embeddings().weight[0, 0] = 1e6
        tuned.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ValueError, match=r"lm_head\.weight was trained to 1e\+06.*Merge in memory instead"):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_weights_that_are_not_read(self, base, tmp_path):
        save(load(base), METHODS["peqa"], tmp_path / "adapter")
        shutil.copyfile(base / "model.safetensors", base / "stale.safetensors")
        with pytest.raises(ValueError, match=r"does not read, stale\.safetensors"):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
