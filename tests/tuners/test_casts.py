"""Casts of a whole model: the scales of its GPTQ layers stay what the checkpoint has."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from gptq_models import PlainLayer, PlainMLP, forget_files, load, random_packed
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from quick_training import SETTINGS, sequences
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_quant import (
    LRECConfig,
    PEQAConfig,
    convert_to_int8,
    gptq,
    merge_checkpoint,
    prepare_gptq_for_training,
    restore_gptq_forward,
)
from peft_quant.tuners.peqa import PEQALinear


CONFIGS = {
    "PEQA": lambda **options: PEQAConfig(task_type="CAUSAL_LM", init_weights=False, **options),
    "LREC": lambda **options: LRECConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **options),
}
CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "within": lambda model: model.base_model.model.model.to(torch.bfloat16) and model,
    "layer by layer": lambda model: [layer.bfloat16() for layer in adapted(model)] and model,
}


def adapted(model):
    return [layer for layer in model.modules() if hasattr(layer, "kept_from_casts")]


def scales(model):
    return {name: m.scales.clone() for name, m in model.named_modules() if gptq.is_packed(m)}


def same_scales(model, before):
    now = scales(model)
    assert now.keys() == before.keys()
    return all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]) for name, tensor in now.items()
    )


def with_rotary_of(model, other):
    """A cast rounds the frequencies of positions too, which a model that is loaded has in fp32."""
    llama, other = (
        next(m for m in whole.modules() if isinstance(m, LlamaForCausalLM)).model for whole in (model, other)
    )
    llama.rotary_emb = other.rotary_emb
    return model


@torch.no_grad()
def logits(model, input_ids):
    return model.eval()(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(params=CONFIGS)
def method(request):
    return CONFIGS[request.param]


@pytest.fixture
def tuned(model, method):
    torch.manual_seed(0)
    return get_peft_model(model, method())


class TestScales:
    @pytest.mark.parametrize("cast", CASTS)
    def test_keep_dtype_and_values(self, tuned, cast):
        before = scales(tuned)
        CASTS[cast](tuned)
        assert same_scales(tuned, before)

    @pytest.mark.parametrize("cast", ("float", "double"))
    def test_in_more_bits_too(self, tuned, input_ids, cast):
        before, expected = scales(tuned), logits(tuned, input_ids)
        getattr(tuned, cast)()
        assert same_scales(tuned, before)
        # products of packed weights are in fp32 whatever the model computes in
        torch.testing.assert_close(logits(tuned, input_ids).float(), expected, rtol=1e-4, atol=1e-4)

    def test_of_layers_without_an_adapter(self, model, method):
        tuned = get_peft_model(model, method(target_modules=["q_proj"]))
        before = scales(tuned)
        tuned.bfloat16()
        assert len(before) == 14 > len(adapted(tuned))
        assert same_scales(tuned, before)

    def test_under_an_injected_adapter(self, model, method):
        injected = inject_adapter_in_model(method(), model)
        before = scales(injected)
        injected.bfloat16()
        assert same_scales(injected, before)

    def test_that_are_parameters(self):
        base = PlainMLP()
        values = base.up.scales.clone()
        del base.up.scales
        base.up.scales = nn.Parameter(values.clone(), requires_grad=False)
        tuned = get_peft_model(base, PEQAConfig()).bfloat16()
        layer = tuned.base_model.model.up.base_layer
        assert isinstance(layer.scales, nn.Parameter)
        assert layer.scales.dtype == torch.float16
        assert torch.equal(layer.scales, values)

    def test_move(self, tuned):
        before = scales(tuned)
        tuned.to("meta", torch.bfloat16)
        assert all(tensor.is_meta and tensor.dtype == torch.float16 for tensor in scales(tuned).values())
        tuned.to_empty(device="cpu")
        assert {name: (t.device.type, t.dtype, t.shape) for name, t in scales(tuned).items()} == {
            name: ("cpu", torch.float16, tensor.shape) for name, tensor in before.items()
        }

    def test_after_unloading_nothing_is_special(self, tuned):
        base = tuned.unload()
        assert {tensor.dtype for tensor in scales(base.bfloat16()).values()} == {torch.bfloat16}


class TestTheCastModel:
    @pytest.mark.parametrize(("cast", "dtype"), (("to", torch.bfloat16), ("half", torch.float16)))
    def test_is_the_model_loaded_in_that_dtype(self, tuned, checkpoint, tmp_path, input_ids, cast, dtype):
        tuned.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(checkpoint, dtype=dtype), tmp_path)
        cast_model = with_rotary_of(CASTS[cast](tuned), loaded)
        assert torch.equal(logits(cast_model, input_ids), logits(loaded, input_ids))

    def test_takes_further_adapters_of_its_base(self, tuned, tmp_path, input_ids):
        tuned.save_pretrained(tmp_path)
        tuned.bfloat16()
        tuned.load_adapter(tmp_path, "again")
        expected = logits(tuned, input_ids)
        tuned.set_adapter("again")
        assert torch.equal(logits(tuned, input_ids), expected)

    def test_copies_and_compiles(self, tuned, input_ids):
        tuned.bfloat16()
        expected = logits(tuned, input_ids)
        assert torch.equal(logits(copy.deepcopy(tuned), input_ids), expected)
        with torch._dynamo.config.patch(disable=False):
            compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(logits(compiled, input_ids), expected)

    def test_adapters_of_lrec_are_cast_as_those_of_lora_are(self, model):
        tuned = get_peft_model(model, CONFIGS["LREC"]()).bfloat16()
        assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}


class TestPEQA:
    @pytest.fixture
    def tuned(self, model):
        torch.manual_seed(0)
        return get_peft_model(model, CONFIGS["PEQA"]())

    def deltas(self, model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if "peqa_scales" in name}

    def test_deltas_keep_dtype_values_and_gradients(self, tuned, input_ids):
        tuned.train()(input_ids=input_ids, labels=input_ids).loss.backward()
        before = self.deltas(tuned)
        gradients = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
        assert gradients.keys() == before.keys()
        tuned.bfloat16()
        for name, p in tuned.named_parameters():
            if name in before:
                assert p.dtype == p.grad.dtype == torch.float32
                assert torch.equal(p, before[name])
                assert torch.equal(p.grad, gradients[name])
            else:
                assert p.dtype == torch.bfloat16
        torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3).step()
        assert all(not torch.equal(delta, before[name]) for name, delta in self.deltas(tuned).items())

    def test_what_is_saved_and_merged_is_what_was_trained(self, tuned, checkpoint, tmp_path):
        tuned.save_pretrained(tmp_path / "before")
        tuned.half().save_pretrained(tmp_path / "after")
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        merge_checkpoint(checkpoint, tmp_path / "after", tmp_path / "merged")
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        in_memory = scales(tuned.merge_and_unload())
        assert all(torch.equal(tensor, merged[f"{name}.scales"]) for name, tensor in in_memory.items())

    def test_a_cast_between_merging_and_unmerging(self, tuned):
        before = scales(tuned)
        tuned.merge_adapter()
        merged = scales(tuned)
        assert not same_scales(tuned, before)
        tuned.bfloat16()
        assert same_scales(tuned, merged)
        tuned.unmerge_adapter()
        assert same_scales(tuned, before)


class TestPreparedLayers:
    def test_keep_their_scales(self, model, input_ids):
        tuned = get_peft_model(
            prepare_gptq_for_training(model), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        )
        before = scales(tuned)
        tuned.bfloat16()
        assert same_scales(tuned, before)
        assert logits(tuned, input_ids).dtype == torch.bfloat16
        restore_gptq_forward(tuned).half()
        assert {tensor.dtype for tensor in scales(tuned).values()} == {torch.float16}
        assert not same_scales(tuned.bfloat16(), before)

    def test_are_those_of_the_model_loaded_in_that_dtype(self, model, checkpoint, input_ids):
        loaded = prepare_gptq_for_training(load(checkpoint, dtype=torch.bfloat16))
        cast = with_rotary_of(prepare_gptq_for_training(model).bfloat16(), loaded)
        assert torch.equal(logits(cast, input_ids), logits(loaded, input_ids))


class TestEvaluationIn16Bits:
    @pytest.mark.parametrize("option", ("bf16_full_eval", "fp16_full_eval"))
    def test_by_the_trainer(self, tuned, method, tmp_path, option):
        before = scales(tuned)
        arguments = TrainingArguments(tmp_path / "run", max_steps=2, learning_rate=1e-3, **SETTINGS, **{option: True})
        run = Trainer(tuned, arguments, train_dataset=sequences(), eval_dataset=sequences(4))
        run.train()
        trained = {name: p.detach().clone() for name, p in tuned.named_parameters() if p.requires_grad}
        run.evaluate()
        assert tuned.base_model.model.dtype in (torch.bfloat16, torch.float16)
        assert same_scales(tuned, before)
        if method is CONFIGS["PEQA"]:
            assert all(torch.equal(tuned.get_parameter(name), value) for name, value in trained.items())

    @pytest.fixture
    def own_state(self):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    def test_by_accelerate(self, tuned, input_ids, own_state):
        before = scales(tuned)
        with torch.autocast("cpu", torch.bfloat16):
            expected = logits(tuned, input_ids)
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(tuned)
        assert torch.equal(logits(prepared, input_ids), expected.float())
        assert same_scales(prepared, before)


class TestCastsThatReachTheScales:
    """Of the base before there is an adapter, and of its layers behind the adapter's back."""

    def test_a_layer_alone(self, tuned, input_ids):
        adapted(tuned)[3].base_layer.bfloat16()
        with pytest.raises(ValueError, match=r"cast from torch.float16 to torch.bfloat16.*with the adapter on"):
            logits(tuned, input_ids)

    def test_a_layer_that_was_read(self):
        layer = PlainLayer(random_packed(4))
        packed = gptq.read_format(layer)
        layer.bfloat16()
        for use in (lambda: gptq.linear(layer, packed, torch.ones(1, 96)), lambda: gptq.dequantize(layer, packed)):
            with pytest.raises(ValueError, match="The scales of a PlainLayer were cast"):
                use()

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
    @pytest.mark.parametrize(
        "use",
        (
            lambda model: get_peft_model(model, PEQAConfig()),
            lambda model: get_peft_model(model, LRECConfig()),
            prepare_gptq_for_training,
            convert_to_int8,
        ),
        ids=("PEQA", "LREC", "prepared", "QFT"),
    )
    def test_before(self, use, dtype):
        model = PlainMLP().to(dtype)
        with pytest.warns(
            UserWarning, match=rf"scales of up and 1 more layers are {dtype}.*checkpoints have torch\.f"
        ):
            use(model)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    def test_loading_in_a_dtype_casts_no_scale(self, checkpoint, method, dtype):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The scales of")
            tuned = get_peft_model(load(checkpoint, dtype=dtype), method())
        assert same_scales(tuned, scales(get_peft_model(load(checkpoint), method())))

    def test_before_an_adapter_is_loaded(self, tuned, checkpoint, tmp_path):
        tuned.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"scales of .* are torch\.bfloat16 in memory and torch\.float16 in"):
            PeftModel.from_pretrained(load(checkpoint).bfloat16(), tmp_path)
        with (
            pytest.warns(UserWarning, match="The scales of"),
            pytest.raises(ValueError, match="trained on another base model"),
        ):
            PeftModel.from_pretrained(forget_files(load(checkpoint)).bfloat16(), tmp_path)


def test_the_dtype_given_for_deltas_is_kept_too(checkpoint):
    tuned = get_peft_model(load(checkpoint, dtype=torch.bfloat16), CONFIGS["PEQA"](), autocast_adapter_dtype=False)
    assert {
        layer.peqa_scales["default"].dtype for layer in tuned.float().modules() if isinstance(layer, PEQALinear)
    } == {torch.bfloat16}
