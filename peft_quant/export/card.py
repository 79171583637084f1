"""Model cards of adapters and checkpoints, generated from their files and from facts that the user adds.

In `README.md`, the text between two marks is generated; the rest is the user's. `peft_quant_facts.json` beside it
holds the facts the text was generated from, a digest of the weights they describe, and the generated front matter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import new_file
from ..gptq.checkpoint import quantization_config, read_tensors
from ..inspection.engines import Packing, engine_verdicts
from ..reading import InvalidFileError, parse_json, read_front_matter, read_json, regular_file


README = "README.md"
FACTS = "peft_quant_facts.json"

_MARK = "<!-- peft_quant:"
_BEGIN = f"{_MARK} generated down to the end mark, and again at every save; your own text goes above or below -->"
_END = f"{_MARK} end -->"
# older cards store the record inside the first mark
_GENERATED = re.compile(rf"{_MARK} generated [^\n<>]*(?:\n(?P<record>{{[^\n]*}})\n)?-->.*?{_END}", re.DOTALL)
_LONGEST_CARD = 1_000_000  # bytes
_MEND = "mend or remove it"

_KINDS = {"PEQA": "peqa_adapter", "LREC": "lrec_adapter", "LORA": "lora_export"}
_MERGED = "merged_gptq"
_QFT = "qft"
QFT = "QFT"
"""The `method` in the facts of models trained by QFT, in any saved or exported format."""

_TAGS = {
    "peqa_adapter": ["peqa", "gptq", "peft-quant"],
    "lrec_adapter": ["lrec", "gptq", "peft-quant"],
    "lora_export": ["lora", "lrec", "gptq"],
    _MERGED: ["gptq", "peqa"],
    _QFT: ["qft", "peft-quant"],
}

_TASKS = {  # PEFT's task type: the Hub's pipeline, the suffix of transformers' class name
    "CAUSAL_LM": ("text-generation", "CausalLM"),
    "SEQ_CLS": ("text-classification", "SequenceClassification"),
    "TOKEN_CLS": ("token-classification", "TokenClassification"),
    "QUESTION_ANS": ("question-answering", "QuestionAnswering"),
    "SEQ_2_SEQ_LM": (None, "Seq2SeqLM"),
}

_ROLES = (  # roles of tensors by their names
    ("scale deltas", re.compile(r"\.peqa_scales$")),
    ("low-rank matrices", re.compile(r"\.lora_(embedding_)?[AB]\b")),
    ("embeddings of single tokens", re.compile(r"\.trainable_tokens_delta$")),
    ("int8 weights", re.compile(r"\.codes$")),
    ("outliers of int8 weights", re.compile(r"\.outlier_values$")),
    ("their columns", re.compile(r"\.outlier_columns$")),
    ("packed integers", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("scales", re.compile(r"\.scales$")),
)
_DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I32": "int32", "I16": "int16", "I8": "int8"}

_FORMAT = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "fingerprint")
# of values by name: `{str: type}` is a mapping, `[type]` a list
_TYPES_OF_FACTS: dict[str, Any] = {
    "base": {str: (str, type(None))},
    "base_quantization": {str: object},
    "command": str,
    "compared_with": {str: {str: (int, float)}},
    "export": {str: object},
    "log": str,
    "method": str,
    "perplexity": {str: (int, float)},
    "repository": str,
    "settings": {str: object},
    "trained": [{str: (str, int)}],
}
_TYPES_OF_CONFIG: dict[str, Any] = {
    "architectures": [str],
    "base_model_name_or_path": str,
    "base_quantization": {str: object},
    "bias": str,
    "peft_type": str,
    "quantization_config": {str: object},
    "task_type": str,
}
_RECORD = {"facts": {str: object}, "metadata": {str: object}, "weights": str}
_OF_THE_WEIGHTS = ("settings", "command", "log", "perplexity", "compared_with", "trained", "export")
_OURS_ALONE = ("library_name", "base_model", "base_model_relation", "pipeline_tag", "model-index")
_INHERITED = ("license", "license_name", "license_link", "language")
_PACKAGES = ("peft-quant", "peft", "transformers", "torch", "gptqmodel", "optimum")

_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})/?$")
_OF_TRANSFORMERS = re.compile(r"This is the model card of a 🤗 transformers model .{0,200}? automatically generated\.")
_OF_PEFT = re.compile(r"### Framework versions\n\n(- PEFT \S+\s*)+$")
_OF_THE_TRAINER = "<!-- This model card has been generated automatically according to the information the Trainer had"


def write_model_card(
    directory: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    repository: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    command: str | None = None,
    perplexity: Mapping[str, float] | None = None,
    compared_with: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write or update the model card (`README.md`) of an adapter, a merged checkpoint or an int8 model.

    `save_pretrained` and `push_to_hub` of PEQA and LREC models, QFTTrainer's saves, `merge_checkpoint` and the exports
    write a card automatically; this function adds facts that only you know. They are kept in `peft_quant_facts.json`
    for later saves, until the weights change. Your own text around the generated part and metadata you changed are
    kept. A card without a generated part keeps its text and gets metadata only. Unknown facts are left out.

    Args:
        directory: directory of the adapter or checkpoint.
        base_model: Hub id of the GPTQ checkpoint, if the adapter does not name one. A local path is never written.
        repository: Hub id of this adapter or checkpoint, for the snippets.
        license: license, as the Hub spells it, for instance `"apache-2.0"`.
        language: language code or codes.
        datasets: Hub id or ids of the training data.
        tags: additional tags.
        settings: training settings by name.
        command: the training command.
        perplexity: perplexity of this model by text name.
        compared_with: perplexities of other models, by model name and text name.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: the directory has neither an `adapter_config.json` nor a `config.json`.
        InvalidFileError: the existing card, its facts or the configuration are damaged.
        ValueError: the adapter is of another method, the checkpoint is not GPTQ, or a fact has another type.
    """
    facts = {"settings": settings, "command": command, "perplexity": perplexity, "compared_with": compared_with}
    if wrong := _misfit({**facts, "repository": repository}, _TYPES_OF_FACTS):
        raise ValueError(f"{wrong}: see the types of `write_model_card`'s arguments.")
    metadata = {"license": license, "language": language, "datasets": datasets, "tags": tags}
    return update_card(directory, [Card.read(directory)], [base_model], repository, facts, metadata)


def update_card(
    directory: str | os.PathLike[str],
    earlier: Sequence[Card] = (),
    bases: Sequence[str | None] = (),
    repository: str | None = None,
    facts: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    exported: bool = False,
    changed: Iterable[str] = (),
) -> Path:
    """Write the card of a directory, replacing an existing one.

    Args:
        directory: directory of the adapter or checkpoint.
        earlier: cards of the same model. Text and metadata come from the first one that a user edited or peft_quant
            wrote; facts come from all of them, and later cards take precedence.
        bases: Hub ids or paths of the base, which take precedence over the adapter's configuration.
        repository: Hub id of the directory's model.
        facts: facts that are not in the files; None for unknown ones.
        metadata: front matter, which takes precedence over existing entries; None for unknown ones.
        exported: whether a LoRA adapter in the directory was exported from an LREC adapter.
        changed: tensors of a merged checkpoint that differ from the base's.

    Raises:
        FileNotFoundError, ValueError: as [`write_model_card`].
    """
    directory = Path(directory)
    file = _config_file(directory)
    place, config = file.parent, read_json(file)
    if wrong := _misfit(config, _TYPES_OF_CONFIG):
        raise InvalidFileError(f"{file} is damaged, {wrong}: download it again.")
    given = {**(facts or {}), "repository": repository}
    if file.name == "config.json":
        config["quantization_config"] = quantization_config(place, config) or {}
    packed = config.get("base_quantization") or config.get("quantization_config")
    if packed and packed.get("quant_method", "gptq") == "gptq":
        given["base_quantization"] = _only(_FORMAT, packed)
    given = _plain(given)
    weights, fingerprint = _digest(place), given.get("base_quantization", {}).get("fingerprint")
    known: dict[str, Any] = {}
    for facts in (*(card.facts_about(weights, fingerprint) for card in earlier), given):
        known |= facts

    kind = _kind(directory, config, known.get("method"), exported or any(card.is_ours for card in earlier))
    if trained := _count_tensors(place, kind, config, set(changed)):
        known["trained"] = trained
    unrecorded = [card.metadata.get("base_model") for card in earlier if not card.is_ours]
    base = _Base.find(*bases, config.get("base_model_name_or_path"), known.get("base"), *unrecorded)
    if base != _Base():
        known["base"] = asdict(base)
    task = _task(config)
    generated = _metadata(kind, base, task, known)

    layout = next((card for card in earlier if not card.is_stock), Card())
    front_matter = _merge_metadata(generated, metadata or {}, layout, [card for card in earlier if card is not layout])
    text = _render(kind, config, base, task, known, place.relative_to(directory).as_posix())
    part = f"{_BEGIN}\n{text.replace(_MARK, '&lt;!-- peft_quant:')}\n\n{_END}"
    searched = _up_to_the_end_mark(layout.text)
    body = _GENERATED.sub(lambda _: part, searched, count=1) + layout.text[len(searched) :]
    if not layout.text:
        body = f"\n{part}\n"
    record = {"weights": weights, "facts": known, "metadata": generated}
    for name, content in (
        (FACTS, json.dumps(record, ensure_ascii=False, indent=2) + "\n"),
        (README, f"---\n{ModelCardData(**front_matter).to_yaml()}\n---\n{body}"),
    ):
        with new_file(directory / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    return directory / README


@contextmanager
def best_effort(place: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors while writing a card into a warning, so that the weights are saved anyway."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"The model card in {place} was left as it is. {error}", stacklevel=3)


def inherited_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """License and language from a base's card, which also hold for checkpoints made from it."""
    try:
        metadata = Card.read(directory).metadata
    except (OSError, ValueError):
        return {}
    return _only(_INHERITED, metadata)


def public_name(model: str) -> str | None:
    """A model's name for publication: its Hub id, or its directory's name without the path."""
    base = _Base.find(model)
    return base.hub_id or base.directory_name


@dataclass(frozen=True)
class Card:
    """A card and the record of its generation.

    Attributes:
        metadata: the front matter.
        text: the text below the front matter.
        weights: digest of the weights that the facts describe.
        facts: the facts the text was generated from.
        generated: the front matter as it was generated.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    weights: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    generated: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Card:
        """Read the card of a directory; an empty one if there is none.

        Raises:
            InvalidFileError: one of the files is damaged, or the card is longer than 1 MB.
        """
        readme, record = Path(directory, README), Path(directory, FACTS)
        metadata, text = _read_readme(readme) if readme.exists() else ({}, "")
        found: Any = None
        if record.exists():
            found = read_json(record, _MEND)
        elif (generated := _GENERATED.search(_up_to_the_end_mark(text))) and generated["record"]:
            record, found = readme, parse_json(generated["record"], str(readme), _MEND)
        if found is None:
            return cls(metadata, text)
        missing = [name for name in _RECORD if name not in found]
        wrong = f"{missing[0]} is missing" if missing else _misfit(found, _RECORD)
        if wrong is None:
            card = cls(metadata, text, found["weights"], found["facts"] or {}, found["metadata"] or {})
            wrong = _misfit(card.facts, _TYPES_OF_FACTS) or _misfit(card.generated, {"tags": [str]})
        if wrong:
            raise InvalidFileError(f"{record} does not hold facts of peft_quant, {wrong}: {_MEND}.")
        return card

    @property
    def is_ours(self) -> bool:
        """Whether peft_quant generated it, even if a user edited it since."""
        return bool(self.generated) or _MARK in self.text

    @property
    def is_stock(self) -> bool:
        """Whether PEFT or transformers wrote all of the text and no user edited it."""
        if _OF_THE_TRAINER in self.text:
            return self.text.count("More information needed") >= 3  # an edited card has these filled in
        text = _OF_PEFT.sub("", _OF_TRANSFORMERS.sub("", self.text))
        return not text.strip() or text.split() == _template().split()

    def facts_about(self, weights: str | None, fingerprint: str | None) -> dict[str, Any]:
        """The facts that hold for these weights on a base with this fingerprint."""
        facts = dict(self.facts)
        if weights != self.weights:
            facts = {name: fact for name, fact in facts.items() if name not in _OF_THE_WEIGHTS}
            if not fingerprint or facts.get("base_quantization", {}).get("fingerprint") != fingerprint:
                facts.pop("base", None)
        training = self.text.partition("### Training hyperparameters")[2].partition("### Framework versions")[0]
        if training and self.is_stock:  # written by the Trainer
            found = {
                "settings": dict(re.findall(r"^- (\w+): (.+)$", training, re.MULTILINE)),
                "log": training.partition("### Training results")[2].strip(),
            }
            facts |= {name: fact for name, fact in found.items() if fact}
        return facts


def _read_readme(file: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card."""
    size = file.stat().st_size
    if size > _LONGEST_CARD:
        raise InvalidFileError(f"{file} has {size} bytes, a card at most {_LONGEST_CARD}: {_MEND}.")
    metadata, text = read_front_matter(file, _MEND)
    try:
        return ModelCardData(**metadata).to_dict(), text
    except Exception as error:  # of many classes
        raise InvalidFileError(f"{file} has front matter that is not the Hub's ({error}): {_MEND}.") from error


def _up_to_the_end_mark(text: str) -> str:
    """The part that the search for a generated part reads: it takes quadratic time in a text without an end mark."""
    return text[: text.rfind(_END) + len(_END)] if _END in text else ""


def _misfit(values: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    """The first known value of another type than expected, or None."""
    for name, kind in types.items():
        if values.get(name) is not None and not _fits(values[name], kind):
            return f"{name} is {str(values[name])[:80]!r}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, kind[0]) for v in value)
    if isinstance(kind, dict):
        names = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        return names and all(_fits(entry, kind[str]) for entry in value.values())
    return isinstance(value, kind)


@cache
def _template() -> str:
    return ModelCard.from_template(ModelCardData()).text


@dataclass(frozen=True)
class _Base:
    """The base model: its Hub id and revision if known, otherwise the name of its directory."""

    hub_id: str | None = None
    revision: str | None = None
    directory_name: str | None = None

    @classmethod
    def find(cls, *names: Any) -> _Base:
        """From the first name that is a Hub id, otherwise from a path; a dictionary is a base recorded earlier."""
        directory_name = None
        for name in names:
            if isinstance(name, dict):
                if name.get("hub_id"):
                    return cls(name["hub_id"], name.get("revision"))
                directory_name = directory_name or name.get("directory_name")
            if not isinstance(name, str) or not name:
                continue
            snapshot = _SNAPSHOT.search(name.replace("\\", "/"))
            if snapshot:
                return cls(f"{snapshot['owner']}/{snapshot['name']}", snapshot["revision"])
            if _is_hub_id(name):
                return cls(name)
            directory_name = directory_name or re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        return cls(directory_name=directory_name)


def _is_hub_id(name: Any) -> bool:
    if not isinstance(name, str) or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _only(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are known, as JSON gives them back: equal to themselves after a card was written and read."""

    def replace(value: Any) -> Any:
        return dict(value) if isinstance(value, Mapping) else str(value)

    known = {name: value for name, value in values.items() if value is not None}
    return json.loads(json.dumps(known, default=replace))


def _config_file(directory: Path) -> Path:
    """The configuration of the card's model. PEFT saves a named adapter's one directory deeper."""
    candidates = [directory / "adapter_config.json", directory / "config.json"]
    inner = sorted(entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink())
    candidates += [entry / "adapter_config.json" for entry in inner]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{directory} has neither an adapter_config.json nor a config.json: pass the directory of an adapter or "
            "of a merged checkpoint."
        )
    return file


def _kind(directory: Path, config: Mapping[str, Any], method: str | None, exported: bool) -> str:
    """The template of a card. `method` trained a checkpoint; `exported` LoRA adapters were LREC adapters."""
    quantization = config.get("quantization_config")
    if quantization is None:
        kind = _KINDS.get(config.get("peft_type", ""))
        if kind is None or (kind == "lora_export" and not exported):
            raise ValueError(
                f"{directory} is a {config.get('peft_type')} adapter, whose card PEFT writes. Cards are written here "
                "for PEQA and LREC adapters, for what `export_lora` wrote and for merged GPTQ checkpoints."
            )
        return kind
    found = quantization.get("quant_method")
    if method == QFT or found == "qft":
        return _QFT
    if found != "gptq":
        raise ValueError(f"{directory} is not a GPTQ checkpoint: the quantization in its config.json is {found}.")
    return _MERGED


def _weight_files(place: Path) -> list[Path]:
    found = (file for pattern in ("*.safetensors", "adapter_model.bin") for file in place.glob(pattern))
    return sorted(map(regular_file, found))


def _digest(place: Path, samples: int = 64, size: int = 4096) -> str | None:
    """A digest of the weights in a directory, from samples of each file; None without weights."""
    files = _weight_files(place)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        length = file.stat().st_size
        digest.update(f"{file.name} {length}".encode())
        with file.open("rb") as stream:
            for sample in range(samples):
                stream.seek(max(0, length - size) * sample // (samples - 1))
                digest.update(stream.read(size))
    return digest.hexdigest()[:16]


def _count_tensors(place: Path, kind: str, config: Mapping[str, Any], changed: set[str]) -> list[dict[str, Any]]:
    """Numbers of tensors, values and bytes by role and dtype; of a merged checkpoint, only for `changed` tensors."""
    other_role = "float parameters" if kind == _QFT else "modules trained whole"
    if config.get("bias", "none") != "none":
        other_role = f"biases and {other_role}" if config.get("modules_to_save") else "biases"
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file in _weight_files(place):
        for name, tensor in read_tensors([file] if file.suffix == ".safetensors" else []).items():
            if kind == _MERGED and name not in changed:
                continue
            role = next((role for role, pattern in _ROLES if pattern.search(name)), other_role)
            dtype = _DTYPES.get(tensor.dtype, tensor.dtype)
            row = rows.setdefault((role, dtype), {"what": role, "tensors": 0, "values": 0, "dtype": dtype, "bytes": 0})
            row["tensors"] += 1
            row["values"] += math.prod(tensor.shape)
            row["bytes"] += tensor.end - tensor.begin
    return [rows[key] for key in sorted(rows)]


def _task(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type of an adapter or a checkpoint."""
    if "peft_type" in config:
        return config.get("task_type") if config.get("task_type") in _TASKS else None
    architecture = next(iter(config.get("architectures") or []), "")
    return next((task for task, (_, ending) in _TASKS.items() if architecture.endswith(f"For{ending}")), None)


def _metadata(kind: str, base: _Base, task: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Generate the front matter from the facts."""
    adapter = kind not in (_MERGED, _QFT)
    metadata: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    tags = [*_TAGS[kind]]
    bits = facts.get("base_quantization", {}).get("bits")
    if isinstance(bits, int):
        tags.append(f"{bits}-bit")
    if base.hub_id:
        metadata["base_model"] = base.hub_id
        metadata["base_model_relation"] = "adapter" if adapter else "finetune"
        if adapter:
            tags.append(f"base_model:adapter:{base.hub_id}")
    pipeline = _TASKS[task][0] if task else None
    if pipeline:
        metadata["pipeline_tag"] = pipeline
    metadata["tags"] = tags
    if facts.get("perplexity"):
        results = [
            {
                "task": {"type": pipeline or "text-generation"},
                "dataset": {"name": text, "type": re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")},
                "metrics": [{"type": "perplexity", "value": value}],
            }
            for text, value in facts["perplexity"].items()
        ]
        name = facts.get("repository", kind.replace("_", "-")).rpartition("/")[2]
        metadata["model-index"] = [{"name": name, "results": results}]
    return metadata


def _merge_metadata(
    generated: Mapping[str, Any], given: Mapping[str, Any], layout: Card, others: Sequence[Card]
) -> dict[str, Any]:
    """Merge front matter: given values first, then those a user changed, then generated ones."""
    found = dict(layout.metadata)
    if not all(map(_is_hub_id, _union(found.get("base_model")))):
        del found["base_model"]
    for card in others:
        added = [tag for tag in _union(card.metadata.get("tags")) if tag not in card.generated.get("tags", [])]
        found["tags"] = _union(found.get("tags"), added)
        found = {name: value for name, value in card.metadata.items() if name not in _OURS_ALONE} | found
    for name in dict.fromkeys((*layout.generated, *generated)):
        old, before, now = found.get(name), layout.generated.get(name), generated.get(name)
        if name == "tags":
            dropped = set(_union(before)) - (set(_union(old)) & set(_union(now)))
            found[name] = [tag for tag in _union(old, now) if tag not in dropped]
        elif old == before:
            found[name] = now
    found["library_name"] = generated["library_name"]  # transformers overwrites it with its own name
    tags = _union(found.get("tags"), given.get("tags"))
    found |= {**_plain(given), "tags": [tag for tag in tags if _is_publishable_tag(tag)]}
    if not found.get("base_model"):
        found.pop("base_model_relation", None)
    return {name: value for name, value in found.items() if value not in (None, [])}


def _union(*lists: Any) -> list[str]:
    entries = [tags if isinstance(tags, list) else [tags] for tags in lists]
    return list(dict.fromkeys(tag for tags in entries for tag in tags if isinstance(tag, str)))


def _is_publishable_tag(tag: str) -> bool:
    """Whether a tag is valid on the Hub. PEFT writes `base_model` tags of local paths too."""
    prefix, _, name = tag.partition(":")
    return prefix != "base_model" or _is_hub_id(name.rpartition(":")[2])


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("peft_quant", "hub_cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def _render(
    kind: str,
    config: Mapping[str, Any],
    base: _Base,
    task: str | None,
    facts: Mapping[str, Any],
    subfolder: str,
) -> str:
    quantization = facts.get("base_quantization", {})
    bits = quantization.get("bits")
    texts = dict.fromkeys(
        text for row in ({"": facts.get("perplexity", {})} | facts.get("compared_with", {})).values() for text in row
    )
    text = (
        _templates()
        .get_template(f"{kind}.md")
        .render(
            config=config,
            base=base,
            base_path=base.hub_id or "path/to/the/base",
            repository=facts.get("repository", "this/repository"),
            subfolder="" if subfolder == "." else subfolder,
            auto_class=f"AutoModelFor{_TASKS[task][1]}" if task else "AutoModel",
            bits=bits[0] if isinstance(bits, list) else bits,
            quantization=_only(_FORMAT, quantization),
            engines=_engines(quantization),
            compared_with=facts.get("compared_with", {}),
            texts=list(texts),
            versions=package_versions(),
            **{name: facts.get(name) for name in ("settings", "command", "log", "perplexity", "trained", "export")},
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _engines(quantization: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Engine, verdict and source for every engine with a known verdict."""
    known = [row for row in engine_verdicts(Packing.from_config(quantization)) if row.serves is not None]
    return [(row.engine, str(row), f"{_sources(row.sources)}, {row.checked}") for row in known]


def _sources(sources: Iterable[str]) -> str:
    """Markdown links labeled by repository or site."""
    links = []
    for source in sources:
        site, path = urlsplit(source).netloc, urlsplit(source).path.split("/")
        label = "/".join(path[1:3]) + (f"#{path[4]}" if path[3:4] in (["pull"], ["issues"]) else "")
        links.append(f"[{label if site == 'github.com' else site}]({source})" if site else source)
    return ", ".join(links)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that a result may depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
