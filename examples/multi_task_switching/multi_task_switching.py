# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]", "gradio>=6.0"]
# ///
"""Three tasks on one 4-bit base, each a PEQA adapter of half a megabyte, switched while the model stays loaded.

Without arguments, on a CPU and without a model hub: the scales of two layers a block of SmolLM2-135M-Instruct are
tuned three times, on the King James Bible, on definitions, and on definitions as JSON; then every adapter is measured
on every task, and switching is timed against loading the model again.

    python multi_task_switching.py
    python multi_task_switching.py --serve

--serve goes on to a page on loopback where the task is switched from request to request. Every stage is kept under
--work-dir and not done twice. --smoke runs all but the page in seconds, on a tiny random model.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, digest, parse, versions  # noqa: I001

import demo_assets
import smoke_model
import torch
from measure import evaluate, probe_logits, windows
from peft import PeftModel
from transformers import AutoTokenizer
from tuning import Settings, tune

import peft_quant
from peft_quant.evaluation.loading import load_model


TARGETS = ["k_proj", "v_proj"]
QUESTION = re.compile(r'(Define the (\w+) "(.+)"\.)\n(.+)\.\n')
PROMPT = 'Define the noun "lighthouse".\n'


def task_texts(assets: Any, end: str) -> dict[str, tuple[str, str]]:
    """Training and held-out text of every task; the last two differ in the form of their answers alone."""
    pairs = [QUESTION.findall(text)[:5000] for text in assets.wordnet()]
    plain, records = [], []
    for part in pairs:
        plain.append("".join(f"{question}\n{answer}.{end}\n" for question, _, _, answer in part))
        answers = [json.dumps({"word": word, "part": kind, "definition": answer}) for _, kind, word, answer in part]
        records.append("".join(f"{question}\n{answer}{end}\n" for (question, *_), answer in zip(part, answers)))
    return {"bible": assets.king_james(), "definitions": tuple(plain), "json": tuple(records)}


def median_seconds(function: Callable[[Any], Any], arguments: list[Any]) -> float:
    """Of calls with each of the arguments."""
    seconds = []
    for argument in arguments:
        start = time.perf_counter()
        function(argument)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def time_switching(base: Path, adapters: dict[str, Path], probe: torch.Tensor, number: int) -> dict[str, float]:
    """Median seconds to change the task in three ways, and whether all come to the same logits."""

    def reload(directory: Path) -> PeftModel:
        return PeftModel.from_pretrained(load_model(base), directory)

    directories = list(islice(cycle(adapters.values()), number))
    last = reload(directories[-1])
    expected = probe_logits(last, probe)
    seconds = {"load the base again": median_seconds(reload, directories[:3])}
    slot = reload(directories[0])
    seconds["hotswap_adapter, from its file"] = median_seconds(
        lambda directory: peft_quant.hotswap_adapter(slot, str(directory), "default"), directories
    )
    for task, directory in adapters.items():
        last.load_adapter(directory, task)
    tasks = list(islice(cycle(adapters), number))
    seconds["set_adapter, all loaded"] = median_seconds(last.set_adapter, tasks)
    for model in (slot, last):
        if not torch.equal(probe_logits(model, probe), expected):
            raise RuntimeError("A switched adapter gives other logits than a loaded one: please report this.")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--windows", type=int, default=4, help="windows of 256 tokens to evaluate each task on")
    parser.add_argument("--switches", type=int, default=30, help="to take the median time of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="go on to a page on loopback")
    parser.add_argument("--port", type=int, help="of the page; a free one by default")
    arguments = parse(parser, "multi_task_switching", steps=2, sequence_length=64, windows=2, switches=6)

    assets: Any = smoke_model if arguments.smoke else demo_assets
    work, base = arguments.work_dir, assets.gptq_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = task_texts(assets, tokenizer.eos_token)
    held_out = {task: windows(tokenizer, text[1], 256, arguments.windows) for task, text in texts.items()}
    settings = {
        task: Settings(
            str(base),
            text[0],
            arguments.steps,
            arguments.batch_size,
            arguments.sequence_length,
            arguments.learning_rate,
            arguments.seed,
            TARGETS,
        )
        for task, text in texts.items()
    }
    adapters = {task: work / f"{task}-{setting.name}" for task, setting in settings.items()}
    of_all = digest(adapters=[adapter.name for adapter in adapters.values()], windows=arguments.windows)
    stages = Stages(work / f"results-{of_all}.json")

    for task, adapter in adapters.items():
        if not adapter.exists():
            stages.run(f"tune: {task}", lambda task=task: tune(settings[task], adapters[task]), adapter)
    rows = {"GPTQ": stages.run("evaluate GPTQ", lambda: evaluate(load_model(base), held_out))}
    for task, adapter in adapters.items():
        rows[task] = stages.run(
            f"evaluate: {task}",
            lambda adapter=adapter: evaluate(PeftModel.from_pretrained(load_model(base), adapter), held_out),
        )
    seconds = stages.run(
        "switch", lambda: time_switching(base, adapters, held_out["bible"], max(arguments.switches, len(adapters)))
    )

    def size(directory: Path) -> int:
        return sum(file.stat().st_size for file in directory.glob("*.safetensors"))

    print(f"\n| held-out perplexity | {' | '.join(texts)} | kB |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [f"{row[task]:.2f}" for task in texts]
        print(f"| {name} | {' | '.join(cells)} | {size(adapters.get(name, base)) / 1000:,.0f} |")
    print("\n| to another task | ms | of the first |\n|---|---|---|")
    slowest = seconds["load the base again"]
    for way, value in seconds.items():
        print(f"| {way} | {value * 1000:.1f} | 1/{slowest / value:.0f} |")
    print("\nlogits are the same, whichever way\n\n| stage | seconds |\n|---|---|")
    for title, stage in stages.results.items():
        print(f"| {title} | {stage['seconds']} |")
    print(f"\n{versions()}")

    if arguments.serve:
        from task_page import TaskModel, build_page, launch

        model = PeftModel.from_pretrained(load_model(base), next(iter(adapters.values())))
        page = build_page(TaskModel(model, tokenizer, adapters), PROMPT)
        print(f"\n{launch(page, arguments.port)}", flush=True)
        page.block_thread()


if __name__ == "__main__":
    main()
