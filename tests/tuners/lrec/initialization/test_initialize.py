"""Initializations that compensate the quantization error, on a model loaded as users load it."""

import json
import math
import weakref

import pytest
import torch
from gptq_models import PlainLayer, PlainMLP, load, quantize, save_tiny_llama, tiny_config
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from peft_quant import LRECConfig, export_lora, initialize_lrec_weights
from peft_quant.gptq.checkpoint import Checkpoint
from peft_quant.tuners.lrec import LRECLinear
from peft_quant.tuners.lrec.initialization import calibration


def float_llama(seed=0, **options):
    """The model that `save_tiny_llama` quantizes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**options))


@pytest.fixture(scope="module")
def float_checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("float") / "llama"
    float_llama().save_pretrained(directory)
    return directory


def tokens(sequences, length=24, seed=0):
    return torch.randint(3, 128, (sequences, length), generator=torch.Generator().manual_seed(seed))


def adapt(model, **options):
    return get_peft_model(model, LRECConfig(**{"task_type": "CAUSAL_LM", "r": 4, **options}))


def layers(model):
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LRECLinear)
    }


@torch.no_grad()
def deltas(model, adapter="default"):
    return {name: layer.get_delta_weight(adapter) for name, layer in layers(model).items()}


def error_of(name, layer, float_model):
    """The float weight and the quantization error, `[N, K]`."""
    weight = float_model.get_submodule(name).weight.detach()
    return weight, weight - layer.get_base_weight()


def held_out_inputs(model, input_ids):
    """What enters each layer, of the sequences held out, by running the whole model."""
    seen, handles = {}, []
    for name, layer in layers(model).items():
        handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]})))
    with torch.no_grad(), model.disable_adapter():
        model(input_ids)
    for handle in handles:
        handle.remove()
    rows = torch.arange(len(input_ids)) % 4 == 1
    return {name: x[rows].flatten(0, 1) for name, x in seen.items()}


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids).logits


class TestSVD:
    @pytest.mark.parametrize(
        "layout",
        (
            *({"bits": bits} for bits in (2, 3, 4, 8)),
            {"group_size": -1, "symmetric": False, "checkpoint_format": "gptq_v2"},
            {"bits": 3, "act_order": True},
        ),
        ids=str,
    )
    def test_is_the_truncated_svd_of_every_error(self, layout, tmp_path, float_checkpoint):
        model = adapt(load(save_tiny_llama(tmp_path / "base", **layout), layout.get("bits", 4)))
        report = initialize_lrec_weights(model, float_checkpoint, "svd")
        float_model = float_llama()
        assert len(report) == len(layers(model)) == 14
        for row, (name, layer) in zip(report, layers(model).items()):
            weight, error = error_of(name, layer, float_model)
            u, s, vt = torch.linalg.svd(error, full_matrices=False)
            best = u[:, :4] * s[:4] @ vt[:4]
            torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=0, atol=1e-4 * float(s[0]))
            assert (row.name, row.bits, row.rank, row.damping) == (name, layout.get("bits", 4), 4, None)
            assert row.weight_error_before == pytest.approx(float(error.norm() / weight.norm()), rel=1e-4)
            assert row.weight_error_after == pytest.approx(float(s[4:].norm() / weight.norm()), rel=1e-3)
            assert row.activation_error_before is row.activation_error_after is None

    def test_ranks_and_scalings_of_single_layers(self, model, float_checkpoint):
        model = adapt(
            model,
            lora_alpha=7,
            use_rslora=True,
            rank_pattern={"q_proj": 9, "layers.1.mlp.down_proj": 2},
            alpha_pattern={"v_proj": 0.5},
        )
        initialize_lrec_weights(model, float_checkpoint, "svd")
        float_model = float_llama()
        changes = deltas(model)
        for name, layer in layers(model).items():
            rank = 9 if "q_proj" in name else 2 if name.endswith("1.mlp.down_proj") else 4
            _, error = error_of(name, layer, float_model)
            s = torch.linalg.svdvals(error)
            rest = (error - changes[name]).norm()
            assert float(rest) == pytest.approx(float(s[rank:].norm()), rel=1e-4)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(a @ a.t(), b.t() @ b, rtol=1e-4, atol=1e-5)

    def test_the_full_rank_gives_the_float_model(self, model, float_checkpoint, input_ids):
        model = adapt(model, r=32)
        quantized = logits(model, input_ids)
        initialize_lrec_weights(model, float_checkpoint, "svd")
        expected = logits(float_llama().half().float(), input_ids)
        rank = {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}
        for name, layer in layers(model).items():
            if name in rank:  # of 32 out-features
                _, error = error_of(name, layer, float_llama())
                torch.testing.assert_close(layer.get_delta_weight("default"), error, rtol=0, atol=1e-5)
        assert (logits(model, input_ids) - expected).norm() < 0.5 * (quantized - expected).norm()


class TestWhitened:
    def test_report_against_the_inputs_of_a_whole_forward(self, model, float_checkpoint):
        model, ids = adapt(model), tokens(13)
        report = initialize_lrec_weights(model, float_checkpoint, "whitened", [ids[:6], {"input_ids": ids[6:]}])
        inputs, float_model = held_out_inputs(model, ids), float_llama()
        assert [row.name for row in report] == list(layers(model))
        for row in report:
            layer, x = layers(model)[row.name], inputs[row.name]
            weight, error = error_of(row.name, layer, float_model)
            rest = error - layer.get_delta_weight("default").detach()
            output = (x @ weight.t()).norm()
            assert row.activation_error_before == pytest.approx(float((x @ error.t()).norm() / output), rel=1e-3)
            assert row.activation_error_after == pytest.approx(float((x @ rest.t()).norm() / output), rel=1e-3)
            assert row.weight_error_after == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-3)

    @pytest.mark.parametrize("sequences", (2, 40))
    @pytest.mark.parametrize(
        "layout", ({"bits": 2}, {"bits": 3, "act_order": True}, {"bits": 4}, {"bits": 8}), ids=str
    )
    def test_is_never_worse_than_svd_on_held_out_tokens(self, layout, sequences, tmp_path, float_checkpoint):
        model = adapt(load(save_tiny_llama(tmp_path / "base", **layout), layout["bits"]))
        ids = tokens(sequences)
        plain = initialize_lrec_weights(model, float_checkpoint, "svd", [ids])
        whitened = initialize_lrec_weights(model, float_checkpoint, "whitened", [ids])
        assert all(row.damping == math.inf for row in plain)
        for before, after in zip(plain, whitened):
            assert after.activation_error_before == pytest.approx(before.activation_error_before)
            assert after.activation_error_after <= before.activation_error_after * (1 + 1e-4)
            assert after.weight_error_after >= before.weight_error_after * (1 - 1e-4)
        if sequences > 2:
            gains = [1 - b.activation_error_after / a.activation_error_after for a, b in zip(plain, whitened)]
            assert sum(gains) / len(gains) > 0.03  # inputs of a random model are nearly isotropic

    def test_padding_does_not_count(self, checkpoint, float_checkpoint):
        ids = tokens(8)
        padded = torch.cat([ids, torch.full((8, 10), 2)], dim=1)
        mask = torch.cat([torch.ones(8, 24), torch.zeros(8, 10)], dim=1).long()
        plain, with_padding = adapt(load(checkpoint)), adapt(load(checkpoint))
        initialize_lrec_weights(plain, float_checkpoint, "whitened", [ids])
        initialize_lrec_weights(
            with_padding, float_checkpoint, "whitened", [{"input_ids": padded, "attention_mask": mask}]
        )
        for name, delta in deltas(plain).items():
            torch.testing.assert_close(deltas(with_padding)[name], delta, rtol=0, atol=1e-3 * float(delta.abs().max()))

    def test_adapters_do_not_change_the_calibration(self, checkpoint, float_checkpoint):
        fresh = adapt(load(checkpoint))
        initialize_lrec_weights(fresh, float_checkpoint, "whitened", [tokens(8)])
        tuned = adapt(load(checkpoint), init_lora_weights=False)
        tuned.add_adapter("other", LRECConfig(r=2, init_lora_weights=False))
        other = deltas(tuned, "other")
        initialize_lrec_weights(tuned, float_checkpoint, "whitened", [tokens(8)])
        assert all(torch.equal(delta, other[name]) for name, delta in deltas(tuned, "other").items())
        assert all(torch.equal(delta, deltas(fresh)[name]) for name, delta in deltas(tuned).items())
        assert tuned.peft_config["default"].init_lrec_weights == "whitened"
        assert tuned.peft_config["other"].init_lrec_weights == "zero"

    def test_a_subset_of_blocks(self, checkpoint, float_checkpoint):
        whole, part = adapt(load(checkpoint)), adapt(load(checkpoint), layers_to_transform=[1])
        for model in (whole, part):
            initialize_lrec_weights(model, float_checkpoint, "whitened", [tokens(8)])
        assert layers(part).keys() == {name for name in layers(whole) if ".1." in name}
        for name, delta in deltas(part).items():
            # layers without an adapter run in gptqmodel's kernel, which rounds weights to fp16
            torch.testing.assert_close(delta, deltas(whole)[name], rtol=0, atol=1e-2 * float(delta.abs().max()))

    def test_a_block_runs_once_for_all_that_follow(self, tmp_path, monkeypatch):
        torch.manual_seed(0)
        blocks = nn.Module()
        blocks.blocks = nn.ModuleList(Block(seed) for seed in range(4))
        blocks.forward = lambda input_ids: chain(blocks.blocks, input_ids)
        ran = []
        monkeypatch.setattr(Block, "note", lambda self: ran.append(self.seed))
        model = get_peft_model(blocks, LRECConfig(r=4))
        initialize_lrec_weights(model, FloatBlocks(4), "whitened", [torch.randn(8, 5, 32)])
        # a whole pass and a chained one to compare, and one for each of the two parts
        assert sorted(ran) == sorted(4 * [*range(4)])

    def test_blocks_that_take_more_than_the_one_before_gives(self):
        torch.manual_seed(0)
        model = nn.Module()
        model.blocks = nn.ModuleList(Block(seed) for seed in range(4))

        def forward(input_ids):
            first = model.blocks[0](input_ids)
            last = model.blocks[2](model.blocks[1](first))
            return model.blocks[3](last + 3 * first)

        model.forward = forward
        peft_model, x = get_peft_model(model, LRECConfig(r=4)), torch.randn(8, 5, 32)
        report = initialize_lrec_weights(peft_model, FloatBlocks(4), "whitened", [x])
        inputs = held_out_inputs(peft_model, x)
        for row in report:
            weight, error = error_of(row.name, layers(peft_model)[row.name], FloatBlocks(4))
            expected = (inputs[row.name] @ error.t()).norm() / (inputs[row.name] @ weight.t()).norm()
            assert row.activation_error_before == pytest.approx(float(expected), rel=1e-3)

    def test_layers_outside_of_blocks(self):
        model = get_peft_model(PlainMLP(group_size=32), LRECConfig(r=4))
        report = initialize_lrec_weights(model, float_mlp(model), "whitened", [{"x": torch.randn(64, 64)}])
        assert [row.name for row in report] == ["up", "down"]
        assert all(row.activation_error_after < row.activation_error_before for row in report)

    def test_a_layer_that_no_token_reaches_gets_the_svd(self):
        base = PlainMLP(group_size=32)
        base.unused = PlainLayer(random_layer())
        model = get_peft_model(base, LRECConfig(r=4))
        float_model = float_mlp(model)
        row = list(initialize_lrec_weights(model, float_model, "whitened", [{"x": torch.randn(64, 64)}]))[-1]
        assert row.name == "unused"
        assert row.activation_error_before is row.damping is None
        _, error = error_of("unused", layers(model)["unused"], float_model)
        assert row.weight_error_after * float(float_model.unused.weight.detach().norm()) == pytest.approx(
            float(torch.linalg.svdvals(error)[4:].norm()), rel=1e-4
        )


def random_layer(seed=5):
    return quantize(torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)), 4, 32)


def float_mlp(model):
    """A float model with other weights near those of the packed one."""
    torch.manual_seed(4)
    float_model = nn.Module()
    for name, layer in layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data = layer.get_base_weight() + 0.02 * torch.randn(layer.out_features, layer.in_features)
        float_model.add_module(name, linear)
    return float_model


class Block(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self.layer = PlainLayer(quantize(float_block(seed).t(), 4, 32))
        self.bias = nn.Parameter(torch.zeros(32))

    def note(self):
        pass

    def forward(self, x):
        self.note()
        return x + torch.tanh(self.layer(x) + self.bias)


class FloatBlocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(count))
        for seed, block in enumerate(self.blocks):
            block.layer = nn.Linear(32, 32)
            block.layer.weight.data = float_block(seed)


def float_block(seed):
    return torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))


def chain(blocks, x):
    for block in blocks:
        x = block(x)
    return x


class TestFloatModel:
    def test_files_sharded_or_not_and_a_module_give_the_same(self, checkpoint, float_checkpoint, tmp_path):
        float_llama().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
        without_head = LlamaModel(tiny_config())
        without_head.load_state_dict(float_llama().model.state_dict())
        without_head.save_pretrained(tmp_path / "base")
        assert "layers.0.mlp.up_proj.weight" in Checkpoint.open(tmp_path / "base").tensors
        results = []
        for source in (str(float_checkpoint), tmp_path / "sharded", tmp_path / "base", float_llama(), without_head):
            model = adapt(load(checkpoint))
            initialize_lrec_weights(model, source, "svd")
            results.append(deltas(model))
        for other in results[1:]:
            assert all(torch.equal(delta, results[0][name]) for name, delta in other.items())

    def test_one_tensor_is_read_at_a_time(self, model, float_checkpoint, monkeypatch):
        read, alive = [], []
        tensor = Checkpoint.tensor

        def spy(self, name):
            assert not [reference for reference in alive if reference() is not None]
            result = tensor(self, name)
            read.append(name)
            alive.append(weakref.ref(result))
            return result

        model = adapt(model)
        monkeypatch.setattr(Checkpoint, "tensor", spy)
        initialize_lrec_weights(model, float_checkpoint, "whitened", [tokens(8)])
        assert sorted(read) == sorted(f"{name}.weight" for name in layers(model))

    def test_covariances_of_one_block_are_held(self, model, float_checkpoint, monkeypatch):
        held, totals = [], []
        init, covariances = calibration._Sums.__init__, calibration._Sums.covariances

        def begin(self, *args):
            init(self, *args)
            assert len(self.layers) == 7
            assert all(reference() is None for reference in held)

        def end(self):
            result = covariances(self)
            assert not self.sums
            tensors = {tensor.data_ptr(): tensor for pair in result.values() for tensor in pair}
            held.extend(weakref.ref(tensor) for tensor in tensors.values())
            totals.append(len(tensors))
            return result

        monkeypatch.setattr(calibration._Sums, "__init__", begin)
        monkeypatch.setattr(calibration._Sums, "covariances", end)
        initialize_lrec_weights(adapt(model), float_checkpoint, "whitened", [tokens(8)])
        # q, k and v share an input, so do gate and up; each has one to fit and one held out
        assert totals == [8, 8]

    def test_transposed_weights(self):
        base = nn.Module()
        base.square, base.wide = PlainLayer(random_square()), PlainLayer(random_layer())
        model = get_peft_model(base, LRECConfig(r=4))
        float_model = float_mlp(model)
        straight = [row.weight_error_after for row in initialize_lrec_weights(model, float_model, "svd")]
        for linear in float_model.children():  # as transformers' Conv1D
            linear.weight.data = linear.weight.data.t().contiguous()
        transposed = [row.weight_error_after for row in initialize_lrec_weights(model, float_model, "svd")]
        # norms are sums in the order of memory
        assert straight == pytest.approx(transposed, rel=1e-5)


def random_square():
    return quantize(torch.randn(64, 64, generator=torch.Generator().manual_seed(6)), 4, 32)


class TestAdapter:
    @pytest.mark.parametrize("start", ("svd", "whitened"))
    def test_saved_and_loaded_without_float_weights(self, start, checkpoint, float_checkpoint, tmp_path, input_ids):
        model = adapt(load(checkpoint)).eval()
        before = logits(model, input_ids)
        initialize_lrec_weights(model, float_checkpoint, start, [tokens(8)])
        expected = logits(model, input_ids)
        assert not torch.equal(before, expected)
        model.save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["init_lrec_weights"] == start
        for trainable in (False, True):
            loaded = PeftModel.from_pretrained(load(checkpoint), tmp_path / "adapter", is_trainable=trainable).eval()
            assert torch.equal(logits(loaded, input_ids), expected)
        loaded.load_adapter(tmp_path / "adapter", "second", is_trainable=True)
        loaded.set_adapter("second")
        assert torch.equal(logits(loaded, input_ids), expected)
        loaded.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="cat")
        loaded.set_adapter("mean")
        torch.testing.assert_close(logits(loaded, input_ids), expected, rtol=0, atol=1e-4)
        export_lora(tmp_path / "adapter", tmp_path / "lora")

    def test_trains_on_and_leaves_the_model_as_it_was(self, model, float_checkpoint, input_ids):
        model = adapt(model, lora_dropout=0.1).train()
        model.get_submodule("base_model.model.lm_head").eval()
        modes = {name: module.training for name, module in model.named_modules()}
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        initialize_lrec_weights(model, float_checkpoint, "whitened", [tokens(8)])
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
        assert not any(layer.disable_adapters for layer in layers(model).values())
        assert not any("forward" in vars(block) for block in model.base_model.model.model.layers)
        assert not any(layer._forward_pre_hooks for layer in layers(model).values())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(5):
            loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < losses[0]


def unchanged(model, call, error, match):
    """A call fails and leaves the adapter as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=match):
        call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(config.init_lrec_weights == "zero" for config in model.peft_config.values())
    assert not any("forward" in vars(block) for block in model.base_model.model.model.layers)


class TestErrors:
    @pytest.mark.parametrize("start", ("svd", "whitened"))
    def test_a_start_in_the_configuration_names_the_function(self, start, model):
        with pytest.raises(ValueError, match=f"initialize_lrec_weights\\(model, float_model, start='{start}'\\)"):
            adapt(model, init_lrec_weights=start)
        assert not layers(model)

    @pytest.mark.parametrize(
        ("options", "message"),
        (
            ({"start": "eora"}, "start='eora': use 'whitened' or 'svd'"),
            ({"start": "zero"}, "start='zero': use 'whitened' or 'svd'"),
            ({}, "'whitened' needs calibration data: pass `calibration="),
            ({"calibration": [], "adapter_name": "other"}, r"no LREC adapter named 'other'; there are \['default'\]"),
            ({"calibration": []}, "0 sequences. Give at least two"),
            ({"calibration": [tokens(1)]}, "1 sequences. Give at least two"),
            ({"calibration": [tokens(1)[0]]}, "not a batch"),
            ({"calibration": ["a text"]}, "holds a str that is not a batch"),
            ({"calibration": [{"input_ids": [[1, 2]]}]}, "holds a dict that is not a batch"),
        ),
    )
    def test_arguments(self, options, message, model, float_checkpoint):
        model = adapt(model)
        unchanged(model, lambda: initialize_lrec_weights(model, float_checkpoint, **options), ValueError, message)

    @pytest.mark.parametrize(
        ("options", "message"),
        (
            (
                {"r": 33},
                r"r=33 exceeds .*0.self_attn.k_proj of shape \[32, 64\].*at most 32.*rank_pattern",
            ),
            ({"lora_alpha": 0}, "scaled by 0: use a positive `lora_alpha`"),
        ),
    )
    def test_ranks_and_scalings(self, options, message, model, float_checkpoint):
        model = adapt(model, **options)
        unchanged(model, lambda: initialize_lrec_weights(model, float_checkpoint, "svd"), ValueError, message)

    def test_an_adapter_on_the_meta_device(self, model, float_checkpoint):
        model = get_peft_model(model, LRECConfig(r=4), low_cpu_mem_usage=True)
        with pytest.raises(ValueError, match="on the meta device: leave `low_cpu_mem_usage` out"):
            initialize_lrec_weights(model, float_checkpoint, "svd")

    def test_weights_that_are_missing(self, model, tmp_path):
        model = adapt(model)
        float_llama(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
        for source in (tmp_path / "shallow", float_llama(num_hidden_layers=1)):
            unchanged(
                model,
                lambda source=source: initialize_lrec_weights(model, source, "svd"),
                ValueError,
                r"lacks the weights of 7 of 14 .*model.layers.1.self_attn.*weight.*and 2 more.*`from_pretrained`",
            )

    def test_another_architecture(self, model, tmp_path):
        model = adapt(model)
        float_llama(intermediate_size=128).save_pretrained(tmp_path / "wider")
        unchanged(
            model,
            lambda: initialize_lrec_weights(model, tmp_path / "wider", "svd"),
            ValueError,
            r"6 of 14 adapted layers have another shape: .*\[64, 96\], the float weight \[64, 128\]",
        )

    def test_another_model_of_the_same_shape(self, model):
        model = adapt(model)
        call = lambda: initialize_lrec_weights(model, float_llama(seed=1), "svd")  # noqa: E731
        message = "LlamaForCausalLM is not the model .*: in 14 of 14 layers the quantized weights are no nearer"
        unchanged(model, call, ValueError, message)

    def test_the_quantized_checkpoint_itself(self, model, checkpoint):
        model = adapt(model)
        call = lambda: initialize_lrec_weights(model, checkpoint, "svd")  # noqa: E731
        unchanged(model, call, ValueError, "holds GPTQ-packed weights. Pass the float model")

    @pytest.mark.parametrize(
        ("change", "message"),
        (
            (lambda weight: weight.to("meta"), "is offloaded"),
            (lambda weight: weight.to(torch.float8_e4m3fn), "held as torch.float8_e4m3fn"),
            (lambda weight: weight * math.nan, "NaN or infinite values"),
        ),
    )
    def test_weights_that_cannot_be_read(self, change, message, model):
        model, float_model = adapt(model), float_llama()
        linear = float_model.model.layers[1].mlp.down_proj  # the last layer, after all others
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)
        call = lambda: initialize_lrec_weights(model, float_model, "whitened", [tokens(4)])  # noqa: E731
        unchanged(model, call, ValueError, f"model.layers.1.mlp.down_proj.weight of LlamaForCausalLM .*{message}")

    def test_no_checkpoint(self, model, tmp_path):
        model = adapt(model)
        call = lambda: initialize_lrec_weights(model, tmp_path, "svd")  # noqa: E731
        unchanged(model, call, FileNotFoundError, "no config.json")

    def test_activations_that_are_not_finite(self, model, float_checkpoint):
        model = adapt(model)
        with torch.no_grad():
            model.get_submodule("base_model.model.model.layers.1.input_layernorm").weight.fill_(math.inf)
        call = lambda: initialize_lrec_weights(model, float_checkpoint, "whitened", [tokens(4)])  # noqa: E731
        unchanged(model, call, ValueError, "input of model.layers.1.self_attn.* is NaN or infinite")


def test_report_as_text(model, float_checkpoint):
    report = initialize_lrec_weights(adapt(model), float_checkpoint, "whitened", [tokens(8)])
    text = str(report)
    lines = text.splitlines()
    assert len(lines) == 2 + 14 + 1
    assert len({line.count("|") for line in lines}) == 1
    row = report.layers[0]
    assert lines[2].startswith(
        f"| {row.name} | 4 | 4 | {row.weight_error_before:.4g} | {row.weight_error_after:.4g} |"
    )
    mean = sum(row.activation_error_after for row in report) / 14
    assert f"{mean:.4g}" in lines[-1]
