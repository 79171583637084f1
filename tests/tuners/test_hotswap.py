import peft
import pytest
import torch
from gptq_models import PlainMLP, load, save_tiny_llama
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

from peft_quant import LRECConfig, PEQAConfig, hotswap_adapter
from peft_quant.tuners.lrec import LRECLinear


needs_peft_21 = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="PEFT 0.20 saves no biases")


def adapter(base, directory, **options):
    config = PEQAConfig(**{"task_type": "CAUSAL_LM", "init_weights": False, **options})
    get_peft_model(load(base), config).save_pretrained(directory)
    return directory


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids).logits


@pytest.fixture
def first(checkpoint, tmp_path):
    return adapter(checkpoint, tmp_path / "first")


@pytest.fixture
def swapped(checkpoint, first):
    return PeftModel.from_pretrained(load(checkpoint), first)


def test_takes_the_new_values_in_place(checkpoint, swapped, tmp_path, input_ids):
    second = adapter(checkpoint, tmp_path / "second")
    expected = logits(PeftModel.from_pretrained(load(checkpoint), second), input_ids)
    pointers = [p.data_ptr() for p in swapped.parameters()]
    assert not torch.equal(logits(swapped, input_ids), expected)
    hotswap_adapter(swapped, second, "default")
    assert torch.equal(logits(swapped, input_ids), expected)
    assert [p.data_ptr() for p in swapped.parameters()] == pointers


def test_a_compiled_model_is_not_compiled_again(checkpoint, swapped, tmp_path, input_ids):
    second = adapter(checkpoint, tmp_path / "second")
    expected = logits(PeftModel.from_pretrained(load(checkpoint), second), input_ids)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False, error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(swapped, backend="aot_eager")
        compiled(input_ids=input_ids, use_cache=False)
        hotswap_adapter(compiled, second, "default")
        torch.testing.assert_close(compiled(input_ids=input_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"target_modules": ["q_proj"]}, "they differ in 12 tensors, first"),
        ({"serving_dtype": "bfloat16"}, "serving_dtype is 'bfloat16', the loaded adapter has None"),
        ({"modules_to_save": ["lm_head"]}, r"trained modules_to_save=\['lm_head'\]"),
    ),
)
def test_an_adapter_of_another_kind_is_refused(checkpoint, swapped, tmp_path, input_ids, options, message):
    before = logits(swapped, input_ids)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(swapped, adapter(checkpoint, tmp_path / "second", **options), "default")
    assert torch.equal(logits(swapped, input_ids), before)


def test_an_adapter_of_another_base_is_refused(swapped, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="trained on another base model"):
        hotswap_adapter(swapped, adapter(other, tmp_path / "second"), "default")


def test_nan_is_refused_before_anything_changes(checkpoint, swapped, tmp_path, input_ids):
    second = adapter(checkpoint, tmp_path / "second")
    weights = load_file(second / "adapter_model.safetensors")
    weights[sorted(weights)[-1]][0, 0] = float("nan")
    save_file(weights, second / "adapter_model.safetensors")
    before = logits(swapped, input_ids)
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        hotswap_adapter(swapped, second, "default")
    assert torch.equal(logits(swapped, input_ids), before)


def test_an_adapter_that_is_absent_or_merged_is_refused(first, swapped):
    with pytest.raises(ValueError, match=r"no adapter 'absent' to replace; loaded are \['default'\]"):
        hotswap_adapter(swapped, first, "absent")
    swapped.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged"):
        hotswap_adapter(swapped, first, "default")


def test_lora_goes_to_peft(tmp_path):
    config = LoraConfig(target_modules=["head"], init_lora_weights=False)
    model = get_peft_model(PlainMLP(), config)
    model.save_pretrained(tmp_path)
    expected = model.base_model.model.head.lora_B["default"].weight.detach().clone()
    with torch.no_grad():
        model.base_model.model.head.lora_B["default"].weight.zero_()
    hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    assert torch.equal(model.base_model.model.head.lora_B["default"].weight, expected)


class TestLREC:
    @pytest.fixture
    def save(self, checkpoint, tmp_path):
        def save(name, base=checkpoint, **options):
            options = {"r": 4, "init_lora_weights": False, **options}
            get_peft_model(load(base), LRECConfig(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path / name)
            return tmp_path / name

        return save

    @pytest.mark.parametrize(
        "options",
        ({}, {"lora_alpha": 3}, {"r": 2}, {"r": 6}),
        ids=("same", "alpha", "lower", "higher"),
    )
    def test_takes_the_new_values(self, checkpoint, save, input_ids, options):
        model = PeftModel.from_pretrained(load(checkpoint), save("first"))
        second = save("second", **options)
        expected = logits(PeftModel.from_pretrained(load(checkpoint), second), input_ids)
        assert not torch.allclose(logits(model, input_ids), expected)
        hotswap_adapter(model, second, "default", torch_device="cpu")
        # a lower rank is filled up with zeros, and summed in another order
        torch.testing.assert_close(logits(model, input_ids), expected, rtol=1e-4, atol=1e-4)

    def test_a_compiled_model_is_not_compiled_again(self, checkpoint, save, input_ids):
        model = PeftModel.from_pretrained(load(checkpoint), save("first"))
        prepare_model_for_compiled_hotswap(model)
        second = save("second", lora_alpha=3)
        expected = logits(PeftModel.from_pretrained(load(checkpoint), second), input_ids)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(disable=False, error_on_recompile=True), torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager")
            compiled(input_ids=input_ids, use_cache=False)
            hotswap_adapter(compiled, second, "default", torch_device="cpu")
            torch.testing.assert_close(compiled(input_ids=input_ids, use_cache=False).logits, expected)

    @pytest.mark.parametrize(
        ("options", "message"),
        (
            ({"use_rslora": True}, "for use_rslora"),
            pytest.param({"bias": "all"}, r"trained biases \(bias='all'\).*`load_adapter`", marks=needs_peft_21),
            ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern=\{'q_proj': 2\}.*`load_adapter`"),
        ),
    )
    def test_an_adapter_of_another_kind_is_refused(self, checkpoint, save, input_ids, options, message):
        model = PeftModel.from_pretrained(load(checkpoint), save("first"))
        before = logits(model, input_ids)
        with pytest.raises(ValueError, match=message):
            hotswap_adapter(model, save("second", **options), "default", torch_device="cpu")
        assert torch.equal(logits(model, input_ids), before)

    def test_an_adapter_of_fewer_layers_leaves_none_of_the_old_one(self, checkpoint, save):
        model = PeftModel.from_pretrained(load(checkpoint), save("first"))
        second = save("second", target_modules=["q_proj"], r=6)
        hotswap_adapter(model, second, "default", torch_device="cpu")
        expected = dict(PeftModel.from_pretrained(load(checkpoint), second).named_modules())
        for name, layer in model.named_modules():
            if isinstance(layer, LRECLinear):
                delta = layer.get_delta_weight("default")
                if name.endswith("q_proj"):
                    # a product of matrices that may lie in the mapping of a file, where sums may be of another order
                    torch.testing.assert_close(delta, expected[name].get_delta_weight("default"))
                else:
                    assert not delta.any()

    def test_an_adapter_of_further_layers_is_refused(self, checkpoint, save, input_ids):
        model = PeftModel.from_pretrained(load(checkpoint), save("first", target_modules=["q_proj"]))
        before = logits(model, input_ids)
        with pytest.raises(RuntimeError, match="unexpected keys found"):
            hotswap_adapter(model, save("second"), "default", torch_device="cpu")
        assert torch.equal(logits(model, input_ids), before)

    def test_an_adapter_of_another_base_is_refused(self, checkpoint, save, tmp_path):
        model = PeftModel.from_pretrained(load(checkpoint), save("first"))
        other = save_tiny_llama(tmp_path / "other", seed=1)
        with pytest.raises(ValueError, match="for base_fingerprint"):
            hotswap_adapter(model, save("second", base=other), "default", torch_device="cpu")
