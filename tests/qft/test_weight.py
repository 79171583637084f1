"""`Int8Weight` as a parameter: products and gradients, PyTorch's own machinery, what autograd keeps."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from gptq_models import kept_for_backward
from torch import nn
from torch.nn import functional as F  # noqa: N812

from peft_quant import ops
from peft_quant.qft import Int8Weight


def dense(rows=48, columns=70, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def weight(ratio=0.02, dtype=torch.float32, groups=1, **shape):
    parts = ops.encode_weight(dense(**shape), round(ratio * 70), groups)
    return nn.Parameter(Int8Weight.from_parts(*parts, dtype=dtype))


def same(a, b):
    return a.parts.keys() == b.parts.keys() and all(torch.equal(part, b.parts[name]) for name, part in a.parts.items())


def own_memory(a, b):
    return all(part.data_ptr() != b.parts[name].data_ptr() for name, part in a.parts.items())


class TestMaking:
    @pytest.mark.parametrize("ratio", (0, 0.01, 0.5))
    def test_from_a_dense_weight(self, ratio):
        w = Int8Weight.from_dense(dense(), ratio, torch.bfloat16)
        outliers = round(ratio * 70)
        assert (w.shape, w.dtype, w.codes.dtype) == ((48, 70), torch.bfloat16, torch.int8)
        assert (w.outlier_columns is None) == (outliers == 0)
        assert ((w.dequantize(torch.float32) - dense()).abs() <= w.scales * (0.5 + 1e-4)).all()
        assert w.bytes_held == 48 * 70 + 48 * 4 + 48 * outliers * 6

    def test_is_a_parameter(self):
        w = weight()
        assert isinstance(w, nn.Parameter) and isinstance(w, Int8Weight)
        assert w.requires_grad and w.is_leaf
        assert "Int8Weight(shape=(48, 70)" in repr(w)

    @pytest.mark.parametrize(
        ("change", "message"),
        (
            ({"codes": torch.zeros(3, 4)}, "codes are an int8 matrix"),
            ({"scales": torch.ones(3, 3)}, "G a divisor of 4"),
            ({"scales": torch.ones(3, 1).half()}, "scales are fp32"),
            ({"scales": torch.zeros(3, 1)}, "not zero"),
            ({"scales": torch.full((3, 1), float("nan"))}, "not zero"),
            ({"outlier_columns": torch.zeros(3, 1, dtype=torch.int16)}, "come together"),
            ({"outlier_columns": torch.zeros(3, 1), "outlier_values": torch.ones(3, 1)}, "outlier_columns are"),
            (
                {"outlier_columns": torch.full((3, 1), 4, dtype=torch.int16), "outlier_values": torch.ones(3, 1)},
                "within 0 to 3",
            ),
            (
                {"outlier_columns": torch.ones(3, 2, dtype=torch.int16), "outlier_values": torch.ones(3, 2)},
                "ascend within",
            ),
            (
                {"outlier_columns": torch.zeros(3, 1, dtype=torch.int16), "outlier_values": torch.ones(3, 2)},
                "outlier_values are",
            ),
        ),
    )
    def test_parts_that_do_not_fit(self, change, message):
        parts = {"codes": torch.zeros(3, 4, dtype=torch.int8), "scales": torch.ones(3, 1)}
        with pytest.raises(ValueError, match=message):
            Int8Weight.from_parts(**{**parts, **change})

    def test_what_cannot_be_encoded(self):
        with pytest.raises(ValueError, match="is a matrix"):
            Int8Weight.from_dense(torch.ones(4))
        with pytest.raises(ValueError, match="infinite or NaN"):
            Int8Weight.from_dense(torch.full((2, 2), float("inf")))
        with pytest.raises(ValueError, match=r"share in \[0, 1\)"):
            Int8Weight.from_dense(torch.ones(2, 2), 1.0)


class TestLinear:
    @pytest.mark.parametrize("groups", (1, 7))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("bias", (False, True))
    def test_values_and_gradients_are_those_of_the_decoded_weight(self, bias, dtype, groups):
        w = weight(dtype=dtype, groups=groups)
        x = torch.randn(2, 5, 70, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        b = torch.randn(48, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_() if bias else None
        leaves = [x, w, *([b] if bias else [])]
        y = F.linear(x, w, b)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        y.backward(dy)
        ours = [leaf.grad for leaf in leaves]
        others = [
            x.detach().float().requires_grad_(), w.dequantize(torch.float32).requires_grad_(),
            *([b.detach().float().requires_grad_()] if bias else []),
        ]  # fmt: skip
        expected = F.linear(*others)
        expected.backward(dy.float())
        # fp32 sums, rounded to the dtype once
        close = {"rtol": 2**-8 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
        torch.testing.assert_close(y.float(), expected, **close)
        for gradient, other in zip(ours, others, strict=True):
            assert gradient.dtype == dtype and type(gradient) is torch.Tensor
            torch.testing.assert_close(gradient.float(), other.grad, **close)

    def test_keeps_its_parts_and_the_input_for_backward(self):
        w, x = weight(), torch.randn(5, 70, requires_grad=True)
        kept = kept_for_backward(lambda: F.linear(x, w))
        assert kept.keys() == {t.untyped_storage().data_ptr() for t in (*w.parts.values(), x)}
        w.requires_grad_(False)
        kept = kept_for_backward(lambda: F.linear(x, w))
        assert kept.keys() == {t.untyped_storage().data_ptr() for t in w.parts.values()}

    def test_autocast(self):
        layer = nn.Linear(70, 48)
        layer.weight = weight()
        x = torch.randn(3, 70, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        expected = F.linear(x.bfloat16().float(), layer.weight.dequantize(), layer.bias.bfloat16().float())
        assert torch.equal(y, expected.bfloat16())

    def test_a_change_between_forward_and_backward_is_noticed(self):
        w = weight()
        y = F.linear(torch.randn(5, 70, requires_grad=True), w)
        w.refresh(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_cannot_be_the_input(self):
        with pytest.raises(TypeError, match="dequantize"):
            F.linear(weight(), torch.ones(3, 70))


def test_embedding():
    w = weight(rows=50)
    ids = torch.tensor([[0, 3, 3], [49, 7, 0]])
    assert torch.equal(F.embedding(ids, w), F.embedding(ids, w.dequantize()))
    kept = kept_for_backward(lambda: F.embedding(ids, w))
    assert max(kept.values(), default=0) <= ids.nbytes
    F.embedding(ids, w).square().sum().backward()
    other = w.dequantize().requires_grad_()
    F.embedding(ids, other).square().sum().backward()
    assert torch.equal(w.grad, other.grad)


def test_tied_weights_add_their_gradients():
    w = weight(rows=50)
    embedding, head = nn.Embedding(50, 70), nn.Linear(70, 50, bias=False)
    embedding.weight = head.weight = w
    other = w.dequantize().requires_grad_()
    ids = torch.tensor([1, 5, 5])
    head(embedding(ids)).square().sum().backward()
    F.linear(F.embedding(ids, other), other).square().sum().backward()
    torch.testing.assert_close(w.grad, other.grad)


def test_conv1d_of_gpt2_runs_on_the_decoded_weight_and_keeps_nothing_dense():
    w, bias, x = weight(), torch.zeros(70), torch.randn(5, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.addmm(bias, x, w)
    assert all(isinstance(tensor, Int8Weight) or tensor.shape == x.shape for tensor in kept)
    y.sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0)[:, None].expand(48, 70))


class TestMachinery:
    def test_copies(self):
        w = weight()
        for other in (copy.deepcopy(w), w.clone(), w.detach().clone()):
            assert isinstance(other, Int8Weight) and same(other, w) and own_memory(other, w)
        assert not own_memory(w.detach(), w)
        assert copy.deepcopy(w).requires_grad and isinstance(copy.deepcopy(w), nn.Parameter)

    def test_copy_between_int8_weights_is_exact(self):
        w, source = weight(), weight(seed=1)
        pointer = w.codes.data_ptr()
        with torch.no_grad():
            w.copy_(source)
        assert same(w, source) and w.codes.data_ptr() == pointer

    def test_copy_from_and_to_dense(self):
        w, source = weight(groups=7), dense(seed=1)
        with torch.no_grad():
            w.copy_(source)
            source.copy_(w)
        assert same(w, Int8Weight.from_parts(*ops.encode_weight(dense(seed=1), 1, 7), dtype=torch.float32))
        assert torch.equal(source, w.dequantize())

    def test_copy_between_layouts_encodes_again(self):
        w, source = weight(0), weight(0.1)
        with torch.no_grad():
            w.copy_(source)
        assert w.outlier_columns is None
        assert ((w.dequantize() - source.dequantize()).abs() <= w.scales * (0.5 + 1e-4)).all()

    @pytest.mark.parametrize("move", (lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half()))
    def test_a_dtype_is_how_it_looks(self, move):
        layer = nn.Linear(70, 48)
        layer.weight = w = weight()
        before = copy.deepcopy(w)
        move(layer)
        assert layer.weight.dtype == layer.bias.dtype != torch.float32
        assert layer.weight.dequantize().dtype == layer.weight.dtype
        assert same(layer.weight, before) and isinstance(layer.weight, nn.Parameter)

    def test_to_another_device(self):
        layer = nn.Linear(70, 48)
        layer.weight = weight()
        layer.to("meta")
        assert isinstance(layer.weight, Int8Weight)
        assert all(part.is_meta for part in layer.weight.parts.values())

    def test_state_dict_and_safe_loading(self):
        layer, other = nn.Linear(70, 48), nn.Linear(70, 48)
        layer.weight, other.weight = weight(), weight(seed=1)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert isinstance(state["weight"], Int8Weight) and same(state["weight"], layer.weight)
        for assign in (False, True):
            other.load_state_dict(state, assign=assign)
            assert same(other.weight, layer.weight)
        layer.load_state_dict({"weight": dense(seed=3), "bias": torch.zeros(48)})
        assert same(layer.weight, weight(seed=3))

    def test_distributed_checkpoints(self, tmp_path):
        layer, other = nn.Linear(70, 48), nn.Linear(70, 48)
        layer.weight, other.weight = weight(), weight(seed=1)
        torch.distributed.checkpoint.save(layer.state_dict(), checkpoint_id=tmp_path, no_dist=True)
        state = other.state_dict()
        torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        assert same(state["weight"], layer.weight)
        assert same(other.weight, layer.weight)

    def test_rows_stay_int8(self):
        w = weight().detach()
        d = w.dequantize()
        for pieces, expected in ((w.split(20), d.split(20)), (w.chunk(3), d.chunk(3)), ((w[5:9],), (d[5:9],))):
            for piece, dense_piece in zip(pieces, expected, strict=True):
                assert isinstance(piece, Int8Weight) and torch.equal(piece.dequantize(), dense_piece)
        pieces[0].copy_(torch.zeros(4, 70))
        assert not w.dequantize()[5:9].any()
        assert torch.equal(w[:, 3:5], w.dequantize()[:, 3:5])
        assert torch.equal(w.split(20, 1)[1], w.dequantize().split(20, 1)[1])
        zeros = w.new_zeros(10, 70)
        assert isinstance(zeros, Int8Weight) and not zeros.dequantize().any()
        assert type(w.new_zeros(10, 7)) is type(w.new_zeros(10, 70, dtype=torch.float64)) is torch.Tensor

    @pytest.mark.parametrize("rows", (30, 48, 60))
    @pytest.mark.parametrize("groups", (1, 2))
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_dense_data_is_encoded_and_rows_that_are_equal_stay(self, rows, groups, dtype):
        w = weight(dtype=dtype, groups=groups)
        before = {name: part.clone() for name, part in w.parts.items()}
        data = torch.cat([w.dequantize(), dense(12, seed=1).to(dtype)])[:rows]
        data[3] *= 2
        w.data = data
        assert isinstance(w, Int8Weight) and (w.shape, w.dtype, w.is_leaf) == ((rows, 70), dtype, True)
        kept = [row for row in range(min(rows, 48)) if row != 3]
        assert all(torch.equal(part[kept], before[name][kept]) for name, part in w.parts.items())
        assert not torch.equal(w.scales[3], before["scales"][3])
        step = w.scales.repeat_interleave(70 // groups, 1)
        # half a step, and half of a bf16 number's last bit
        assert ((w.dequantize() - data).abs() <= step * 0.5001 + data.abs() * 2**-8).all()
        F.linear(torch.ones(1, 70, dtype=dtype), w).sum().backward()
        assert w.grad.shape == w.shape

    def test_data_in_int8_is_taken_over(self):
        w, other = weight(), weight(ratio=0, rows=60)
        w.data = other.data
        assert w.shape == other.shape and same(w, other)

    @pytest.mark.parametrize("shape", ((48, 71), (48 * 70,), (2, 24, 70)))
    def test_data_of_another_width_is_refused_and_nothing_changes(self, shape):
        w = weight()
        before = w.clone()
        with pytest.raises(ValueError, match=r"The data of an int8 weight .* has 70 columns, found"):
            w.data = torch.zeros(shape)
        assert w.shape == before.shape and same(w, before)

    def test_a_flat_view_is_of_the_same_weight(self):
        w = weight().detach()
        flat = w.view(-1)
        assert flat.shape == (48 * 70,) and flat.codes.data_ptr() == w.codes.data_ptr()
        assert torch.equal(flat.dequantize(), w.dequantize().view(-1))
        assert torch.equal(flat[70:90], w.dequantize().view(-1)[70:90])
        assert same(flat.view(48, 70), w)
        assert torch.equal(flat.reshape(24, 140), w.dequantize().reshape(24, 140))
        flat.copy_(dense(seed=2).view(-1))
        assert same(w, weight(seed=2))
        with pytest.raises(TypeError, match="as its weight"):
            F.linear(torch.ones(3, 48 * 70), flat)

    def test_operations_run_on_the_decoded_weight(self):
        w = weight().detach()
        d = w.dequantize()
        assert torch.equal(w.t(), d.t()) and type(w.t()) is torch.Tensor
        assert torch.equal(w + w, d + d)
        assert torch.equal(torch.cat([w, d]), torch.cat([d, d]))
        assert torch.equal(torch.linalg.vector_norm(w), torch.linalg.vector_norm(d))

    def test_operations_in_place_encode(self):
        w = weight(0).detach()
        expected = w.dequantize() * 2
        result = w.mul_(2)
        assert result is w
        torch.testing.assert_close(w.dequantize(), expected)
        torch._foreach_mul_([w], 0.5)
        torch.testing.assert_close(w.dequantize(), expected / 2)
        nn.init.zeros_(w)
        assert not w.dequantize().any()


def test_fsdp2_shards_int8(tmp_path):
    script = Path(__file__).parent / "sharded_forward.py"
    commands = [[sys.executable, script, str(rank), "2", tmp_path / "store"] for rank in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for command in commands]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), outputs[0][1].decode()
    assert json.loads(outputs[0][0]) == {"output": True, "gradients": True, "int8": [[24, 70], [15, 48]]}
