"""Counting live tensors, by hand."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from peft_quant.estimate.count import (
    ACTIVATIONS,
    DECODED,
    GRADIENTS,
    KINDS,
    LOGITS,
    REST,
    AsOnAGpu,
    LiveTensors,
    Shapes,
    total_bytes,
)


KB = 1024


def meta(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


@pytest.fixture
def live():
    return LiveTensors(tokens=64, vocabulary=100, shapes=Shapes())


def sizes(amounts):
    return {kind: size for kind, (size, _) in amounts.items() if size}


def test_what_lives_and_what_lived(live):
    weight = meta(16, 16)
    live.hold(weight, REST)
    with live:
        x = meta(16, 16)  # 1 KB, as all of these
        y = x.exp().exp()
        assert sizes(live.amounts()) == {REST: KB, ACTIVATIONS: 2 * KB}
        live.mark(["here"])
        del x
        live.mark(["there"])
        del y
    assert sizes(live.peaks["here"]) == {REST: KB, ACTIVATIONS: 3 * KB}
    assert sizes(live.peaks["there"]) == {REST: KB, ACTIVATIONS: 2 * KB}
    assert sizes(live.amounts()) == {REST: KB}
    assert live.amounts()[REST] == (KB, 256)


def test_views_and_what_is_written_to_count_once(live):
    x = meta(16, 16)
    live.hold(x, REST)
    with live:
        views = [x.t(), x[:4], x.view(-1), x.add_(1), torch.ops.aten._unsafe_view(x, (4, 64))]
    assert sizes(live.amounts()) == {REST: KB}
    assert all(view.untyped_storage()._cdata == x.untyped_storage()._cdata for view in views)


def test_sizes_are_those_of_the_allocator(live):
    with live:
        kept = meta(3), meta(129)  # noqa: F841
    assert sizes(live.amounts()) == {ACTIVATIONS: 512 + KB}


def test_kinds(live):
    packed = meta(8, 64, dtype=torch.int32), meta(1, 8, dtype=torch.int32), meta(1, 64), None, 4, 64, 1
    with live:
        weight = torch.ops.peft_quant.dequantize(*packed, torch.float32)  # 64 x 64
        logits = meta(64, 100)
        other = meta(65, 100)
    assert sizes(live.amounts()) == {DECODED: 16 * KB, LOGITS: 25 * KB, ACTIVATIONS: 25 * KB + 512}
    live.hold(other, GRADIENTS)
    assert sizes(live.amounts()) == {DECODED: 16 * KB, LOGITS: 25 * KB, GRADIENTS: 25 * KB + 512}
    del weight, logits, other
    assert total_bytes(live.amounts()) == 0
    assert tuple(live.amounts()) == KINDS


def test_a_packed_product_holds_a_decoded_weight(live):
    packed = meta(8, 64, dtype=torch.int32), meta(1, 8, dtype=torch.int32), meta(1, 64), None, 4, 64, 1
    with live:
        y = torch.ops.peft_quant.linear(meta(2, 64), *packed)
        live.mark(["product"])
    assert sizes(live.peaks["product"]) == {DECODED: 16 * KB, ACTIVATIONS: 2 * 512}
    assert sizes(live.amounts()) == {ACTIVATIONS: y.nbytes}


def test_shapes_that_were_seen_are_the_same_again():
    shapes = Shapes()
    aten = torch.ops.aten
    x, y = meta(4, 6, 8), meta(8, 4, 6).permute(1, 2, 0)
    calls = [
        (aten.add.Tensor, (x, y), {}),
        (aten.add.Tensor, (y, y), {}),
        (aten._to_copy.default, (x,), {"dtype": torch.bfloat16}),
        (aten._to_copy.default, (y,), {"dtype": torch.bfloat16}),
        (aten.sum.dim_IntList, (x, [1]), {}),
        (aten.sum.dim_IntList, (x, [1], True), {}),
        (aten.div.Tensor, (x.long(), 2), {}),
        (aten.mul.Tensor, (x.long(), 2), {}),
        (aten.mul.Tensor, (x.long(), 2.0), {}),
        (aten.native_layer_norm.default, (x, [8], None, None, 1e-5), {}),
        (aten.view.default, (x, [24, 8]), {}),
        (aten.mul_.Tensor, (x, 2), {}),
    ]
    for func, args, kwargs in calls:
        expected = func(*args, **kwargs)
        for _ in range(2):
            found = shapes.run(func, args, kwargs)
            pairs = zip(found, expected) if isinstance(expected, tuple) else [(found, expected)]
            for tensor, other in pairs:
                assert (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
                same = tensor.untyped_storage()._cdata == x.untyped_storage()._cdata
                assert same == (func in (aten.view.default, aten.mul_.Tensor))


def test_autocast_has_the_lists_of_cuda():
    x, weight = meta(4, 8), torch.nn.Parameter(meta(8, 8))
    half = x.bfloat16()
    gpu = AsOnAGpu(autocast=True)
    with gpu.forward():
        assert F.linear(x, weight).dtype == (x @ weight).dtype == torch.bfloat16
        assert F.layer_norm(half, (8,)).dtype == F.softmax(half, -1).dtype == half.pow(2).dtype == torch.float32
        assert (half + x).dtype == torch.float32
        assert F.silu(half).dtype == torch.bfloat16
        # a parameter is cast once in a forward pass
        assert gpu.cast(weight) is gpu.cast(weight)
        assert gpu.cast(x) is not gpu.cast(x)
    with AsOnAGpu(autocast=False).forward():
        assert F.linear(x, weight).dtype == torch.float32
        assert F.layer_norm(half, (8,)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "mask", "kept"),
    (
        # FlashAttention keeps its inputs, its output and a number for each query and head; so does the one for masks
        (torch.bfloat16, False, 4 * 2 * 128 + 4 * 4),
        (torch.bfloat16, True, 4 * 2 * 128 + 4 * 4),
    ),
)
def test_attention_keeps_no_scores(dtype, mask, kept):
    tokens = 512
    states = [meta(1, 4, tokens, 32, dtype=dtype, requires_grad=True) for _ in range(3)]
    live = LiveTensors(1, 1, Shapes())
    for tensor in states:
        live.hold(tensor, ACTIVATIONS)
    given = meta(1, 1, tokens, tokens, dtype=torch.bool) if mask else None
    with live, AsOnAGpu(autocast=False).forward():
        out = F.scaled_dot_product_attention(*states, attn_mask=given)
    mask_bytes = 2 * tokens * tokens if mask else 0
    assert out.shape == states[0].shape
    assert kept * tokens + mask_bytes <= total_bytes(live.amounts()) <= kept * tokens + mask_bytes + 4 * 512


def test_what_depends_on_values_cannot_be_counted(live):
    with live:
        assert bool((meta(4) == 0).all())  # no padding, for instance
        assert not bool((torch.ones(4) == 0).all())
        with pytest.raises(NotImplementedError, match="depends on its activations"):
            meta(4).sum().item()
