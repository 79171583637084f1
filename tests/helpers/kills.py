"""Saves in processes that are killed, and what they leave: the old state, the new one, or one that is refused.

    python tests/helpers/kills.py --kills 1000

kills each writer at random moments, so often in all, and prints a table. It fails if a mixture of two saves loads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from gptq_models import float_llama, load, save_tiny_llama, tiny_tokenizer
from peft import PeftConfig, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from qft_models import int8_llama, trainer
from safetensors.torch import load_file
from tqdm.std import TqdmDefaultWriteLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_quant import (
    LRECConfig,
    PEQAConfig,
    cache_teacher,
    export_lora,
    export_qft,
    merge_checkpoint,
    write_model_card,
)
from peft_quant.gptq.checkpoint import Checkpoint
from peft_quant.gptq.quantize import quantize_checkpoint
from peft_quant.trainers.distillation import cache
from peft_quant.trainers.distillation.cache import CachedTeacher
from peft_quant.trainers.report.page import TrainingReport, write_training_report


ABSENT = "absent"
STEPS = {"os.rename", "os.remove"}
"""Calls that make files appear and disappear, as Python's audit events name them."""


@dataclass
class Writer:
    """A save, and how to read what it wrote.

    Attributes:
        save: writes to a path.
        read: returns what is there as a reader gets it, as text; raises `ValueError` or `OSError` to refuse it.
        old: what is there before, written by another save; None for nothing.
        overwrites: whether it may be repeated; otherwise what is there is removed before.
    """

    save: Callable[[Path], Any]
    read: Callable[[Path], str]
    old: Path | None = None
    overwrites: bool = True

    def state(self, path: Path) -> str:
        return self.read(path) if path.exists() else ABSENT


class Material:
    """The writers, each with what it needs, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def base(self) -> Path:
        return save_tiny_llama(self.directory / "base")

    @cached_property
    def float_model(self) -> Path:
        float_llama().half().save_pretrained(self.directory / "float")
        tiny_tokenizer().save_pretrained(self.directory / "float")
        return self.directory / "float"

    @cached_property
    def peqa(self) -> Any:
        return get_peft_model(load(self.base), PEQAConfig(task_type="CAUSAL_LM"))

    @cached_property
    def lrec(self) -> Any:
        config = LRECConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"])
        return get_peft_model(load(self.base), config)

    def _saved(self, name: str, save: Callable[[Path], Any]) -> Path:
        path = self.directory / name
        save(path)
        return path

    def peqa_adapter(self) -> Writer:
        old = self._saved("old peqa", lambda path: save_adapter(self.peqa, 1e-3, path))
        return Writer(lambda path: save_adapter(self.peqa, 2e-3, path), read_adapter, old)

    def lrec_adapter(self) -> Writer:
        old = self._saved("old lrec", lambda path: save_adapter(self.lrec, 1, path, lora_alpha=4))
        return Writer(lambda path: save_adapter(self.lrec, 2, path, lora_alpha=16), read_adapter, old)

    def lrec_as_lora(self) -> Writer:
        old = self._saved("old lora", lambda path: save_adapter(self.lrec, 1, path, lora_alpha=4, save_as_lora=True))
        return Writer(
            lambda path: save_adapter(self.lrec, 2, path, lora_alpha=16, save_as_lora=True), read_adapter, old
        )

    def lrec_in_pickle(self) -> Writer:
        old = self._saved("old safetensors", lambda path: save_adapter(self.lrec, 1, path, lora_alpha=4))
        return Writer(
            lambda path: save_adapter(self.lrec, 2, path, lora_alpha=16, safe_serialization=False), read_adapter, old
        )

    def lrec_in_transformers(self) -> Writer:
        model: Any = load(self.base)
        model.add_adapter(LRECConfig(task_type="CAUSAL_LM", r=2))
        old = self._saved("old native", lambda path: save_adapter(model, 1, path, lora_alpha=4))
        return Writer(lambda path: save_adapter(model, 2, path, lora_alpha=16), read_adapter, old)

    def qft_trainer(self) -> Writer:
        options = {"trainer_options": {"processing_class": tiny_tokenizer()}}
        run = trainer(self.directory / "run", int8_llama(seed=1, rms_norm_eps=1e-3), **options)
        first = trainer(self.directory / "run", int8_llama(), **options)
        return Writer(run.save_model, read_model, self._saved("old qft", first.save_model))

    def qft_in_shards(self) -> Writer:
        first, model = int8_llama(), int8_llama(seed=1, rms_norm_eps=1e-3)
        old = self._saved("old shards", lambda path: first.save_pretrained(path, max_shard_size="50kB"))
        return Writer(lambda path: model.save_pretrained(path, max_shard_size="50kB"), read_model, old)

    def qft_shards_over_one_file(self) -> Writer:
        first, model = int8_llama(), int8_llama(seed=1)
        old = self._saved("old file", first.save_pretrained)
        return Writer(lambda path: model.save_pretrained(path, max_shard_size="50kB"), read_model, old)

    def merge(self) -> Writer:
        adapter = self._saved("merged", lambda path: save_adapter(self.peqa, 1e-3, path))
        return Writer(lambda path: merge_checkpoint(self.base, adapter, path), read_checkpoint, overwrites=False)

    def qft_to_bf16(self) -> Writer:
        model = int8_llama()
        return Writer(lambda path: export_qft(model, path, "bf16"), read_checkpoint, overwrites=False)

    def qft_to_gptq(self) -> Writer:
        model = int8_llama()
        return Writer(lambda path: export_qft(model, path, "gptq"), read_checkpoint, overwrites=False)

    def lrec_to_lora(self) -> Writer:
        adapter = self._saved("exported", lambda path: save_adapter(self.lrec, 1, path))
        return Writer(lambda path: export_lora(adapter, path), read_adapter, overwrites=False)

    def teacher_cache(self) -> Writer:
        teacher, rows = float_llama(), [{"input_ids": [3 + i, *range(10, 20 + i)]} for i in range(8)]

        def save(path: Path) -> None:
            cache._SHARD_BYTES, before = 1000, cache._SHARD_BYTES
            try:
                cache_teacher(teacher, rows, path, k=8)
            finally:
                cache._SHARD_BYTES = before

        return Writer(save, read_cache)

    def card(self) -> Writer:
        old = self._saved("old card", lambda path: save_adapter(self.peqa, 1e-3, path))
        return Writer(lambda path: write_model_card(path, license="mit", command="train"), read_card, old)

    def report(self) -> Writer:
        def write(status: str) -> Callable[[Path], Any]:
            report = TrainingReport(title="run", status=status)
            return lambda path: write_training_report(report, path / "report.html")

        return Writer(write("finished"), read_report, self._saved("old report", write("step 1")))

    def quantization(self) -> Writer:
        texts = [" ".join(f"w{(start * 7 + i) % 125}" for i in range(16)) for start in range(4)]

        def save(path: Path) -> None:
            quantize_checkpoint(self.float_model, path, texts, group_size=32, state=path.with_suffix(".unfinished"))

        return Writer(save, read_checkpoint, overwrites=False)


WRITERS: dict[str, Callable[[Material], Writer]] = {
    name.replace("_", " "): getattr(Material, name)
    for name, member in vars(Material).items()
    if callable(member) and not name.startswith("_")
}


def save_adapter(model: Any, value: float, path: Path, **options: Any) -> None:
    """Save an adapter of one value everywhere, with options of its configuration or of `save_pretrained`."""
    config = model.peft_config["default"]
    saving = {name: options.pop(name) for name in ("safe_serialization",) if name in options}
    for name, option in {"save_as_lora": False, **options}.items():
        setattr(config, name, option)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    model.save_pretrained(path, **saving)


def digest(config: Any, tensors: dict[str, torch.Tensor], *files: Path) -> str:
    """A text that is the same for the same configuration, tensors and files."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=lambda value: sorted(map(str, value))).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    for file in files:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:12]


def read_adapter(path: Path) -> str:
    config = PeftConfig.from_pretrained(os.fspath(path)).to_dict()
    return digest(config, load_peft_weights(os.fspath(path), device="cpu"))


def read_model(path: Path) -> str:
    config = AutoConfig.from_pretrained(path).to_dict()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = path / "tokenizer.json"
    parts = {}
    for name, tensor in model.state_dict().items():
        values = getattr(tensor, "parts", {"": tensor})
        parts |= {f"{name} {part}": value for part, value in values.items() if value.ndim}
    return digest({**config, "_name_or_path": None}, parts, *[tokenizer] * tokenizer.exists())


def read_checkpoint(path: Path) -> str:
    checkpoint = Checkpoint.open(path)
    if (path / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(path)
    return digest(checkpoint.config, {}, *sorted(file for file in path.iterdir() if file.name != "README.md"))


def read_cache(path: Path) -> str:
    shards = CachedTeacher(path).manifest["shards"]
    tensors = {f"{shard['file']} {k}": t for shard in shards for k, t in load_file(path / shard["file"]).items()}
    return digest(shards, tensors)


def read_card(path: Path) -> str:
    """The facts, of which the card is generated again at the next save."""
    assert (path / "README.md").read_text(encoding="utf-8").endswith("\n")
    return digest(json.loads((path / "peft_quant_facts.json").read_text(encoding="utf-8"))["facts"], {})


def read_report(path: Path) -> str:
    text = (path / "report.html").read_text(encoding="utf-8")
    assert text.rstrip().endswith("</html>")
    return "finished" if "finished" in text else "step 1"


def run_killed(save: Callable[[], Any], *, step: int | None = None, seconds: float | None = None) -> bool:
    """Save in a fork of this process that is killed before its n-th step, or after so many seconds.

    Returns whether it was killed; otherwise it came to its end before.
    """
    process = os.fork()
    if not process:
        try:
            signal.alarm(60)  # ends it if a lock of a thread that the fork lacks is waited for
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            if step is not None:
                _die_before(step)
            save()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the save ended with {status}"
    return status != 0


def _die_before(step: int) -> None:
    steps = count(1)

    def hook(event: str, _: Any) -> None:
        if event in STEPS and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@dataclass
class Kills:
    """A writer, and a place to kill it."""

    writer: Writer
    place: Path

    def __post_init__(self) -> None:
        self.place.mkdir()
        self.path = self.place / "out"
        self._restore()
        self.old = self.writer.state(self.path)
        self.writer.save(self.path)
        self.new = self.writer.state(self.path)
        assert self.new != self.old

    def _restore(self) -> None:
        shutil.rmtree(self.place)
        self.place.mkdir()
        if self.writer.old is not None:
            shutil.copytree(self.writer.old, self.path)

    def kill(self, **when: Any) -> str | None:
        """What a killed save left: "old", "new", "refused" or "mixed"; None if it was not killed."""
        self._restore()
        if not run_killed(lambda: self.writer.save(self.path), **when):
            return None
        try:
            state = self.writer.state(self.path)
            left = {self.old: "old", self.new: "new"}.get(state, "mixed")
        except (ValueError, OSError):
            left = "refused"
        return left

    def save_again(self) -> None:
        """Check that the next save after a killed one ends in the new state, and removes what that one left."""
        if not self.writer.overwrites and self.path.exists():
            shutil.rmtree(self.path)
        self.writer.save(self.path)
        assert self.writer.state(self.path) == self.new
        assert not list(self.place.rglob("*.partial"))

    def seconds(self) -> float:
        """How long a save takes."""
        self._restore()
        start = time.perf_counter()
        run_killed(lambda: self.writer.save(self.path))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="in all")
    parser.add_argument("--only", choices=WRITERS, help="one writer alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    TqdmDefaultWriteLock.mp_lock = None  # is shared with forks: one that is killed would never release it
    random.seed(options.seed)
    chosen = [options.only] if options.only else [*WRITERS]
    outcomes = ("old", "new", "refused", "mixed")
    print(f"{'writer':26} {'ms':>6} {'kills':>6} " + " ".join(f"{outcome:>8}" for outcome in outcomes))
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        material = Material(Path(directory))
        for number, name in enumerate(chosen):
            kills = Kills(WRITERS[name](material), Path(directory, f"place {number}"))
            wanted = options.kills * (number + 1) // len(chosen) - options.kills * number // len(chosen)
            seconds = kills.seconds()
            found: Counter[str] = Counter()
            while found.total() < wanted:
                left = kills.kill(seconds=random.uniform(0, 1.1 * seconds))
                if left is not None:
                    found[left] += 1
                    kills.save_again()
            total += found
            columns = " ".join(f"{found[outcome]:8}" for outcome in outcomes)
            print(f"{name:26} {1000 * seconds:6.0f} {found.total():6} {columns}", flush=True)
    print(f"{'all':26} {'':6} {total.total():6} " + " ".join(f"{total[outcome]:8}" for outcome in outcomes))
    sys.exit(1 if total["mixed"] else 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch._dynamo.config.disable = True
    main()
