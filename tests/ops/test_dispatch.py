"""What all operators have: checks of their arguments, and kernels for a GPU."""

import pytest
import torch
from gptq_models import random_packed

from peft_quant import ops
from peft_quant.ops.dispatch import Operator, _import_kernels
from peft_quant.ops.int8 import operators as int8
from peft_quant.ops.packed import operators as packed


OPERATORS = [value for module in (packed, int8) for value in vars(module).values() if isinstance(value, Operator)]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_has_kernels_for_a_gpu(operator):
    pytest.importorskip("triton")
    assert _import_kernels(operator._family)
    assert callable(operator._triton)


def on_meta(tensors):
    return [tensor.to("meta") if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


X = torch.empty(5, 96, device="meta")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    (
        ("bits", 5, "bits is 2, 3, 4 or 8, found 5"),
        ("zero_offset", 2, "zero_offset is 0 or 1, found 2"),
        ("qweight", torch.empty(12, 64), r"qweight is torch.int32 \(12, 64\), found torch.float32"),
        (
            "qzeros",
            torch.empty(3, 9, dtype=torch.int32),
            r"qzeros is torch.int32 \(3, 8\), found torch.int32 \(3, 9\)",
        ),
        ("scales", torch.empty(2, 64), r"scales is torch.float32 or .* \(3, 64\), found torch.float32 \(2, 64\)"),
        ("g_idx", torch.empty(95, dtype=torch.int32), r"g_idx is .* \(96,\), found torch.int32 \(95,\)"),
    ),
)
def test_packed_weights_are_checked(field, value, message):
    weight = ops.PackedWeight(*on_meta(random_packed(4, group_size=32).operand()))
    assert ops.linear(X, weight).shape == (5, 64)
    with pytest.raises(RuntimeError, match=message):
        ops.linear(X, weight._replace(**dict(zip([field], on_meta([value])))))


def test_int8_weights_are_checked():
    weight = ops.EncodedWeight(*on_meta(ops.encode_weight(torch.randn(64, 96), 1)))
    assert int8.int8_linear(X, weight, None).shape == (5, 64)
    with pytest.raises(RuntimeError, match=r"scales is torch.float32 \(64, 1\), found torch.float16"):
        int8.int8_linear(X, weight._replace(scales=weight.scales.half()), None)
    with pytest.raises(RuntimeError, match=r"x is .* \(5, 96\), found torch.float32 \(5, 95\)"):
        int8.int8_linear(X[:, :95], weight, None)
