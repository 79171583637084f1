import json
import re
import shutil

import pytest
import torch
from gptq_models import load, save_tiny_llama, tiny_config
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_quant import (
    InvalidCheckpointError,
    InvalidFileError,
    LRECConfig,
    PEQAConfig,
    compare_adapters,
    export_lora,
    inspect_adapter,
)
from peft_quant.inspection import is_adapter


UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A base, another one, adapters of each kind with their models, and what their layers compute."""
    root = tmp_path_factory.mktemp("inspected")
    base = save_tiny_llama(root / "base", 4, 32)
    save_tiny_llama(root / "other", 4, 32, seed=1)
    save_tiny_llama(root / "unlike", 4, 64)
    expected = {}
    for name, config in {
        "peqa": PEQAConfig(task_type="CAUSAL_LM", init_weights=False),
        "lrec": LRECConfig(
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            r=4,
            lora_alpha=6,
            rank_pattern={"q_proj": 8},
            modules_to_save=["lm_head"],
        ),
    }.items():
        model = get_peft_model(load(base), config)
        model.save_pretrained(root / name)
        layer = model.base_model.model.get_submodule(UP)
        expected[name] = {
            "scales": layer.base_tensors().scales.float(),
            "weight": layer.get_base_weight(),
            "change": (layer.peqa_scales["default"] if name == "peqa" else layer.get_delta_weight("default")).detach(),
        }
    export_lora(root / "lrec", root / "export")
    return root, expected


def row(inspection, name=UP):
    (found,) = [change for change in inspection.changes if change.name == name]
    return found


class TestKinds:
    def test_peqa(self, material):
        root, expected = material
        assert is_adapter(root / "peqa")
        assert not is_adapter(root / "base")
        inspection = inspect_adapter(root / "peqa", root / "base")
        assert (inspection.method, inspection.fits_base, len(inspection.changes)) == ("PEQA", True, 14)
        tensors = load_file(root / "peqa/adapter_model.safetensors")
        assert inspection.values == sum(change.values for change in inspection.changes)
        assert inspection.bytes == sum(tensor.nbytes for tensor in tensors.values())
        assert inspection.other_values == 0
        quotient = expected["peqa"]["change"] / expected["peqa"]["scales"]
        assert row(inspection).relative == pytest.approx(float(quotient.square().mean().sqrt()), rel=1e-6)
        assert 0.9 < row(inspection).stored <= 1
        assert "the one given" in str(inspection)
        assert inspection.base_quantization["fingerprint"] in str(inspection)

    def test_lrec(self, material):
        root, expected = material
        inspection = inspect_adapter(root / "lrec", root / "base")
        change, weight = (expected["lrec"][name].double() for name in ("change", "weight"))
        found = row(inspection)
        assert inspection.fits_base
        assert found.relative == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
        singular = torch.linalg.svdvals(change)
        assert found.stable_rank == pytest.approx(float((singular**2).sum() / singular[0] ** 2), rel=1e-5)
        assert (found.rank, found.scaling) == (4, 1.5)
        assert row(inspection, "model.layers.0.self_attn.q_proj").rank == 8
        assert inspection.other_values == 128 * 64
        lines = [re.split("  +", line) for line in str(inspection).splitlines()]
        assert ["rank", "4, 8"] in lines
        assert ["scaling", "0.75, 1.5"] in lines
        assert ["of other modules", "8,192 values"] in lines

    def test_an_export(self, material):
        root, _ = material
        exported = inspect_adapter(root / "export", root / "base")
        original = inspect_adapter(root / "lrec", root / "base")
        assert (exported.method, exported.fits_base, exported.base_quantization) == ("LORA", None, None)
        assert exported.changes == original.changes
        assert any("fingerprint" in note for note in exported.notes)

    def test_lora_on_a_dense_model(self, tmp_path):
        model = get_peft_model(LlamaForCausalLM(tiny_config()), LoraConfig(r=4, target_modules=["v_proj"]))
        model.save_pretrained(tmp_path)
        inspection = inspect_adapter(tmp_path)
        assert [change.absolute for change in inspection.changes] == [0, 0]
        assert any("2 of 2 layers have not moved" in note for note in inspection.notes)
        assert str(inspection)

    def test_layers_come_in_the_models_order(self, material):
        names = [change.name for change in inspect_adapter(material[0] / "peqa").changes]
        assert [name.split(".")[2] for name in names] == ["0"] * 7 + ["1"] * 7

    def test_no_gptq_layer(self, material, tmp_path):
        shutil.copytree(material[0] / "lrec", tmp_path / "head")
        tensors = load_file(material[0] / "lrec/adapter_model.safetensors")
        head = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
        save_file(head, tmp_path / "head/adapter_model.safetensors")
        inspection = inspect_adapter(tmp_path / "head")
        assert (inspection.changes, inspection.values) == ((), inspection.other_values)
        assert "in 0 layers" in str(inspection)
        assert inspection.layer_table() == "no GPTQ layer is changed"


class TestTheBase:
    def test_without_one(self, material):
        root, expected = material
        inspection = inspect_adapter(root / "peqa")
        assert inspection.fits_base is None
        assert {change.relative for change in inspection.changes} == {None}
        rms = float(expected["peqa"]["change"].double().square().mean().sqrt())
        assert row(inspection).absolute == pytest.approx(rms, rel=1e-9)
        assert "root mean square" in str(inspection)

    @pytest.mark.parametrize("base", ["other", "unlike"])
    def test_another_one(self, material, base):
        root, _ = material
        inspection = inspect_adapter(root / "peqa", root / base)
        assert inspection.fits_base is False
        assert {change.relative for change in inspection.changes} == {None}
        assert any("is not the base" in note for note in inspection.notes)
        assert "another one than given" in str(inspection)

    def test_one_without_these_layers(self, material, tmp_path):
        root, _ = material
        shutil.copytree(root / "base", tmp_path / "base")
        tensors = load_file(tmp_path / "base/model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(UP)}
        save_file(kept, tmp_path / "base/model.safetensors")
        assert inspect_adapter(root / "peqa", tmp_path / "base").fits_base is False
        of_lora = inspect_adapter(root / "export", tmp_path / "base")
        assert of_lora.fits_base is None
        assert "it has no packed layer" in of_lora.notes[0]

    def test_a_damaged_one(self, material, tmp_path):
        root, _ = material
        shutil.copytree(root / "base", tmp_path / "base")
        tensors = load_file(tmp_path / "base/model.safetensors")
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"] * 0
        save_file(tensors, tmp_path / "base/model.safetensors")
        with pytest.raises(InvalidCheckpointError, match=UP):
            inspect_adapter(root / "peqa", tmp_path / "base")


class TestSideBySide:
    def test_an_adapter_and_itself_scaled(self, material, tmp_path):
        root, _ = material
        shutil.copytree(root / "peqa", tmp_path / "half")
        tensors = load_file(root / "peqa/adapter_model.safetensors")
        halves = {name: -tensor / 2 for name, tensor in tensors.items()}
        save_file(halves, tmp_path / "half/adapter_model.safetensors")
        comparison = compare_adapters(root / "peqa", tmp_path / "half", root / "base")
        assert comparison.cosine == pytest.approx(-1)
        assert comparison.cosines.keys() == {change.name for change in comparison.first.changes}
        for first, second in zip(comparison.first.changes, comparison.second.changes):
            assert second.relative == pytest.approx(first.relative / 2)
        lines = comparison.layer_table().splitlines()
        assert len(lines) == 15
        assert lines[0].split() == ["layer", "first", "second", "cosine"]
        first, second, cosine = next(line.split()[1:] for line in lines if line.startswith(UP))
        assert first == f"{row(comparison.first).relative:.2%}"
        assert second == f"{row(comparison.second).relative:.2%}"
        assert cosine == "-1.000"

    def test_of_two_kinds(self, material):
        root, _ = material
        comparison = compare_adapters(root / "peqa", root / "lrec", root / "base")
        assert (comparison.cosines, comparison.cosine) == ({}, None)
        assert "none, as no layer is changed by both in the same way" in str(comparison)

    def test_an_export_is_the_adapter(self, material):
        root, _ = material
        comparison = compare_adapters(root / "lrec", root / "export")
        assert comparison.cosine == pytest.approx(1)


class TestWhatIsNotInspected:
    def test_another_method(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "VERA"}')
        with pytest.raises(ValueError, match="a VERA adapter"):
            inspect_adapter(tmp_path)

    def test_dora(self, material, tmp_path):
        shutil.copytree(material[0] / "export", tmp_path / "dora")
        file = tmp_path / "dora/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
        with pytest.raises(ValueError, match="DoRA"):
            inspect_adapter(tmp_path / "dora")

    def test_files_that_are_missing_or_cut(self, material, tmp_path):
        with pytest.raises(FileNotFoundError, match="adapter_config"):
            inspect_adapter(tmp_path)
        shutil.copy(material[0] / "peqa/adapter_config.json", tmp_path)
        with pytest.raises(FileNotFoundError, match="pickle"):
            inspect_adapter(tmp_path)
        whole = (material[0] / "peqa/adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(whole[:-4])
        with pytest.raises(InvalidCheckpointError, match="truncated"):
            inspect_adapter(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        (
            ({"peft_type": ["LREC"]}, r"is a \['LREC'\] adapter"),
            ({"alpha_pattern": {"(([a-z0-9._]+)+)+!": 8}}, "alpha_pattern has .* too long to match"),
            ({"alpha_pattern": {"q_proj": "8"}}, "has alpha_pattern="),
            ({"lora_alpha": None}, "has lora_alpha=None"),
            ({"lora_alpha": 10**400}, "has lora_alpha="),
            ({"base_quantization": 5}, "has base_quantization=5"),
            ({"peft_quant_version": 5}, "has peft_quant_version=5"),
            ({"base_model_name_or_path": {}}, "has base_model_name_or_path="),
        ),
    )
    def test_configs_of_other_types(self, material, tmp_path, changes, message):
        directory = shutil.copytree(material[0] / "lrec", tmp_path / "lrec")
        file = directory / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(ValueError, match=message):
            inspect_adapter(directory)
        with pytest.raises(ValueError, match=message):
            compare_adapters(material[0] / "lrec", directory)

    def test_an_alpha_that_is_left_out_is_loras_default(self, material, tmp_path):
        directory = shutil.copytree(material[0] / "lrec", tmp_path / "lrec")
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text())
        del config["lora_alpha"]
        config["alpha_pattern"] = {}
        file.write_text(json.dumps(config))
        assert all(change.scaling == 8 / change.rank for change in inspect_adapter(directory).changes)

    @pytest.mark.parametrize(
        ("tensor", "message"),
        (
            (torch.zeros(3, 0), "holds no values for"),
            (torch.zeros(3, 64, dtype=torch.int32), "as torch.int32, which does not train"),
            (torch.zeros(3, 64).to(torch.float8_e4m3fn), "as torch.float8_e4m3fn, which does not train"),
        ),
    )
    def test_tensors_of_other_kinds(self, material, tmp_path, tensor, message):
        directory = shutil.copytree(material[0] / "peqa", tmp_path / "peqa")
        tensors = load_file(directory / "adapter_model.safetensors")
        tensors[next(iter(tensors))] = tensor
        save_file(tensors, directory / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            inspect_adapter(directory)

    @pytest.mark.parametrize("name", ("adapter_config.json", "adapter_model.safetensors"))
    def test_links_that_leave_the_adapter(self, material, tmp_path, name):
        directory = shutil.copytree(material[0] / "peqa", tmp_path / "peqa")
        (directory / name).rename(tmp_path / "secret")
        (directory / name).symlink_to(tmp_path / "secret")
        with pytest.raises(InvalidFileError, match=f"{name} is a link to .*secret"):
            inspect_adapter(directory)
