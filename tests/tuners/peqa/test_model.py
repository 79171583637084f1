"""PEQA through PEFT's public interface, on a model loaded as users load it."""

import copy
import shutil

import pytest
import torch
from gptq_models import PACKED, load, logits, save_tiny_llama
from peft import PeftModel, get_peft_model
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file

from peft_quant import PEQAConfig
from peft_quant.tuners.peqa import PEQALayer


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


@pytest.fixture
def tuned(model):
    return randomize(get_peft_model(model, config())).eval()


class TestForward:
    def test_deltas_are_zero_at_first(self, model):
        adapted = layers(get_peft_model(model, config()))
        assert len(adapted) == len(PACKED)
        assert not any(layer.peqa_scales["default"].any() for layer in adapted.values())

    def test_the_layers_own_forward_is_never_called_when_merged(self, tuned, input_ids, monkeypatch):
        for layer in layers(tuned).values():
            monkeypatch.setattr(type(layer.base_layer), "forward", None)
        tuned.merge_adapter()
        logits(tuned, input_ids)

    def test_a_whole_model_compiles_without_graph_breaks(self, model, input_ids):
        tuned = randomize(get_peft_model(model, config())).eval()
        model.model.layers = model.model.layers[:1]
        expected = logits(tuned, input_ids)
        with torch._dynamo.config.patch(disable=False):
            compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(logits(compiled, input_ids, use_cache=False), expected)


class TestSaveAndLoad:
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

    def test_adapters_with_regular_expressions(self, model, tmp_path):
        peft_model = get_peft_model(model, config(target_modules=r".*\.(q|v)_proj"))
        peft_model.add_adapter("other", config(target_modules=r".*\.0\..*_proj"))
        assert all("other" in layer.peqa_scales for name, layer in layers(peft_model).items() if ".0." in name)

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
            ((["default"], [1.0, 2.0], "new"), "1 adapters and 2 weights"),
        ),
    )
    def test_weighted_sum_bad_input(self, pair, arguments, message):
        with pytest.raises(ValueError, match=message):
            pair.add_weighted_adapter(*arguments)

    def test_mixed_batch_of_a_merged_model_is_refused(self, pair, input_ids):
        pair.merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            logits(pair, input_ids, adapter_names=["default", "default"])


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
