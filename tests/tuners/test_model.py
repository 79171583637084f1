"""Every method through PEFT's public interface, on a model loaded as users load it."""

import pytest
import torch
from gptq_models import (
    DENSE_BYTES,
    PACKED,
    PlainMLP,
    assert_loaded,
    forget_files,
    load,
    logits,
    needs_native_adapters,
    save_tiny_llama,
    saved_for_backward,
    tiny_config,
)
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM

from peft_quant import RepackedLayerError


@pytest.fixture
def config(method):
    return lambda **options: method.config(task_type="CAUSAL_LM", **options)


@pytest.fixture
def tuned(method, model):
    return method.tuned(model, task_type="CAUSAL_LM")


def backward(model, input_ids):
    model.train()(input_ids=input_ids, labels=input_ids).loss.backward()


def all_have_gradients(model):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return trainable and all(p.grad.any() for p in trainable)


class TestTargets:
    @pytest.fixture
    def targets(self, method, model, config):
        def adapted(**options):
            names = method.layers(get_peft_model(model, config(**options)))
            return sorted(name.removeprefix("base_model.model.") for name in names)

        return adapted

    def test_all_linear_is_every_packed_layer(self, targets):
        assert targets(target_modules="all-linear") == sorted(PACKED)

    def test_names_and_exclusions(self, targets):
        exclusions = ["model.layers.1.self_attn.v_proj"]
        assert targets(target_modules=["q_proj", "v_proj"], exclude_modules=exclusions) == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.q_proj",
        ]

    def test_regular_expression(self, targets):
        assert targets(target_modules=r".*\.0\.mlp\.(up|down)_proj") == [
            "model.layers.0.mlp.down_proj",
            "model.layers.0.mlp.up_proj",
        ]

    @pytest.mark.parametrize("target", (None, "all-linear"))
    def test_layers_to_transform(self, targets, target):
        expected = sorted(name for name in PACKED if ".1." in name)
        assert targets(target_modules=target, layers_to_transform=[1]) == expected

    def test_a_float_layer_is_refused_before_anything_changes(self, method, model, config):
        message = rf"matches lm_head, a Linear without GPTQ-packed.*{method.name} cannot.*modules_to_save"
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(target_modules=["lm_head", "q_proj"]))
        assert not method.layers(model)

    def test_a_name_that_matches_nothing_is_refused(self, model, config):
        with pytest.raises(ValueError, match="absent"):
            get_peft_model(model, config(target_modules=["absent"]))

    def test_a_float_model_is_refused(self, method, config):
        float_model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
        message = rf"{method.name} adapts GPTQ-packed layers, and LlamaForCausalLM has none\. Load a GPTQ checkpoint"
        with pytest.raises(ValueError, match=message):
            get_peft_model(float_model, config())

    def test_a_bitsandbytes_model_is_refused(self, config):
        float_model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
        float_model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        with pytest.raises(ValueError, match="is quantized with bitsandbytes"):
            get_peft_model(float_model, config())

    def test_a_repacked_model_without_files_is_refused_before_anything_changes(
        self, method, checkpoint, config, input_ids
    ):
        model = forget_files(load(checkpoint, backend="auto"))
        logits(model, input_ids)
        with pytest.raises(RepackedLayerError, match=r'model\.layers\.0\.self_attn\.._proj.*backend="gptq_torch"'):
            get_peft_model(model, config())
        assert not method.layers(model)

    def test_a_mislabelled_zero_format_is_noticed(self, config, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama", checkpoint_format="gptq_v2")
        text = (directory / "config.json").read_text()
        (directory / "config.json").write_text(text.replace("gptq_v2", "gptq"))
        with pytest.warns(UserWarning, match="wrong zero point format"):
            get_peft_model(load(directory), config())


class TestForward:
    def test_only_fp32_tensors_of_the_adapter_train(self, method, model, config):
        peft_model = get_peft_model(model, config())
        trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        assert trainable.keys() == method.parameters(peft_model).keys()
        assert len(trainable) == len(method.tensors) * len(PACKED)
        assert all("default" in name.split(".") for name in trainable)
        assert all(p.dtype == torch.float32 for p in trainable.values())

    def test_the_layers_own_forward_is_never_called(self, method, tuned, input_ids, monkeypatch):
        for layer in method.layers(tuned).values():
            monkeypatch.setattr(type(layer.base_layer), "forward", None)
        logits(tuned, input_ids)
        with tuned.disable_adapter():
            logits(tuned, input_ids)

    def test_gradients_after_an_evaluation_are_those_before(self, method, checkpoint, input_ids):
        gradients = []
        for evaluate_first in (False, True):
            tuned = method.tuned(load(checkpoint, backend="auto_trainable"), task_type="CAUSAL_LM")
            if evaluate_first:
                logits(tuned, input_ids)
            backward(tuned, input_ids)
            gradients.append([p.grad for p in tuned.parameters() if p.requires_grad])
        assert all(torch.equal(before, after) and before.any() for before, after in zip(*gradients))

    def test_kbit_preparation(self, method, model, input_ids):
        tuned = method.tuned(prepare_model_for_kbit_training(model), task_type="CAUSAL_LM")
        backward(tuned, input_ids)
        assert all_have_gradients(tuned)

    def test_autocast(self, tuned, input_ids):
        with torch.autocast("cpu", torch.bfloat16):
            low = logits(tuned, input_ids)
        expected = logits(tuned, input_ids)
        # 8 bits of mantissa through two blocks
        assert (low.float() - expected).norm() < 0.05 * expected.norm()

    def test_less_is_saved_for_backward_than_lora_on_gptqmodel_saves(self, checkpoint, config, input_ids):
        kept = []
        for peft_config in (config(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PACKED)):
            peft_model = get_peft_model(load(checkpoint), peft_config)
            peft_model.enable_input_require_grads()
            kept.append(saved_for_backward(peft_model, input_ids))
        ours, lora = kept
        assert lora > DENSE_BYTES
        assert lora - ours > 0.9 * DENSE_BYTES


class TestSaveAndLoad:
    def test_files_and_fresh_load(self, method, tuned, checkpoint, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert saved.keys() == {f"base_model.model.{name}.{tensor}" for name in PACKED for tensor in method.tensors}
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))
        assert not any(p.requires_grad for p in loaded.parameters())

    @pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
    def test_loaded_beside_another(self, tuned, checkpoint, tmp_path, input_ids, low_cpu_mem_usage):
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("second")
        assert_loaded(loaded, tuned, lambda model: logits(model, input_ids), "second")

    def test_auto_class(self, tuned, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        kernel = GPTQConfig(bits=4, backend="gptq_torch")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, quantization_config=kernel, dtype=torch.float32)
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

    def test_trainable_load_goes_on_training(self, tuned, checkpoint, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path, is_trainable=True)
        backward(loaded, input_ids)
        assert all_have_gradients(loaded)

    def test_modules_to_save(self, method, model, checkpoint, tmp_path, input_ids):
        tuned = method.tuned(model, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        with torch.no_grad():
            tuned.get_output_embeddings().weight.mul_(0.5)
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

    def test_the_base_is_recorded(self, tuned):
        recorded = tuned.peft_config["default"].base_quantization
        assert {key: recorded[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
        }
        assert len(recorded["fingerprint"]) == 64

    @pytest.mark.parametrize("other", ({"bits": 8}, {"seed": 1}, {"group_size": 64}))
    def test_another_base_is_refused_naming_both(self, tuned, tmp_path, other):
        tuned.save_pretrained(tmp_path / "adapter")
        base = load(save_tiny_llama(tmp_path / "other", **other), bits=other.get("bits", 4))
        with pytest.raises(ValueError, match=r"expects \{'bits': 4.*this one is \{'bits': "):
            PeftModel.from_pretrained(base, tmp_path / "adapter")

    def test_the_same_weights_in_the_other_zero_format_are_the_same_base(self, tuned, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path / "adapter")
        base = load(save_tiny_llama(tmp_path / "v2", checkpoint_format="gptq_v2"))
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

    def test_the_state_dict_of_the_base_has_the_keys_of_the_checkpoint(self, tuned, checkpoint):
        state, base = get_base_model_state_dict(tuned), load_file(checkpoint / "model.safetensors")
        assert state.keys() == base.keys()
        assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in base.items())


class TestSeveralAdapters:
    @pytest.fixture
    def pair(self, method, tuned, config):
        rank = {"r": 2} if method.name == "LREC" else {}
        tuned.add_adapter("other", config(changed=True, target_modules=["q_proj", "down_proj"], **rank))
        return tuned.eval()

    def outputs(self, pair, input_ids):
        results = {}
        for name in ("default", "other"):
            pair.set_adapter(name)
            results[name] = logits(pair, input_ids)
        with pair.disable_adapter():
            results["__base__"] = logits(pair, input_ids)
        return results

    def test_an_inactive_adapter_is_frozen(self, pair):
        trainable = {name for name, p in pair.named_parameters() if p.requires_grad}
        assert trainable
        assert all("default" in name.split(".") for name in trainable)

    def test_an_unknown_adapter_cannot_be_combined(self, pair):
        with pytest.raises(ValueError, match=r"'?absent'? does not exist"):
            pair.add_weighted_adapter(["default", "absent"], [1.0, 1.0], "new", "linear")
        assert "new" not in pair.peft_config

    def test_mixed_batch(self, pair, input_ids):
        results = self.outputs(pair, input_ids)
        names = ["other", "__base__", "default", "other"]
        mixed = logits(pair, input_ids.repeat(2, 1), adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], results[name][row % 2], rtol=1e-4, atol=1e-4)

    def test_mixed_batch_with_beam_search(self, pair, input_ids):
        generated = pair.generate(
            input_ids=input_ids, adapter_names=["other", "default"], num_beams=2, max_new_tokens=3, do_sample=False
        )
        for row, name in enumerate(("other", "default")):
            pair.set_adapter(name)
            alone = pair.generate(input_ids=input_ids[row : row + 1], num_beams=2, max_new_tokens=3, do_sample=False)
            assert torch.equal(generated[row, : alone.shape[1]], alone[0])

    def test_mixed_batch_bad_input(self, pair, input_ids):
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): absent"):
            logits(pair, input_ids, adapter_names=["absent", "default"])
        with pytest.raises(ValueError, match="got 3 and 2"):
            logits(pair, input_ids, adapter_names=["default"] * 3)
        with pytest.raises(ValueError, match="training mode"):
            logits(pair.train(), input_ids, adapter_names=["default", "default"])

    def test_delete(self, method, pair, input_ids):
        results = self.outputs(pair, input_ids)
        pair.set_adapter("other")
        pair.delete_adapter("default")
        assert torch.equal(logits(pair, input_ids), results["other"])
        for layer in method.layers(pair).values():
            assert not any("default" in getattr(layer, attribute) for attribute in method.by_adapter)

    def test_only_the_active_adapter_trains(self, pair, input_ids):
        pair.set_adapter("other")
        backward(pair, input_ids)
        for name, parameter in pair.named_parameters():
            assert "other" not in name.split(".") or parameter.grad.any()
            assert "default" not in name.split(".") or parameter.grad is None

    def test_status(self, method, pair):
        status = pair.get_model_status()
        assert status.peft_types == {"default": method.name, "other": method.name}
        assert status.available_adapters == ["default", "other"]


def test_unload_gives_the_base_back(method, tuned, checkpoint, tmp_path):
    base_model = tuned.unload()
    assert not method.layers(base_model)
    base_model.save_pretrained(tmp_path)
    saved, base = (load_file(directory / "model.safetensors") for directory in (tmp_path, checkpoint))
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], base[name]) for name in base)


class TestTransformersNative:
    @needs_native_adapters
    def test_add_load_switch_delete(self, tuned, checkpoint, config, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        model = load(checkpoint)
        model.load_adapter(str(tmp_path), adapter_name="task")
        assert_loaded(model, tuned, lambda model: logits(model, input_ids), "task")
        expected = logits(model, input_ids)
        model.add_adapter(config(), adapter_name="fresh")
        assert model.active_adapters() == ["fresh"]
        assert not torch.equal(logits(model, input_ids), expected)
        model.set_adapter("task")
        assert torch.equal(logits(model, input_ids), expected)
        model.disable_adapters()
        assert not torch.equal(logits(model, input_ids), expected)
        model.enable_adapters()
        model.set_adapter("task")
        model.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(load(checkpoint), tmp_path / "again")
        assert_loaded(again, tuned, lambda model: logits(model, input_ids))
        model.delete_adapter("fresh")
        assert list(model.peft_config) == ["task"]

    def test_auto_model_from_an_adapter(self, tuned, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        kernel = GPTQConfig(bits=4, backend="gptq_torch")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kernel, dtype=torch.float32)
        assert_loaded(model.eval(), tuned, lambda model: logits(model, input_ids))


class TestCustomModels:
    def test_any_module_with_packed_layers(self, method):
        tuned = method.tuned(PlainMLP(), modules_to_save=["head"])
        tuned(torch.randn(3, 64)).sum().backward()
        assert all(p.grad.any() for p in method.parameters(tuned).values())
        assert tuned.peft_config["default"].base_quantization["checkpoint_format"] is None

    def test_inject_adapter_in_model(self, method):
        model = inject_adapter_in_model(method.config(), PlainMLP())
        assert isinstance(model.up, method.layer_class)
        expected = {f"{name}.{tensor}" for name in ("down", "up") for tensor in method.tensors}
        assert get_peft_model_state_dict(model).keys() == expected

    def test_nothing_is_built_on_nn_linear(self, method):
        with pytest.raises(ValueError, match="Sequential has none"):
            get_peft_model(nn.Sequential(nn.Linear(4, 4)), method.config())

    def test_mixed_batch_without_a_config(self, method):
        tuned = method.tuned(PlainMLP())
        x = torch.randn(2, 64)
        with torch.no_grad():
            mixed = tuned(x, adapter_names=["__base__", "default"])
            torch.testing.assert_close(mixed[1:], tuned(x[1:]))
            with tuned.disable_adapter():
                torch.testing.assert_close(mixed[:1], tuned(x[:1]))

    def test_repr(self, method):
        up = method.tuned(PlainMLP()).base_model.model.up
        assert repr(up).startswith(f"{method.name.lower()}.{method.layer_class.__name__}(")
