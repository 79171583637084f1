"""Saved adapters: of which base they are, and what they may hold."""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from gptq_models import load, save_tiny_llama
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_quant import (
    InvalidFileError,
    LRECConfig,
    PEQAConfig,
    export_lora,
    hotswap_adapter,
    inspect_adapter,
    merge_checkpoint,
)


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
    edit_config(adapter, base_quantization=record)


def edit_config(adapter, **options):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


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


class TestDamagedFiles:
    """Named before PEFT reads them, whoever reads the adapter."""

    @pytest.mark.parametrize(
        ("content", "message"),
        (
            (b"", "is not JSON"),
            (b"{", "is not JSON"),
            (b"[" * 10**5, "is not JSON"),
            (b'"peft_type"', "holds a str, not a mapping"),
            (b"[]", "holds a list, not a mapping"),
            (b"5", "holds a int, not a mapping"),
            (b"\xff\xfe", "is not UTF-8"),
            (b'{"peft_quant_version": "0.1.0"}', "has peft_type=None"),
            (b'{"base_quantization": {}, "peft_type": "PEQB"}', "has peft_type='PEQB'"),
            (b'{"peft_quant_version": "0.1.0", "peft_type": []}', r"has peft_type=\[\]"),
            (b'{"peft_type": "PEQA", "target_modules": 5}', "has target_modules=5, which is not a text or a list"),
            (b'{"peft_type": "PEQA", "target_modules": [["q_proj"]]}', "has target_modules="),
            (b'{"peft_type": "LREC", "r": "8"}', "has r='8', which is not an integer"),
            (b'{"peft_type": "LREC", "rank_pattern": null}', "has rank_pattern=None"),
            (b'{"peft_type": "LREC", "use_bdlora": "yes"}', "is not a configuration of an adapter .*BdLoraConfig"),
            (b'{"peft_type": "LREC", "r": 0}', "is not a configuration of an adapter .*use positive integers"),
            (
                b'{"peft_type": "PEQA", "task_type": "SOME"}',
                "is not a configuration of .*Invalid task type",
            ),
        ),
    )
    def test_configs(self, base, tmp_path, content, message):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
        message = rf"adapter_config\.json {message}"
        with pytest.raises(InvalidFileError, match=message):
            PeftConfig.from_pretrained(tmp_path / "adapter")
        with pytest.raises(InvalidFileError, match=message):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")

    @pytest.mark.parametrize("content", ("{}", '{"hidden_size": 4}', '{"peft_type": "PEQB"}', '{"peft_type": [1]}'))
    def test_configs_of_something_else(self, base, tmp_path, content):
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(content)
        message = r"adapter has an adapter_config\.json of another kind"
        with pytest.raises(InvalidFileError, match=message):
            merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
        with pytest.raises(InvalidFileError, match=message):
            export_lora(tmp_path / "adapter", tmp_path / "exported")

    @pytest.mark.parametrize("target", ("elsewhere", "/dev/zero", "adapter_config.json"))
    def test_links_for_configs(self, base, tmp_path, target):
        (tmp_path / "elsewhere").write_text('{"peft_type": "LORA"}')
        (tmp_path / "adapter").mkdir()
        link = tmp_path / "adapter" / "adapter_config.json"
        link.symlink_to(target if target != "elsewhere" else tmp_path / target)
        for read in (merge_checkpoint, lambda _, *paths: export_lora(*paths)):
            with pytest.raises(InvalidFileError, match=r"adapter_config\.json is (a link|not a regular file)"):
                read(base, tmp_path / "adapter", tmp_path / "out")

    def test_configs_before_the_model_changes(self, base, adapter):
        edit_config(adapter, modules_to_save=5)
        model = load(base)
        for read in (lambda: PeftModel.from_pretrained(model, adapter), lambda: model.load_adapter(str(adapter))):
            with pytest.raises(InvalidFileError, match=r"adapter_config\.json has modules_to_save=5"):
                read()
        assert not any("peqa" in name or "lora" in name for name, _ in model.named_parameters())

    def test_configs_that_another_one_replaces(self, method, base, adapter):
        edit_config(adapter, modules_to_save=5)
        with pytest.raises(InvalidFileError, match=r"adapter_config\.json has modules_to_save=5"):
            PeftModel.from_pretrained(load(base), adapter, config=type(METHODS[method])(**GIVEN[method]))

    def test_other_methods_are_left_to_peft(self, tmp_path):
        (tmp_path / "adapter").mkdir()
        content = '{"peft_type": "LORA", "r": 2, "modules_to_save": null, "unknown": [5]}'
        (tmp_path / "adapter" / "linked").write_text(content)
        (tmp_path / "adapter" / "adapter_config.json").symlink_to("linked")
        with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
            assert PeftConfig.from_pretrained(tmp_path / "adapter").r == 2

    def test_links_out_of_an_adapter_of_any_method(self, tmp_path):
        """What the method is stands in the file that must not be read."""
        (tmp_path / "elsewhere").write_text('{"peft_type": "LORA", "r": 2}')
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InvalidFileError, match="outside of"):
            PeftConfig.from_pretrained(tmp_path / "adapter")

    @pytest.mark.parametrize("length", (0, 7, 100, -1))
    def test_truncated_weights(self, base, adapter, method, length):
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        self.refuse_weights(base, adapter, method, r"adapter_model\.safetensors is (not a safetensors file|truncated)")

    @pytest.mark.parametrize("dtype", (torch.int32, torch.float8_e4m3fn))
    def test_weights_of_other_dtypes(self, base, adapter, method, dtype):
        change(
            adapter,
            lambda tensors: {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in tensors.items()},
            "adapter_model.safetensors",
        )
        self.refuse_weights(base, adapter, method, f"as {dtype}, which does not train")

    def test_pickled_weights(self, base, adapter, method):
        """PEFT reads those, tensors only; work on files does not."""
        file, pickled = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
        weights = load_file(file)
        file.unlink()
        torch.save(weights, pickled)
        PeftModel.from_pretrained(load(base), adapter)
        with pytest.raises(InvalidFileError, match=r"has no adapter_model\.safetensors; pickled weights .* not read"):
            self.read_files(base, adapter, method)
        for content in (pickled.read_bytes()[:-100], b"", pickle.dumps(Path), b"cos\nsystem\n(S'touch code_ran'\ntR."):
            pickled.write_bytes(content)
            with pytest.raises(InvalidFileError, match=r"adapter_model\.bin is damaged"):
                PeftModel.from_pretrained(load(base), adapter)
        assert not Path("code_ran").exists()
        torch.save([1], pickled)
        with pytest.raises(InvalidFileError, match=r"adapter_model\.bin is damaged"):
            PeftModel.from_pretrained(load(base), adapter)

    def test_missing_weights(self, base, adapter, method):
        (adapter / "adapter_model.safetensors").unlink()
        self.refuse_weights(base, adapter, method, r"has no adapter_model\.safetensors")

    def test_pipes(self, base, adapter, method):
        (adapter / "adapter_model.safetensors").unlink()
        os.mkfifo(adapter / "adapter_model.safetensors")
        self.refuse_weights(base, adapter, method, r"adapter_model\.safetensors is not a regular file")

    @pytest.mark.parametrize("name", ("adapter_config.json", "adapter_model.safetensors"))
    def test_links_that_leave_the_adapter(self, base, adapter, method, tmp_path, name):
        (adapter / name).rename(tmp_path / "secret")
        (adapter / name).symlink_to(tmp_path / "secret")
        self.refuse_weights(base, adapter, method, rf"{name} is a link to .*secret, outside of .*Copy the file there")

    def refuse_weights(self, base, adapter, method, message):
        with pytest.raises(InvalidFileError, match=message):
            PeftModel.from_pretrained(load(base), adapter)
        with pytest.raises(InvalidFileError, match=message):
            self.read_files(base, adapter, method)
        assert not (adapter.parent / "out").exists()

    def read_files(self, base, adapter, method):
        if method == "peqa":
            merge_checkpoint(base, adapter, adapter.parent / "out")
        else:
            export_lora(adapter, adapter.parent / "out")

    def test_in_the_cache_of_the_hub(self, base, adapter, method, tmp_path):
        repository, commit = tmp_path / "cache" / "models--user--adapter", "c" * 40
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        adapter.rename(repository / "blobs")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (repository / "snapshots" / commit / name).symlink_to(f"../../blobs/{name}")
        PeftModel.from_pretrained(load(base), "user/adapter", cache_dir=tmp_path / "cache")
        file = repository / "blobs" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InvalidFileError, match=rf"{commit}/adapter_model\.safetensors is truncated"):
            PeftModel.from_pretrained(load(base), "user/adapter", cache_dir=tmp_path / "cache")
        (repository / "blobs" / "adapter_config.json").write_text("{")
        with pytest.raises(InvalidFileError, match=rf"{commit}/adapter_config\.json is not JSON"):
            PeftModel.from_pretrained(load(base), "user/adapter", cache_dir=tmp_path / "cache")

    def test_before_hot_swapping(self, base, adapter, method):
        model = PeftModel.from_pretrained(load(base), adapter)
        file = adapter / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InvalidFileError, match=r"adapter_model\.safetensors is truncated"):
            hotswap_adapter(model, str(adapter), "default")


class TestPatternsThatWouldNotEnd:
    PATTERN = "(([a-z0-9._]+)+)+!"

    @pytest.mark.parametrize("option", ("target_modules", "exclude_modules", "modules_to_save"))
    def test_are_refused_before_they_are_matched(self, base, adapter, option):
        edit_config(adapter, **{option: [self.PATTERN] if option == "modules_to_save" else self.PATTERN})
        message = f"{option} has the regular expression .* too long to match"
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(base), adapter)
        with pytest.raises(ValueError, match=message):
            load(base).load_adapter(str(adapter))

    def test_ranks(self, base, tmp_path):
        save(load(base), METHODS["lrec"], tmp_path / "adapter")
        edit_config(tmp_path / "adapter", rank_pattern={self.PATTERN: 2})
        with pytest.raises(ValueError, match="rank_pattern has the regular expression"):
            PeftModel.from_pretrained(load(base), tmp_path / "adapter")

    def test_more_entries_than_the_model_has_modules(self, base, adapter):
        edit_config(adapter, target_modules=[f"layer{number}" for number in range(40_000)])
        with pytest.raises(ValueError, match="target_modules has 40000 entries, more than there are modules"):
            PeftModel.from_pretrained(load(base), adapter)

    def test_more_entries_than_any_model_has(self, base, adapter):
        edit_config(adapter, target_modules=[f"layer{number}" for number in range(100_000)])
        with pytest.raises(InvalidFileError, match="which is not a text or a list of at most 50000"):
            PeftModel.from_pretrained(load(base), adapter)


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
