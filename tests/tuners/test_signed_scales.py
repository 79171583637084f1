"""Scales of either sign, as AutoRound writes them: trained, merged and kept on their side of zero."""

import json

import pytest
import torch
from gptq_models import PlainMLP, float_llama, load, save_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from quick_training import SETTINGS, sequences
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_quant import (
    LRECConfig,
    PEQAConfig,
    gptq,
    initialize_lrec_weights,
    merge_checkpoint,
    prepare_gptq_for_training,
)
from peft_quant.ops import reference
from peft_quant.tuners.peqa import PEQALinear


def peqa(**options):
    return PEQAConfig(task_type="CAUSAL_LM", **options)


@torch.no_grad()
def logits(model, input_ids):
    return model.eval()(input_ids=input_ids, use_cache=False).logits


def float_twin(directory):
    """The model whose linear weights are those that a checkpoint's tensors decode to, by the naive formula."""
    config = json.loads((directory / "config.json").read_text())
    declared = config["quantization_config"]
    tensors = load_file(directory / "model.safetensors")
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        packed = (tensors.pop(f"{name}.{part}") for part in gptq.PackedTensors._fields)
        offset = int(declared.get("checkpoint_format", "gptq") == "gptq")
        tensors[f"{name}.weight"] = reference.dequantize(*packed, declared["bits"], offset).t()
    model = float_llama()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    """A checkpoint as AutoRound writes it, not to be written to."""
    return save_tiny_llama(tmp_path_factory.mktemp("signed") / "llama", signed=True)


@pytest.mark.parametrize("act_order", (False, True))
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_outputs_and_gradients_are_those_of_the_formulas(bits, symmetric, act_order):
    torch.manual_seed(0)
    base = PlainMLP(bits, group_size=32, symmetric=symmetric, act_order=act_order, signed=True)
    layer = get_peft_model(base, PEQAConfig(init_weights=False)).base_model.model.up
    x, dy = torch.randn(5, 64, requires_grad=True), torch.randn(5, 96)
    y = layer(x)
    y.backward(dy)

    tensors = gptq.packed_tensors(layer.base_layer)
    scales = tensors.scales.float()
    assert (scales < 0).any() and (scales > 0).any()
    delta = layer.peqa_scales["default"]
    tuned = reference.round_scales(scales + delta.detach(), scales, torch.float16).float()
    assert not torch.equal(tuned, scales)
    centered = reference.centered_codes(tensors.qweight, tensors.qzeros, tensors.g_idx, bits, 1)
    weight = tuned[tensors.g_idx.long()] * centered
    # fp32 sums of at most 96 products in another order
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, reference.linear(x, weight), **close)
    torch.testing.assert_close(x.grad, reference.linear_grad_x(dy, weight), **close)
    expected = reference.linear_grad_scales(x.detach(), dy, centered, tensors.g_idx, len(scales))
    torch.testing.assert_close(delta.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_random_deltas_have_the_size_of_those_on_positive_scales(signed, checkpoint):
    sizes = []
    for base in (signed, checkpoint):
        torch.manual_seed(0)
        model = get_peft_model(load(base), peqa(init_weights=False))
        sizes.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]).std().item())
    # AutoRound spans 16 steps where the other packer spans 15
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@pytest.mark.parametrize("rate", (2e-3, 0.1))
def test_trained_and_merged_it_is_the_same_model_and_no_scale_crossed_zero(signed, tmp_path, input_ids, rate):
    """The smaller rate is a tenth of the smallest scale, the larger one that of a large one."""
    model = get_peft_model(load(signed), peqa())
    settings = TrainingArguments(tmp_path / "run", max_steps=3, learning_rate=rate, **SETTINGS)
    Trainer(model, settings, train_dataset=sequences()).train()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, input_ids)

    would_cross = [
        bool(((layer.base_scales + layer.peqa_scales["default"]).sign() != layer.base_scales.sign()).any())
        for layer in model.modules()
        if isinstance(layer, PEQALinear)
    ]
    assert set(would_cross) == {rate == 0.1}
    merge_checkpoint(signed, tmp_path / "adapter", tmp_path / "merged", allow_clamped_scales=rate == 0.1)
    model.merge_and_unload().save_pretrained(tmp_path / "in_memory")
    before, on_files, in_memory = (
        load_file(directory / "model.safetensors")
        for directory in (signed, tmp_path / "merged", tmp_path / "in_memory")
    )
    for name, tensor in before.items():
        assert torch.equal(on_files[name], in_memory[name]), name
        if name.endswith(".scales"):
            assert not torch.equal(on_files[name], tensor)
            assert torch.equal(on_files[name].sign(), tensor.sign())
        else:
            assert torch.equal(on_files[name], tensor)
    again = get_peft_model(load(tmp_path / "merged"), peqa())
    assert torch.equal(logits(again, input_ids), expected)


def test_two_adapters_add_up_and_come_off_again(signed, input_ids):
    torch.manual_seed(0)
    model = get_peft_model(load(signed), peqa(init_weights=False))
    model.add_adapter("other", peqa(init_weights=False))
    layers = [layer for layer in model.modules() if isinstance(layer, PEQALinear)]
    before = [layer.base_scales.clone() for layer in layers]
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        layers[0].peqa_scales["default"].sub_(1e3 * before[0])
    expected = logits(model, input_ids)
    model.merge_adapter()
    assert torch.equal(logits(model, input_ids), expected)
    merged = [layer.get_base_layer().scales for layer in layers]
    assert all(torch.equal(scales.sign(), base.sign()) for scales, base in zip(merged, before))
    assert (merged[0].abs() == 2.0**-24).all()  # the least of fp16
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().scales, base) for layer, base in zip(layers, before))


def test_other_methods_on_prepared_layers(signed, input_ids):
    expected = logits(float_twin(signed), input_ids)
    model = get_peft_model(
        prepare_gptq_for_training(load(signed)), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)
    )
    # fp32 sums in another order, through two blocks
    torch.testing.assert_close(logits(model, input_ids), expected, rtol=1e-4, atol=1e-4)


def test_a_low_rank_start_repairs(signed, input_ids):
    torch.manual_seed(0)
    model = get_peft_model(load(signed), LRECConfig(task_type="CAUSAL_LM", r=8))
    report = initialize_lrec_weights(model, float_llama(), "svd")
    assert all(row.weight_error_after < row.weight_error_before < 0.2 for row in report.layers)
    exact = logits(float_llama(), input_ids)
    repaired, plain = ((logits(m, input_ids) - exact).norm() for m in (model, float_twin(signed)))
    assert repaired < plain


class TestAutoRound:
    """Its auto_gptq export, as version 0.16.1 writes it."""

    @pytest.fixture(params=(False, True), ids=("in order", "act-order"))
    def exported(self, tmp_path, request):
        directory = save_tiny_llama(tmp_path / "exported", signed=True, act_order=request.param)
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = {
            "autoround_version": "0.16.1",
            "bits": 4,
            "damp_percent": 0.01,
            "data_type": "int",
            "desc_act": request.param,
            "enable_quanted_input": False,
            "group_size": 32,
            "lm_head": False,
            "provider": "auto-round",
            "quant_method": "gptq",
            "sym": True,
            "true_sequential": False,
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def test_it_loads_and_is_the_decoded_model(self, exported, input_ids):
        expected = logits(float_twin(exported), input_ids)
        model = load(exported)
        # gptqmodel forms scale * (q - z) in fp16: 2 ** -11 of each weight, through two blocks
        close = {"rtol": 0, "atol": 0.01 * expected.abs().max().item()}
        torch.testing.assert_close(logits(model, input_ids), expected, **close)
        adapted = logits(get_peft_model(model, peqa()), input_ids)
        # fp32 sums in another order, through two blocks
        torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)

    def test_an_adapter_comes_back_and_merges(self, exported, tmp_path, input_ids):
        model = get_peft_model(load(exported), peqa(init_weights=False))
        expected = logits(model, input_ids)
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(
            logits(PeftModel.from_pretrained(load(exported), tmp_path / "adapter"), input_ids), expected
        )
        merge_checkpoint(exported, tmp_path / "adapter", tmp_path / "merged")
        assert isinstance(load(tmp_path / "merged"), LlamaForCausalLM)
        twin = logits(float_twin(tmp_path / "merged"), input_ids)
        torch.testing.assert_close(expected, twin, rtol=1e-4, atol=1e-4)
