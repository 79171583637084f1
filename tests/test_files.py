"""Files and directories that are written as a whole, by one process and by several, and where there is no room."""

import errno
import os
import tempfile
from contextlib import contextmanager

import pytest
import torch
from full_disk import limited_file_size
from safetensors.torch import save_file

from peft_quant.files import new_directory, new_file, only_writer, replaced_files


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()
    }


def write(directory, **files):
    directory.mkdir(exist_ok=True, parents=True)
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)


@contextmanager
def in_new_file(directory):
    with new_file(directory / "out") as path:
        path.write_text("new")
        yield directory / ".out.abcdefgh.partial"


@contextmanager
def in_new_directory(directory):
    with new_directory(directory / "out") as path:
        (path / "file").write_text("new")
        yield directory / ".out.abcdefgh.partial"


@contextmanager
def in_replaced_files(directory):
    write(directory / "out", file="old")
    with replaced_files(directory / "out", "file") as path:
        (path / "file").write_text("new")
        yield directory / "out" / ".save.abcdefgh.partial"


WRITERS = (in_new_file, in_new_directory, in_replaced_files)


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

    def test_the_first_of_two_writers_stays(self, tmp_path):
        message = "out was written by another process in the meantime: that one stays"
        with pytest.raises(FileExistsError, match=message), new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("second")
            write(tmp_path / "out", file="first")
        assert contents(tmp_path) == {"out/file": "first"}

    def test_the_second_of_two_writers_is_refused_at_once(self, tmp_path):
        with new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("first")
            message = "out is being written by another process"
            with pytest.raises(FileExistsError, match=message), new_directory(tmp_path / "out"):
                raise AssertionError
        assert contents(tmp_path) == {"out/file": "first"}


class TestReplacedFiles:
    def test_all_others_stay(self, tmp_path):
        write(tmp_path / "out", config_json="old", weights="old", notes="mine")
        write(tmp_path / "out" / "other", config_json="other")
        with replaced_files(tmp_path / "out", "config.json") as directory:
            write(directory, config_json="new", weights="new")
            write(directory / "deep" / "deeper", config_json="new")
        assert contents(tmp_path / "out") == {
            "config.json": "new",
            "weights": "new",
            "notes": "mine",
            "other/config.json": "other",
            "deep/deeper/config.json": "new",
        }

    @pytest.mark.parametrize("exists", (False, True))
    def test_an_error_changes_nothing(self, tmp_path, exists):
        if exists:
            write(tmp_path / "out", config_json="old", weights="old")
        before = contents(tmp_path)
        with pytest.raises(KeyboardInterrupt), replaced_files(tmp_path / "out", "config.json") as directory:
            write(directory, config_json="new")
            raise KeyboardInterrupt
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"] * exists

    @pytest.mark.parametrize(
        ("written", "stays"),
        (
            ({"config_json": "new", "model_a": "new"}, {"config.json", "model.a", "other"}),
            ({"config_json": "new", "variant": "new"}, {"config.json", "variant", "model.a", "model.b", "other"}),
            ({}, {"config.json", "model.a", "model.b", "other"}),
        ),
    )
    def test_stale_files(self, tmp_path, written, stays):
        write(tmp_path / "out", config_json="old", model_a="old", model_b="old", other="old")
        with replaced_files(tmp_path / "out", "config.json", stale=("model.*",)) as directory:
            write(directory, **written)
        assert contents(tmp_path / "out").keys() == stays

    def test_a_file_cannot_be_the_directory(self, tmp_path):
        (tmp_path / "out").write_text("old")
        with pytest.raises(NotADirectoryError, match="out is a file"), replaced_files(tmp_path / "out", "config.json"):
            pass
        assert contents(tmp_path) == {"out": "old"}

    def test_a_part_of_another_save_appears_with_it(self, tmp_path):
        write(tmp_path / "out", config_json="old", weights="old")
        with replaced_files(tmp_path / "out", "config.json") as directory:
            with replaced_files(directory, "config.json") as same:
                write(same, config_json="new", weights="new")
            assert contents(tmp_path / "out")["weights"] == "old"
        assert contents(tmp_path) == {"out/config.json": "new", "out/weights": "new"}

    def test_a_directory_that_another_process_makes_meanwhile(self, tmp_path):
        with replaced_files(tmp_path / "out", "config.json") as directory:
            write(directory, config_json="second", weights="second")
            write(tmp_path / "out", config_json="first", weights="first", more="first")
        assert contents(tmp_path) == {"out/config.json": "second", "out/weights": "second", "out/more": "first"}


class TestTwoWriters:
    @pytest.mark.parametrize("writer", (in_new_file, in_replaced_files))
    def test_the_last_one_wins(self, tmp_path, writer):
        with writer(tmp_path), writer(tmp_path):
            pass
        assert set(contents(tmp_path).values()) == {"new"}

    def test_one_at_a_time(self, tmp_path):
        message = "is being written by another process"
        with only_writer(tmp_path), pytest.raises(BlockingIOError, match=message), only_writer(tmp_path):
            pass
        with only_writer(tmp_path):
            pass


class TestLeftOver:
    """What killed processes left: their locks are gone."""

    @pytest.mark.parametrize("writer", WRITERS)
    def test_the_next_writer_removes_it(self, tmp_path, writer):
        with writer(tmp_path) as left:
            pass
        out = tmp_path / "out"
        out.unlink() if out.is_file() else [path.unlink() for path in out.iterdir()] and out.rmdir()
        write(left, file="half")
        with writer(tmp_path):
            assert not left.exists()
        assert "half" not in contents(tmp_path).values()

    @pytest.mark.parametrize("writer", WRITERS)
    def test_nothing_else_is_removed(self, tmp_path, writer):
        others = (".out.backup", ".out.abcdefg.partial", ".other.abcdefgh.partial", ".save.partial")
        for name in others:
            write(tmp_path / name, file="mine")
            write(tmp_path / "out" / name, file="mine")
        if writer is not in_replaced_files:
            (tmp_path / "out").rename(tmp_path / "elsewhere")
        with writer(tmp_path):
            pass
        assert list(contents(tmp_path).values()).count("mine") == 2 * len(others)

    def test_that_of_a_live_process_stays(self, tmp_path):
        with in_new_file(tmp_path):
            (live,) = tmp_path.iterdir()
            with in_new_file(tmp_path):
                assert live.exists()


class TestNoRoom:
    MESSAGE = r"^\[Errno \d+\] File too large: nothing was changed\. Make room, or choose another directory: '.*out'$"

    @pytest.mark.parametrize("safetensors", (False, True))
    def test_the_old_files_stay(self, tmp_path, safetensors):
        write(tmp_path / "out", config_json="old", weights="old")
        with (
            pytest.raises(OSError, match=self.MESSAGE) as raised,
            limited_file_size(1000),
            replaced_files(tmp_path / "out", "config.json") as directory,
        ):
            write(directory, config_json="new")
            if safetensors:
                save_file({"weight": torch.zeros(1000)}, directory / "weights")
            else:
                (directory / "weights").write_bytes(bytes(1001))
        assert raised.value.errno == errno.EFBIG
        assert contents(tmp_path) == {"out/config.json": "old", "out/weights": "old"}

    @pytest.mark.parametrize("writer", WRITERS)
    def test_a_directory_that_cannot_be_written(self, tmp_path, writer, monkeypatch):
        def read_only(**options):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/a/name/that/nobody/knows")

        monkeypatch.setattr(tempfile, "mkdtemp", read_only)
        message = r"Read-only file system: .*out cannot be written\. Choose another directory: '.*'$"
        with pytest.raises(OSError, match=message) as raised, writer(tmp_path):
            pass
        assert raised.value.errno == errno.EROFS

    def test_other_errors_are_passed_on(self, tmp_path):
        error = OSError(errno.ENOENT, "no such file", "base/model.safetensors")
        with pytest.raises(FileNotFoundError) as raised, new_directory(tmp_path / "out"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("writer", WRITERS)
def test_files_have_reached_the_disk_before_they_appear(tmp_path, writer, monkeypatch):
    synced, early = set(), []
    stock_sync, stock_rename, stock_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        stock_sync(descriptor)

    def checked(stock):
        def rename(source, target):
            files = [source, *(path for path in source.rglob("*"))] if source.is_dir() else [source]
            early.extend(path for path in files if path.stat().st_ino not in synced)
            stock(source, target)
            synced.clear()

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", checked(stock_rename))
    monkeypatch.setattr(os, "replace", checked(stock_replace))
    with writer(tmp_path):
        pass
    assert not early
    place = tmp_path / "out" if writer is in_replaced_files else tmp_path
    assert place.stat().st_ino in synced  # the directory, whose entry is new
