"""`weight` of a GPTQ layer: what models such as T5 ask for, whose activations it must not cast to integers."""

import copy
import importlib.util

import pytest
import torch
from auto_gptq_layers import auto_gptq_linear
from gptq_models import PlainLayer, PlainMLP, load, quantize, random_packed
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from peft_quant import LRECConfig, PEQAConfig, gptq, prepare_gptq_for_training, restore_gptq_forward
from peft_quant.tuners.layer import AdaptedLinear


SIZES = {
    "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
MODELS = {
    "T5": lambda: T5ForConditionalGeneration(T5Config(**SIZES)),
    "mT5": lambda: MT5ForConditionalGeneration(MT5Config(**SIZES, feed_forward_proj="gated-gelu")),
}
METHODS = {
    "PEQA": lambda: PEQAConfig(target_modules="all-linear"),
    "LREC": lambda: LRECConfig(target_modules="all-linear", r=4),
}
TARGETS = ["q", "v", "wo"]


def plain(packed):
    return PlainLayer(packed)


def of_gptqmodel(packed):
    rows, columns = packed.codes.shape
    layer = TorchLinear(4, 32, True, False, rows, columns, bias=False)
    for name, tensor in packed.tensors.items():
        setattr(layer, name, tensor)
    layer.optimized = True
    layer.post_init()
    return layer


def of_auto_gptq(packed):
    layer = auto_gptq_linear("cuda")(4, 32, *packed.codes.shape, False, weight_dtype=torch.float16)
    for name, tensor in packed.tensors.items():
        setattr(layer, name, tensor)
    return layer


KINDS = {"plain": (plain, 1), "gptqmodel": (of_gptqmodel, 0), "auto-gptq": (of_auto_gptq, 1)}


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "auto-gptq" and importlib.util.find_spec("auto_gptq") is None:
        pytest.skip("auto-gptq 0.7.1 has wheels up to Python 3.11")
    return KINDS[request.param]


@pytest.fixture(params=MODELS)
def model(request, kind):
    """With every linear layer of its blocks packed."""
    make_layer, zero_offset = kind
    torch.manual_seed(0)
    model = MODELS[request.param]()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".block." in name:
            # T5's own initialization leaves the layers' outputs too small to matter
            packed = quantize(torch.randn(module.weight.shape[::-1]) * 0.1, 4, 32, zero_offset=zero_offset)
            model.set_submodule(name, make_layer(packed))
    return model.requires_grad_(False).eval()


def batch():
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.flip(1)}


@torch.no_grad()
def logits(model):
    return model.eval()(**batch()).logits


def trained(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before))
    return model.eval()


def decoded(model, weights):
    """The float model with the given weights in the place of packed layers."""
    twin = copy.deepcopy(model)
    for name, weight in weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        twin.set_submodule(name, layer)
    return twin


def agree(model, twin):
    """In fp32, sums differ in their order.

    In bf16 both round their activations, and the twin its weights, to 8 bits, through four blocks.
    """

    def error(expected):
        return ((logits(model).float() - expected.float()).norm() / expected.float().norm()).item()

    assert error(logits(twin)) < 1e-5
    model.bfloat16()
    assert error(logits(twin.bfloat16())) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_adapter_is_the_decoded_float_model(model, method):
    base = copy.deepcopy(model)
    tuned = trained(get_peft_model(model, METHODS[method]()))
    layers = {name: m for name, m in tuned.base_model.model.named_modules() if isinstance(m, AdaptedLinear)}
    if method == "PEQA":
        weights = {
            name: gptq.dequantize(layer.base_layer, layer.packed, layer.tuned_scales(["default"]).detach())
            for name, layer in layers.items()
        }
    else:
        weights = {
            name: (layer.get_base_weight() + layer.get_delta_weight("default")).detach()
            for name, layer in layers.items()
        }
    assert any(name.endswith("wo") for name in weights)
    agree(tuned, decoded(base, weights))


def dense(model):
    return {name: gptq.dequantize(m, gptq.read_format(m)) for name, m in model.named_modules() if gptq.is_packed(m)}


def test_prepared_layers_are_the_decoded_float_model(model):
    twin = decoded(model, dense(model))
    agree(prepare_gptq_for_training(model), twin)


def test_adapters_on_prepared_layers_are_those_on_the_decoded_float_model(model, kind):
    if kind is not KINDS["gptqmodel"]:
        pytest.skip("PEFT's LoRA takes GPTQ layers of gptqmodel alone")
    config = LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False)
    twin = get_peft_model(decoded(model, dense(model)), config)
    tuned = get_peft_model(prepare_gptq_for_training(model), config)
    tuned.load_state_dict({name: t for name, t in twin.state_dict().items() if "lora_" in name}, strict=False)
    agree(tuned, twin)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_graph_breaks(model, method):
    tuned = get_peft_model(model, METHODS[method]()).eval()
    feed_forward = tuned.get_encoder().block[0].layer[1].DenseReluDense
    x = torch.randn(2, 12, 64)
    with torch._dynamo.config.patch(disable=False), torch.no_grad():
        compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), feed_forward(x))


class TestWhatItSays:
    @pytest.fixture(params=("PEQA", "LREC", "prepared", "LoRA on prepared"))
    def make(self, request):
        """Gives a model whose `down_proj` layers say their weight."""

        def make(model):
            if request.param == "prepared":
                return prepare_gptq_for_training(model)
            if request.param == "LoRA on prepared":
                config = LoraConfig(target_modules=["down_proj"], r=4)
                return get_peft_model(prepare_gptq_for_training(model), config)
            return get_peft_model(model, METHODS[request.param]())

        return make

    def weights(self, model):
        return [m.weight for name, m in model.named_modules() if name.endswith("down_proj")]

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    def test_shape_dtype_and_device(self, checkpoint, make, dtype):
        model = make(load(checkpoint, dtype=dtype))
        for cast, expected in ((lambda m: m, dtype), (lambda m: m.bfloat16(), torch.bfloat16)):
            for weight in self.weights(cast(model)):
                assert isinstance(weight, torch.Tensor)
                assert (weight.shape, weight.dtype, weight.device.type) == ((64, 96), expected, "cpu")
                assert not weight.requires_grad
        assert all(weight.device.type == "meta" for weight in self.weights(model.to("meta")))

    def test_in_a_copy(self, llama, make):
        made = make(llama)
        other = copy.deepcopy(made).bfloat16()
        assert {weight.dtype for weight in self.weights(made)} == {torch.float32}
        assert {weight.dtype for weight in self.weights(other)} == {torch.bfloat16}

    @pytest.mark.parametrize(
        "use",
        (
            lambda w: w + 1.0 * w,
            lambda w: w @ w.t(),
            lambda w: nn.functional.linear(torch.ones(2, 96), w),
            lambda w: w.norm(),
            lambda w: w[0],
            lambda w: w.detach(),
            lambda w: w.to(torch.float64),
            lambda w: w.mul_(2),
            lambda w: torch.ones(64, 96).copy_(w),
        ),
    )
    def test_it_has_no_values(self, llama, make, use):
        with pytest.raises(RuntimeError, match=r"a weight that is packed.*peft_quant\.gptq\.dequantize"):
            use(self.weights(make(llama))[0])

    def test_it_can_be_shown(self, llama, make):
        assert repr(self.weights(make(llama))[0]) == ("PackedWeight(shape=(64, 96), dtype=torch.float32, device=cpu)")

    @pytest.fixture
    def llama(self, checkpoint):
        return load(checkpoint)

    @pytest.mark.parametrize("method", (PEQAConfig, LRECConfig))
    def test_it_is_not_the_dtype_of_adapters(self, method):
        base = PlainMLP()
        base.head.bfloat16()
        tuned = get_peft_model(base, method(target_modules=["up"]))
        tuned.add_adapter("other", method(target_modules=["down"]))
        mlp = tuned.base_model.model
        assert (mlp.up.weight.dtype, mlp.down.weight.dtype) == (torch.bfloat16, torch.bfloat16)

    def test_other_layers_say_what_they_said(self):
        layer = PlainLayer(random_packed(4))
        model = nn.Sequential(layer, nn.Linear(64, 8))
        restore_gptq_forward(prepare_gptq_for_training(model))
        assert not hasattr(layer, "weight")
        lora = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        adapted = lora.base_model.model[0]
        assert adapted.weight is adapted.base_layer.weight


def test_integers_are_no_activations():
    layer = PlainLayer(random_packed(4))
    packed = gptq.read_format(layer)
    with pytest.raises(TypeError, match=r"activations in floating point, not torch\.int32"):
        gptq.linear(layer, packed, torch.ones(2, 96, dtype=torch.int32))
