"""Model cards of adapters and checkpoints, from what their files say and what only the user knows.

A card is generated between two marks. The first carries, as JSON, the facts it was made of and a digest of the weights
they are true of, so that a card can be made again without asking for them, and drops them once the weights are others.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..files import new_file
from ..gptq.checkpoint import quantization_config
from ..inspection.engines import Packing, engine_verdicts


README = "README.md"

_START = "<!-- peft_quant: generated down to the end mark, and again at every save; your own text goes above or below"
_END = "<!-- peft_quant: end -->"
_GENERATED = re.compile(rf"{re.escape(_START)}\n(?P<record>\{{.*\}})\n-->\n.*?{re.escape(_END)}", re.DOTALL)

_KINDS = {"PEQA": "peqa_adapter", "LREC": "lrec_adapter", "LORA": "lora_export"}
_MERGED = "merged_gptq"
_QFT = "qft"
QFT = "QFT"
"""The `method` in the facts of what QFT trained, in whatever format it was saved or exported."""

_TAGS = {
    "peqa_adapter": ["peqa", "gptq", "peft-quant"],
    "lrec_adapter": ["lrec", "gptq", "peft-quant"],
    "lora_export": ["lora", "lrec", "gptq"],
    _MERGED: ["gptq", "peqa"],
    _QFT: ["qft", "peft-quant"],
}

_TASKS = {  # of PEFT: the Hub's pipeline, the end of transformers' class
    "CAUSAL_LM": ("text-generation", "CausalLM"),
    "SEQ_CLS": ("text-classification", "SequenceClassification"),
    "TOKEN_CLS": ("token-classification", "TokenClassification"),
    "QUESTION_ANS": ("question-answering", "QuestionAnswering"),
    "SEQ_2_SEQ_LM": (None, "Seq2SeqLM"),
}

_ROLES = (  # what the tensors of an adapter are, by their names
    ("scale deltas", re.compile(r"\.peqa_scales$")),
    ("low-rank matrices", re.compile(r"\.lora_(embedding_)?[AB]\b")),
    ("embeddings of single tokens", re.compile(r"\.trainable_tokens_delta$")),
    ("int8 weights", re.compile(r"\.codes$")),
    ("outliers of int8 weights", re.compile(r"\.outlier_values$")),
    ("their columns", re.compile(r"\.outlier_columns$")),
    ("packed integers", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("scales", re.compile(r"\.scales$")),
)
_OTHER_ROLE = "modules trained whole"
_OTHER_ROLE_OF_QFT = "float parameters"
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I32": "int32", "I16": "int16", "I8": "int8"}

_FORMAT = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "fingerprint")
_OF_THE_WEIGHTS = ("settings", "command", "log", "perplexity", "compared_with", "trained", "export")
_OURS_ALONE = ("library_name", "base_model", "base_model_relation", "pipeline_tag", "model-index", "model_name")
_INHERITED = ("license", "license_name", "license_link", "language")
_PACKAGES = ("peft-quant", "peft", "transformers", "torch", "gptqmodel", "optimum")

_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<revision>[0-9a-f]{40})/?$")
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
    """Write or refresh the model card (`README.md`) of an adapter, a merged checkpoint or a model trained in int8.

    `save_pretrained` and `push_to_hub` of PEQA and LREC models, QFTTrainer's saves, `merge_checkpoint` and the exports
    do so by themselves; this adds what only you know. Facts are kept for later saves, until the weights change. Your
    own text around the generated part stays, and so does the metadata you changed; a card without a generated part
    keeps its text and gets metadata only. What is not known is left out.

    Args:
        directory: of the adapter or of the checkpoint.
        base_model: Hub id of the GPTQ checkpoint, if the adapter does not name one. A local path is never written.
        repository: Hub id of this adapter or checkpoint, for the snippets.
        license: as the Hub spells it, for instance `"apache-2.0"`.
        language: code or codes.
        datasets: Hub id or ids of what was trained on.
        tags: further tags.
        settings: of the training, by name.
        command: the training command.
        perplexity: of this model, by the name of the text.
        compared_with: the same of other models, by the name of the model.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: the directory has neither an `adapter_config.json` nor a `config.json`.
        ValueError: the adapter is of another method, the checkpoint is not GPTQ, or the card there is not readable.
    """
    facts = {"settings": settings, "command": command, "perplexity": perplexity, "compared_with": compared_with}
    metadata = {"license": license, "language": language, "datasets": datasets, "tags": tags}
    card = Path(directory, README)
    earlier = [card.read_text(encoding="utf-8")] if card.is_file() else []
    return update_card(directory, earlier, [base_model], repository, facts, metadata)


def update_card(
    directory: str | os.PathLike[str],
    earlier: Sequence[str] = (),
    bases: Sequence[str | None] = (),
    repository: str | None = None,
    facts: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    exported: bool = False,
    changed: Iterable[str] = (),
) -> Path:
    """Write the card of a directory, in the place of whatever card is there.

    Args:
        earlier: cards of the same model. The first one that somebody has written in, or that was generated here, lends
            its text and metadata; all of them lend facts, later ones first.
        bases: Hub ids or paths of the base, preferred to what the adapter's configuration says.
        repository: Hub id of the directory's model.
        facts: what the files do not say; None for what is not known.
        metadata: of the front matter, preferred to what is there; None for what is not known.
        exported: a LoRA adapter in the directory was an LREC adapter.
        changed: tensors of a merged checkpoint that are not its base's.

    Raises:
        FileNotFoundError, ValueError: as [`write_model_card`] does.
    """
    directory = Path(directory)
    known = [_Card.read(text) for text in earlier]
    method = (facts or {}).get("method") or next((c.facts["method"] for c in known if c.facts.get("method")), None)
    kind, config, place = _read_config(directory, method)
    if kind == "lora_export" and not exported and not any(card.record for card in known):
        raise ValueError(
            f"{directory} is a LORA adapter, whose card PEFT writes. Cards are written here for PEQA and LREC "
            "adapters, for what `export_lora` wrote and for merged GPTQ checkpoints."
        )
    weights = _digest(place)
    collected = _collect_facts(known, weights)
    collected |= {name: _plain(value) for name, value in (facts or {}).items() if value is not None}
    if kind in (_MERGED, _QFT):
        quantization = config["quantization_config"]
        packed = quantization.get("quant_method") == "gptq"
        collected["base_quantization"] = _only(_FORMAT, quantization) if packed else {}
    elif config.get("base_quantization"):
        collected["base_quantization"] = _only(_FORMAT, config["base_quantization"])
    trained = _count_tensors(
        place, set(changed) if kind == _MERGED else None, _OTHER_ROLE_OF_QFT if kind == _QFT else _other_role(config)
    )
    if trained:
        collected["trained"] = trained

    if repository:
        collected["repository"] = repository
    layout = next((card for card in known if not card.is_stock), None)
    base = _Base.find(*bases, config.get("base_model_name_or_path"), *_bases_of(known, weights, collected))
    if base != _Base():
        collected["base"] = asdict(base)
    task = _task(config)
    generated = _metadata(kind, base, task, collected)
    given = {name: _plain(value) for name, value in (metadata or {}).items() if value is not None}
    merged = _merge_metadata(generated, given, layout, [card for card in known if card is not layout])

    record = {"weights": weights, "facts": collected, "metadata": generated}
    text = _render(kind, config, base, task, collected, place.relative_to(directory).as_posix())
    # `>` would end the comment
    mark = json.dumps(record, ensure_ascii=False).replace(">", "\\u003e")
    part = f"{_START}\n{mark}\n-->\n{text}\n\n{_END}"
    if layout is None:
        body = f"\n{part}\n"
    elif layout.record is None:
        body = layout.text
    else:
        body = _GENERATED.sub(lambda _: part, layout.text, count=1)
    front_matter = ModelCardData(**merged).to_yaml()
    path = directory / README
    with new_file(path) as file:
        file.write_text(f"---\n{front_matter}\n---\n{body}", encoding="utf-8")
    return path


def inherited_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What the card of a base says that is true of a checkpoint made from it: licence and language."""
    card = Path(directory, README)
    try:
        metadata = _Card.read(card.read_text(encoding="utf-8")).metadata
    except (OSError, ValueError):
        return {}
    return _only(_INHERITED, metadata)


def public_name(model: str) -> str | None:
    """What to call a model in public: its Hub id, or the name of its directory without the path to it."""
    base = _Base.find(model)
    return base.hub_id or base.directory_name


@dataclass(frozen=True)
class _Card:
    """A card: its front matter, its text, and what was recorded in it when it was generated (None if it was not)."""

    metadata: dict[str, Any]
    text: str
    record: dict[str, Any] | None

    @classmethod
    def read(cls, content: str) -> _Card:
        if not content.lstrip().startswith("---"):
            return cls({}, content, _read_record(content))
        try:
            card = ModelCard(content)
        except Exception as error:  # YAML's errors and those of the metadata's own checks
            raise ValueError(f"The front matter of {README} is not readable: {error}. Mend or remove it.") from error
        return cls(card.data.to_dict(), card.text, _read_record(card.text))

    @property
    def is_stock(self) -> bool:
        """Whether a library wrote all of the text, and nobody changed it."""
        if self.record is not None:
            return False
        untouched = self.text.count("More information needed") >= 3  # a user would begin by filling these in
        if _OF_THE_TRAINER in self.text and untouched:
            return True
        return _without_peft_version(self.text) in ("", *_stock_texts())

    @property
    def facts(self) -> dict[str, Any]:
        """What the card says that the files do not."""
        if self.record is not None:
            return self.record["facts"]
        return _facts_of_the_trainer(self.text) if self.is_stock else {}


@dataclass(frozen=True)
class _Base:
    """The base model: Hub id and revision, as far as they are known, or else the name of its directory."""

    hub_id: str | None = None
    revision: str | None = None
    directory_name: str | None = None

    @classmethod
    def find(cls, *names: Any) -> _Base:
        """From the first name that is a Hub id, or from a path; a dictionary is a base found earlier."""
        directory_name = None
        for name in names:
            if isinstance(name, dict):
                if name["hub_id"]:
                    return cls(**name)
                directory_name = directory_name or name["directory_name"]
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


def _read_record(text: str) -> dict[str, Any] | None:
    generated = _GENERATED.search(text)
    if generated is None:
        return None
    try:
        record = json.loads(generated["record"])
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"weights", "facts", "metadata"} <= record.keys() else None


@cache
def _stock_texts() -> tuple[str, ...]:
    """What PEFT and transformers start a card from."""
    of_transformers = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    cards = (
        ModelCard.from_template(ModelCardData()),
        ModelCard.from_template(ModelCardData(), model_description=of_transformers),
    )
    return tuple(card.text.strip() for card in cards)


def _without_peft_version(text: str) -> str:
    return re.sub(r"### Framework versions\n\n(- PEFT \S+\s*)+$", "", text.strip()).strip()


def _facts_of_the_trainer(text: str) -> dict[str, Any]:
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE))
    facts: dict[str, Any] = {}
    settings = re.findall(r"^- (\w+): (.+)$", sections.get("Training hyperparameters", ""), re.MULTILINE)
    if settings:
        facts["settings"] = dict(settings)
    log = sections.get("Training results", "").strip()
    if log.startswith("|"):
        facts["log"] = log
    return facts


def _collect_facts(cards: Sequence[_Card], weights: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for card in cards:
        of_these_weights = card.record is None or card.record["weights"] == weights
        facts |= {name: fact for name, fact in card.facts.items() if of_these_weights or name not in _OF_THE_WEIGHTS}
    return facts


def _bases_of(cards: Sequence[_Card], weights: str | None, facts: Mapping[str, Any]) -> list[Any]:
    """The Hub ids that cards give for the base, if they are a user's or about the same base."""
    found = []
    for card in cards:
        record = card.record or {"weights": weights, "facts": {}, "metadata": {}}
        fingerprints = [known.get("base_quantization", {}).get("fingerprint") for known in (record["facts"], facts)]
        same_base = record["weights"] == weights or (fingerprints[0] and fingerprints[0] == fingerprints[1])
        name = card.metadata.get("base_model")
        if same_base and record["facts"].get("base"):
            found.append(record["facts"]["base"])
        elif same_base or name != record["metadata"].get("base_model"):
            found.append(name)
    return found


def _only(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, so that it equals itself after a card was written and read."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _read_config(directory: Path, method: str | None) -> tuple[str, dict[str, Any], Path]:
    """The kind of card, the configuration it is about, and where that lies: PEFT saves named adapters one deeper.

    Args:
        method: what made a checkpoint, if that is known.
    """
    adapters = [directory / "adapter_config.json", *sorted(directory.glob("*/adapter_config.json"))]
    file = next((file for file in (*adapters[:1], directory / "config.json", *adapters[1:]) if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{directory} has neither an adapter_config.json nor a config.json: pass the directory of an adapter or "
            "of a merged checkpoint."
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "adapter_config.json":
        kind = _KINDS.get(config.get("peft_type"))
        if kind is None:
            raise ValueError(
                f"{directory} is a {config.get('peft_type')} adapter, whose card PEFT writes. Cards are written here "
                "for PEQA and LREC adapters and merged GPTQ checkpoints."
            )
        return kind, config, file.parent
    config["quantization_config"] = quantization_config(file.parent, config) or {}
    found = config["quantization_config"].get("quant_method")
    if method == QFT or found == "qft":
        return _QFT, config, file.parent
    if found != "gptq":
        raise ValueError(f"{directory} is not a GPTQ checkpoint: the quantization in its config.json is {found}.")
    return _MERGED, config, file.parent


def _weight_files(place: Path) -> list[Path]:
    return sorted(file for pattern in ("*.safetensors", "adapter_model.bin") for file in place.glob(pattern))


def _digest(place: Path, samples: int = 64, size: int = 4096) -> str | None:
    """A short name for the weights in a directory, from samples of its files; None without weights."""
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


def _count_tensors(place: Path, names: set[str] | None, other_role: str) -> list[dict[str, Any]]:
    """Tensors, values and bytes by role and dtype, of the named tensors or of all."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file in _weight_files(place):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if names is not None and name not in names:
                    continue
                entry = tensors.get_slice(name)
                dtype, values = entry.get_dtype(), math.prod(entry.get_shape())
                role = next((role for role, pattern in _ROLES if pattern.search(name)), other_role)
                row = rows.setdefault(
                    (role, dtype),
                    {"what": role, "tensors": 0, "values": 0, "dtype": _DTYPES.get(dtype, dtype), "bytes": 0},
                )
                row["tensors"] += 1
                row["values"] += values
                row["bytes"] += values * _BYTES.get(dtype, 1)
    return [rows[key] for key in sorted(rows)]


def _other_role(config: Mapping[str, Any]) -> str:
    """What an adapter's tensors are that no pattern knows."""
    if config.get("bias", "none") == "none":
        return _OTHER_ROLE
    return f"biases and {_OTHER_ROLE}" if config.get("modules_to_save") else "biases"


def _task(config: Mapping[str, Any]) -> str | None:
    """PEFT's name of the task, of an adapter or of a checkpoint."""
    if "peft_type" in config:
        return config.get("task_type") if config.get("task_type") in _TASKS else None
    architecture = next(iter(config.get("architectures") or []), "")
    return next((task for task, (_, ending) in _TASKS.items() if architecture.endswith(f"For{ending}")), None)


def _metadata(kind: str, base: _Base, task: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter that follows from the facts."""
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
            EvalResult(
                task_type=pipeline or "text-generation",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
                dataset_name=text,
                metric_type="perplexity",
                metric_value=value,
            )
            for text, value in facts["perplexity"].items()
        ]
        name = facts.get("repository", kind.replace("_", "-")).rpartition("/")[2]
        metadata |= ModelCardData(model_name=name, eval_results=results).to_dict()
    return metadata


def _merge_metadata(
    generated: Mapping[str, Any], given: Mapping[str, Any], layout: _Card | None, others: Sequence[_Card]
) -> dict[str, Any]:
    """Front matter: what is given, then what a user wrote, then what was generated."""
    found = dict(layout.metadata) if layout else {}
    before = layout.record["metadata"] if layout and layout.record else {}
    for card in others:
        for name, value in card.metadata.items():
            if name == "tags":
                found[name] = _union(found.get(name), value)
            elif name not in _OURS_ALONE and name not in before:
                found.setdefault(name, value)
    if not _is_publishable(found.get("base_model")):
        found.pop("base_model", None)
    if not before:
        found.pop("library_name", None)  # libraries write "transformers" here, for adapters too
    if not found.get("model-index", [{}])[0].get("results"):
        found.pop("model-index", None)

    merged: dict[str, Any] = {}
    for name in dict.fromkeys((*found, *generated)):
        old, ours = found.get(name), generated.get(name)
        if name == "tags":
            stale = set(before.get("tags", [])) - set(ours or [])
            refused = set(before.get("tags", [])) - set(old or [])
            merged[name] = [
                tag
                for tag in _union(old, ours)
                if tag not in stale and tag not in refused and _is_publishable_tag(tag)
            ]
        elif name in before and name not in found and name != "library_name":
            continue  # a user took it out
        elif name in found and old != before.get(name):
            merged[name] = old
        elif name in generated:
            merged[name] = ours
    if "base_model" not in merged:
        merged.pop("base_model_relation", None)
    for name, value in given.items():
        merged[name] = _union(merged.get(name), value) if name == "tags" else value
    return {name: value for name, value in merged.items() if value not in (None, [])}


def _union(*lists: Any) -> list[str]:
    entries = [[tags] if isinstance(tags, str) else tags or [] for tags in lists]
    return list(dict.fromkeys(tag for tags in entries for tag in tags))


def _is_publishable(base_model: Any) -> bool:
    names = base_model if isinstance(base_model, list) else [base_model]
    return all(_is_hub_id(name) for name in names)


def _is_publishable_tag(tag: str) -> bool:
    """The Hub's tags of a base model must name a model there; PEFT's name whatever was loaded."""
    prefix, _, name = tag.partition(":")
    return prefix != "base_model" or _is_hub_id(name.rpartition(":")[2])


def _render(
    kind: str,
    config: Mapping[str, Any],
    base: _Base,
    task: str | None,
    facts: Mapping[str, Any],
    subfolder: str,
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("peft_quant", "hub_cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    quantization = facts.get("base_quantization", {})
    bits = quantization.get("bits")
    texts = dict.fromkeys(
        text for row in ({"": facts.get("perplexity", {})} | facts.get("compared_with", {})).values() for text in row
    )
    text = environment.get_template(f"{kind}.md").render(
        config=config,
        base=base,
        base_path=base.hub_id or "path/to/the/base",
        repository=facts.get("repository", "this/repository"),
        subfolder="" if subfolder == "." else subfolder,
        auto_class=f"AutoModelFor{_TASKS[task][1]}" if task else "AutoModel",
        bits=bits[0] if isinstance(bits, list) else bits,
        quantization=_only(_FORMAT, quantization),
        engines=_engines(quantization),
        settings=facts.get("settings"),
        command=facts.get("command"),
        log=facts.get("log"),
        perplexity=facts.get("perplexity"),
        compared_with=facts.get("compared_with", {}),
        texts=list(texts),
        trained=facts.get("trained"),
        export=facts.get("export"),
        versions=package_versions(),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _engines(quantization: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Engine, verdict and source, for the engines of which it is known."""
    known = [row for row in engine_verdicts(Packing.from_config(quantization)) if row.serves is not None]
    return [(row.engine, str(row), f"{_sources(row.sources)}, {row.checked}") for row in known]


def _sources(sources: Iterable[str]) -> str:
    """Links, named by repository or site."""
    links = []
    for source in sources:
        site, path = urlsplit(source).netloc, urlsplit(source).path.split("/")
        label = "/".join(path[1:3]) + (f"#{path[4]}" if path[3:4] in (["pull"], ["issues"]) else "")
        links.append(f"[{label if site == 'github.com' else site}]({source})" if site else source)
    return ", ".join(links)


def package_versions() -> dict[str, str]:
    """Of the packages that a result may depend on, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
