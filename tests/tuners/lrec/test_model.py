"""LREC through PEFT's public interface, on a model loaded as users load it."""

import copy

import peft
import pytest
import torch
from gptq_models import PACKED, PlainMLP, load, logits
from packaging.version import Version
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.utils.warning import PeftWarning

from peft_quant import LRECConfig, PEQAConfig, prepare_gptq_for_training
from peft_quant.tuners.lrec import LRECLinear


needs_peft_21 = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="PEFT 0.21 does this")


def config(**options):
    return LRECConfig(**{"task_type": "CAUSAL_LM", "r": 4, **options})


def adapt(model, **options):
    """A model with an adapter that changes it, as training would."""
    torch.manual_seed(0)
    return get_peft_model(model, config(init_lora_weights=False, **options)).eval()


def layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LRECLinear)}


@pytest.fixture
def tuned(model):
    return adapt(model)


class TestForward:
    @pytest.mark.parametrize("training", (False, True))
    def test_a_whole_model_compiles_without_graph_breaks(self, model, input_ids, training):
        tuned = adapt(model, lora_dropout=0.1)
        tuned.add_adapter("other", config(r=2, init_lora_weights=False))
        tuned.base_model.set_adapter(["default", "other"])
        model.model.layers = model.model.layers[:1]
        expected = logits(tuned, input_ids)
        with torch._dynamo.config.patch(disable=False):
            compiled = torch.compile(tuned.train(training), fullgraph=True, backend="aot_eager")
            actual = logits(compiled, input_ids, use_cache=False)
        if training:
            assert not torch.equal(actual, expected)  # dropout
        else:
            torch.testing.assert_close(actual, expected)

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
    def test_patterns_come_back(self, checkpoint, tmp_path, input_ids):
        patterns = {"rank_pattern": {r".*\.1\..*_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True}
        tuned = adapt(load(checkpoint), **patterns)
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path)
        assert {layer.r["default"] for layer in layers(loaded).values()} == {2, 4}
        assert torch.equal(logits(loaded, input_ids), logits(tuned, input_ids))

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

    @needs_peft_21
    def test_matrices_that_are_shards_are_warned_of(self, tuned, tmp_path):
        layer = layers(tuned)[f"base_model.model.{PACKED[0]}"]
        layer.lora_A["default"].weight.data = torch.zeros(32)
        with pytest.warns(PeftWarning, match="1 LoRA tensor.* have invalid shape.*DeepSpeed ZeRO-3 / FSDP shards"):
            tuned.save_pretrained(tmp_path)


class TestSeveralAdapters:
    @pytest.fixture
    def pair(self, tuned):
        tuned.add_adapter("other", config(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        return tuned.eval()

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


class TestMerge:
    @pytest.mark.parametrize("method", ("merge_adapter", "merge_and_unload"))
    def test_merging_is_refused_naming_the_way_out(self, tuned, input_ids, method):
        expected = logits(tuned, input_ids)
        with pytest.raises(ValueError, match=r"cannot be merged into a GPTQ model.*export_lora"):
            getattr(tuned, method)()
        assert torch.equal(logits(tuned, input_ids), expected)
        with pytest.raises(ValueError, match="cannot be merged"):
            next(iter(layers(tuned).values())).merge()

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
