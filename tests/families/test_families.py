"""What a user does with a checkpoint, on each family, from its files."""

import json

import pytest
import torch
from families import FAMILIES
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from peft_quant import (
    Int8Weight,
    LRECConfig,
    PEQAConfig,
    QFTTrainer,
    QFTTrainingArguments,
    convert_to_int8,
    inspect_checkpoint,
    merge_checkpoint,
)
from peft_quant.gptq import dequantize, read_format
from peft_quant.gptq.source import packed_modules
from peft_quant.tuners.layer import AdaptedLinear


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory):
    """Directory of the checkpoint, and the outputs of the float model that it decodes to."""
    directory = tmp_path_factory.mktemp("family") / "base"
    model = family.save(directory)
    return directory, None if family.loaded_as else family.outputs(model)


@pytest.fixture
def base(family, saved):
    torch.manual_seed(0)  # of heads that a checkpoint lacks
    return family.load(saved[0])


def stored_layers(directory):
    return [name for name in load_file(directory / "model.safetensors") if name.endswith(".qweight")]


def adapted(model):
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def first_output(output):
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state)[..., 0].mean()


def train(model, family):
    """A few steps towards a smaller first output; how far they get."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = first_output(model(**family.inputs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_loaded_whole(family, saved, base):
    directory, expected = saved
    unused = 1 if family.also_packed != "(?!)" and family.loaded_as else 0
    assert len(packed_modules(base)) == len(stored_layers(directory)) - unused
    if expected is not None:
        model = get_peft_model(base, PEQAConfig(task_type=family.task_type)).eval()
        largest = float(expected.abs().max())  # sums are in another order
        torch.testing.assert_close(family.outputs(model), expected, rtol=1e-3, atol=1e-3 * largest)


def test_peqa_trains(family, base):
    adapter_trains(family, base, PEQAConfig)


def test_lrec_trains(family, base):
    adapter_trains(family, base, LRECConfig)


def adapter_trains(family, base, method):
    layers = len(packed_modules(base)) - (family.also_packed != "(?!)")  # a head is not among the default targets
    model = get_peft_model(base, method(task_type=family.task_type))
    assert len(adapted(model)) == layers
    losses = train(model, family)
    assert losses[-1] < losses[0]


def test_held_in_int8(base):
    weights = {name: dequantize(layer, read_format(layer)) for name, layer in packed_modules(base).items()}
    model = convert_to_int8(base)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        held = layer.weight.dequantize(torch.float32) if isinstance(layer.weight, Int8Weight) else layer.weight
        error = (held.t() if isinstance(layer, Conv1D) else held) - weight
        assert error.norm() < 0.02 * weight.norm()  # a step is 1/127 of the largest weight of a row, without outliers


def test_qft_trains(family, base, tmp_path):
    model = convert_to_int8(base)
    before = first_output(model(**family.inputs)).item()
    rows = [{name: tensor[row] for name, tensor in family.inputs.items()} | {"labels": 0} for row in (0, 1)] * 2
    arguments = QFTTrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", use_cpu=True
    )

    def loss(output, *_, **__):
        return first_output(output)

    trainer = QFTTrainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    model.eval()
    assert first_output(model(**family.inputs)).item() < before
    loaded, info = type(model).from_pretrained(tmp_path / "trained", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(family.outputs(loaded.eval()), family.outputs(model))


def test_adapter_saved_and_loaded(family, saved, base, tmp_path):
    model = get_peft_model(base, PEQAConfig(task_type=family.task_type, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(family.load(saved[0]), tmp_path).eval()
    trained, found = (
        {name: p for name, p in each.named_parameters() if "peqa" in name or "modules_to_save" in name}
        for each in (model, loaded)
    )
    assert trained.keys() == found.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in trained.items())


def test_merged_on_files_as_in_memory(family, saved, base, tmp_path, refuses):
    directory, _ = saved
    model = get_peft_model(base, PEQAConfig(task_type=family.task_type, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    outputs = family.outputs(model)
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    in_memory = load_file(tmp_path / "memory" / "model.safetensors")
    if family.loaded_as and family.task_type == "SEQ_CLS":
        with refuses("score.weight.*Merge in memory instead"):
            merge_checkpoint(directory, tmp_path / "adapter", tmp_path / "files")
    else:
        merge_checkpoint(directory, tmp_path / "adapter", tmp_path / "files")
        on_files = load_file(tmp_path / "files" / "model.safetensors")
        if family.loaded_as is None:
            assert on_files.keys() <= in_memory.keys()
            assert all(torch.equal(in_memory[name], tensor) for name, tensor in on_files.items())
        merged = get_peft_model(family.load(tmp_path / "files"), PEQAConfig(task_type=family.task_type)).eval()
        assert torch.equal(family.outputs(merged), outputs)
    merged = get_peft_model(family.load(tmp_path / "memory"), PEQAConfig(task_type=family.task_type)).eval()
    assert torch.equal(family.outputs(merged), outputs)


def test_inspected(family, saved, base):
    directory, _ = saved
    inspection = inspect_checkpoint(directory)
    assert not inspection.errors
    assert len(inspection.layers) == len(stored_layers(directory))
    assert inspection.training["PEQA"].startswith("yes")
    model = get_peft_model(base, PEQAConfig(task_type=family.task_type, modules_to_save=[]))
    scales = sum(p.numel() for name, p in model.named_parameters() if "peqa_scales" in name)
    assert inspection.trainable["PEQA"] == scales


def test_declared_options_survive_a_merge(family, saved, base, tmp_path):
    if "dynamic" not in family.declared and "lm_head" not in family.declared:
        pytest.skip("it declares nothing of its own")
    model = get_peft_model(base, PEQAConfig(task_type=family.task_type))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert {name: written[name] for name in family.declared} == family.declared
