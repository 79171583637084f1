import json
import os
import socket

import pytest

from peft_quant.reading import (
    InvalidFileError,
    parse_yaml,
    read_front_matter,
    read_json,
    read_text,
    regular_file,
    regular_files,
)


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "file").write_text("within")
    (tmp_path / "outside").write_text("secret")
    return tmp_path / "folder"


def snapshot(tmp_path):
    """A folder of the Hub's cache, with a file in it and one in a subfolder, and what they link to."""
    repository = tmp_path / "models--user--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "main" / "deep").mkdir(parents=True)
    (repository / "blobs" / "1234").write_text("{}")
    files = repository / "snapshots" / "main" / "config.json", repository / "snapshots" / "main" / "deep" / "a.json"
    files[0].symlink_to("../../blobs/1234")
    files[1].symlink_to("../../../blobs/1234")
    return files


class TestLinks:
    def test_out_of_the_folder(self, folder, tmp_path):
        for target in ("../outside", tmp_path / "outside"):
            (folder / "link").symlink_to(target)
            for read in (regular_file, read_text, read_json):
                with pytest.raises(InvalidFileError, match=r"link is a link to .*outside, outside of .*Copy the file"):
                    read(folder / "link")
            (folder / "link").unlink()

    def test_out_of_the_folder_through_a_linked_one(self, folder, tmp_path):
        (folder / "parent").symlink_to("..")
        with pytest.raises(InvalidFileError, match="outside of"):
            regular_file(folder / "parent" / "outside", folder)

    def test_within_the_folder(self, folder):
        (folder / "deep" / "link").symlink_to("../file")
        assert regular_file(folder / "deep" / "link", folder).read_text() == "within"
        with pytest.raises(InvalidFileError, match="outside of"):
            regular_file(folder / "deep" / "link")

    def test_to_the_folder_itself(self, folder, tmp_path):
        (tmp_path / "linked").symlink_to(folder)
        assert read_text(tmp_path / "linked" / "file") == "within"
        assert [file.name for file in regular_files(tmp_path / "linked")] == ["file"]

    def test_in_the_cache_of_the_hub(self, tmp_path):
        config, deep = snapshot(tmp_path)
        assert read_json(config) == read_json(deep) == {}
        assert regular_files(config.parent) == [config, deep]

    def test_in_what_the_repositories_of_the_cache_share(self, tmp_path):
        config, _ = snapshot(tmp_path)
        shared = config.parents[3] / "blobs" / "02" / "02ab"
        shared.parent.mkdir(parents=True)
        config.resolve().rename(shared)
        config.unlink()
        config.symlink_to("../../../blobs/02/02ab")
        assert read_json(config) == {}

    def test_out_of_the_cache_of_the_hub(self, tmp_path):
        config, deep = snapshot(tmp_path)
        (tmp_path / "secret").write_text("{}")
        blob = config.resolve()
        blob.unlink()
        blob.symlink_to(tmp_path / "secret")
        with pytest.raises(InvalidFileError, match="outside of"):
            read_json(config)
        deep.parent.parent.joinpath("other").symlink_to("../../../secret")
        with pytest.raises(InvalidFileError, match="outside of"):
            read_json(deep.parent.parent / "other")

    @pytest.mark.parametrize("target", ("link", "other", "missing"))
    def test_that_lead_nowhere(self, folder, target):
        (folder / "link").symlink_to(target)
        (folder / "other").symlink_to("link")
        with pytest.raises(InvalidFileError, match=rf"link is a link that leads nowhere \({target}\)"):
            read_text(folder / "link")
        with pytest.raises(InvalidFileError, match="leads nowhere"):
            regular_files(folder)


class TestOtherKindsOfFiles:
    def test_pipes(self, folder):
        os.mkfifo(folder / "pipe")
        for read in (read_text, read_json, regular_file, lambda pipe: regular_files(pipe.parent)):
            with pytest.raises(InvalidFileError, match="pipe is not a regular file"):
                read(folder / "pipe")

    def test_sockets(self, folder, monkeypatch):
        monkeypatch.chdir(folder)  # addresses are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            with pytest.raises(InvalidFileError, match="socket is not a regular file"):
                regular_files(folder)

    def test_folders_and_devices(self, folder):
        for file in (folder / "deep", "/dev/zero"):
            with pytest.raises(InvalidFileError, match="not a regular file"):
                read_text(file)

    def test_none_at_all(self, folder):
        with pytest.raises(FileNotFoundError):
            read_text(folder / "absent")


class TestTrees:
    def test_all_but_hidden_entries(self, folder):
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("")
        (folder / "deep" / ".kept").write_text("")
        assert [file.relative_to(folder).as_posix() for file in regular_files(folder)] == ["deep/.kept", "file"]

    def test_two_links_to_their_parent(self, folder):
        for name in ("one", "two"):
            (folder / name).symlink_to(".")
        with pytest.raises(InvalidFileError, match=r"is a link to a folder, \., which is not followed"):
            regular_files(folder)

    def test_too_many_files(self, folder, monkeypatch):
        monkeypatch.setattr("peft_quant.reading._MOST_FILES", 3)
        assert len(regular_files(folder)) == 1
        for name in "abc":
            (folder / "deep" / name).write_text("")
        with pytest.raises(InvalidFileError, match="more than 3 files"):
            regular_files(folder)


class TestText:
    def test_a_byte_order_mark(self, tmp_path):
        (tmp_path / "file").write_bytes(b"\xef\xbb\xbf{}")
        assert read_text(tmp_path / "file") == "{}"

    def test_too_long(self, tmp_path):
        with (tmp_path / "file").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(InvalidFileError, match="file has 1099512 MB"):
            read_text(tmp_path / "file")

    @pytest.mark.parametrize(
        "content", (b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000)
    )
    def test_json_that_is_no_mapping(self, tmp_path, content):
        (tmp_path / "file.json").write_bytes(content)
        with pytest.raises(InvalidFileError, match=r"file\.json (is not|holds a)"):
            read_json(tmp_path / "file.json")

    def test_many_keys(self, tmp_path):
        (tmp_path / "file.json").write_text(json.dumps(dict.fromkeys(map(str, range(10**5)))))
        assert len(read_json(tmp_path / "file.json")) == 10**5


class TestYaml:
    def test_what_it_reads(self):
        assert parse_yaml("a: [1, x]\nb: null", "it") == {"a": [1, "x"], "b": None}

    @pytest.mark.parametrize("text", (BOMB, "a: &a [*a]", "a: &a 1\nb: *a", "a: &a {b: 1}\nc: {<<: *a}"))
    def test_aliases(self, text):
        with pytest.raises(InvalidFileError, match=r"it is not YAML \(the alias \*a\d* is not supported"):
            parse_yaml(text, "it")

    @pytest.mark.parametrize(
        "text", ("a: [", "[" * 10**5, "!!python/object:os.system {}", "2020-99-99", "[1]: {[2]: 3}", "a: \0")
    )
    def test_what_is_none(self, text):
        with pytest.raises(InvalidFileError, match="it is not YAML"):
            parse_yaml(text, "it")

    def test_long_ones(self):
        with pytest.raises(InvalidFileError, match="it has 200001 characters of YAML"):
            parse_yaml("a" * 200_001, "it")


class TestFrontMatter:
    @pytest.mark.parametrize(
        ("text", "expected"),
        (
            ("---\nlicense: mit\n---\n# Title\n---\n", ({"license": "mit"}, "# Title\n---\n")),
            ("\n---\r\nlicense: mit\r\n---\r\ntext", ({"license": "mit"}, "text")),
            ("---\n---\ntext", ({}, "text")),
            ("# Title\n---\na: b\n---\n", ({}, "# Title\n---\na: b\n---\n")),
            ("---\na: b\n", ({}, "---\na: b\n")),
            ("", ({}, "")),
        ),
    )
    def test_metadata_and_text(self, tmp_path, text, expected):
        (tmp_path / "card.md").write_bytes(text.encode())
        assert read_front_matter(tmp_path / "card.md") == expected

    @pytest.mark.parametrize("metadata", ("- a", "text", "a: [", BOMB))
    def test_damaged_metadata(self, tmp_path, metadata):
        (tmp_path / "card.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(InvalidFileError, match=r"card\.md"):
            read_front_matter(tmp_path / "card.md")
