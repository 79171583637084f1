import pytest
import torch
from gptq_models import save_tiny_llama
from safetensors.torch import load_file

from peft_quant.gptq import InvalidCheckpointError
from peft_quant.gptq.checkpoint import Checkpoint, new_directory


NAME = "model.layers.1.mlp.down_proj.scales"


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


class TestNewDirectory:
    def test_appears_once_complete(self, tmp_path):
        with new_directory(tmp_path / "deep" / "out") as directory:
            (directory / "file").write_text("whole")
            assert not (tmp_path / "deep" / "out").exists()
        assert (tmp_path / "deep" / "out" / "file").read_text() == "whole"
        assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "deep").stat().st_mode

    def test_leaves_nothing_behind_when_interrupted(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("half")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_never_overwrites(self, tmp_path):
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError, match="out exists already"), new_directory(tmp_path / "out"):
            pass
