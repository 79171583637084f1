"""Any PEFT method on GPTQ layers, without dense weights kept for backward."""

import copy

import peft
import pytest
import torch
from gptq_models import DENSE_BYTES, forget_files, load, saved_for_backward
from packaging.version import Version
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

import peft_quant
from peft_quant import RepackedLayerError, prepare_gptq_for_training, restore_gptq_forward


TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights=False, **options)


METHODS = {
    "LoRA": lora(),
    "QA-LoRA": lora(use_qalora=True, qalora_group_size=8),
    "OFT": OFTConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=0, oft_block_size=8),
    "MiSS": MissConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4, init_weights=False),
    "VeRA": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, init_weights=False),
    "layer norms": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def gradients(model, input_ids):
    model.train().zero_grad()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def method(request):
    """A name of `METHODS`."""
    if request.param in ("MiSS", "VeRA") and Version(peft.__version__) < Version("0.21"):
        request.applymarker(pytest.mark.xfail(raises=ImportError, strict=True, reason="needs torchao < 0.18"))
    return request.param


@pytest.mark.parametrize("method", METHODS, indirect=True)
@pytest.mark.parametrize("after", (False, True))
def test_same_training_without_dense_weights(checkpoint, input_ids, method, after):
    torch.manual_seed(0)
    plain = get_peft_model(load(checkpoint), METHODS[method])
    plain.enable_input_require_grads()
    lean = copy.deepcopy(plain)
    if after:
        prepare_gptq_for_training(lean)
    else:
        torch.manual_seed(0)
        lean = get_peft_model(prepare_gptq_for_training(load(checkpoint)), METHODS[method])
        lean.enable_input_require_grads()
        lean.load_state_dict(
            {name: t for name, t in plain.state_dict().items() if "quant_linear" not in name}, strict=False
        )
    expected, actual = gradients(plain, input_ids), gradients(lean, input_ids)
    assert expected
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        # gptqmodel decodes weights in fp16, one part in 2048 of each
        torch.testing.assert_close(actual[name], gradient, rtol=0.05, atol=0.02 * gradient.abs().max().item())
    saving = saved_for_backward(plain, input_ids) - saved_for_backward(lean, input_ids)
    assert saving > 0.9 * DENSE_BYTES


def test_stays_undone_done_and_done_twice(model, input_ids):
    def logits():
        with torch.no_grad():
            return model(input_ids=input_ids).logits

    kernel = logits()
    assert prepare_gptq_for_training(model) is model
    lean = logits()
    assert not torch.equal(lean, kernel)
    prepare_gptq_for_training(model)
    assert torch.equal(logits(), lean)
    assert torch.equal(copy.deepcopy(model)(input_ids=input_ids).logits, lean)
    restore_gptq_forward(model)
    assert torch.equal(logits(), kernel)
    assert not any("_lean_format" in vars(module) for module in model.modules())


def test_a_copy_uses_its_own_tensors(model, input_ids):
    prepare_gptq_for_training(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(input_ids=input_ids).logits
        other.model.layers[0].mlp.up_proj.scales.mul_(2)
        assert torch.equal(model(input_ids=input_ids).logits, before)
        assert not torch.equal(other(input_ids=input_ids).logits, before)


def test_saved_checkpoints_are_those_of_the_base(model, checkpoint, tmp_path):
    prepare_gptq_for_training(model).save_pretrained(tmp_path)
    saved, base = (load_file(directory / "model.safetensors") for directory in (tmp_path, checkpoint))
    assert saved.keys() == base.keys()
    assert all(torch.equal(saved[name], base[name]) for name in base)


def test_evaluation_takes_no_gradient_away(checkpoint, input_ids):
    model = prepare_gptq_for_training(load(checkpoint, backend="auto_trainable"))
    peft_model = get_peft_model(model, lora())
    with torch.no_grad():
        peft_model.eval()(input_ids=input_ids)
    found = gradients(peft_model, input_ids)
    assert len(found) == 2 * 2 * len(TARGETS)
    assert all(gradient.any() for gradient in found.values())


def test_compiles_without_graph_breaks(model, input_ids):
    peft_model = get_peft_model(prepare_gptq_for_training(model), lora()).eval()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False), torch.no_grad():
        expected = peft_model(input_ids=input_ids, use_cache=False).logits
        compiled = torch.compile(peft_model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=input_ids, use_cache=False).logits, expected)


def test_bad_input(checkpoint, input_ids):
    with pytest.raises(ValueError, match="Linear has no GPTQ layers"):
        prepare_gptq_for_training(nn.Linear(2, 2))
    repacked = forget_files(load(checkpoint, backend="auto"))
    with torch.no_grad():
        repacked(input_ids=input_ids)
    with pytest.raises(RepackedLayerError, match="gptq_torch"):
        prepare_gptq_for_training(repacked)
    assert not any("_lean_format" in vars(module) for module in repacked.modules())


def test_is_public():
    assert {"prepare_gptq_for_training", "restore_gptq_forward"} <= set(peft_quant.__all__)


@pytest.mark.parametrize(
    "config",
    (
        IA3Config(task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=["down_proj"]),
        lora(use_dora=True),
    ),
    ids=("IA3", "DoRA"),
)
def test_peft_itself_refuses_gptq_layers_for(config, model):
    """Should PEFT take them one day, they train lean too, and README has to say so."""
    with pytest.raises(ValueError, match="not support"):
        get_peft_model(prepare_gptq_for_training(model), config)
