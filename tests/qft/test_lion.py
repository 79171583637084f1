"""QuantizedLion: steps against fp32 Lion, clipping, fusion, saved states, and gradients that are not finite."""

import copy
import io
import math

import pytest
import torch
from gptq_models import float_llama
from torch import nn

from peft_quant import ops
from peft_quant.ops import reference
from peft_quant.qft import Int8Weight, QuantizedLion


ROUNDINGS = ("stochastic", "nearest", "error_feedback")


def int8_model(dtype=torch.float32, ratio=0.02):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 70), nn.Linear(70, 48), nn.LayerNorm(48), nn.Linear(48, 50, bias=False))
    model.to(dtype)
    for layer in (model[1], model[3]):
        layer.weight = nn.Parameter(Int8Weight.from_dense(layer.weight, ratio))
    return model


def backward(model, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(0, 50, (64,), generator=generator) for _ in range(2))
    loss = nn.functional.cross_entropy(model(ids).float(), targets)
    (loss * scale).backward()
    return loss.item()


def train(model, optimizer, steps, start=0, micro_batches=1, max_norm=None):
    for step in range(start, start + steps):
        for micro_batch in range(micro_batches):
            backward(model, step * micro_batches + micro_batch)
        if max_norm is not None:
            optimizer.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad()


def tensors(model, optimizer):
    for parameter in model.parameters():
        yield from parameter.parts.values() if isinstance(parameter, Int8Weight) else (parameter,)
        yield from (tensor for name, tensor in optimizer.state[parameter].items() if name != "skipped")


def snapshot(model, optimizer):
    return [tensor.detach().clone() for tensor in tensors(model, optimizer)]


def unchanged(model, optimizer, before):
    return all(torch.equal(now, then) for now, then in zip(tensors(model, optimizer), before, strict=True))


def decoded(parameter):
    return parameter.dequantize() if isinstance(parameter, Int8Weight) else parameter.detach().float()


def momentum(optimizer, parameter):
    state = optimizer.state[parameter]
    if optimizer.state_bits == 32:
        return state["momentum"].clone()
    return ops.decode_blocks(state["momentum"], state["momentum_scales"])


def step_of(optimizer, parameter):
    """The step of the grid of each element of the momentum."""
    scales = optimizer.state[parameter]["momentum_scales"]
    return scales.repeat_interleave(256)[: parameter.numel()].view(parameter.shape)


def dense_gradients(model, *seeds):
    float_model = copy.deepcopy(model)
    for seed in seeds:
        backward(float_model, seed)
    return [parameter.grad for parameter in float_model.parameters()]


class TestStep:
    @pytest.mark.parametrize("fused", (False, True))
    @pytest.mark.parametrize("weight_decay", (0.0, 0.5))
    def test_is_lion_within_a_step_of_each_grid(self, fused, weight_decay):
        model = int8_model()
        gradients = dense_gradients(model, 5)
        optimizer = QuantizedLion(model.parameters(), lr=1e-4, weight_decay=weight_decay, fused=fused)
        train(model, optimizer, 3)
        gradients = dense_gradients(model, 5)
        options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": weight_decay}
        expected = [
            (*reference.lion(decoded(p), g, momentum(optimizer, p), **options), momentum(optimizer, p), g)
            for p, g in zip(model.parameters(), gradients)
        ]
        backward(model, 5)
        optimizer.step()
        for parameter, (weight, mean, before, gradient) in zip(model.parameters(), expected):
            error = (momentum(optimizer, parameter) - mean).abs()
            # a step of its own rounding, and 1 % of one of the gradient's
            assert (error <= step_of(optimizer, parameter) * 1.01 + 0.01 * gradient.abs().max() / 127).all()
            # where the sign does not hang on the gradient's rounding
            sure = (0.9 * before + 0.1 * gradient).abs() > 0.1 * gradient.abs().max() / 127
            grid = parameter.scales if isinstance(parameter, Int8Weight) else 1e-9
            error = (decoded(parameter) - weight).abs()
            inside = weight.abs() <= 127 * grid if isinstance(parameter, Int8Weight) else torch.tensor(True)
            assert (error <= grid * (1 + 1e-3) + 1e-8)[sure & inside].all()
            assert sure.float().mean() > 0.2

    def test_weight_decay_shrinks_codes_and_outliers_alike(self):
        model = int8_model()
        optimizer = QuantizedLion(model[1].parameters(), lr=1e-2, weight_decay=10.0, refresh_steps=0)
        before = model[1].weight.dequantize()
        values = model[1].weight.outlier_values.clone()
        model[1].weight.grad = torch.zeros(48, 70)
        optimizer.gradients.push(model[1].weight, torch.zeros(48, 70))
        optimizer.step()
        torch.testing.assert_close(model[1].weight.outlier_values, values * 0.9)
        error = (model[1].weight.dequantize() - before * 0.9).abs()
        assert (error <= model[1].weight.scales * (1 + 1e-4)).all()

    def test_without_a_gradient_nothing_moves(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), weight_decay=0.1)
        before = copy.deepcopy(model)
        optimizer.step()
        assert all(torch.equal(decoded(a), decoded(b)) for a, b in zip(model.parameters(), before.parameters()))
        assert not optimizer.state

    def test_zero_gradients_never_move_anything(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), lr=1e-2)
        before = [decoded(p).clone() for p in model.parameters()]
        for seed in range(10):
            backward(model, seed, scale=0.0)
            optimizer.step()
        assert all(torch.equal(decoded(p), b) for p, b in zip(model.parameters(), before))

    def test_refreshing_lets_a_row_grow(self):
        model = int8_model(ratio=0)
        largest = {}
        for refresh_steps in (0, 5):
            layer = copy.deepcopy(model[1])
            optimizer = QuantizedLion([layer.weight], lr=1e-3, refresh_steps=refresh_steps)
            for _ in range(60):
                optimizer.gradients.push(layer.weight, -layer.weight.dequantize().sign())
                optimizer.step()
            largest[refresh_steps] = layer.weight.dequantize().abs().amax(1) / decoded(model[1].weight).abs().amax(1)
        assert (largest[0] <= 128 / 127 * 1.0001).all()
        assert (largest[5] > 1.2).all()

    def test_learning_rates_of_groups_and_schedulers_count(self):
        model = int8_model()
        groups = [{"params": model[1].parameters(), "lr": 0.0}, {"params": model[3].parameters()}]
        optimizer = QuantizedLion(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 1))
        before = snapshot(model[1:2], QuantizedLion(model[1].parameters(), lr=0))
        train(model, optimizer, 1)
        assert torch.equal(model[1].weight.codes, before[0])
        moved = model[3].weight.codes.clone()
        scheduler.step()
        train(model, optimizer, 1, start=1)
        assert torch.equal(model[3].weight.codes, moved)

    def test_closure(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters())
        before = model[1].weight.codes.clone()
        assert optimizer.step(lambda: backward(model)) > 0
        assert not torch.equal(model[1].weight.codes, before)


class TestClipping:
    def test_is_that_of_the_float_reference(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), lr=1e-4)
        train(model, optimizer, 2)
        gradients = dense_gradients(model, 5)
        before = [momentum(optimizer, p) for p in model.parameters()]
        norm = nn.utils.get_total_norm(gradients)
        max_norm = norm.item() / 20
        nn.utils.clip_grads_with_norm_([nn.Parameter(g) for g in gradients], max_norm, norm)
        backward(model, 5)
        torch.testing.assert_close(optimizer.clip_grad_norm_(max_norm), norm)
        optimizer.step()
        for parameter, old, gradient in zip(model.parameters(), before, gradients):
            expected = 0.99 * old + 0.01 * gradient / 20
            error = (momentum(optimizer, parameter) - expected).abs()
            assert (error <= step_of(optimizer, parameter) * 1.01 + 0.01 / 20 * gradient.abs().max() / 127).all()

    def test_changes_the_step_and_lasts_for_one(self):
        models = [int8_model() for _ in range(3)]
        for model, norms in zip(models, ([None, None], [1e-3, None], [1e9, None])):
            optimizer = QuantizedLion(model.parameters())
            for step, norm in enumerate(norms):
                train(model, optimizer, 1, start=step, max_norm=norm)
                if step == 0:
                    model.scale = optimizer.state[model[1].weight]["momentum_scales"].mean()
                model.last = optimizer.state[model[1].weight]["momentum_scales"].mean()
        assert models[1].scale < models[0].scale / 100
        assert torch.equal(models[2].scale, models[0].scale)
        assert models[1].last > 10 * models[1].scale

    def test_of_a_fused_optimizer_is_by_parameter(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), fused=True, max_parameter_norm=1e-3)
        backward(model)
        optimizer.step()
        for parameter in model.parameters():
            # (1 - beta2) times the clipped gradient
            assert momentum(optimizer, parameter).norm() <= 1e-5 * 1.1
        with pytest.raises(RuntimeError, match="max_parameter_norm"):
            optimizer.clip_grad_norm_(1.0)


class TestFused:
    def test_is_a_step_with_one_micro_batch_within_the_rounding_of_the_gradient(self):
        outcomes = []
        for fused in (False, True):
            model = int8_model()
            optimizer = QuantizedLion(model.parameters(), lr=1e-3, fused=fused)
            backward(model)
            optimizer.step()
            outcomes.append([(decoded(p), momentum(optimizer, p)) for p in model.parameters()])
        for parameter, (weight, mean), (fused_weight, fused_mean) in zip(model.parameters(), *outcomes):
            bound = 0.01 * 100 * mean.abs().max() / 127 + 2 * step_of(optimizer, parameter)
            assert ((mean - fused_mean).abs() <= bound).all()
            # moves agree where the gradient is not rounded to zero
            grid = parameter.scales if isinstance(parameter, Int8Weight) else torch.tensor(1e-3)
            sure = fused_mean.abs() > 2 * mean.abs().max() / 127
            assert sure.float().mean() > 0.05
            assert ((weight - fused_weight).abs() <= grid * 1.001)[sure.expand_as(weight)].all()

    def test_stores_no_gradient_and_steps_within_backward(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), fused=True)
        before = model[1].weight.codes.clone()
        backward(model)
        assert not torch.equal(model[1].weight.codes, before)
        assert len(optimizer.gradients) == 0
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_refuses_a_second_backward_before_the_step(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), fused=True)
        backward(model)
        with pytest.raises(RuntimeError, match="gradient_accumulation_steps=1"):
            backward(model)
        optimizer.step()
        backward(model)
        optimizer.zero_grad()
        backward(model)


class TestAccumulation:
    def test_is_a_step_on_the_sum(self):
        model = int8_model()
        expected = dense_gradients(model, 0, 1, 2)
        optimizer = QuantizedLion(model.parameters())
        for seed in range(3):
            backward(model, seed)
        torch.testing.assert_close(optimizer.gradients.norm(), nn.utils.get_total_norm(expected), rtol=2e-2, atol=0)
        optimizer.step()
        for parameter, gradient in zip(model.parameters(), expected):
            # three roundings of the gradient and one of the momentum
            bound = 0.01 * 3 * 2 * gradient.abs().max() / 127 + step_of(optimizer, parameter)
            assert ((momentum(optimizer, parameter) - 0.01 * gradient).abs() <= bound).all()

    def test_zero_grad_forgets(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters())
        backward(model)
        optimizer.zero_grad()
        assert len(optimizer.gradients) == 0


class TestNotFinite:
    @pytest.mark.parametrize("value", (math.nan, math.inf))
    @pytest.mark.parametrize("max_norm", (None, 1.0))
    @pytest.mark.parametrize("rounding", ("stochastic", "error_feedback"))
    def test_leaves_all_untouched_and_is_counted(self, value, max_norm, rounding):
        model = int8_model(torch.bfloat16)
        optimizer = QuantizedLion(model.parameters(), lr=1e-3, weight_decay=0.1, rounding=rounding, refresh_steps=3)
        train(model, optimizer, 1)
        before = snapshot(model, optimizer)
        for seed in range(2):  # of them one in which all would be refreshed
            backward(model, seed)
            model[2].weight.register_hook(lambda gradient: gradient * value)
            backward(model, seed)
            model[2].weight._backward_hooks.clear()
            if max_norm is not None:
                assert not optimizer.clip_grad_norm_(max_norm).isfinite()
            optimizer.step()
        assert unchanged(model, optimizer, before)
        assert optimizer.skipped_steps == 2
        train(model, optimizer, 1)
        assert not unchanged(model, optimizer, before)
        assert optimizer.skipped_steps == 2

    def test_skips_that_parameter_alone_if_fused(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters(), lr=1e-2, fused=True)
        codes = model[3].weight.codes.clone(), model[1].weight.codes.clone()
        model[3].weight.register_hook(lambda gradient: gradient * math.nan)
        backward(model)
        optimizer.step()
        assert torch.equal(model[3].weight.codes, codes[0])
        assert not torch.equal(model[1].weight.codes, codes[1])
        assert optimizer.skipped_steps == 1


class TestState:
    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize(
        "options",
        ({}, {"rounding": "error_feedback"}, {"state_bits": 32}, {"fused": True}, {"refresh_steps": 2}),
        ids=lambda options: "-".join(options) or "default",
    )
    def test_a_loaded_run_goes_on_to_the_bit(self, dtype, options):
        model = int8_model(dtype)
        optimizer = QuantizedLion(model.parameters(), lr=1e-3, **options)
        micro_batches = 1 if options.get("fused") else 2
        train(model, optimizer, 3, micro_batches=micro_batches)
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        train(model, optimizer, 3, start=3, micro_batches=micro_batches)

        file.seek(0)
        model_state, state = torch.load(file, weights_only=True)
        other = int8_model(dtype)
        other.load_state_dict(model_state)
        resumed = QuantizedLion(other.parameters(), lr=1.0, **options)
        resumed.load_state_dict(state)
        train(other, resumed, 3, start=3, micro_batches=micro_batches)
        assert all(
            torch.equal(a, b) for a, b in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True)
        )

    def test_keeps_int8_as_int8(self):
        model = int8_model(torch.bfloat16)
        optimizer = QuantizedLion(model.parameters(), rounding="error_feedback")
        train(model, optimizer, 1)
        loaded = QuantizedLion(model.parameters(), rounding="error_feedback")
        loaded.load_state_dict(optimizer.state_dict())
        for parameter in model.parameters():
            state = loaded.state[parameter]
            assert (state["momentum"].dtype, state["momentum_scales"].dtype) == (torch.int8, torch.float32)
            assert ("residual" in state) == isinstance(parameter, Int8Weight)
            assert state["momentum"].data_ptr() != optimizer.state[parameter]["momentum"].data_ptr()

    def test_takes_a_byte_a_parameter_and_scales(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters())
        train(model, optimizer, 1)
        held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        parameters = [p.numel() for p in model.parameters()]
        assert held == sum(n + 4 * -(-n // 256) + 4 for n in parameters)

    def test_of_other_options_is_refused(self):
        model = int8_model()
        optimizer = QuantizedLion(model.parameters())
        train(model, optimizer, 1)
        state = optimizer.state_dict()
        for options in ({"state_bits": 32}, {"rounding": "error_feedback"}):
            with pytest.raises(ValueError, match="does not fit this optimizer"):
                QuantizedLion(model.parameters(), **options).load_state_dict(state)
        with pytest.raises(ValueError, match="does not fit this optimizer"):
            QuantizedLion([nn.Parameter(p.detach()[:1].clone()) for p in model.parameters()]).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"lr": -1.0}, "lr is finite"),
        ({"lr": math.nan}, "lr is finite"),
        ({"betas": (0.9, 1.0)}, "betas are in"),
        ({"weight_decay": -0.1}, "weight_decay is at least 0"),
        ({"rounding": "up"}, "rounding is one of nearest, stochastic, error_feedback"),
        ({"state_bits": 4}, "state_bits is 8 or 32"),
        ({"max_parameter_norm": 1.0}, "is above 0 and for fused=True"),
        ({"max_parameter_norm": 0.0, "fused": True}, "is above 0 and for fused=True"),
        ({"refresh_steps": -1}, "refresh_steps is a number of steps"),
    ),
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLion([nn.Parameter(torch.ones(2, 2))], **options)


def test_parameters_that_cannot_be():
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, found torch\.float64"):
        QuantizedLion([nn.Parameter(torch.ones(2, 2).double())])
    with pytest.raises(ValueError, match="contiguous"):
        QuantizedLion([nn.Parameter(torch.ones(2, 3).t())])


class Lion(torch.optim.Optimizer):
    """The reference as an optimizer."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            mean = state.get("momentum", torch.zeros_like(parameter))
            weight, state["momentum"] = reference.lion(
                parameter, parameter.grad, mean, self.param_groups[0]["lr"], 0.9, 0.99, 0.0
            )
            parameter.copy_(weight)


class TestTraining:
    """30 steps on a small Llama, at a learning rate below a hundredth of a step of the grid of its weights."""

    def losses(self, make, int8=True):
        model = float_llama().train()
        ids = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(1))
        if int8:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(Int8Weight.from_dense(module.weight))
        optimizer, losses = make(model.parameters()), []
        for _ in range(31):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    @pytest.fixture(scope="class")
    def fp32(self):
        return self.losses(lambda parameters: Lion(parameters, 3e-5), int8=False)

    @pytest.mark.parametrize("options", ({}, {"fused": True}, {"rounding": "error_feedback"}, {"state_bits": 32}))
    def test_learns_as_fp32_lion(self, options, fp32):
        start, *_, end = self.losses(lambda parameters: QuantizedLion(parameters, lr=3e-5, **options))
        assert start == pytest.approx(fp32[0], rel=1e-3)
        # of what fp32 Lion gains
        assert (start - end) / (fp32[0] - fp32[-1]) == pytest.approx(1, abs=0.1)

    def test_nearest_rounding_does_not(self, fp32):
        start, *_, end = self.losses(lambda parameters: QuantizedLion(parameters, lr=3e-5, rounding="nearest"))
        assert start - end < 0.8 * (fp32[0] - fp32[-1])
