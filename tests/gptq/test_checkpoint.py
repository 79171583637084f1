import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, without_order
from gptq_models import save_tiny_llama
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import peft_quant.gptq.checkpoint
from peft_quant.gptq import InvalidCheckpointError
from peft_quant.gptq.checkpoint import Checkpoint, read_tensors
from peft_quant.reading import InvalidFileError


NAME = "model.layers.1.mlp.down_proj.scales"


def write_header(file, header, data=bytes(4)):
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)


@pytest.fixture
def sharded(tmp_path):
    return save_tiny_llama(tmp_path / "base", shards=3)


def test_reads_tensors_over_shards(sharded):
    checkpoint = Checkpoint.open(sharded)
    expected = {}
    for file in sharded.glob("*.safetensors"):
        expected |= load_file(file)
    assert checkpoint.tensors.keys() == expected.keys()
    assert torch.equal(checkpoint.tensor(NAME), expected[NAME])
    with pytest.raises(KeyError, match="no tensor named 'absent'"):
        checkpoint.tensor("absent")


def test_copy_replaces_the_named_tensors_and_nothing_else(sharded, tmp_path):
    (sharded / "tokenizer").mkdir()
    (sharded / "tokenizer" / "vocab.txt").write_text("a b c")
    (sharded / ".cache").mkdir()
    target = tmp_path / "copy"
    target.mkdir()
    checkpoint = Checkpoint.open(sharded)
    checkpoint.copy_with(target, {NAME}, lambda name, old: old * 2)
    assert torch.equal(Checkpoint.open(target).tensor(NAME), checkpoint.tensor(NAME) * 2)
    changed = []
    for file in (path for path in sharded.rglob("*") if path.is_file()):
        before, after = file.read_bytes(), (target / file.relative_to(sharded)).read_bytes()
        assert len(before) == len(after)
        changed += [file] * (before != after)
    assert changed == [checkpoint.tensors[NAME].file]
    assert not (target / ".cache").exists()


@pytest.mark.parametrize("wrong", (lambda old: old.float(), lambda old: old[:-1]))
def test_a_replacement_of_another_kind_is_refused(sharded, tmp_path, wrong):
    with pytest.raises(ValueError, match="its replacement is"):
        Checkpoint.open(sharded).copy_with(tmp_path, {NAME}, lambda name, old: wrong(old))


@pytest.mark.parametrize("length", (4, 100, -10))
def test_truncated_shards_are_named(sharded, length):
    shard = sharded / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:length])
    with pytest.raises(InvalidCheckpointError, match=r"model-00002-of-00003\.safetensors.*truncated"):
        Checkpoint.open(sharded)


def test_a_shard_that_is_something_else_is_named(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(b"\x08" + bytes(7) + b"not json" + bytes(100))
    with pytest.raises(InvalidCheckpointError, match="model-00002-of-00003"):
        Checkpoint.open(sharded)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)


class TestWhatIsRead:
    """As `from_pretrained` reads it, and nothing else."""

    def add_other(self, sharded, tmp_path, name):
        """Put weights of another model into the directory."""
        other = save_tiny_llama(tmp_path / "other", seed=1)
        shutil.copyfile(other / "model.safetensors", sharded / name)

    @pytest.mark.parametrize("name", ("model-00004-of-00004.safetensors", "aa.safetensors", "zz.safetensors"))
    def test_stale_shards_are_not_read_and_named(self, sharded, tmp_path, name):
        expected = Checkpoint.open(sharded).tensor(NAME)
        self.add_other(sharded, tmp_path, name)
        checkpoint = Checkpoint.open(sharded)
        assert torch.equal(checkpoint.tensor(NAME), expected)
        assert [file.name for file in checkpoint.unread] == [name]

    def test_one_file_goes_before_an_index(self, sharded, tmp_path):
        self.add_other(sharded, tmp_path, "model.safetensors")
        checkpoint = Checkpoint.open(sharded)
        assert {file.name for file in checkpoint.files} == {"model.safetensors"}
        assert len(checkpoint.unread) == 3

    def test_the_file_that_the_config_names_goes_before_all(self, sharded, tmp_path):
        self.add_other(sharded, tmp_path, "chosen.safetensors")
        (sharded / "config.json").write_text('{"transformers_weights": "chosen.safetensors"}')
        assert {file.name for file in Checkpoint.open(sharded).files} == {"chosen.safetensors"}

    @pytest.mark.parametrize("name", ("pytorch_model.bin", "consolidated.00.pth", "model-Q4_0.gguf"))
    def test_other_formats_are_named(self, sharded, name):
        (sharded / name).write_bytes(b"")
        assert [file.name for file in Checkpoint.open(sharded).unread] == [name]

    def test_files_of_something_else_are_not(self, sharded):
        save_file({"expected": torch.zeros(1)}, sharded / "outputs.safetensors")
        (sharded / "training_args.bin").write_bytes(b"")
        assert Checkpoint.open(sharded).unread == ()

    def test_a_missing_shard_is_named(self, sharded):
        (sharded / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(InvalidCheckpointError, match=r"names the shard 'model-00002-of-00003\.safetensors'"):
            Checkpoint.open(sharded)

    def test_a_tensor_that_only_the_index_has(self, sharded):
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["lost.weight"] = "model-00001-of-00003.safetensors"
        index.write_text(json.dumps(content))
        with pytest.raises(InvalidCheckpointError, match=r"1 tensors that .* lost\.weight first"):
            Checkpoint.open(sharded)

    def test_a_tensor_in_two_shards(self, sharded):
        first, second = (sharded / f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2))
        tensors = load_file(second)
        name = next(iter(load_file(first)))
        save_file({**tensors, name: torch.zeros(1)}, second)
        with pytest.raises(InvalidCheckpointError, match=r"is in model-00001.* and in model-00002"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("name", ("../model.safetensors", "/model.safetensors", "deep/model.safetensors"))
    def test_shards_outside_of_the_directory(self, sharded, name):
        index = sharded / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {NAME: name}}))
        with pytest.raises(InvalidCheckpointError, match="names the shard"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        "content", ("{", "[]", '"text"', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 10**5)
    )
    def test_a_damaged_index_is_named(self, sharded, content):
        (sharded / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InvalidFileError, match=r"model\.safetensors\.index\.json"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("content", (b"{", b"[1]", b"\xff\xfe"))
    def test_a_damaged_config_is_named(self, sharded, content):
        (sharded / "config.json").write_bytes(content)
        with pytest.raises(InvalidFileError, match=r"config\.json"):
            Checkpoint.open(sharded)

    def test_a_name_that_transformers_does_not_look_for(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        (directory / "model.safetensors").rename(directory / "gptq_model-4bit-128g.safetensors")
        with pytest.raises(FileNotFoundError, match=r"gptq_model-4bit-128g\.safetensors.*rename it"):
            Checkpoint.open(directory)

    @pytest.mark.parametrize(
        "entry",
        (
            {"dtype": "F16", "shape": [2]},
            {"dtype": "F16", "shape": [2], "data_offsets": "ab"},
            {"dtype": "F16", "shape": [2], "data_offsets": [0]},
            {"dtype": "F16", "shape": [2], "data_offsets": [True, 4]},
            {"dtype": "F16", "shape": 2, "data_offsets": [0, 4]},
            {"dtype": "F16", "shape": "2", "data_offsets": [0, 4]},
            {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]},
            {"dtype": "F16", "shape": [2.0], "data_offsets": [0, 4]},
            {"dtype": "F16", "shape": [1 << 63], "data_offsets": [0, 4]},
            {"dtype": "F16", "shape": [1] * 65, "data_offsets": [0, 4]},
            {"dtype": "F16", "shape": [0], "data_offsets": [4, 0]},
            {"dtype": ["F16"], "shape": [2], "data_offsets": [0, 4]},
            [],
        ),
    )
    def test_a_damaged_header_is_named(self, sharded, entry):
        write_header(sharded / "model-00002-of-00003.safetensors", json.dumps({"tensor": entry}))
        with pytest.raises(
            InvalidCheckpointError, match=r"model-00002-of-00003\.safetensors is not a safetensors file"
        ):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize(
        "header", ("[]", "[" * 10**5, '{"__metadata__": {"a": 1}}', '{"__metadata__": []}', "9" * 5000, '{"a": ""}')
    )
    def test_a_header_of_another_kind_is_named(self, sharded, header):
        write_header(sharded / "model-00002-of-00003.safetensors", header)
        with pytest.raises(InvalidCheckpointError, match="is not a safetensors file"):
            Checkpoint.open(sharded)

    def test_a_header_with_a_name_twice(self, tmp_path):
        entry = '"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}'
        write_header(tmp_path / "twice.safetensors", f"{{{entry}, {entry}}}")
        with pytest.raises(InvalidCheckpointError, match=r"twice\.safetensors is not a safetensors file"):
            read_tensors([tmp_path / "twice.safetensors"])

    @pytest.mark.parametrize(
        "entries",
        (
            {"a": ("F16", [3], 0, 4)},
            {"a": ("F16", [1 << 62, 4], 0, 4)},
            {"a": ("F16", [1], 0, 2)},  # and two bytes of nothing
            {"a": ("F16", [1], 2, 4)},
            {"a": ("F16", [2], 0, 4), "b": ("F16", [1], 2, 4)},
            {"a": ("F16", [2], 0, 4), "b": ("F16", [2], 0, 4)},
        ),
    )
    def test_tensors_in_the_wrong_place_are_named(self, tmp_path, entries):
        file = tmp_path / "damaged.safetensors"
        header = {name: {"dtype": d, "shape": s, "data_offsets": [b, e]} for name, (d, s, b, e) in entries.items()}
        write_header(file, json.dumps(header))
        with pytest.raises(InvalidCheckpointError, match=r"damaged\.safetensors (has a tensor of F16|is truncated)"):
            read_tensors([file])
        with pytest.raises(SafetensorError):  # which is as strict
            load_file(file)

    def test_a_tensor_of_an_unknown_dtype_is_named(self, tmp_path):
        write_header(
            tmp_path / "extra.safetensors", '{"tensor": {"dtype": "F4", "shape": [2], "data_offsets": [0, 4]}}'
        )
        with pytest.raises(InvalidCheckpointError, match=r"extra\.safetensors has a tensor of F4"):
            read_tensors([tmp_path / "extra.safetensors"])["tensor"].read()

    def test_a_file_that_shrinks_while_it_is_read(self, sharded):
        checkpoint = Checkpoint.open(sharded)
        file = checkpoint.tensors[NAME].file
        os.truncate(file, checkpoint.tensors[NAME].begin + 1)
        with pytest.raises(InvalidCheckpointError, match="changed while it was read"):
            checkpoint.tensor(NAME)

    @pytest.mark.parametrize("name", ("../other/model.safetensors", "/model.safetensors", ["a"], 1))
    def test_weights_that_the_config_names_outside_of_the_directory(self, sharded, name):
        (sharded / "config.json").write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(InvalidCheckpointError, match=r"config\.json has transformers_weights="):
            Checkpoint.open(sharded)

    def test_reading_is_linear_in_the_tensors(self, sharded, monkeypatch):
        """Each header is read once, not for each tensor again."""
        read = []
        read_header = peft_quant.gptq.checkpoint._read_header
        monkeypatch.setattr(
            "peft_quant.gptq.checkpoint._read_header", lambda file: read.append(file.name) or read_header(file)
        )
        checkpoint = Checkpoint.open(sharded)
        for layer in checkpoint.packed_layers:
            checkpoint.packed(layer)
        assert sorted(read) == [f"model-0000{shard}-of-00003.safetensors" for shard in (1, 2, 3)]


class TestLinks:
    def test_a_shard_outside_of_the_directory(self, sharded, tmp_path):
        shard = sharded / "model-00002-of-00003.safetensors"
        shard.rename(tmp_path / "secret")
        shard.symlink_to(tmp_path / "secret")
        with pytest.raises(InvalidFileError, match=r"model-00002-of-00003\.safetensors is a link to .*secret"):
            Checkpoint.open(sharded)

    @pytest.mark.parametrize("name", ("model-00002-of-00003.safetensors", "extra.safetensors"))
    def test_a_pipe(self, sharded, name):
        (sharded / name).unlink(missing_ok=True)
        os.mkfifo(sharded / name)
        with pytest.raises(InvalidFileError, match=name.replace(".", r"\.")):
            Checkpoint.open(sharded)

    def test_a_copy_follows_none_out_of_the_directory(self, sharded, tmp_path):
        (tmp_path / "secret").write_text("secret")
        (sharded / "deep").mkdir()
        (sharded / "deep" / "link").symlink_to(tmp_path / "secret")
        (tmp_path / "copy").mkdir()
        with pytest.raises(InvalidFileError, match=r"link is a link to .*secret"):
            Checkpoint.open(sharded).copy_with(tmp_path / "copy", {NAME}, lambda name, old: old)
        assert list((tmp_path / "copy").iterdir()) == []

    def test_a_snapshot_of_the_hub_is_copied_with_its_content(self, sharded, tmp_path):
        snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        blobs = Path(shutil.move(sharded, tmp_path / "models--a--b" / "blobs"))
        for blob in blobs.iterdir():
            (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
        (tmp_path / "copy").mkdir()
        checkpoint = Checkpoint.open(snapshot)
        checkpoint.copy_with(tmp_path / "copy", {NAME}, lambda name, old: old * 2)
        assert torch.equal(Checkpoint.open(tmp_path / "copy").tensor(NAME), checkpoint.tensor(NAME) * 2)
        assert not any(file.is_symlink() for file in (tmp_path / "copy").iterdir())


class TestLegacy:
    def test_the_config_of_auto_gptq(self, tmp_path):
        FAMILIES["Llama, quantize_config.json"].save(tmp_path / "base")
        assert Checkpoint.open(tmp_path / "base").quantization["bits"] == 4

    def test_rows_without_an_order_are_in_order(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base", group_size=64)  # 96 in-features make a short last group
        expected = Checkpoint.open(directory).packed("model.layers.0.mlp.down_proj")
        without_order(directory)
        found = Checkpoint.open(directory).packed("model.layers.0.mlp.down_proj")
        assert all(torch.equal(one, other) for one, other in zip(found, expected))

    def test_act_order_without_an_order(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base", act_order=True)
        without_order(directory)
        with pytest.raises(InvalidCheckpointError, match=r"down_proj has no g_idx"):
            Checkpoint.open(directory).packed("model.layers.0.mlp.down_proj")

    @pytest.mark.parametrize("shape", ((), (4,), (4, 0), (4, 1)))
    def test_without_an_order_and_of_other_shapes(self, tmp_path, shape):
        directory = save_tiny_llama(tmp_path / "base")
        without_order(directory)
        name = "model.layers.0.mlp.down_proj"
        tensors = load_file(directory / "model.safetensors")
        tensors[f"{name}.scales"] = torch.ones(shape, dtype=torch.float16)
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(InvalidCheckpointError, match=r"down_proj has qweight, qzeros and scales of the shapes"):
            Checkpoint.open(directory).packed(name)

    def test_a_layer_that_lacks_a_tensor(self, sharded):
        checkpoint = Checkpoint.open(sharded)
        del checkpoint.tensors["model.layers.1.mlp.down_proj.qzeros"]
        with pytest.raises(InvalidCheckpointError, match=r"model\.layers\.1\.mlp\.down_proj has no qzeros"):
            checkpoint.packed("model.layers.1.mlp.down_proj")
