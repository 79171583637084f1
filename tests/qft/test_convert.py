"""Models to int8: which weights, and from which sources."""

import pytest
import torch
from gptq_models import PlainLayer, PlainMLP, float_llama, load, random_packed, save_tiny_llama, tiny_config
from qft_models import int8_llama
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from peft_quant import Int8Weight, QFTConfig, RepackedLayerError, convert_to_int8
from peft_quant.qft.policy import POLICY


def int8_names(model):
    return {name for name, p in model.named_parameters() if isinstance(p, Int8Weight)}


class TestPolicy:
    def test_a_llama(self):
        model = int8_llama()
        linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}
        assert int8_names(model) == linear
        assert len(linear) == 14
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("tied", (False, True))
    def test_embeddings_on_demand(self, tied):
        model = int8_llama(QFTConfig(embeddings=True), tie_word_embeddings=tied)
        assert "model.embed_tokens.weight" in int8_names(model)
        # a head of its own stays in float; a tied one is the same parameter
        assert isinstance(model.lm_head.weight, Int8Weight) == tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    def test_routers_stay(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
        qwen = convert_to_int8(
            Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **experts, vocab_size=64, intermediate_size=32))
        )
        names = int8_names(qwen)
        assert "model.layers.0.mlp.shared_expert.up_proj.weight" in names
        assert not {name for name in names if name.endswith((".gate.weight", "shared_expert_gate.weight"))}
        mixtral = convert_to_int8(
            MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=64, intermediate_size=32, num_local_experts=4))
        )
        assert int8_names(mixtral) == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"}

    def test_more_on_demand(self):
        model = int8_llama(QFTConfig(modules_to_not_convert=["down_proj", "model.layers.1"]))
        assert len(int8_names(model)) == 6

    @pytest.mark.parametrize(
        ("model", "config", "message"),
        (
            (nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), None, "Sequential has no linear layer to hold"),
            (nn.Sequential(nn.Linear(4, 4)), QFTConfig(modules_to_not_convert=["0"]), "no linear layer .* beside"),
        ),
        ids=str,
    )
    def test_no_linear_layer(self, model, config, message):
        with pytest.raises(ValueError, match=message):
            convert_to_int8(model, config)

    def test_every_rule_has_a_role(self):
        assert [rule.role for rule in POLICY] == ["head", "router", "linear layer", "embedding"]


class TestFloatModels:
    def test_a_row_is_off_by_half_a_step_at_most(self):
        before = float_llama()
        expected = {name: p.detach().clone() for name, p in before.named_parameters()}
        model = convert_to_int8(before)
        assert model is before
        for name, p in model.named_parameters():
            if isinstance(p, Int8Weight):
                assert p.outlier_values.shape[1] == round(0.01 * p.shape[1])
                error = (p.dequantize() - expected[name]).abs()
                assert (error <= p.scales * 0.5001).all()
            else:
                assert torch.equal(p, expected[name])

    def test_conv1d(self, input_ids):
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=16)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        expected = model(input_ids).logits
        convert_to_int8(model)
        assert len(int8_names(model)) == 4
        logits = model(input_ids).logits
        assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
        logits.square().sum().backward()
        assert all(p.grad.shape == p.shape and p.grad.isfinite().all() for p in model.parameters())

    def test_weights_shared_by_layers_stay_shared(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[2].weight = model[0].weight
        convert_to_int8(model)
        assert model[2].weight is model[0].weight
        assert model[1].weight is not model[0].weight
        assert isinstance(model[2].weight, Int8Weight)

    def test_a_module_around_a_model_of_transformers(self):
        vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
        model = LlavaModel(LlavaConfig(text_config=tiny_config(), vision_config=vision))
        around = nn.ModuleDict({"model": model})
        around.config = model.config
        names = int8_names(convert_to_int8(around))
        assert len(names) == 14 + 6 + 2  # of both towers, and between them

    def test_frozen_ones_stay_frozen(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].weight.requires_grad_(False)
        convert_to_int8(model)
        assert [layer.weight.requires_grad for layer in model] == [False, True]

    def test_nan_is_named(self):
        model = float_llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj cannot be held in int8: .* NaN"):
            convert_to_int8(model)

    def test_twice(self):
        with pytest.raises(ValueError, match="holds its weights in int8 already"):
            convert_to_int8(int8_llama())

    def test_another_quantization(self):
        model = float_llama()
        model.quantization_method = "bitsandbytes"
        with pytest.raises(ValueError, match="quantized with bitsandbytes"):
            convert_to_int8(model)

    @pytest.mark.parametrize("ratio", (-0.1, 0.6, float("nan")))
    def test_a_ratio_out_of_range(self, ratio):
        with pytest.raises(ValueError, match="outlier_ratio="):
            QFTConfig(outlier_ratio=ratio)


class TestGPTQ:
    @pytest.mark.parametrize(
        ("group_size", "groups", "checkpoint_format", "signed"),
        (
            (-1, 1, "gptq", False),
            (-1, 1, "gptq_v2", False),
            (32, 2, "gptq", False),
            (32, 2, "gptq_v2", False),
            (-1, 1, "gptq", True),
            (32, 2, "gptq", True),
        ),
    )
    def test_8_bit_integers_are_taken_as_they_are(
        self, tmp_path, input_ids, group_size, groups, checkpoint_format, signed
    ):
        path = save_tiny_llama(tmp_path / "base", 8, group_size, checkpoint_format=checkpoint_format, signed=signed)
        model = load(path, bits=8)
        expected = model(input_ids).logits
        scales = model.model.layers[0].mlp.up_proj.scales.t().float()
        convert_to_int8(model)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert torch.equal(weight.scales, scales)
        assert bool((scales < 0).any()) == signed
        assert (weight.scales.shape[1], weight.outlier_columns) == (groups, None)
        assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
        # the other side computes in 16 bits, as GPTQ's kernel does
        assert (model(input_ids).logits - expected).abs().max() < 5e-3 * expected.abs().max()
        assert model.config.quantization_config.quant_method == "qft"

    def test_decoded_weights_lie_as_those_of_a_float_model_do(self, checkpoint):
        model = convert_to_int8(load(checkpoint), QFTConfig(outlier_ratio=0.0))
        weight = model.model.layers[0].mlp.up_proj.weight
        assert all(part.is_contiguous() for part in weight.parts.values())

    @pytest.mark.parametrize("signed", (False, True))
    @pytest.mark.parametrize("layer_bias", (False, True))
    def test_codes(self, layer_bias, signed):
        packed = random_packed(8, signed=signed)
        model = nn.Sequential(PlainLayer(packed, torch.arange(64.0) if layer_bias else None), nn.Linear(64, 8))
        convert_to_int8(model)
        weight = model[0].weight
        assert torch.equal(weight.codes.int(), (packed.codes - 128).t().int())
        assert torch.equal(weight.dequantize(), packed.weight.t())
        assert (model[0].bias is not None) == layer_bias
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize(
        ("bits", "options"),
        (
            (4, {"group_size": 32}),
            (3, {"group_size": 32}),
            (8, {"group_size": 32, "symmetric": False}),
            (8, {"group_size": 32, "act_order": True}),
            (8, {"group_size": 64}),
            (4, {"group_size": 32, "signed": True}),
            (8, {"group_size": 32, "symmetric": False, "signed": True}),
        ),
        ids=str,
    )
    def test_others_are_decoded_and_encoded_again(self, bits, options):
        packed = random_packed(bits, **options)
        model = nn.Sequential(PlainLayer(packed), nn.Linear(64, 8))
        convert_to_int8(model)
        weight = model[0].weight
        assert weight.scales.shape == (64, 1)
        assert weight.outlier_values.shape == (64, 1)
        assert ((weight.dequantize() - packed.weight.t()).abs() <= weight.scales * 0.5001).all()

    def test_a_repacked_layer_is_refused_and_nothing_changed(self):
        model = PlainMLP()
        model.down.linear_mode = "inference"
        with pytest.raises(RepackedLayerError, match="down"):
            convert_to_int8(model)
        assert isinstance(model.up, PlainLayer)
