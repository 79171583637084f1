"""Numbers of `layer_changes` against dense, naive ones."""

import pytest
import torch
from gptq_models import PlainMLP, random_packed, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaForCausalLM

from peft_quant import LRECConfig, PEQAConfig
from peft_quant.gptq import PackedTensors
from peft_quant.gptq.layer import tensor_format
from peft_quant.inspection import cosine_similarities, layer_changes


LAYER = "model.layers.0.mlp.up_proj"
KEY = f"base_model.model.{LAYER}"


def base_of(packed):
    tensors = PackedTensors(**packed.tensors)
    return lambda name: (tensors, tensor_format(name, tensors, packed.zero_offset))


def low_rank(rank=4, columns=64, rows=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, rows), (columns, rank)))
    return {f"{KEY}.lora_A.weight": a, f"{KEY}.lora_B.weight": b}


def dense(tensors, scaling):
    return scaling * tensors[f"{KEY}.lora_B.weight"].double() @ tensors[f"{KEY}.lora_A.weight"].double()


class TestScales:
    @pytest.mark.parametrize("serving_dtype", [None, "bfloat16"])
    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_against_naive_loops(self, bits, signed, serving_dtype):
        packed = random_packed(bits, group_size=32, signed=signed)
        scales = packed.tensors["scales"]
        delta = torch.randn(scales.shape, generator=torch.Generator().manual_seed(1)) * scales.float() * 1e-3
        (row,) = layer_changes({f"{KEY}.peqa_scales": delta}, {"serving_dtype": serving_dtype}, base_of(packed))
        (without_base,) = layer_changes({f"{KEY}.peqa_scales": delta}, {"serving_dtype": serving_dtype})

        absolute = relative = changed = 0.0
        for s, d in zip(scales.flatten(), delta.flatten()):
            absolute += float(d) ** 2
            relative += (float(d) / float(s)) ** 2
            tuned, untuned = s.float() + d, s.float()
            if serving_dtype:
                tuned, untuned = tuned.bfloat16().float(), untuned.bfloat16().float()
            changed += tuned.half() != untuned.half()
        assert row.name == without_base.name == LAYER
        assert row.absolute == without_base.absolute == pytest.approx((absolute / scales.numel()) ** 0.5, rel=1e-9)
        # the quotient is rounded to fp32
        assert row.relative == pytest.approx((relative / scales.numel()) ** 0.5, rel=1e-6)
        assert row.stored == changed / scales.numel()
        assert 0 < row.stored < 1
        assert (without_base.relative, without_base.stored) == (None, None)
        assert row.values == scales.numel()

    def test_nothing_moved(self):
        packed = random_packed(4)
        zero = torch.zeros_like(packed.tensors["scales"], dtype=torch.float32)
        (row,) = layer_changes({f"{KEY}.peqa_scales": zero}, {"serving_dtype": "bfloat16"}, base_of(packed))
        assert (row.absolute, row.relative, row.stored) == (0, 0, 0)


class TestLowRank:
    @pytest.mark.parametrize("use_rslora", [False, True])
    @pytest.mark.parametrize("act_order", [False, True])
    def test_against_dense_matrices(self, act_order, use_rslora):
        packed = random_packed(4, group_size=32, act_order=act_order, symmetric=False)
        tensors = low_rank()
        (row,) = layer_changes(tensors, {"lora_alpha": 6, "use_rslora": use_rslora}, base_of(packed))
        scaling = 6 / 2 if use_rslora else 6 / 4
        change = dense(tensors, scaling)
        singular = torch.linalg.svdvals(change)
        assert row.absolute == pytest.approx(float(change.norm()), rel=1e-9)
        # the base decodes in fp32
        assert row.relative == pytest.approx(float(change.norm() / packed.weight.double().norm()), rel=1e-6)
        assert row.stable_rank == pytest.approx(float(change.norm() ** 2 / singular[0] ** 2), rel=1e-9)
        assert (row.rank, row.scaling, row.stored, row.values) == (4, scaling, None, 4 * (96 + 64))

    def test_alpha_of_single_layers(self):
        config = {"lora_alpha": 4, "alpha_pattern": {"mlp.up_proj": 12, "q_proj": 1}}
        assert layer_changes(low_rank(), config)[0].scaling == 3

    def test_a_branch_that_is_zero(self):
        tensors = low_rank()
        tensors[f"{KEY}.lora_B.weight"].zero_()
        (row,) = layer_changes(tensors, {"lora_alpha": 4})
        assert (row.absolute, row.stable_rank) == (0, None)

    def test_rank_one(self):
        tensors = {key: tensor / tensor.norm() for key, tensor in low_rank(rank=1).items()}
        (row,) = layer_changes(tensors, {"lora_alpha": 5})
        assert row.absolute == pytest.approx(5)
        assert row.stable_rank == pytest.approx(1)

    def test_a_gram_matrix_is_all_that_is_made(self, monkeypatch):
        sizes = []
        matmul = torch.Tensor.__matmul__
        monkeypatch.setattr(
            torch.Tensor, "__matmul__", lambda x, y: sizes.append((out := matmul(x, y)).shape) or out, raising=True
        )
        layer_changes(low_rank(), {"lora_alpha": 4})
        cosine_similarities(low_rank(), low_rank(8, seed=1), ({"lora_alpha": 4}, {"lora_alpha": 4}))
        assert sizes
        assert all(max(size) <= 8 for size in sizes)


class TestCosines:
    def test_of_low_rank_branches(self):
        first, second = low_rank(), low_rank(rank=7, seed=1)
        configs = ({"lora_alpha": 6}, {"lora_alpha": 3, "use_rslora": True})
        x, y = dense(first, 1.5).flatten(), dense(second, 3 / 7**0.5).flatten()
        cosines = cosine_similarities(first, second, configs)
        assert cosines.keys() == {LAYER, ""}
        assert cosines[LAYER] == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-9)

    def test_of_scales_over_layers(self):
        first, second = (
            {f"base_model.model.{name}.peqa_scales": torch.randn(2, 8) for name in names}
            for names in (("a", "b", "only_first"), ("b", "a", "only_second"))
        )
        cosines = cosine_similarities(first, second, ({}, {}))
        assert cosines.keys() == {"a", "b", ""}
        x, y = (
            torch.cat([tensors[f"base_model.model.{name}.peqa_scales"].double().flatten() for name in "ab"])
            for tensors in (first, second)
        )
        assert cosines[""] == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-9)

    def test_of_different_kinds_or_nothing(self):
        assert cosine_similarities(low_rank(), {f"{KEY}.peqa_scales": torch.ones(2, 8)}, ({"lora_alpha": 1}, {})) == {}
        zero = {f"{KEY}.peqa_scales": torch.zeros(2, 8)}
        assert cosine_similarities(zero, zero, ({}, {})) == {}


class TestLiveModels:
    @pytest.mark.parametrize("config", [PEQAConfig(init_weights=False), LRECConfig(init_lora_weights=False, r=4)])
    def test_an_adapted_model(self, config):
        base = PlainMLP(4, group_size=32)
        model = get_peft_model(base, config)
        layers = {name: model.base_model.model.get_submodule(name) for name in ("up", "down")}
        rows = layer_changes(
            get_peft_model_state_dict(model),
            model.peft_config["default"],
            lambda name: (layers[name].base_tensors(), layers[name].packed),
        )
        assert [row.name for row in rows] == ["up", "down"]
        for row in rows:
            layer = layers[row.name]
            if isinstance(config, PEQAConfig):
                scales = layer.base_scales.float()
                expected = float((layer.peqa_scales["default"].detach() / scales).square().mean().sqrt())
            else:
                expected = float(layer.get_delta_weight("default").detach().norm() / layer.get_base_weight().norm())
            assert row.relative == pytest.approx(expected, rel=1e-5)

    def test_lora_on_a_dense_model_and_other_tensors(self):
        config = LoraConfig(
            r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False
        )
        model = get_peft_model(LlamaForCausalLM(tiny_config()), config)
        assert isinstance(model, PeftModel)
        rows = layer_changes(get_peft_model_state_dict(model), config)
        assert [row.name for row in rows] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        delta = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").get_delta_weight("default")
        assert rows[1].absolute == pytest.approx(float(delta.detach().norm()), rel=1e-5)


class TestDamage:
    def test_half_a_branch(self):
        tensors = low_rank()
        del tensors[f"{KEY}.lora_B.weight"]
        with pytest.raises(ValueError, match="lora_B"):
            layer_changes(tensors, {"lora_alpha": 4})

    def test_ranks_that_do_not_fit(self):
        tensors = low_rank() | {f"{KEY}.lora_B.weight": torch.ones(64, 5)}
        with pytest.raises(ValueError, match=r"\(4, 96\) and \(64, 5\)"):
            layer_changes(tensors, {"lora_alpha": 4})

    def test_non_finite(self):
        with pytest.raises(ValueError, match=f"2 NaN or infinite values for {LAYER}"):
            layer_changes({f"{KEY}.peqa_scales": torch.tensor([[float("nan"), 1.0, float("inf")]])}, {})

    @pytest.mark.parametrize("tensors", [low_rank(rows=64), {f"{KEY}.peqa_scales": torch.zeros(2, 64)}])
    def test_another_base(self, tensors):
        with pytest.raises(ValueError, match="another base model"):
            layer_changes(tensors, {"lora_alpha": 4}, base_of(random_packed(4, group_size=32)))
