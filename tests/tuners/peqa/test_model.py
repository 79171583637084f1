"""PEQA through PEFT's public interface, on a model loaded as users load it."""

import copy
import shutil

import pytest
import torch
from gptq_models import (
    DENSE_BYTES,
    PlainMLP,
    forget_files,
    load,
    needs_native_adapters,
    save_tiny_llama,
    saved_for_backward,
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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig, LlamaForCausalLM

from peft_quant import PEQAConfig, RepackedLayerError
from peft_quant.tuners.peqa import PEQALayer, PEQALinear


PACKED = [
    f"model.layers.{block}.{name}"
    for block in (0, 1)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def config(**options):
    return PEQAConfig(task_type="CAUSAL_LM", **options)


def randomize(model, adapter="default", seed=0):
    """Give an adapter deltas of about a tenth of the scales, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            if adapter in layer.peqa_scales:
                noise = torch.randn(layer.peqa_scales[adapter].shape, generator=generator)
                layer.peqa_scales[adapter].copy_(noise * 0.1 * layer.base_scales.float())
    return model


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PEQALayer)}


def targets(model):
    return sorted(name.removeprefix("base_model.model.") for name in layers(model))


@torch.no_grad()
def logits(model, input_ids, **options):
    return model(input_ids=input_ids, **options).logits


@pytest.fixture
def tuned(model):
    return randomize(get_peft_model(model, config())).eval()


class TestTargets:
    @pytest.mark.parametrize("target", (None, "all-linear"))
    def test_every_packed_layer_by_default(self, model, target):
        assert targets(get_peft_model(model, config(target_modules=target))) == sorted(PACKED)

    def test_names_and_exclusions(self, model):
        peft_model = get_peft_model(
            model, config(target_modules=["q_proj", "v_proj"], exclude_modules=["model.layers.1.self_attn.v_proj"])
        )
        assert targets(peft_model) == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.q_proj",
        ]

    def test_regular_expression(self, model):
        assert targets(get_peft_model(model, config(target_modules=r".*\.0\.mlp\.(up|down)_proj"))) == [
            "model.layers.0.mlp.down_proj",
            "model.layers.0.mlp.up_proj",
        ]

    def test_layers_to_transform(self, model):
        peft_model = get_peft_model(model, config(layers_to_transform=[1]))
        assert targets(peft_model) == sorted(name for name in PACKED if ".1." in name)

    def test_a_float_layer_is_refused_before_anything_changes(self, model):
        with pytest.raises(ValueError, match=r"matches lm_head, a Linear without GPTQ-packed.*modules_to_save"):
            get_peft_model(model, config(target_modules=["lm_head", "q_proj"]))
        assert not layers(model)

    def test_a_name_that_matches_nothing_is_refused(self, model):
        with pytest.raises(ValueError, match="absent"):
            get_peft_model(model, config(target_modules=["absent"]))

    def test_a_float_model_is_refused(self):
        float_model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
        with pytest.raises(ValueError, match=r"has none\. Load a GPTQ checkpoint"):
            get_peft_model(float_model, config())

    def test_a_bitsandbytes_model_is_refused(self):
        float_model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
        float_model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        with pytest.raises(ValueError, match="is quantized with bitsandbytes"):
            get_peft_model(float_model, config())

    def test_a_repacked_model_without_files_is_refused_before_anything_changes(self, checkpoint, input_ids):
        model = forget_files(load(checkpoint, backend="auto"))
        logits(model, input_ids)
        with pytest.raises(RepackedLayerError, match=r'model\.layers\.0\.self_attn\.._proj.*backend="gptq_torch"'):
            get_peft_model(model, config())
        assert not layers(model)

    def test_a_mislabelled_zero_format_is_noticed(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama", checkpoint_format="gptq_v2")
        text = (directory / "config.json").read_text()
        (directory / "config.json").write_text(text.replace("gptq_v2", "gptq"))
        with pytest.warns(UserWarning, match="wrong zero point format"):
            get_peft_model(load(directory), config())


class TestForward:
    def test_only_fp32_deltas_train(self, model):
        peft_model = get_peft_model(model, config())
        trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        assert len(trainable) == len(PACKED)
        assert all(name.endswith(".peqa_scales.default") for name in trainable)
        assert all(p.dtype == torch.float32 and not p.any() for p in trainable.values())

    def test_the_layers_own_forward_is_never_called(self, tuned, input_ids, monkeypatch):
        for layer in layers(tuned).values():
            monkeypatch.setattr(type(layer.base_layer), "forward", None)
        logits(tuned, input_ids)
        with tuned.disable_adapter():
            logits(tuned, input_ids)
        tuned.merge_adapter()
        logits(tuned, input_ids)

    def test_gradients_after_an_evaluation_are_those_before(self, checkpoint, input_ids):
        gradients = []
        for evaluate_first in (False, True):
            peft_model = get_peft_model(load(checkpoint, backend="auto_trainable"), config())
            if evaluate_first:
                logits(peft_model.eval(), input_ids)
            peft_model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
            gradients.append([layer.peqa_scales["default"].grad for layer in layers(peft_model).values()])
        assert all(torch.equal(before, after) and before.any() for before, after in zip(*gradients))

    def test_kbit_preparation(self, model, input_ids):
        peft_model = get_peft_model(prepare_model_for_kbit_training(model), config())
        peft_model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        assert all(layer.peqa_scales["default"].grad.any() for layer in layers(peft_model).values())

    def test_autocast(self, tuned, input_ids):
        with torch.autocast("cpu", torch.bfloat16):
            low = logits(tuned, input_ids)
        # 8 bits of mantissa through two blocks
        torch.testing.assert_close(low.float(), logits(tuned, input_ids), rtol=0.1, atol=0.2)

    def test_a_whole_model_compiles_without_graph_breaks(self, tuned, input_ids):
        expected = logits(tuned, input_ids)
        with torch._dynamo.config.patch(disable=False):
            compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(logits(compiled, input_ids, use_cache=False), expected)

    def test_less_is_saved_for_backward_than_lora_on_gptqmodel_saves(self, checkpoint, input_ids):
        kept = []
        for peft_config in (config(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PACKED)):
            peft_model = get_peft_model(load(checkpoint), peft_config)
            peft_model.enable_input_require_grads()
            kept.append(saved_for_backward(peft_model, input_ids))
        peqa, lora = kept
        assert lora > DENSE_BYTES
        assert lora - peqa > 0.9 * DENSE_BYTES


class TestSaveAndLoad:
    def test_files_and_fresh_load(self, tuned, checkpoint, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert sorted(saved) == sorted(f"base_model.model.{name}.peqa_scales" for name in PACKED)
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))
        assert not any(p.requires_grad for p in loaded.parameters())

    @pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
    def test_low_memory_loading(self, tuned, checkpoint, tmp_path, input_ids, low_cpu_mem_usage):
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

    def test_auto_class(self, tuned, checkpoint, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        kernel = GPTQConfig(bits=4, backend="gptq_torch")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, quantization_config=kernel, dtype=torch.float32)
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

    def test_trainable_load_goes_on_training(self, tuned, checkpoint, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path, is_trainable=True)
        loaded.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        assert all(layer.peqa_scales["default"].grad.any() for layer in layers(loaded).values())

    def test_modules_to_save(self, model, checkpoint, tmp_path, input_ids):
        peft_model = randomize(get_peft_model(model, config(modules_to_save=["lm_head"]))).eval()
        with torch.no_grad():
            peft_model.get_output_embeddings().weight.mul_(0.5)
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(peft_model, input_ids))

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

    def test_nan_is_refused(self, tuned, checkpoint, tmp_path):
        layers(tuned)[f"base_model.model.{PACKED[3]}"].peqa_scales["default"].data[0, 0] = float("nan")
        tuned.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"o_proj.*1 NaN or infinite values"):
            PeftModel.from_pretrained(load(checkpoint), tmp_path)


class TestSeveralAdapters:
    @pytest.fixture
    def pair(self, tuned):
        tuned.add_adapter("other", config(target_modules=["q_proj", "down_proj"]))
        return randomize(tuned, "other", seed=1)

    def outputs(self, pair, input_ids):
        results = {}
        for name in ("default", "other"):
            pair.set_adapter(name)
            results[name] = logits(pair, input_ids)
        with pair.disable_adapter():
            results["__base__"] = logits(pair, input_ids)
        return results

    def test_adapters_with_regular_expressions(self, model, tmp_path):
        peft_model = get_peft_model(model, config(target_modules=r".*\.(q|v)_proj"))
        peft_model.add_adapter("other", config(target_modules=r".*\.0\..*_proj"))
        assert all("other" in layer.peqa_scales for name, layer in layers(peft_model).items() if ".0." in name)

    def test_an_inactive_adapter_is_frozen(self, pair):
        trainable = {name for name, p in pair.named_parameters() if p.requires_grad}
        assert trainable
        assert all(name.endswith(".default") for name in trainable)

    def test_two_active_add_their_deltas(self, pair, input_ids):
        with torch.no_grad():
            for layer in layers(pair).values():
                if "other" in layer.peqa_scales:
                    # half an fp32 unit is lost in a scale, but with another half it decides how fp16 rounds
                    _, exponents = layer.base_scales.float().frexp()
                    halves = torch.ldexp(torch.tensor(0.5), exponents - 24)
                    layer.peqa_scales["default"].copy_(halves)
                    layer.peqa_scales["other"].copy_(halves + torch.ldexp(torch.tensor(0.5), exponents - 11))
        pair.base_model.set_adapter(["default", "other"])
        both = logits(pair, input_ids)
        pair.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
        pair.set_adapter("sum")
        assert torch.equal(logits(pair, input_ids), both)

    def test_weighted_sum_is_linear_in_the_deltas(self, pair):
        pair.add_weighted_adapter(["default", "other"], [2.0, -1.0], "mix")
        for layer in layers(pair).values():
            expected = 2 * layer.peqa_scales["default"]
            if "other" in layer.peqa_scales:
                expected = expected - layer.peqa_scales["other"]
            torch.testing.assert_close(layer.peqa_scales["mix"], expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        (
            ((["default"], [1.0], "new", "svd"), "combination_type='svd'"),
            ((["absent"], [1.0], "new"), "'absent' does not exist"),
            ((["default"], [1.0, 2.0], "new"), "1 adapters and 2 weights"),
        ),
    )
    def test_weighted_sum_bad_input(self, pair, arguments, message):
        with pytest.raises(ValueError, match=message):
            pair.add_weighted_adapter(*arguments)

    def test_mixed_batch(self, pair, input_ids):
        results = self.outputs(pair, input_ids)
        names = ["other", "__base__", "default", "other"]
        batch = input_ids.repeat(2, 1)
        mixed = logits(pair, batch, adapter_names=names)
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
        pair.eval().merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            logits(pair, input_ids, adapter_names=["default", "default"])

    def test_delete(self, pair, input_ids):
        results = self.outputs(pair, input_ids)
        pair.set_adapter("other")
        pair.delete_adapter("default")
        assert torch.equal(logits(pair, input_ids), results["other"])
        assert not any(
            "default" in layer.peqa_scales or "default" in layer.serving_dtype for layer in layers(pair).values()
        )

    def test_only_the_active_adapter_trains(self, pair, input_ids):
        pair.set_adapter("other")
        pair.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        for layer in layers(pair).values():
            assert layer.peqa_scales["default"].grad is None
            assert "other" not in layer.peqa_scales or layer.peqa_scales["other"].grad.any()

    def test_status(self, pair):
        status = pair.get_model_status()
        assert (status.peft_types, status.available_adapters) == (
            {"default": "PEQA", "other": "PEQA"},
            ["default", "other"],
        )


def reload(directory, bits):
    """A merged checkpoint, its tensors where they were before: in PyTorch's own memory.

    In the mapping of its file, dense weights begin at other addresses, and their products may be summed in another
    order.
    """
    return copy.deepcopy(load(directory, bits))


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "act_order", "signed"), (
    (2, 32, False, False, False),
    (3, 64, True, True, False),
    (4, 32, True, False, False),
    (4, -1, False, False, False),
    (8, 32, True, True, False),
    (4, 32, True, False, True),
    (2, -1, False, True, True),
))  # fmt: skip
class TestMerge:
    @pytest.fixture
    def tuned(self, tmp_path, bits, group_size, symmetric, act_order, signed):
        self.base = save_tiny_llama(tmp_path / "base", bits, group_size, symmetric, act_order, signed=signed)
        return randomize(get_peft_model(load(self.base, bits), config())).eval()

    def test_merging_changes_no_bit_and_comes_back(self, tuned, input_ids):
        expected = logits(tuned, input_ids)
        before = {name: layer.base_scales.clone() for name, layer in layers(tuned).items()}
        tuned.merge_adapter()
        assert torch.equal(logits(tuned, input_ids), expected)
        assert not any(
            torch.equal(layer.get_base_layer().scales, before[name]) for name, layer in layers(tuned).items()
        )
        tuned.unmerge_adapter()
        assert all(torch.equal(layer.get_base_layer().scales, before[name]) for name, layer in layers(tuned).items())
        assert torch.equal(logits(tuned, input_ids), expected)

    def test_reloaded_under_a_fresh_adapter_gives_the_same_bits(self, tuned, tmp_path, input_ids, bits):
        expected = logits(tuned, input_ids)
        tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
        again = get_peft_model(reload(tmp_path / "merged", bits), config()).eval()
        assert torch.equal(logits(again, input_ids), expected)

    def test_reloaded_through_gptqmodels_own_layers(self, tuned, tmp_path, input_ids, bits):
        expected = logits(tuned, input_ids)
        merged = tuned.merge_and_unload()
        assert not layers(merged)
        in_memory = logits(merged, input_ids)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = logits(reload(tmp_path / "merged", bits), input_ids)
        assert torch.equal(reloaded, in_memory)
        # gptqmodel forms scale * (q - z) in fp16: 2 ** -11 of each weight, through two blocks
        torch.testing.assert_close(reloaded, expected, rtol=0, atol=0.01 * expected.abs().max().item())

    def test_a_save_in_the_middle_leaves_training_as_it_was(self, tuned, tmp_path, input_ids, bits):
        expected = logits(tuned, input_ids)
        tuned.merge_adapter()
        shutil.copytree(self.base, tmp_path / "merged")
        save_file(get_base_model_state_dict(tuned), tmp_path / "merged" / "model.safetensors")
        tuned.unmerge_adapter()
        assert torch.equal(logits(tuned, input_ids), expected)
        again = get_peft_model(reload(tmp_path / "merged", bits), config()).eval()
        assert torch.equal(logits(again, input_ids), expected)


class TestMergeOfSeveral:
    def test_deltas_add_up_before_the_one_rounding(self, tuned, input_ids):
        tuned.add_adapter("other", config())
        randomize(tuned, "other", seed=1)
        tuned.base_model.set_adapter(["default", "other"])
        expected = logits(tuned, input_ids)
        tuned.merge_adapter(adapter_names=["default"])
        with pytest.warns(UserWarning, match="additionally merging other"):
            tuned.merge_adapter(adapter_names=["other"])
        assert torch.equal(logits(tuned, input_ids), expected)
        tuned.unmerge_adapter()
        assert torch.equal(logits(tuned, input_ids), expected)

    def test_disabling_unmerges(self, tuned, input_ids):
        with tuned.disable_adapter():
            base = logits(tuned, input_ids)
        tuned.merge_adapter()
        with tuned.disable_adapter():
            assert torch.equal(logits(tuned, input_ids), base)

    def test_unload_gives_the_base_back(self, tuned, checkpoint, tmp_path):
        tuned.unload().save_pretrained(tmp_path)
        saved, base = (load_file(directory / "model.safetensors") for directory in (tmp_path, checkpoint))
        assert saved.keys() == base.keys()
        assert all(torch.equal(saved[name], base[name]) for name in base)

    def test_nan_is_never_merged(self, tuned):
        *_, last = layers(tuned).values()
        last.peqa_scales["default"].data[0, 0] = float("inf")
        before = [layer.base_scales.clone() for layer in layers(tuned).values()]
        with pytest.raises(ValueError, match=r"adapter 'default' of model\.layers\.1.* holds 1 NaN or infinite"):
            tuned.merge_adapter()
        for layer, scales in zip(layers(tuned).values(), before):
            assert torch.equal(layer.get_base_layer().scales, scales)
            assert not layer.merged
        with pytest.raises(ValueError, match="adapter 'default' of layer holds 1 NaN or infinite"):
            last.merge()
        assert not last.merged

    def test_the_training_kernel_is_not_forced_on_who_serves(self, tuned, tmp_path):
        tuned.merge_and_unload().save_pretrained(tmp_path)
        assert '"backend": "auto"' in (tmp_path / "config.json").read_text()

    def test_serving_in_bf16_changes_nothing(self, model, tmp_path, input_ids):
        tuned = randomize(get_peft_model(model, config(serving_dtype="bfloat16"))).eval()
        tuned.merge_and_unload().save_pretrained(tmp_path)
        scales = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.scales"]
        assert torch.equal(scales.bfloat16().half(), scales)

    def test_conversion_to_lora_is_declined(self, tuned):
        assert not tuned.supports_lora_conversion()


class TestTransformersNative:
    @needs_native_adapters
    def test_add_load_switch_delete(self, tuned, checkpoint, tmp_path, input_ids):
        expected = logits(tuned, input_ids)
        tuned.save_pretrained(tmp_path)
        model = load(checkpoint)
        model.load_adapter(str(tmp_path), adapter_name="task")
        assert torch.equal(logits(model, input_ids), expected)
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
        assert torch.equal(logits(again, input_ids), expected)
        model.delete_adapter("fresh")
        assert list(model.peft_config) == ["task"]

    def test_auto_model_from_an_adapter(self, tuned, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        kernel = GPTQConfig(bits=4, backend="gptq_torch")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kernel, dtype=torch.float32)
        assert torch.equal(logits(model.eval(), input_ids), logits(tuned, input_ids))


class TestCustomModels:
    def test_any_module_with_packed_layers(self):
        peft_model = get_peft_model(PlainMLP(), PEQAConfig(modules_to_save=["head"]))
        x = torch.randn(3, 64)
        peft_model(x).sum().backward()
        assert all(layer.peqa_scales["default"].grad.any() for layer in layers(peft_model).values())
        assert peft_model.peft_config["default"].base_quantization["checkpoint_format"] is None

    def test_inject_adapter_in_model(self):
        model = inject_adapter_in_model(PEQAConfig(), PlainMLP())
        assert isinstance(model.up, PEQALinear)
        state = get_peft_model_state_dict(model)
        assert sorted(state) == ["down.peqa_scales", "up.peqa_scales"]

    def test_nothing_is_built_on_nn_linear(self):
        with pytest.raises(ValueError, match="Sequential has none"):
            get_peft_model(nn.Sequential(nn.Linear(4, 4)), PEQAConfig())

    def test_mixed_batch_without_a_config_and_repr(self):
        peft_model = get_peft_model(PlainMLP(), PEQAConfig())
        x = torch.randn(2, 64)
        with torch.no_grad():
            mixed = peft_model.eval()(x, adapter_names=["__base__", "default"])
            torch.testing.assert_close(mixed, peft_model(x))
        assert repr(peft_model.base_model.model.up).startswith("peqa.PEQALinear(")
