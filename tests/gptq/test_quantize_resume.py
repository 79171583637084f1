"""A quantization that is interrupted goes on after the layers that are finished, to the same bits."""

import json
import logging

import pytest
import torch
from gptq_models import float_llama, tiny_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_quant.gptq import quantize_resume as finished_layers
from peft_quant.gptq.quantize import quantize_checkpoint
from peft_quant.gptq.quantize_resume import FinishedLayers, Layer, count_finished
from peft_quant.reading import InvalidFileError


gptqmodel = pytest.importorskip("gptqmodel")

LAYERS = 14  # 7 in each of 2 blocks


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=128))


def broken():
    """One value of the first layer of the second block is no number, which gptqmodel remembers for all after it."""
    model = float_llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, model in {
        "llama": float_llama(),
        "other": float_llama(seed=1),
        "gpt2": gpt2(),
        "broken": broken(),
    }.items():
        model.half().save_pretrained(directory / name)
        tiny_tokenizer().save_pretrained(directory / name)
    return directory


@pytest.fixture
def quantize(models, tmp_path):
    texts = [" ".join(f"w{(start * 7 + i) % 125}" for i in range(16)) for start in range(4)]

    def quantize(out="out", model="llama", calibration=texts, **options):
        state = tmp_path / "state" if out == "out" else None
        options = {"group_size": 32, **options}
        return quantize_checkpoint(models / model, tmp_path / out, calibration, state=state, **options)

    return quantize


class Solver:
    """Counts the layers that gptqmodel solves, and is interrupted in the one after so many."""

    def __init__(self):
        self.solved = 0
        self.stop = None

    def __call__(self, layer, solve, *args, **kwargs):
        if self.solved == self.stop:
            raise KeyboardInterrupt
        self.solved += 1
        return solve(layer, *args, **kwargs)


@pytest.fixture
def solver(monkeypatch):
    solver, solve = Solver(), gptqmodel.quantization.GPTQ.fasterquant
    monkeypatch.setattr(
        gptqmodel.quantization.GPTQ, "fasterquant", lambda self, *args, **kwargs: solver(self, solve, *args, **kwargs)
    )
    return solver


@pytest.fixture
def interrupted(quantize, solver):
    """`interrupted(5, **options)`: a quantization, after it solved five layers."""

    def interrupted(stop, **options):
        solver.stop, solver.solved = stop, 0
        with pytest.raises(KeyboardInterrupt):
            quantize(**options)
        solver.stop, solver.solved = None, 0

    return interrupted


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False, "bits": 2},
        {"act_order": True},
        {"bits": 3},
        {"group_size": -1},
        {"group_size": 64},
        {"model": "gpt2"},
        {"model": "gpt2", "act_order": True},
        {"model": "broken"},
    ],
    ids=str,
)
def test_it_goes_on_to_the_same_bits(quantize, solver, interrupted, options, tmp_path):
    whole = quantize("whole", **options)
    layers = solver.solved
    interrupted(2, **options)
    assert count_finished(tmp_path / "state") == (2, layers)
    interrupted(layers - 5, **options)
    assert count_finished(tmp_path / "state") == (layers - 3, layers)
    assert not (tmp_path / "out").exists()
    resumed = quantize(**options)
    assert solver.solved == 3
    assert contents(resumed) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_finished_blocks_are_passed_once(quantize, interrupted, monkeypatch):
    passes = {}
    forward = nn.Module.__call__

    def counted(module, *args, **kwargs):
        if type(module).__name__ == "LlamaMLP":
            passes[module.layer] = passes.get(module.layer, 0) + 1
        return forward(module, *args, **kwargs)

    loaded = LlamaForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        model = loaded(cls, *args, **kwargs)
        for i, block in enumerate(model.model.layers):
            block.mlp.layer = i
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    interrupted(9)
    monkeypatch.setattr(nn.Module, "__call__", counted)
    quantize()
    assert passes == {0: 4, 1: 4 * (5 + 1)}  # of 4 samples: what is left of the second block, and its outputs


def test_a_process_killed_in_the_middle_of_a_file(quantize, solver, tmp_path, monkeypatch):
    whole = quantize("whole")
    save = finished_layers.save_file

    def killed(tensors, file, metadata):
        save(tensors, file, metadata)
        if "o_proj" in file.name:
            file.write_bytes(file.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(finished_layers, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize()
    monkeypatch.undo()
    left = tmp_path / "state" / ".model.layers.0.self_attn.o_proj.safetensors.abcdefgh.partial"
    left.mkdir()
    (left / "model.layers.0.self_attn.o_proj.safetensors").write_bytes(b"killed")
    assert count_finished(tmp_path / "state") == (3, LAYERS)
    assert contents(quantize()) == contents(whole)


def test_a_damaged_file(quantize, solver, interrupted, tmp_path, caplog):
    whole = quantize("whole")
    interrupted(5)
    file = tmp_path / "state" / "model.layers.0.self_attn.k_proj.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "peft_quant"):
        assert contents(quantize()) == contents(whole)
    assert solver.solved == LAYERS - 4
    assert "k_proj.safetensors is damaged: the layer is quantized again" in caplog.text


@pytest.fixture
def one_layer(tmp_path):
    """A directory with one layer, and that layer."""
    finished = FinishedLayers(tmp_path / "state", {"layers": 1})
    scale, zero = torch.rand(2, 2), torch.ones(2, 2)
    g_idx = torch.arange(4, dtype=torch.int32) // 2
    weight = scale[:, g_idx] * (torch.arange(8.0).view(2, 4) - zero[:, g_idx])
    finished.save("layer", Layer(weight, scale, zero, g_idx, mock=False), transposed=False)
    return finished, finished.load("layer")


def test_any_damage_is_noticed(one_layer):
    finished, layer = one_layer
    file = finished.directory / "layer.safetensors"
    content = file.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        found = finished.load("layer")
        if found is not None:  # white space in the header
            assert all(torch.equal(getattr(found, n), getattr(layer, n)) for n in ("weight", "scale", "zero", "g_idx"))
            assert found.mock is layer.mock


def test_a_file_of_another_layer_or_without_a_checksum(one_layer):
    finished, layer = one_layer
    file = finished.directory / "layer.safetensors"
    file.rename(finished.directory / "other.safetensors")
    assert finished.load("other") is None
    save_file({"scale": layer.scale}, file, {"layout": "{}"})
    assert finished.load("layer") is None


@pytest.mark.parametrize("content", ["", "[]", "7", "{", "[" * 10_000, "{}", '{"layers": "2"}', "\xff"])
def test_damaged_settings(one_layer, content):
    directory = one_layer[0].directory
    (directory / "settings.json").write_bytes(content.encode("latin-1"))
    for read in (count_finished, lambda directory: FinishedLayers(directory, {"layers": 1})):
        with pytest.raises(InvalidFileError, match="settings"):
            read(directory)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 3}, "it has bits=4; asked for was bits=3."),
        ({"group_size": 64}, "it has group_size=32; asked for was group_size=64."),
        ({"symmetric": False}, "symmetric=True"),
        ({"act_order": True}, "act_order=False"),
        ({"model": "other"}, "it has model="),
        ({"calibration": ["w1 w2 w3"]}, "it has calibration="),
    ],
    ids=str,
)
def test_other_settings(quantize, interrupted, tmp_path, options, named):
    interrupted(1)
    before = contents(tmp_path / "state")
    with pytest.raises(ValueError, match="is of another quantization") as refused:
        quantize(**options)
    assert named in str(refused.value)
    assert contents(tmp_path / "state") == before
    assert not (tmp_path / "out").exists()


def test_another_version(quantize, interrupted, tmp_path):
    interrupted(1)
    file = tmp_path / "state" / "settings.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "gptqmodel": "7.0.0"}))
    with pytest.raises(ValueError, match=r"it has gptqmodel='7\.0\.0'"):
        quantize()


def test_the_same_model_in_another_directory(quantize, solver, interrupted, models, tmp_path):
    interrupted(5)
    (tmp_path / "moved").symlink_to(models / "llama")
    quantize(model=tmp_path / "moved")
    assert solver.solved == LAYERS - 5


def test_a_directory_of_something_else(quantize, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no layers of an interrupted quantization"):
        quantize()
    assert contents(tmp_path / "state") == {"mine.txt": b"mine"}


def test_nothing_is_left_before_the_first_layer(interrupted, tmp_path):
    interrupted(0)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_quantized_already(quantize, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(model=checkpoint)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_codes_do_not_give(transposed, tmp_path):
    finished = FinishedLayers(tmp_path / "state", {"layers": 1})
    weight = torch.randn(8, 6)
    groups = torch.ones(8, 3), torch.zeros(8, 3), torch.arange(6, dtype=torch.int32) // 2
    finished.save("layer", Layer(weight.t() if transposed else weight, *groups, mock=False), transposed)
    found = finished.load("layer").weight
    assert torch.equal(found, weight.t() if transposed else weight)
    assert found.is_contiguous() is not transposed
