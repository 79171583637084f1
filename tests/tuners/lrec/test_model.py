"""LREC through PEFT's public interface, on a model loaded as users load it."""

import copy

import peft
import pytest
import torch
from gptq_models import (
    DENSE_BYTES,
    PlainMLP,
    assert_loaded,
    forget_files,
    load,
    needs_native_adapters,
    save_tiny_llama,
    saved_for_backward,
    tiny_config,
)
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.save_and_load import get_base_model_state_dict
from peft.utils.warning import PeftWarning
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM

from peft_quant import LRECConfig, PEQAConfig, RepackedLayerError, prepare_gptq_for_training
from peft_quant.tuners.lrec import LRECLinear


needs_peft_21 = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="PEFT 0.21 does this")

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
    return LRECConfig(**{"task_type": "CAUSAL_LM", "r": 4, **options})


def adapt(model, **options):
    """A model with an adapter that changes it, as training would."""
    torch.manual_seed(0)
    return get_peft_model(model, config(init_lora_weights=False, **options)).eval()


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LRECLinear)}


def targets(model):
    return sorted(name.removeprefix("base_model.model.") for name in layers(model))


@torch.no_grad()
def logits(model, input_ids, **options):
    return model(input_ids=input_ids, **options).logits


@pytest.fixture
def tuned(model):
    return adapt(model)


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

    @pytest.mark.parametrize("target", (None, "all-linear"))
    def test_layers_to_transform(self, model, target):
        peft_model = get_peft_model(model, config(target_modules=target, layers_to_transform=[1]))
        assert targets(peft_model) == sorted(name for name in PACKED if ".1." in name)

    def test_a_float_layer_is_refused_before_anything_changes(self, model):
        with pytest.raises(ValueError, match=r"lm_head, a Linear without GPTQ-packed.*LREC cannot.*modules_to_save"):
            get_peft_model(model, config(target_modules=["lm_head", "q_proj"]))
        assert not layers(model)

    def test_a_name_that_matches_nothing_is_refused(self, model):
        with pytest.raises(ValueError, match="absent"):
            get_peft_model(model, config(target_modules=["absent"]))

    def test_a_float_model_is_refused(self):
        float_model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
        with pytest.raises(ValueError, match=r"LREC adapts GPTQ-packed layers, and LlamaForCausalLM has none"):
            get_peft_model(float_model, config())

    def test_a_repacked_model_without_files_is_refused_before_anything_changes(self, checkpoint, input_ids):
        model = forget_files(load(checkpoint, backend="auto"))
        logits(model, input_ids)
        with pytest.raises(RepackedLayerError, match=r'model\.layers\.0\.self_attn\.._proj.*backend="gptq_torch"'):
            get_peft_model(model, config())
        assert not layers(model)


class TestForward:
    def test_only_fp32_branches_train(self, model):
        peft_model = get_peft_model(model, config())
        trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        assert len(trainable) == 2 * len(PACKED)
        assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in trainable)
        assert all(p.dtype == torch.float32 for p in trainable.values())

    def test_the_layers_own_forward_is_never_called(self, tuned, input_ids, monkeypatch):
        for layer in layers(tuned).values():
            monkeypatch.setattr(type(layer.base_layer), "forward", None)
        logits(tuned, input_ids)
        with tuned.disable_adapter():
            logits(tuned, input_ids)

    @pytest.mark.parametrize("evaluate_first", (False, True))
    def test_every_tensor_gets_a_gradient(self, checkpoint, input_ids, evaluate_first):
        peft_model = adapt(load(checkpoint, backend="auto_trainable"))
        if evaluate_first:
            logits(peft_model.eval(), input_ids)
        peft_model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        assert all(p.grad.any() for p in peft_model.parameters() if p.requires_grad)

    def test_kbit_preparation(self, model, input_ids):
        peft_model = adapt(prepare_model_for_kbit_training(model))
        peft_model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        assert all(p.grad.any() for p in peft_model.parameters() if p.requires_grad)

    def test_autocast(self, tuned, input_ids):
        with torch.autocast("cpu", torch.bfloat16):
            low = logits(tuned, input_ids)
        expected = logits(tuned, input_ids)
        # 8 bits of mantissa through two blocks
        assert (low.float() - expected).norm() < 0.05 * expected.norm()

    @pytest.mark.parametrize("training", (False, True))
    def test_a_whole_model_compiles_without_graph_breaks(self, model, input_ids, training):
        tuned = adapt(model, lora_dropout=0.1)
        tuned.add_adapter("other", config(r=2, init_lora_weights=False))
        tuned.base_model.set_adapter(["default", "other"])
        expected = logits(tuned, input_ids)
        with torch._dynamo.config.patch(disable=False):
            compiled = torch.compile(tuned.train(training), fullgraph=True, backend="aot_eager")
            actual = logits(compiled, input_ids, use_cache=False)
        if training:
            assert not torch.equal(actual, expected)  # dropout
        else:
            torch.testing.assert_close(actual, expected)

    def test_less_is_saved_for_backward_than_lora_on_gptqmodel_saves(self, checkpoint, input_ids):
        kept = []
        for peft_config in (config(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PACKED)):
            peft_model = get_peft_model(load(checkpoint), peft_config)
            peft_model.enable_input_require_grads()
            kept.append(saved_for_backward(peft_model, input_ids))
        lrec, lora = kept
        assert lora > DENSE_BYTES
        assert lora - lrec > 0.9 * DENSE_BYTES

    def test_is_lora_on_prepared_layers(self, tuned, checkpoint, input_ids):
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PACKED)
        reference = get_peft_model(prepare_gptq_for_training(load(checkpoint)), lora).eval()
        reference.load_state_dict({name: t for name, t in tuned.state_dict().items() if "lora_" in name}, strict=False)
        torch.testing.assert_close(logits(tuned, input_ids), logits(reference, input_ids))

    def test_rescaling(self, tuned, input_ids):
        with tuned.disable_adapter():
            base = logits(tuned, input_ids)
        with rescale_adapter_scale(tuned, 0.0):
            assert torch.equal(logits(tuned, input_ids), base)
        assert not torch.equal(logits(tuned, input_ids), base)


class TestSaveAndLoad:
    def test_files_have_the_keys_of_lora(self, tuned, checkpoint, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        expected = {f"base_model.model.{name}.{matrix}.weight" for name in PACKED for matrix in ("lora_A", "lora_B")}
        assert saved.keys() == expected
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))
        assert not any(p.requires_grad for p in loaded.parameters())

    def test_patterns_come_back(self, checkpoint, tmp_path, input_ids):
        patterns = {"rank_pattern": {r".*\.1\..*_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True}
        tuned = adapt(load(checkpoint), **patterns)
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert {layer.r["default"] for layer in layers(loaded).values()} == {2, 4}
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

    @pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
    def test_low_memory_loading(self, tuned, checkpoint, tmp_path, input_ids, low_cpu_mem_usage):
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
        loaded.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        assert all(p.grad.any() for name, p in loaded.named_parameters() if "lora_" in name)

    def test_modules_to_save(self, model, checkpoint, tmp_path, input_ids):
        peft_model = adapt(model, modules_to_save=["lm_head"])
        with torch.no_grad():
            peft_model.get_output_embeddings().weight.mul_(0.5)
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(peft_model, input_ids))

    def test_trainable_tokens(self, model, checkpoint, tmp_path, input_ids):
        tokens = input_ids[0, :3].tolist()
        peft_model = adapt(model, trainable_token_indices=tokens)
        before = logits(peft_model, input_ids)
        (delta,) = (p for name, p in peft_model.named_parameters() if "trainable_tokens_delta" in name)
        assert delta.requires_grad
        with torch.no_grad():
            delta.mul_(2)
        assert not torch.equal(logits(peft_model, input_ids), before)
        peft_model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert torch.equal(logits(loaded, input_ids), logits(peft_model, input_ids))

    @pytest.mark.parametrize("options", ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 4]}))
    def test_tied_embeddings_stay_tied(self, checkpoint, tmp_path, options):
        def tied():
            model = load(checkpoint)
            model.config.tie_word_embeddings = True
            model.tie_weights()
            return model

        ids = torch.tensor([[3, 4, 5]])
        peft_model = adapt(tied(), ensure_weight_tying=True, **options)
        before = logits(peft_model, ids)
        (trained,) = (p for name, p in peft_model.named_parameters() if p.requires_grad and "lora_" not in name)
        with torch.no_grad():
            trained.mul_(2)
        after = logits(peft_model, ids)
        assert not torch.allclose(after[..., 3], before[..., 3])  # the head has the token's new embedding
        peft_model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(tied(), tmp_path), ids), after)

    def test_the_base_is_recorded(self, tuned):
        recorded = tuned.peft_config["default"].base_quantization
        assert (recorded["bits"], recorded["group_size"], len(recorded["fingerprint"])) == (4, 32, 64)

    @pytest.mark.parametrize("other", ({"bits": 8}, {"seed": 1}))
    def test_another_base_is_refused_naming_both(self, tuned, tmp_path, other):
        tuned.save_pretrained(tmp_path / "adapter")
        base = load(save_tiny_llama(tmp_path / "other", **other), bits=other.get("bits", 4))
        with pytest.raises(ValueError, match=r"expects \{'bits': 4.*this one is \{'bits': "):
            PeftModel.from_pretrained(base, tmp_path / "adapter")

    @needs_peft_21
    def test_matrices_that_are_shards_are_warned_of(self, tuned, tmp_path):
        layer = layers(tuned)[f"base_model.model.{PACKED[0]}"]
        layer.lora_A["default"].weight.data = torch.zeros(32)
        with pytest.warns(PeftWarning, match="1 LoRA tensor.* have invalid shape.*DeepSpeed ZeRO-3 / FSDP shards"):
            tuned.save_pretrained(tmp_path)

    def test_the_state_dict_of_the_base_has_the_keys_of_the_checkpoint(self, tuned, checkpoint):
        state, base = get_base_model_state_dict(tuned), load_file(checkpoint / "model.safetensors")
        assert state.keys() == base.keys()
        assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in base.items())


class TestSeveralAdapters:
    @pytest.fixture
    def pair(self, tuned):
        tuned.add_adapter("other", config(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        return tuned.eval()

    def outputs(self, pair, input_ids, names=("default", "other")):
        results = {}
        for name in names:
            pair.set_adapter(name)
            results[name] = logits(pair, input_ids)
        with pair.disable_adapter():
            results["__base__"] = logits(pair, input_ids)
        return results

    def test_an_inactive_adapter_is_frozen(self, pair):
        trainable = {name for name, p in pair.named_parameters() if p.requires_grad}
        assert trainable
        assert all(name.endswith(".default.weight") for name in trainable)

    @pytest.mark.parametrize(
        "combination",
        ("cat", pytest.param("svd", marks=needs_peft_21)),  # PEFT 0.20 applies the scaling twice
    )
    def test_two_active_are_their_exact_combination(self, pair, input_ids, combination):
        pair.base_model.set_adapter(["default", "other"])
        both = logits(pair, input_ids)
        pair.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination, svd_rank=6)
        pair.set_adapter("sum")
        torch.testing.assert_close(logits(pair, input_ids), both, rtol=1e-3, atol=1e-3)

    def test_linear_combination(self, pair):
        pair.add_adapter("third", config(init_lora_weights=False))
        pair.add_weighted_adapter(["default", "third"], [2.0, 0.5], "mix", "linear")
        for layer in layers(pair).values():
            factor = [(2.0 * layer.scaling["default"]) ** 0.5, (0.5 * layer.scaling["third"]) ** 0.5]
            for matrices in (layer.lora_A, layer.lora_B):
                expected = factor[0] * matrices["default"].weight + factor[1] * matrices["third"].weight
                torch.testing.assert_close(matrices["mix"].weight, expected)

    @pytest.mark.parametrize(
        "rules",
        (
            {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
            {"target_modules": ["up_proj"], "layers_to_transform": [1]},
            {"exclude_modules": ["q_proj"]},
            {"use_rslora": True},
            {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 5}},
        ),
    )
    def test_combining_adapters_of_unlike_options(self, pair, input_ids, rules):
        pair.add_adapter("third", config(init_lora_weights=False, **rules))
        configs = {name: copy.copy(pair.peft_config[name]) for name in ("third", "other")}
        pair.base_model.set_adapter(["third", "other"])
        both = logits(pair, input_ids)
        pair.add_weighted_adapter(["third", "other"], [1.0, 1.0], "sum", "cat")
        assert all(pair.peft_config[name] == given for name, given in configs.items())
        pair.set_adapter("sum")
        torch.testing.assert_close(logits(pair, input_ids), both, rtol=1e-3, atol=1e-3)

    def test_a_combination_is_saved_and_loaded(self, pair, checkpoint, tmp_path, input_ids):
        pair.add_weighted_adapter(["default", "other"], [1.0, -0.5], "mix", "svd")
        pair.set_adapter("mix")
        pair.save_pretrained(tmp_path, selected_adapters=["mix"])
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path / "mix")
        assert torch.equal(logits(loaded, input_ids), logits(pair, input_ids))

    @pytest.mark.parametrize("combination", ("cat", "linear", "svd"))
    def test_a_combination_keeps_nothing_but_its_matrices(self, pair, combination):
        pair.add_adapter("third", config(init_lora_weights=False))
        pair.add_weighted_adapter(["default", "third"], [1.0, -0.5], "mix", combination)
        for layer in layers(pair).values():
            for matrix in (layer.lora_A["mix"].weight, layer.lora_B["mix"].weight):
                assert matrix.is_contiguous()
                assert matrix.untyped_storage().nbytes() == matrix.nbytes

    def test_an_unknown_adapter_cannot_be_combined(self, pair):
        with pytest.raises(ValueError, match="absent does not exist"):
            pair.add_weighted_adapter(["default", "absent"], [1.0, 1.0], "new", "cat")
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

    def test_delete(self, pair, input_ids):
        results = self.outputs(pair, input_ids)
        pair.set_adapter("other")
        pair.delete_adapter("default")
        assert torch.equal(logits(pair, input_ids), results["other"])
        for layer in layers(pair).values():
            for attribute in ("lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha", "use_rslora"):
                assert "default" not in getattr(layer, attribute)

    def test_only_the_active_adapter_trains(self, pair, input_ids):
        pair.set_adapter("other")
        pair.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        for name, parameter in pair.named_parameters():
            assert ".other." not in name or parameter.grad.any()
            assert ".default." not in name or parameter.grad is None

    def test_status(self, pair):
        status = pair.get_model_status()
        assert (status.peft_types, status.available_adapters) == (
            {"default": "LREC", "other": "LREC"},
            ["default", "other"],
        )


class TestMerge:
    @pytest.mark.parametrize("method", ("merge_adapter", "merge_and_unload"))
    def test_merging_is_refused_naming_the_way_out(self, tuned, input_ids, method):
        expected = logits(tuned, input_ids)
        with pytest.raises(ValueError, match=r"cannot be merged into a GPTQ model.*export_lora"):
            getattr(tuned, method)()
        assert torch.equal(logits(tuned, input_ids), expected)
        with pytest.raises(ValueError, match="cannot be merged"):
            next(iter(layers(tuned).values())).merge()

    def test_unload_gives_the_base_back(self, tuned, checkpoint, tmp_path):
        base_model = tuned.unload()
        assert not layers(base_model)
        base_model.save_pretrained(tmp_path)
        saved, base = (load_file(directory / "model.safetensors") for directory in (tmp_path, checkpoint))
        assert saved.keys() == base.keys()
        assert all(torch.equal(saved[name], base[name]) for name in base)

    def test_conversion_to_lora(self, tuned):
        lora, state = convert_to_lora(tuned, rank=4)
        assert lora.r == 4
        for name, layer in layers(tuned).items():
            name = name.removeprefix("base_model.model.")
            product = state[f"base_model.model.{name}.lora_B.weight"] @ state[f"base_model.model.{name}.lora_A.weight"]
            torch.testing.assert_close(product, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-4)


class TestBesidePEQA:
    def test_on_a_model_with_merged_scales(self, model, input_ids):
        scales = get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
        expected = logits(scales, input_ids)
        peft_model = get_peft_model(scales.merge_and_unload(), config()).eval()
        assert torch.equal(logits(peft_model, input_ids), expected)

    @pytest.mark.parametrize(("below", "above"), ((PEQAConfig, LRECConfig), (LRECConfig, PEQAConfig)))
    def test_on_top_of_the_other_is_refused_before_anything_changes(self, below, above):
        model = inject_adapter_in_model(below(), PlainMLP())
        modules = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"up has adapters of another method.*unload\(\)"):
            inject_adapter_in_model(above(), model)
        assert [type(module) for module in model.modules()] == modules


class TestTransformersNative:
    @needs_native_adapters
    def test_add_load_switch_delete(self, tuned, checkpoint, tmp_path, input_ids):
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
    def test_any_module_with_packed_layers(self):
        peft_model = get_peft_model(PlainMLP(), LRECConfig(modules_to_save=["head"], init_lora_weights=False))
        peft_model(torch.randn(3, 64)).sum().backward()
        assert all(p.grad.any() for name, p in peft_model.named_parameters() if "lora_" in name)
        assert peft_model.peft_config["default"].base_quantization["checkpoint_format"] is None

    def test_inject_adapter_in_model(self):
        model = inject_adapter_in_model(LRECConfig(), PlainMLP())
        assert isinstance(model.up, LRECLinear)
        state = get_peft_model_state_dict(model)
        assert sorted(state) == [f"{name}.lora_{m}.weight" for name in ("down", "up") for m in "AB"]

    def test_nothing_is_built_on_nn_linear(self):
        with pytest.raises(ValueError, match="Sequential has none"):
            get_peft_model(nn.Sequential(nn.Linear(4, 4)), LRECConfig())

    def test_repr(self):
        peft_model = get_peft_model(PlainMLP(), LRECConfig())
        assert repr(peft_model.base_model.model.up).startswith("lrec.LRECLinear(")
