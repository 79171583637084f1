import json
import os

import pytest
import torch
from gptq_models import save_tiny_llama
from hub_server import Hub, serve
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_quant import InvalidFileError, inspect_checkpoint
from peft_quant.inspection import is_adapter
from peft_quant.ops.packed.packing import convert_zeros, pack_rows, unpack_rows


FIXTURES = "tests/fixtures"
LAYER = "model.layers.1.mlp.down_proj"


def rewrite(directory, changes):
    """Replace tensors of a checkpoint; None removes one."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def declare(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def verdict(inspection, engine):
    (found,) = [row for row in inspection.engines if row.engine.startswith(engine)]
    return found


class TestSoundCheckpoints:
    @pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_tensors_say_what_the_config_does(self, tmp_path, bits, symmetric, act_order, checkpoint_format):
        directory = save_tiny_llama(tmp_path / "llama", bits, 32, symmetric, act_order, checkpoint_format)
        inspection = inspect_checkpoint(directory)
        assert inspection.errors == ()
        expected = {"bits": bits, "group_size": 32, "sym": symmetric, "desc_act": act_order}
        if symmetric:  # other zero points fit both formats
            expected["checkpoint_format"] = checkpoint_format
        assert inspection.found == expected
        assert inspection.declared == {
            "quant_method": "gptq",
            **expected,
            "checkpoint_format": checkpoint_format,
        }
        assert len(inspection.layers) == 14
        assert all(how.startswith("yes") for how in inspection.training.values())
        assert verdict(inspection, "transformers").serves
        assert verdict(inspection, "ExLlamaV2").serves == (
            False if bits != 4 else True if checkpoint_format == "gptq" else None
        )
        assert any("act-order" in note for note in inspection.notes) == act_order

    def test_numbers_of_a_layer(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama", 4, 32, symmetric=False)
        (layer,) = [layer for layer in inspect_checkpoint(directory).layers if layer.name == LAYER]
        with safe_open(directory / "model.safetensors", "pt") as file:
            qweight, scales = (file.get_tensor(f"{LAYER}.{name}") for name in ("qweight", "scales"))
            qzeros = file.get_tensor(f"{LAYER}.qzeros")
        codes = [(int(word) >> shift) & 15 for word in qweight.flatten() for shift in range(0, 32, 4)]
        zeros = [(int(word) + 0x11111111 >> shift) & 15 for word in qzeros.flatten() for shift in range(0, 32, 4)]
        assert layer.saturated == sum(code in (0, 15) for code in codes) / len(codes)
        assert layer.zero_points == (min(zeros), max(zeros))
        assert layer.scale_range == (float(scales.min()), float(scales.max()))
        assert layer.not_bfloat16 == sum(float(s) != float(s.bfloat16()) for s in scales.flatten()) / scales.numel()
        assert (layer.in_features, layer.out_features, layer.groups, layer.group_size) == (96, 64, 3, 32)
        assert (layer.scale_dtype, layer.dead_scales, layer.negative_scales) == ("float16", 0, 0)

    def test_negative_scales_are_counted_and_noted(self, tmp_path):
        inspection = inspect_checkpoint(save_tiny_llama(tmp_path / "llama", signed=True))
        assert inspection.errors == ()
        negative = {layer.name: layer.negative_scales for layer in inspection.layers}
        tensors = load_file(tmp_path / "llama" / "model.safetensors")
        assert negative == {name: int((tensors[f"{name}.scales"] < 0).sum()) for name in negative}
        scales = torch.cat([tensors[f"{name}.scales"].flatten() for name in negative])
        share = f"{(scales < 0).double().mean():.1%} of the scales are negative, as in AutoRound's symmetric"
        assert any(share in note for note in inspection.notes)
        assert all(layer.dead_scales == 0 and layer.scale_range[0] < 0 for layer in inspection.layers)
        assert all(how.startswith("yes") for how in inspection.training.values())

    def test_sizes(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama", 3, 32, shards=3)
        inspection = inspect_checkpoint(directory)
        parts = {"packed integers": 0, "scales": 0, "zero points": 0, "group indices": 0, "other tensors": 0}
        names = dict(zip(("qweight", "scales", "qzeros", "g_idx"), parts))
        for file in directory.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                parts[names.get(name.rpartition(".")[2], "other tensors")] += tensor.nbytes
        assert inspection.sizes == parts
        weights = sum(layer.in_features * layer.out_features for layer in inspection.layers)
        packed = sum(parts.values()) - parts["other tensors"]
        assert inspection.bits_per_weight == pytest.approx(8 * packed / weights)
        assert inspection.bits_per_weight > 3 + 16 / 32

    def test_what_trains(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama", 4, 32)
        inspection = inspect_checkpoint(directory)
        tensors = load_file(directory / "model.safetensors")
        scales = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".scales"))
        assert inspection.trainable["PEQA"] == scales
        assert inspection.trainable["LREC"] == 2 * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 96))
        assert f"{scales:,} scales" in inspection.training["PEQA"]
        assert 'GPTQConfig(bits=4, backend="gptq_torch")' in inspection.training["PEQA"]

    @pytest.mark.parametrize(
        ("fixture", "found"),
        (
            ("auto_gptq_3bit_act_order", {"bits": 3, "group_size": 32, "sym": True, "desc_act": True}),
            ("auto_gptq_4bit_asym", {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}),
        ),
    )
    def test_checkpoints_of_auto_gptq(self, fixture, found, request):
        inspection = inspect_checkpoint(request.config.rootpath / FIXTURES / fixture)
        assert inspection.errors == ()
        assert {name: inspection.found[name] for name in found} == found
        assert inspection.declared["checkpoint_format"] == "gptq"

    def test_the_last_group_is_shorter(self, tmp_path):
        inspection = inspect_checkpoint(save_tiny_llama(tmp_path / "llama", 4, 64))
        assert inspection.errors == ()
        assert any("shorter" in note for note in inspection.notes)
        assert verdict(inspection, "SGLang").serves is False

    def test_one_group(self, tmp_path):
        inspection = inspect_checkpoint(save_tiny_llama(tmp_path / "llama", 4, -1))
        assert (inspection.declared["group_size"], inspection.found["group_size"]) == (-1, -1)
        assert not any("group_size" in note for note in inspection.notes)
        assert {layer.group_size for layer in inspection.layers} == {64, 96}

    def test_bfloat16_models(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
        assert any("--dtype float16" in note for note in inspect_checkpoint(directory).notes)
        tensors = load_file(directory / "model.safetensors")
        held = {name: s.bfloat16().to(s.dtype) for name, s in tensors.items() if name.endswith(".scales")}
        rewrite(directory, held)
        assert inspect_checkpoint(directory).notes == ()

    def test_layers_come_in_the_models_order(self, tmp_path):
        names = [layer.name for layer in inspect_checkpoint(save_tiny_llama(tmp_path / "llama")).layers]
        assert [name.split(".")[2] for name in names] == ["0"] * 7 + ["1"] * 7


class TestContradictions:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize(("stored", "declared"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
    def test_the_wrong_zero_format(self, tmp_path, bits, stored, declared):
        directory = save_tiny_llama(tmp_path / "llama", bits, checkpoint_format=stored)
        declare(directory, checkpoint_format=declared)
        inspection = inspect_checkpoint(directory)
        assert inspection.found["checkpoint_format"] == stored
        (error,) = inspection.errors
        assert repr(stored) in error
        assert set(inspection.training.values()) == {"no: see errors"}

    @pytest.mark.parametrize(
        ("options", "said", "note"),
        (
            ({"symmetric": False}, {"sym": True}, "sym=true is declared"),
            ({"symmetric": True}, {"sym": False}, "sym=false is declared"),
            ({"act_order": True}, {"desc_act": False}, "desc_act=false is declared"),
            ({"act_order": False}, {"desc_act": True}, "desc_act=true is declared"),
            ({"bits": 8}, {"bits": 4}, "bits=4 is declared, the tensors have 8"),
            ({"group_size": 32}, {"group_size": 128}, "group_size=128 is declared, the tensors have 32"),
        ),
    )
    def test_other_fields(self, tmp_path, options, said, note):
        directory = save_tiny_llama(tmp_path / "llama", **options)
        declare(directory, **said)
        inspection = inspect_checkpoint(directory)
        assert inspection.errors == ()
        assert any(note in line for line in inspection.notes)

    def test_verdicts_follow_the_tensors(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama", symmetric=False)
        declare(directory, sym=True)
        assert verdict(inspect_checkpoint(directory), "vLLM").serves is False


class TestDamage:
    @pytest.fixture
    def directory(self, tmp_path):
        return save_tiny_llama(tmp_path / "llama", 4, 32)

    def test_dead_scales_are_counted(self, directory):
        scales = load_file(directory / "model.safetensors")[f"{LAYER}.scales"].clone()
        scales[0, :3] = torch.tensor([0.0, float("nan"), float("-inf")])
        rewrite(directory, {f"{LAYER}.scales": scales})
        inspection = inspect_checkpoint(directory)
        (layer,) = [layer for layer in inspection.layers if layer.name == LAYER]
        assert (layer.dead_scales, layer.group_size, layer.act_order) == (3, None, None)
        assert layer.scale_range[0] == 0
        (error,) = inspection.errors
        assert LAYER in error
        assert "2 of 192 scales are NaN or infinite" in error
        assert inspection.training["PEQA"] == "no: see errors"
        assert inspection.found["bits"] == 4
        assert "dead scales" in inspection.layer_table()

    def test_every_error_is_listed(self, directory):
        tensors = load_file(directory / "model.safetensors")
        other = "model.layers.0.mlp.up_proj"
        changes = {
            f"{LAYER}.g_idx": tensors[f"{LAYER}.g_idx"] + 7,
            f"{other}.qzeros": tensors[f"{other}.qzeros"][:, 1:],
        }
        rewrite(directory, changes | {"model.layers.0.mlp.gate_proj.scales": None})
        inspection = inspect_checkpoint(directory)
        assert len(inspection.errors) == 3
        text = "\n".join(inspection.errors)
        assert "gate_proj has no scales" in text
        assert f"{other} is not a valid GPTQ layer: qzeros have shape (2, 11)" in text
        assert f"{LAYER} is not a valid GPTQ layer: g_idx ranges over 7..9" in text
        assert len(inspection.layers) == 12  # shapes that fit have statistics

    def test_a_truncated_file(self, directory):
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        inspection = inspect_checkpoint(directory)
        (error,) = inspection.errors
        assert "truncated" in error
        assert inspection.layers == ()
        assert verdict(inspection, "transformers").serves  # by what is declared
        assert "errors:\n- " in str(inspection)

    def test_a_missing_shard(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "sharded", shards=2)
        (directory / "model-00002-of-00002.safetensors").unlink()
        errors = "\n".join(inspect_checkpoint(directory).errors)
        assert "model-00002-of-00002.safetensors" in errors

    @pytest.mark.parametrize("value", ("four", 4.5, [4], {"a": 4}))
    @pytest.mark.parametrize("name", ("bits", "group_size", "sym", "desc_act"))
    def test_declarations_of_other_types(self, directory, name, value):
        declare(directory, **{name: value}, meta={"quantizer": 5})
        inspection = inspect_checkpoint(directory)
        assert inspection.errors == (
            f"The quantization config has {name}={value!r}, which is not "
            f"{'an integer' if name in ('bits', 'group_size') else 'true or false'}: download it again.",
        )
        assert inspection.declared[name] is None
        assert inspection.declared["quantizer"] == "5"
        assert len(inspection.layers) == 14
        assert "see errors" in inspection.training["PEQA"]
        assert str(inspection)
        assert inspect_checkpoint(directory, statistics=False).errors == inspection.errors

    @pytest.mark.parametrize("value", (5, ["gptq"], {"a": 1}, "marlin"))
    def test_formats_that_are_none(self, directory, value):
        declare(directory, checkpoint_format=value)
        inspection = inspect_checkpoint(directory)
        assert any(error.startswith(f"checkpoint_format={value!r} is neither") for error in inspection.errors)
        assert str(inspection)

    @pytest.mark.parametrize(
        "damage",
        (
            {f"{LAYER}.scales": torch.ones(3, 0, dtype=torch.float16)},
            {f"{LAYER}.scales": torch.ones((), dtype=torch.float16)},
            {f"{LAYER}.scales": torch.ones(3, 64).to(torch.float8_e4m3fn)},
            {f"{LAYER}.qweight": torch.ones(12, dtype=torch.int32)},
            {f"{LAYER}.g_idx": torch.ones(96, dtype=torch.int64) << 62},
            {f"{LAYER}.g_idx": torch.zeros(0, dtype=torch.int32)},
            {f"{LAYER}.qzeros": torch.zeros(0, 0, dtype=torch.int32)},
            {
                f"{LAYER}.qweight": torch.zeros(12, 0, dtype=torch.int32),
                f"{LAYER}.scales": torch.ones(3, 0, dtype=torch.float16),
                f"{LAYER}.qzeros": torch.zeros(3, 0, dtype=torch.int32),
            },
        ),
    )
    def test_tensors_of_other_kinds(self, directory, damage):
        rewrite(directory, damage)
        inspection = inspect_checkpoint(directory)
        assert len(inspection.errors) == 1
        assert inspection.errors[0].startswith(f"{LAYER} is not a valid GPTQ layer")
        assert str(inspection)

    @pytest.mark.parametrize("content", ("{", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": "../a"}}'))
    def test_a_damaged_index(self, tmp_path, content):
        directory = save_tiny_llama(tmp_path / "llama", shards=2)
        (directory / "model.safetensors.index.json").write_text(content)
        (error,) = inspect_checkpoint(directory).errors
        assert "model.safetensors.index.json" in error

    def test_links_and_pipes(self, directory):
        (directory / "model.safetensors").rename(directory.parent / "elsewhere")
        (directory / "model.safetensors").symlink_to(directory.parent / "elsewhere")
        (error,) = inspect_checkpoint(directory).errors
        assert "model.safetensors is a link to" in error
        (directory / "model.safetensors").unlink()
        (directory.parent / "elsewhere").rename(directory / "model.safetensors")
        os.mkfifo(directory / "other.safetensors")
        (error,) = inspect_checkpoint(directory).errors
        assert "other.safetensors is not a regular file" in error

    @pytest.mark.parametrize("content", ("{", "[]", "[" * 10**5))
    def test_without_a_readable_config_nothing_is_known(self, directory, content):
        (directory / "config.json").write_text(content)
        with pytest.raises(InvalidFileError, match=r"config\.json"):
            inspect_checkpoint(directory)

    def test_a_config_of_many_keys(self, directory):
        declare(directory, **{f"key{number}": number for number in range(10**5)})
        assert inspect_checkpoint(directory).errors == ()

    def test_another_layout(self, directory):
        declare(directory, checkpoint_format="gptq_p")
        assert any("gptq_p" in error for error in inspect_checkpoint(directory).errors)

    def test_no_packed_layer(self, directory):
        tensors = load_file(directory / "model.safetensors")
        dense = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
        save_file(dense, directory / "model.safetensors", metadata={"format": "pt"})
        assert any("No packed layer" in error for error in inspect_checkpoint(directory).errors)

    def test_saturated_codes(self, directory):
        qweight = load_file(directory / "model.safetensors")[f"{LAYER}.qweight"]
        codes = unpack_rows(qweight, 4).clamp(1, 14)
        codes[:48] = 15
        rewrite(directory, {f"{LAYER}.qweight": pack_rows(codes, 4)})
        (layer,) = [layer for layer in inspect_checkpoint(directory).layers if layer.name == LAYER]
        assert layer.saturated == 0.5

    def test_one_layer_in_the_other_zero_format(self, directory):
        qzeros = load_file(directory / "model.safetensors")[f"{LAYER}.qzeros"]
        rewrite(directory, {f"{LAYER}.qzeros": convert_zeros(qzeros, 4, 1, 0)})
        inspection = inspect_checkpoint(directory)
        assert inspection.found["sym"] is False
        assert any("zero points range over 8..9" in note for note in inspection.notes)


class TestWhatIsNotInspected:
    def test_a_float_model(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "llama")
        config = json.loads((directory / "config.json").read_text())
        quantization = config.pop("quantization_config")
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="nothing of a quantization"):
            inspect_checkpoint(directory)
        (directory / "quantize_config.json").write_text(json.dumps(quantization))
        inspection = inspect_checkpoint(directory)
        assert any("copy it into config.json" in note for note in inspection.notes)
        assert inspection.training["PEQA"].startswith("yes")

    def test_another_quantization(self, tmp_path):
        (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq", "bits": 4}}')
        with pytest.raises(ValueError, match="quant_method='awq'"):
            inspect_checkpoint(tmp_path)

    def test_an_empty_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint or adapter"):
            inspect_checkpoint(tmp_path)


def test_the_printed_tables(tmp_path):
    inspection = inspect_checkpoint(save_tiny_llama(tmp_path / "llama", 4, 32))
    text = str(inspection)
    assert "found in 14 layers" in text
    assert "bits a packed weight" in text
    assert all(row.engine in text and all(source in text for source in row.sources) for row in inspection.engines)
    assert "errors:" not in text
    table = inspection.layer_table().splitlines()
    assert len(table) == 15
    assert table[0].split()[:4] == ["layer", "bits", "group", "act-order"]


class TestTheHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        """A hub on loopback with the checkpoint `user/base`, which keeps what it was asked for."""
        hub = Hub(tmp_path / "hub")
        hub.add("user/base", save_tiny_llama(tmp_path / "llama", 3, 32))
        with serve(hub) as endpoint:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            yield hub

    def test_the_config_alone_gives_verdicts(self, hub):
        assert not is_adapter("user/base")
        inspection = inspect_checkpoint("user/base")
        assert (inspection.layers, inspection.sizes, inspection.found) == ((), {}, {})
        assert inspection.declared["bits"] == 3
        assert verdict(inspection, "llama.cpp").serves is False
        assert "found" not in str(inspection)
        assert not [request for request in hub.requests if "safetensors" in request]

    def test_weights_when_statistics_are_asked_for(self, hub):
        inspection = inspect_checkpoint("user/base", statistics=True)
        assert len(inspection.layers) == 14
        assert inspection.found["bits"] == 3
        assert [request for request in hub.requests if "model.safetensors" in request]

    def test_offline_what_is_cached_decides(self, hub, monkeypatch):
        inspect_checkpoint("user/base")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not is_adapter("user/base")
        assert inspect_checkpoint("user/base").declared["bits"] == 3
        with pytest.raises(LocalEntryNotFoundError):
            is_adapter("user/other")
