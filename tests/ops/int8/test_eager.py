"""int8 weights, gradients and Lion in plain PyTorch, against the formulas and against what rounding must do."""

import math

import pytest
import torch

from peft_quant import ops
from peft_quant.ops import EncodedWeight, reference
from peft_quant.ops.int8 import eager as int8
from peft_quant.ops.int8 import operators
from peft_quant.ops.rounding import dither, random_key, random_words, round_to_dtype


SHAPES = ((1, 3), (7, 130), (3, 256), (16, 1024))
STEP = {"max_norm": math.inf, "lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(n, repeats):
    """Five standard errors of the mean of `repeats` stochastic roundings, whose deviation is at most half a step."""
    return 5 * 0.5 / math.sqrt(repeats) * torch.ones(n)


class TestGenerator:
    def test_words_are_those_of_lowbias32(self):
        def word(index, key):
            low, high = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
            x = index ^ low
            x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF ^ high
            x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
            return x ^ x >> 16

        for key in (0, 1, random_key(3, 1, 4)):
            words = random_words(5, 25, key, torch.device("cpu")).tolist()
            assert [w & 0xFFFFFFFF for w in words] == [word(index, key) for index in range(5, 25)]

    def test_keys_differ_and_fit_an_operator(self):
        keys = {random_key(*path) for path in ((0,), (1,), (0, 0), (0, 1), (1, 0), (2**40,))}
        assert len(keys) == 6
        assert all(-(2**63) <= key < 2**63 for key in keys)

    @pytest.mark.parametrize("half", (0, 1))
    def test_noise_is_uniform_and_independent_of_neighbours_steps_and_the_other_half(self, half):
        n = 1 << 20
        noise = dither(random_words(0, n, random_key(0, 0), torch.device("cpu")), half)
        assert noise.abs().max() < 0.5
        # 16 bins of n/16 with a deviation of sqrt(n/16): chi-squared of 15 degrees, beyond 44 once in 10 000
        counts = torch.histc(noise, 16, -0.5, 0.5)
        assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 44
        others = [
            noise.roll(1),
            noise.roll(256),
            dither(random_words(0, n, random_key(0, 1), torch.device("cpu")), half),
            dither(random_words(0, n, random_key(0, 0), torch.device("cpu")), 1 - half),
        ]
        for other in others:
            # the correlation of n independent pairs deviates by 1 / sqrt(n)
            assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 5 / math.sqrt(n)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_16_bit_rounding_is_unbiased(self, dtype):
        value = torch.tensor([1.0, -1.001, 0.3, 3e-3, -123.4])
        repeats = 1 << 14
        words = random_words(0, repeats * len(value), 7, torch.device("cpu")).view(repeats, -1)
        rounded = round_to_dtype(value.expand(repeats, -1), dtype, words).float()
        step = value.abs().log2().floor().exp2() * torch.finfo(dtype).eps
        assert ((rounded - value).abs() <= step).all()
        assert ((rounded.mean(0) - value).abs() <= step * spread(len(value), repeats)).all()
        assert (rounded[:, 0] == 1).all()

    def test_what_is_not_finite_stays_so(self):
        x = torch.tensor([math.inf, -math.inf, math.nan])
        rounded = round_to_dtype(x, torch.bfloat16, random_words(0, 3, 0, torch.device("cpu")))
        assert torch.equal(rounded.isnan(), x.isnan())
        assert torch.equal(rounded.isinf(), x.isinf())


class TestGradient:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("shape", SHAPES)
    def test_error_is_below_a_step(self, shape, dtype):
        x = random(*shape).to(dtype)
        codes, scales, squares = ops.encode_gradient(x, 0)
        assert codes.shape == x.shape
        error = (ops.decode_blocks(codes, scales) - x.float()).abs().view(-1)
        assert (error <= scales.repeat_interleave(256)[: x.numel()] * (1 + 1e-5)).all()
        torch.testing.assert_close(squares.sum(), x.float().square().sum())

    def test_rounding_is_unbiased_and_reproducible(self):
        x, repeats = random(300), 4096
        decoded = torch.stack([ops.decode_blocks(*ops.encode_gradient(x, random_key(k))[:2]) for k in range(repeats)])
        _, scales, _ = ops.encode_gradient(x, 0)
        bound = scales.repeat_interleave(256)[:300] * spread(300, repeats)
        assert ((decoded.mean(0) - x).abs() <= bound).all()
        assert torch.equal(decoded[3], ops.decode_blocks(*ops.encode_gradient(x, random_key(3))[:2]))
        assert not torch.equal(decoded[3], decoded[4])

    def test_adding_is_unbiased(self):
        a, b, repeats = random(300), random(300, seed=1), 4096
        total = torch.zeros(300)
        for k in range(repeats):
            codes, scales, _ = ops.encode_gradient(a, random_key(0, k))
            squares = ops.accumulate_gradient(codes, scales, b, random_key(1, k))
            total += ops.decode_blocks(codes, scales)
        # two roundings, of which the second has the larger step
        bound = 2 * scales.repeat_interleave(256)[:300] * spread(300, repeats)
        assert ((total / repeats - a - b).abs() <= bound).all()
        # the squares are those of `b` and what `a` was rounded to
        torch.testing.assert_close(squares.sum(), (a + b).square().sum(), rtol=1e-2, atol=0)

    def test_zeros_stay_zero(self):
        x = random(4, 256)
        x[1] = 0
        x[2, ::2] = 0
        x[3] = 1e-35  # as good as zero: its inverse overflows
        codes, scales, _ = ops.encode_gradient(x, 5)
        assert not codes[1].any() and not codes[2, ::2].any() and not codes[3].any()
        assert scales.isfinite().all()

    @pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
    def test_what_is_not_finite_survives_more_gradients(self, value):
        x = random(600)
        x[300] = value
        codes, scales, squares = ops.encode_gradient(x, 0)
        assert not squares.sum().isfinite()
        squares = ops.accumulate_gradient(codes, scales, random(600, seed=1), 1)
        assert not squares.sum().isfinite()
        assert torch.equal(scales.isnan(), torch.tensor([False, True, False]))


class TestWeight:
    @pytest.mark.parametrize("groups", (1, 4))
    @pytest.mark.parametrize("outliers", (0, 3))
    def test_decodes_within_half_a_step(self, outliers, groups):
        weight = random(7, 128)
        parts = ops.encode_weight(weight, outliers, groups)
        _, scales, columns, values = parts
        decoded = ops.decode_weight(parts, torch.float32)
        assert torch.equal(decoded, reference.int8_decode(*parts))
        bound = scales.repeat_interleave(128 // groups, dim=1) * (0.5 + 1e-4)
        assert ((decoded - weight).abs() <= bound).all()
        if outliers:
            assert torch.equal(columns.long(), weight.abs().topk(outliers).indices.sort().values)
            assert torch.equal(decoded.gather(1, columns.long()), weight.gather(1, columns.long()))
            assert (columns.dtype, values.dtype) == (torch.int16, torch.float32)
        else:
            assert columns is values is None

    def test_outliers_leave_the_scale_to_the_others(self):
        weight = random(8, 200) * 0.02
        weight[:, 17] = 5
        with_outliers, without = (ops.encode_weight(weight, r) for r in (2, 0))
        error, error_without = (
            (ops.decode_weight(parts, torch.float32) - weight).norm() for parts in (with_outliers, without)
        )
        assert error < error_without / 20

    def test_decoding_rounds_once(self):
        parts = ops.encode_weight(random(9, 70), 2)
        parts[0].add_(1)  # outliers have codes of their own from the first update on
        decoded = ops.decode_weight(parts, torch.bfloat16)
        assert torch.equal(decoded, reference.int8_decode(*parts).bfloat16())

    def test_rows_of_zeros_can_still_learn(self):
        weight = random(4, 64) * 0.02
        weight[2] = 0
        _, scales, *_ = ops.encode_weight(weight, 1)
        torch.testing.assert_close(scales[2], scales[[0, 1, 3]].mean(0))
        assert (ops.encode_weight(torch.zeros(2, 8), 1)[1] > 0).all()

    def test_columns_of_wide_rows_take_four_bytes(self):
        weight = torch.zeros(1, 40_000)
        weight[0, 39_999] = 1
        _, _, columns, values = ops.encode_weight(weight, 1)
        assert (columns.dtype, columns.item(), values.item()) == (torch.int32, 39_999, 1)


def mirrored(weight):
    """The same weight without outliers, by negative scales."""
    return EncodedWeight(weight.codes.neg(), weight.scales.neg(), None, None)


class TestNegativeScales:
    def test_decoding(self):
        parts = mirrored(ops.encode_weight(random(7, 128), 0, 4))
        assert torch.equal(ops.decode_weight(parts, torch.float32), reference.int8_decode(*parts))

    def test_a_step_is_that_of_the_mirrored_weight(self):
        state, other = (State((5, 300), groups=3) for _ in range(2))
        state.weight.clamp_(-100, 100)
        other.weight, other.scales = state.weight.neg(), state.scales.neg()
        start, lr = state.decoded(), 3 * state.scales.min().item()
        for key in range(3):
            for each in (state, other):
                each.step(random(5, 300, seed=9), lr=lr, rounding=ops.NEAREST, key=key)
        assert not torch.equal(state.decoded(), start)
        assert torch.equal(other.decoded(), state.decoded())

    def test_a_refresh_keeps_what_fits(self):
        weight = mirrored(ops.encode_weight(random(6, 300), 0))
        codes, scales, *_ = weight
        codes.clamp_(-126, 126)
        before = codes.clone(), scales.clone()
        for key in range(20):
            ops.refresh_weight(weight, key)
        assert torch.equal(codes, before[0])
        assert torch.equal(scales, before[1])

    def test_a_refresh_gives_room_at_the_edge(self):
        weight = mirrored(ops.encode_weight(random(6, 300), 0))
        codes, scales, *_ = weight
        codes[:, 5] = -128
        before = ops.decode_weight(weight, torch.float32)
        ops.refresh_weight(weight, 1)
        assert codes.abs().max() < 115
        after = ops.decode_weight(weight, torch.float32)
        assert ((after - before).abs() <= scales.abs()).all()


class TestRefresh:
    def test_keeps_what_fits(self):
        parts = ops.encode_weight(random(6, 300), 3)
        parts[0].clamp_(-126, 126)
        before = [part.clone() for part in parts]
        for key in range(20):
            ops.refresh_weight(parts, key)
        assert all(torch.equal(part, old) for part, old in zip(parts, before))

    def test_gives_room_where_codes_are_at_the_edge(self):
        weight = ops.encode_weight(random(6, 300), 0)
        codes, scales, *_ = weight
        before = ops.decode_weight(weight, torch.float32)
        old = scales.clone()
        ops.refresh_weight(weight, 1)
        torch.testing.assert_close(scales, old * 1.125, rtol=2**-11, atol=0)  # scales are rounded to fp16
        assert codes.abs().max() < 115
        after = ops.decode_weight(weight, torch.float32)
        assert ((after - before).abs() <= scales).all()

    def test_takes_small_rows_up_and_is_unbiased(self):
        codes = torch.full((1, 4096), 11, dtype=torch.int8)
        codes[0, 0] = 60
        scales = torch.tensor([[0.5]])
        weight = EncodedWeight(codes, scales, None, None)
        ops.refresh_weight(weight, 1)
        torch.testing.assert_close(scales, torch.tensor([[60 * 0.5 * 1.125 / 127]]), rtol=2**-11, atol=0)
        decoded = ops.decode_weight(weight, torch.float32)[0, 1:]
        assert (decoded != 5.5).any()
        assert abs(decoded.mean() - 5.5) < scales.item() * spread(1, 4095)

    def test_chooses_outliers_anew(self):
        weight = random(3, 200)
        parts = ops.encode_weight(weight, 2)
        _, scales, columns, values = parts
        values.mul_(0.01)  # no longer the largest
        dense = ops.decode_weight(parts, torch.float32)
        ops.refresh_weight(parts, 1)
        assert torch.equal(columns.long(), dense.abs().topk(2).indices.sort().values)
        decoded = ops.decode_weight(parts, torch.float32)
        assert torch.equal(decoded.gather(1, columns.long()), dense.gather(1, columns.long()))
        assert ((decoded - dense).abs() <= scales * (1 + 1e-4)).all()

    def test_in_runs_of_rows(self, monkeypatch):
        def refreshed():
            parts = ops.encode_weight(random(7, 60), 2)
            ops.refresh_weight(parts, 1)
            return parts

        expected = refreshed()
        monkeypatch.setattr(int8, "_RUN", 130)
        assert all(torch.equal(a, b) for a, b in zip(refreshed(), expected))


class State:
    """The tensors of a step on a weight of int8 or another dtype."""

    def __init__(self, shape, dtype=torch.int8, groups=1, momentum=None, residual=False, seed=0):
        weight = random(*shape, seed=seed) * 0.02
        self.scales = None
        self.weight = weight.to(dtype)
        if dtype == torch.int8:
            self.weight, self.scales, *_ = ops.encode_weight(weight, 0, groups)
        momentum = random(*shape, seed=seed + 1) if momentum is None else momentum
        self.momentum, self.momentum_scales, _ = ops.encode_gradient(momentum, 1)
        self.residual = ops.random_residual(self.weight, seed) if residual else None
        self.skipped = torch.zeros((), dtype=torch.int32)

    def step(self, gradient, gradient_scales=None, norm=1.0, rounding=ops.STOCHASTIC, key=0, **options):
        step = ops.LionStep(
            self.weight, self.scales, gradient, gradient_scales, self.momentum, self.momentum_scales, self.residual,
            torch.tensor(norm), self.skipped, **{**STEP, **options}, rounding=rounding, key=key,
        )  # fmt: skip
        ops.lion_step(step)

    def decoded(self):
        if self.scales is None:
            return self.weight.float()
        return ops.decode_weight(EncodedWeight(self.weight, self.scales, None, None), torch.float32)

    def tensors(self):
        return [self.weight, self.momentum, self.momentum_scales, self.residual]


def reference_step(state, gradient, factor=1.0, **options):
    momentum = ops.decode_blocks(state.momentum, state.momentum_scales)
    options = {**STEP, **options}
    del options["max_norm"]
    return reference.lion(state.decoded(), gradient.float() * factor, momentum, **options)


class TestLion:
    @pytest.mark.parametrize("weight_decay", (0.0, 0.1))
    @pytest.mark.parametrize("quantized", (False, True))
    @pytest.mark.parametrize("groups", (1, 2))
    @pytest.mark.parametrize("shape", ((3, 256), (7, 130), (2, 1024)))
    def test_is_the_reference_within_a_step_of_each_grid(self, shape, groups, quantized, weight_decay, monkeypatch):
        monkeypatch.setattr(int8, "_RUN", 512)
        state, gradient, scales = State(shape, groups=groups), random(*shape, seed=9), None
        if quantized:
            gradient, scales, _ = ops.encode_gradient(gradient, 3)
        dense = gradient if scales is None else ops.decode_blocks(gradient, scales)
        weight, momentum = reference_step(state, dense, factor=0.5, weight_decay=weight_decay)
        state.step(gradient, scales, norm=2.0, max_norm=1.0, weight_decay=weight_decay)
        step = state.scales.repeat_interleave(shape[1] // groups, dim=1)
        # of the decoded weights one in each row is at the edge, and cannot grow
        inside = weight.abs() <= 127 * step
        assert ((state.decoded() - weight).abs() <= step * (1 + 1e-4))[inside].all()
        assert inside.float().mean() > 0.9
        error = (ops.decode_blocks(state.momentum, state.momentum_scales) - momentum).abs().view(-1)
        assert (error <= state.momentum_scales.repeat_interleave(256)[: error.numel()] * (1 + 1e-4)).all()

    def test_rounding_of_the_weight_is_unbiased_where_an_update_is_a_hundredth_of_a_step(self):
        shape, repeats = (4, 64), 4096
        start = State(shape)
        gradient = random(*shape, seed=9)
        lr = 0.01 * start.scales.min().item()
        exact, momentum = reference_step(start, gradient, lr=lr)
        weights, momenta = torch.zeros(shape), torch.zeros(shape)
        for key in range(repeats):
            state = State(shape)
            state.step(gradient, lr=lr, key=random_key(key))
            weights += state.decoded()
            momenta += ops.decode_blocks(state.momentum, state.momentum_scales)
        inside = exact.abs() <= 127 * start.scales
        # a code moves with a probability of at most 0.01
        bound = 5 * start.scales * math.sqrt(0.01 / repeats) + 1e-6
        assert ((weights / repeats - exact).abs() <= bound)[inside].all()
        assert (weights / repeats != start.decoded())[inside].float().mean() > 0.9
        assert ((momenta / repeats - momentum).abs() <= state.momentum_scales * spread(64, repeats)).all()

    def test_zero_gradient_never_moves_a_parameter(self):
        for dtype, residual in (
            (torch.int8, False),
            (torch.int8, True),
            (torch.bfloat16, False),
            (torch.float32, False),
        ):
            state = State((5, 300), dtype=dtype, momentum=torch.zeros(5, 300), residual=residual)
            rounding = ops.ERROR_FEEDBACK if residual else ops.STOCHASTIC
            if dtype == torch.int8:
                state.weight[0] = -128  # as in GPTQ checkpoints
            before = state.weight.clone()
            for key in range(50):
                state.step(torch.zeros(5, 300), key=key, rounding=rounding)
            assert torch.equal(state.weight, before)
            assert not state.momentum.any()

    def test_nearest_rounding_loses_small_updates_and_error_feedback_does_not(self):
        moved = {}
        gradient = random(4, 256, seed=9)
        for rounding in (ops.NEAREST, ops.STOCHASTIC, ops.ERROR_FEEDBACK):
            state = State((4, 256), momentum=gradient, residual=rounding == ops.ERROR_FEEDBACK)
            state.weight.clamp_(-100, 100)
            before, lr = state.decoded(), 0.05 * state.scales.min().item()
            for key in range(100):
                state.step(gradient, lr=lr, rounding=rounding, key=key)
            moved[rounding] = -((state.decoded() - before) * gradient.sign()).mean().item() / (100 * lr)
        assert moved[ops.NEAREST] == 0
        # the mean of 1024 sums of 100 draws, of which each deviates by 1.1, in 5; error feedback begins with one draw
        assert moved[ops.STOCHASTIC] == pytest.approx(1, abs=5 * 1.1 / 5 / 32)
        assert moved[ops.ERROR_FEEDBACK] == pytest.approx(1, abs=5 * 0.3 / 5 / 32)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
    def test_floating_point_weights(self, dtype):
        state, gradient = State((6, 100), dtype=dtype), random(6, 100, seed=9).to(dtype)
        weight, _ = reference_step(state, gradient, weight_decay=0.1)
        state.step(gradient, weight_decay=0.1)
        info = torch.finfo(dtype)
        step = (weight.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
        assert ((state.weight.float() - weight).abs() <= step).all()

    @pytest.mark.parametrize("norm", (math.nan, math.inf))
    @pytest.mark.parametrize("rounding", (ops.STOCHASTIC, ops.ERROR_FEEDBACK))
    def test_a_norm_that_is_not_finite_changes_nothing_and_is_counted(self, norm, rounding):
        state = State((4, 100), residual=rounding == ops.ERROR_FEEDBACK)
        before = [None if t is None else t.clone() for t in state.tensors()]
        gradient = torch.full((4, 100), norm)
        for _ in range(3):
            state.step(gradient, norm=norm, rounding=rounding, max_norm=1.0)
        assert all(a is b or torch.equal(a, b) for a, b in zip(state.tensors(), before))
        assert state.skipped == 3

    def test_codes_saturate(self):
        state = State((1, 4), momentum=torch.zeros(1, 4))
        state.weight = torch.tensor([[127, -127, -128, 0]], dtype=torch.int8)
        state.step(torch.tensor([[-1.0, 1.0, 1.0, 1.0]]), lr=10 * state.scales.item(), rounding=ops.NEAREST)
        assert state.weight.tolist() == [[127, -128, -128, -10]]

    def test_residuals_to_begin_with_are_uniform(self):
        residual = ops.random_residual(torch.zeros(64, 1024, dtype=torch.int8), 3)
        assert residual.abs().max() == 127
        # 16 bins: chi-squared of 15 degrees, beyond 44 once in 10 000; -128 counts as -127
        counts = torch.histc(residual.float(), 16, -128, 128)
        assert ((counts - 4096) ** 2 / 4096).sum() < 44

    def test_the_key_alone_decides(self):
        def stepped(key):
            state = State((4, 100))
            state.step(random(4, 100, seed=9), key=key)
            return state.tensors()[:3]

        assert all(torch.equal(a, b) for a, b in zip(stepped(1), stepped(1)))
        assert not torch.equal(stepped(1)[0], stepped(2)[0])


class TestProducts:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("bias", (False, True))
    def test_are_those_of_the_decoded_weight(self, dtype, bias):
        parts = ops.encode_weight(random(48, 70), 1)
        weight = reference.int8_decode(*parts)
        x, dy = random(2, 5, 70, seed=1).to(dtype), random(2, 5, 48, seed=2).to(dtype)
        b = random(48, seed=3).to(dtype) if bias else None
        y = operators.int8_linear(x, parts, b)
        expected = x.float() @ weight.t() + (0 if b is None else b.float())
        # sums of 70 products in another order, rounded to the dtype once
        close = {"rtol": 2**-8 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-4}
        torch.testing.assert_close(y.float(), expected, **close)
        torch.testing.assert_close(operators.int8_linear_grad_x(dy, parts).float(), dy.float() @ weight, **close)
        assert y.dtype == dtype


def test_opcheck():
    x = random(3, 300)
    codes, scales, _ = ops.encode_gradient(x, 0)
    parts = ops.encode_weight(x, 3)
    state = State((3, 300), residual=True)
    step = (
        state.weight, state.scales, codes, scales, state.momentum, state.momentum_scales, state.residual,
        torch.tensor(1.0), state.skipped, 1.0, 1e-4, 0.9, 0.99, 0.1, ops.ERROR_FEEDBACK, 5,
    )  # fmt: skip
    with torch._dynamo.config.patch(disable=False):
        torch.library.opcheck(torch.ops.peft_quant.encode_gradient.default, (x, 0))
        torch.library.opcheck(torch.ops.peft_quant.accumulate_gradient.default, (codes.clone(), scales.clone(), x, 1))
        for outliers in (parts, (*parts[:2], None, None)):
            torch.library.opcheck(torch.ops.peft_quant.decode_weight.default, (*outliers, torch.bfloat16))
            torch.library.opcheck(torch.ops.peft_quant.int8_linear.default, (random(5, 300), *outliers, None))
            torch.library.opcheck(torch.ops.peft_quant.int8_linear.default, (random(2, 5, 300), *outliers, random(3)))
            torch.library.opcheck(torch.ops.peft_quant.int8_linear_grad_x.default, (random(2, 5, 3), *outliers))
        torch.library.opcheck(torch.ops.peft_quant.lion_step.default, step)
        dense = (*step[:2], x, None, *step[4:6], None, *step[7:-2], ops.STOCHASTIC, 5)
        torch.library.opcheck(torch.ops.peft_quant.lion_step.default, dense)
