"""Inputs of fuzz targets: a small valid directory, and a list of edits to its files.

An edit is a list of JSON values, so that an input can be kept as a readable file with a line of JSON per edit:

    ["set", FILE, PATH, VALUE]            a value in a JSON file, or in the header of a safetensors file
    ["delete", FILE, PATH]
    ["move", FILE, PATH, FROM]            the value at another path
    ["grow", FILE, PATH, KIND, SIZE]      a value of that size; KIND is one of `GROWN`
    ["splice", FILE, BEGIN, LENGTH, TEXT] bytes replaced, wherever they are; TEXT is UTF-8 with surrogate escapes
    ["copy", FILE, FROM]                  another file's content
    ["rename", FILE, TO]
    ["remove", FILE]
    ["link", FILE, TARGET]                a symbolic link
    ["fifo", FILE]
    ["directory", FILE]

PATH is a list of keys and positions. Edits that do not apply change nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


Files = Mapping[str, bytes]
Edit = list[Any]

GROWN: dict[str, Callable[[int], str]] = {
    "digits": lambda size: "9" * size,
    "text": lambda size: f'"{"a" * size}"',
    "nested lists": lambda size: "[" * size + "]" * size,
    "nested mappings": lambda size: '{"a":' * size + "0" + "}" * size,
    "list": lambda size: f"[{','.join(map(str, range(size)))}]",
    "mapping": lambda size: "{" + ",".join(f'"{i}": {i}' for i in range(size)) + "}",
}
_SIZES = (2, 100, 5_000, 100_000)
_GROWN_HERE = "\0grown\0"
_JSON = (".json", ".safetensors")
_LENGTH_BYTES = 8  # of a safetensors header's length

_TOKENS = (
    *("\udcff", "\udc80\udc80", "\0", "\0\0\0\0", "\udcff\udcff\udcff\udcff", "\0|", "\0~", "\ufeff", "²", "٣", "🤗"),
    *("{", "}", "[", "]", '"', ":", ",", "\n", "---\n", "- ", "&a [*a, *a]", "*a", "!!python/name:os.system", "<<: "),
    *("{{ 1 }}", "{% raw %}", "${x}", "<!-- peft_quant:", "-->", "<!-- peft_quant: end -->", "null", "NaN", "1e999"),
    *("../", "/", "\\", "~", "%s", "=", "--", "0x10", "1_000", "24GB", "-1", "'", "#", "\r", "\t", "models--a--b/"),
)
_STRINGS = (
    *("", "gptq", "gptq_v2", "qft", "PEQA", "LREC", "LORA", "CAUSAL_LM", "float16", "bfloat16", "all-linear", "none"),
    *("F16", "BF16", "F32", "I32", "I64", "I8", "U8", "F4", "model.safetensors", "config.json", ".", "..", "a/b", "²"),
    *("../outside/secret", "/etc/passwd", "(([a-z0-9._]+)+)+!", "(", ".*", "a" * 65, "\0", "\ud800", "1", "-1", "nan"),
)
_NUMBERS = (0, 1, -1, 2, 3, 4, 8, 31, 32, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, 5e-324)

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(_NUMBERS),
        st.integers(-300, 300),
        st.floats(),
        st.sampled_from(_STRINGS),
        st.text(max_size=12),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(_STRINGS), st.text(max_size=8)), inner, max_size=3),
    ),
    max_leaves=5,
)
"""JSON values, those that parsers stumble over more often."""


def inputs(files: Files) -> st.SearchStrategy[list[Edit]]:
    """Lists of edits of a directory."""
    names = sorted(files)
    of_files = [edit for name in names for edit in _edits_of(name, files)]
    of_directory = st.one_of(
        _edit("copy", st.sampled_from(names), st.sampled_from(names)),
        _edit("remove", st.sampled_from(names)),
        _edit("rename", st.sampled_from(names), st.sampled_from([new for name in names for new in _renamed(name)])),
        _edit("link", st.sampled_from(names), st.sampled_from([*names, ".", "..", "/dev/zero", "../outside/secret"])),
        _edit("fifo", st.sampled_from(names)),
        _edit("directory", st.sampled_from(names)),
    )
    return st.lists(st.one_of(*of_files, of_directory), min_size=1, max_size=4)


def _renamed(name: str) -> Iterator[str]:
    """The name with its file or one of its directories named otherwise."""
    parts = name.split("/")
    for i, part in enumerate(parts):
        for suffix in ("²", "0", ".partial", " "):
            yield "/".join([*parts[:i], f"{part}{suffix}", *parts[i + 1 :]])


def _edit(operation: str, *parts: Any) -> st.SearchStrategy[Edit]:
    return st.tuples(st.just(operation), *parts).map(list)


def _edits_of(name: str, files: Files) -> Iterator[st.SearchStrategy[Edit]]:
    file, size = st.just(name), len(files[name])
    if name.endswith(_JSON):
        paths = st.sampled_from([list(path) for path in _paths(_document(name, files[name]))])
        yield _edit("set", file, paths, VALUES)
        yield _edit("set", file, st.tuples(paths, st.sampled_from(_STRINGS)).map(lambda p: [*p[0], p[1]]), VALUES)
        yield _edit("delete", file, paths)
        yield _edit("move", file, paths, paths)
        yield _edit("grow", file, paths, st.sampled_from(sorted(GROWN)), st.sampled_from(_SIZES))
    text = st.one_of(st.sampled_from(_TOKENS), st.text(max_size=8), st.lists(st.sampled_from(_TOKENS)).map("".join))
    yield _edit("splice", file, st.integers(0, size), st.one_of(st.integers(0, 8), st.just(size)), text)


def _paths(value: Any) -> Iterator[tuple[Any, ...]]:
    yield ()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        for path in _paths(inner):
            yield (key, *path)


def write(files: Files, edits: list[Edit], directory: Path) -> None:
    """Write an edited directory."""
    contents = dict(files)
    special: dict[str, Edit] = {}
    for edit in edits:
        operation, name, *rest = edit
        if name not in contents:
            continue
        if operation in ("link", "fifo", "directory"):
            special[name] = edit
        elif operation == "remove":
            del contents[name]
        elif operation == "rename":
            contents[rest[0]] = contents.pop(name)
        elif operation == "copy":
            contents[name] = contents.get(rest[0], b"")
        elif operation == "splice":
            begin, length, text = rest
            new = text.encode("utf-8", "surrogateescape" if _escapes(text) else "surrogatepass")
            contents[name] = contents[name][:begin] + new + contents[name][begin + length :]
        else:
            contents[name] = _edited(name, contents[name], operation, *rest)
    for name in (*files, *contents):  # readers are given folders that exist
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = directory / name
        if name not in special:
            path.write_bytes(content)
        elif special[name][0] == "link":
            path.symlink_to(special[name][2])
        elif special[name][0] == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()


def _escapes(text: str) -> bool:
    return all(not 0xD800 <= ord(character) < 0xE000 or 0xDC80 <= ord(character) < 0xDD00 for character in text)


def _document(name: str, content: bytes) -> Any:
    if name.endswith(".safetensors"):
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        content = content[_LENGTH_BYTES : _LENGTH_BYTES + length]
    return json.loads(content)


def _edited(name: str, content: bytes, operation: str, path: list[Any], *rest: Any) -> bytes:
    """A JSON file, or a safetensors file with its header, after an edit."""
    try:
        document = _document(name, content)
        value = None
        if operation == "set":
            value = rest[0]
        elif operation == "move":
            value = _at(document, rest[0])
        elif operation == "grow":
            value = _GROWN_HERE
        holder = {"": document}
        *outer, last = "", *path
        inner = _at(holder, outer)
        if operation == "delete":
            del inner[last]
        else:
            inner[last] = value
        text = json.dumps(holder.get(""))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):  # the file as earlier edits left it
        return content
    if operation == "grow":
        kind, size = rest
        text = text.replace(json.dumps(_GROWN_HERE), GROWN[kind](size))
    header = text.encode()
    if not name.endswith(".safetensors"):
        return header
    data = content[_LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little") :]
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header + data


def _at(document: Any, path: list[Any]) -> Any:
    for key in path:
        document = document[key]
    return document
