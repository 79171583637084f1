"""LREC's layer against the dense weight it stands for."""

import pytest
import torch
from gptq_models import PlainLayer, PlainMLP, kept_for_backward, random_packed
from peft import get_peft_model
from torch import nn

from peft_quant import LRECConfig


class One(nn.Module):
    """One packed layer."""

    def __init__(self, bits=4, rows=96, columns=64, bias=None, **options):
        super().__init__()
        self.packed = random_packed(bits, rows, columns, **options)
        self.layer = PlainLayer(self.packed, bias)

    def forward(self, x):
        return self.layer(x)


def adapted(base, **options):
    torch.manual_seed(0)
    model = get_peft_model(base, LRECConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}))
    return model, model.base_model.model.layer


def dense(layer, packed, names=("default",)):
    """The weight `[K, N]` that the layer stands for."""
    weight = packed.weight
    for name in names:
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight).t()
    return weight


def gradients(output, *tensors):
    torch.manual_seed(1)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), tensors)


LAYOUTS = [
    *({"bits": bits} for bits in (2, 3, 4, 8)),
    {"group_size": 32, "symmetric": False},
    {"group_size": 64},
    {"group_size": 32, "act_order": True},
    {"zero_offset": 0, "symmetric": False},
    {"rows": 32, "columns": 32, "group_size": 32},
    {"scale_dtype": torch.bfloat16},
    {"group_size": 32, "signed": True},
    {"symmetric": False, "signed": True},
    {"bias": torch.linspace(-1, 1, 64)},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rslora", (False, True))
def test_outputs_and_gradients_against_the_dense_weight(layout, rslora):
    model, layer = adapted(One(**layout), use_rslora=rslora)
    assert layer.scaling["default"] == (4.0 if rslora else 2.0)
    packed, bias = model.base_model.model.packed, layer.base_layer.bias
    x = torch.randn(2, 5, packed.weight.shape[0], requires_grad=True)
    trained = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    actual = model(x)
    expected = x @ dense(layer, packed) + (0 if bias is None else bias)
    torch.testing.assert_close(actual, expected)
    for grad, reference in zip(gradients(actual, x, *trained), gradients(expected, x, *trained)):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", ((4, 4), (2, 7)))
def test_two_active_adapters_add_up(ranks):
    model, layer = adapted(One(), r=ranks[0])
    model.add_adapter("other", LRECConfig(r=ranks[1], lora_alpha=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 96, requires_grad=True)
    trained = [matrix[name].weight for name in ("default", "other") for matrix in (layer.lora_A, layer.lora_B)]
    actual, expected = model(x), x @ dense(layer, model.base_model.model.packed, ("default", "other"))
    torch.testing.assert_close(actual, expected)
    for grad, reference in zip(gradients(actual, x, *trained), gradients(expected, x, *trained)):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (False, True))
def test_dtypes(dtype, autocast):
    model, layer = adapted(One())
    x = torch.randn(5, 96).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    gradients(y, layer.lora_A["default"].weight)
    expected = x.float() @ dense(layer, model.base_model.model.packed)
    # x, the [M, R] product and the output each are rounded to 8 bits of mantissa, 11 in fp16
    unit = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[y.dtype]
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=4 * unit * expected.abs().max().item())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_adapters_are_fp32_whatever_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = get_peft_model(One(), LRECConfig())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestDropout:
    def test_drops_the_input_of_the_branch_only(self):
        model, layer = adapted(One(), lora_dropout=0.5)
        packed = model.base_model.model.packed
        x = torch.randn(5, 96)
        torch.manual_seed(2)
        actual = model.train()(x)
        torch.manual_seed(2)
        dropped = nn.functional.dropout(x, 0.5)
        torch.testing.assert_close(actual, x @ packed.weight + dropped @ (dense(layer, packed) - packed.weight))

    def test_is_off_in_evaluation(self):
        model, layer = adapted(One(), lora_dropout=0.5)
        x = torch.randn(5, 96)
        torch.testing.assert_close(model.eval()(x), x @ dense(layer, model.base_model.model.packed))

    def test_each_active_adapter_drops_by_its_own_rate(self):
        model, layer = adapted(One(), lora_dropout=0.5)
        model.add_adapter("other", LRECConfig(r=3, init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
        x = torch.randn(5, 96)
        packed = model.base_model.model.packed
        torch.manual_seed(2)
        actual = model.train()(x)
        torch.manual_seed(2)
        dropped = nn.functional.dropout(x, 0.5)
        expected = x @ dense(layer, packed, ["other"]) + dropped @ (dense(layer, packed) - packed.weight)
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("autocast", (False, True))
    def test_computes_in_the_dtype_of_the_input(self, autocast):
        model, _ = adapted(One(), lora_dropout=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model.train()(torch.randn(5, 96, dtype=torch.float16))
        assert y.dtype == (torch.bfloat16 if autocast else torch.float16)


@pytest.mark.parametrize("start", (True, "gaussian"))
def test_the_start_is_the_base(start):
    model, layer = adapted(One(), init_lora_weights=start)
    x = torch.randn(5, 96)
    assert layer.lora_A["default"].weight.any()
    assert not layer.lora_B["default"].weight.any()
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


def test_patterns_set_ranks_and_scalings_of_single_layers():
    config = LRECConfig(r=4, lora_alpha=8, rank_pattern={"up": 2}, alpha_pattern={"down": 6})
    base = get_peft_model(PlainMLP(), config).base_model.model
    assert (base.up.lora_A["default"].weight.shape, base.up.scaling["default"]) == ((2, 64), 4.0)
    assert (base.down.lora_B["default"].weight.shape, base.down.scaling["default"]) == ((64, 4), 1.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("adapters", (1, 2))
def test_what_is_kept_for_backward(dtype, adapters):
    """Of everything but the parameters and the packed tensors: x, the [M, R] product and 16-bit copies of A and B."""
    rows, columns, tokens, rank = 256, 512, 128, 4
    model, layer = adapted(One(rows=rows, columns=columns), r=rank)
    for i in range(1, adapters):
        model.add_adapter(str(i), LRECConfig(r=rank, init_lora_weights=False))
    model.base_model.set_adapter(list(layer.lora_A))
    x = torch.randn(tokens, rows, dtype=dtype, requires_grad=True)
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {pointer: size for pointer, size in kept_for_backward(lambda: model(x)).items() if pointer not in resident}
    assert kept.pop(x.data_ptr()) == x.nbytes
    intermediate = tokens * rank * adapters * dtype.itemsize
    assert intermediate in kept.values()
    copies = 0 if (dtype, adapters) == (torch.float32, 1) else (rows + columns) * rank * adapters * dtype.itemsize
    assert sum(kept.values()) <= intermediate + copies
