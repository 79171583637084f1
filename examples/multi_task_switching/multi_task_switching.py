# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]", "gradio>=6.0"]
# ///
r"""Several tasks on one GPTQ base, each a small PEQA adapter, switched while the model stays loaded.

The scales of two layers a block are tuned once for each task; then every adapter is measured on every task, and
switching is timed against loading the model again. On SmolLM2-135M-Instruct in 4 bits, on a CPU and without a model
hub:

    python examples/demo_assets.py --wordnet
    python examples/multi_task_switching/multi_task_switching.py \
        --model .cache/assets/smollm2-135m-instruct-gptq-4bit \
        --tasks .cache/assets/king-james .cache/assets/definitions .cache/assets/definitions-json

With your own checkpoint and texts, each a path or a Hub id with the splits train and test:

    python multi_task_switching.py --model user/model-gptq-4bit --tasks user/one user/other

--serve goes on to a page on loopback where the task is switched from request to request.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from threading import Event
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import peft_quant
from peft_quant.evaluation.loading import load_model
from peft_quant.evaluation.perplexity import perplexity
from peft_quant.evaluation.text import read_texts, token_windows


def tune(arguments: argparse.Namespace, dataset: Dataset, directory: Path) -> None:
    """Tune the scales of a few layers on one task, and save the adapter."""
    set_seed(arguments.seed)
    config = peft_quant.PEQAConfig(task_type="CAUSAL_LM", target_modules=arguments.target_modules)
    model = get_peft_model(load_model(arguments.model), config)
    training = TrainingArguments(
        output_dir=str(directory),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, arguments.steps // 10),
        weight_decay=0.0,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, arguments.steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    Trainer(model, training, train_dataset=dataset, data_collator=default_data_collator).train()
    model.save_pretrained(directory)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(ids.to(model.device)).logits.float().cpu()


def median_seconds(function: Callable[[Any], Any], arguments: list[Any]) -> float:
    """Of calls with each of the arguments."""
    seconds = []
    for argument in arguments:
        start = time.perf_counter()
        function(argument)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def time_switching(base: str, adapters: dict[str, Path], probe: torch.Tensor, number: int) -> dict[str, float]:
    """Median seconds to change the task in three ways, and whether all come to the same logits."""

    def reload(directory: Path) -> PeftModel:
        return PeftModel.from_pretrained(load_model(base), directory)

    directories = list(islice(cycle(adapters.values()), number))
    last = reload(directories[-1])
    expected = logits(last, probe)
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
        if not torch.equal(logits(model, probe), expected):
            raise RuntimeError("A switched adapter gives other logits than a loaded one: please report this.")
    return seconds


@dataclass
class Answer:
    """What a request has got so far.

    Attributes:
        text: generated until now.
        switch_seconds: what it took to switch to its task; 0 where the task was that of the request before.
    """

    text: str = ""
    switch_seconds: float = 0.0


class TaskModel:
    """A base with one adapter, whose values are those of the task that a request asks for.

    Args:
        model: the base with the first task's adapter, named `default`.
        tokenizer: of the base.
        adapters: directories of PEQA adapters of the same layers, by task.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, adapters: Mapping[str, Path]) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.adapters = adapters
        self.task = next(iter(adapters))
        self._worker = ThreadPoolExecutor(max_workers=1)  # requests wait here: no switch within a generation

    def stream(self, task: str, prompt: str, max_new_tokens: int) -> Iterator[Answer]:
        """Continue a prompt, greedily; the text grows from one answer to the next. Safe to call from any thread.

        Raises:
            ValueError: the adapter's file does not fit the model. The task before stays.
        """
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer, abandoned = Answer(), Event()

        def generate() -> None:
            try:
                start = time.perf_counter()
                if task != self.task:
                    peft_quant.hotswap_adapter(self.model, str(self.adapters[task]), "default")
                    self.task = task
                    answer.switch_seconds = time.perf_counter() - start
                inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
                self.model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda ids, scores: torch.full((len(ids),), abandoned.is_set(), device=ids.device)]
                    ),
                )
            finally:
                streamer.end()

        done = self._worker.submit(generate)
        try:
            yield answer
            for part in streamer:
                answer.text += part
                yield answer
            done.result()
        finally:
            abandoned.set()


def build_page(model: TaskModel, prompt: str, max_new_tokens: int = 48) -> Any:
    """A page with a choice of tasks, a prompt and what the model makes of it."""
    import gradio as gr

    def answer(task: str, prompt: str) -> Iterator[tuple[str, str]]:
        for answer in model.stream(task, prompt, max_new_tokens):
            switched = f"switched in {answer.switch_seconds * 1000:.0f} ms" if answer.switch_seconds else ""
            yield answer.text, switched

    sizes = {
        task: (directory / "adapter_model.safetensors").stat().st_size for task, directory in model.adapters.items()
    }
    with gr.Blocks(title="Tasks of one 4-bit model", analytics_enabled=False) as page:
        gr.Markdown("# Tasks of one 4-bit model\nA task is a file of scales; the packed integers stay where they are.")
        task = gr.Radio(
            [(f"{task} ({size / 1000:.0f} kB)", task) for task, size in sizes.items()], value=model.task, label="Task"
        )
        text = gr.Textbox(prompt, label="Prompt")
        button = gr.Button("Generate", variant="primary")
        output = gr.Textbox(label="Output", lines=6)
        status = gr.Markdown()
        generation = gr.on(
            [button.click, text.submit],
            answer,
            [task, text],
            [output, status],
            trigger_mode="always_last",
            show_progress_on=output,
        )
        task.change(None, cancels=generation)
    return page


def launch(page: Any, port: int | None = None) -> str:
    """Serve a page on loopback, on a free port by default, and give its address; does not wait."""
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=False, prevent_thread_lock=True, quiet=True, footer_links=[]
    )
    return address


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--tasks", nargs="+", required=True, help="texts: directories or Hub data sets")
    parser.add_argument("--target-modules", nargs="+", default=["k_proj", "v_proj"], help="layers to tune")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--windows", type=int, default=4, help="windows of 256 tokens to evaluate each task on")
    parser.add_argument("--switches", type=int, default=30, help="to take the median time of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".cache/multi_task_switching"), help="directory for adapters")
    parser.add_argument("--serve", action="store_true", help="go on to a page on loopback")
    parser.add_argument("--prompt", default='Define the noun "lighthouse".\n', help="to begin with on the page")
    parser.add_argument("--port", type=int, help="of the page; a free one by default")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    held_out, adapters = {}, {}
    for source in arguments.tasks:
        task = Path(source).stem
        adapters[task] = arguments.out / task
        number = arguments.steps * arguments.batch_size
        dataset = token_windows(read_texts(source), tokenizer, arguments.sequence_length, number)
        tune(arguments, dataset, adapters[task])
        windows = token_windows(read_texts(source, split="test"), tokenizer, 256, arguments.windows)
        held_out[task] = torch.tensor(windows["input_ids"][:])

    def evaluate(model: torch.nn.Module) -> list[float]:
        return [perplexity(model, tokens, description=f"perplexity, {task}") for task, tokens in held_out.items()]

    rows = {"GPTQ": evaluate(load_model(arguments.model))}
    rows |= {task: evaluate(load_model(adapter)) for task, adapter in adapters.items()}
    probe = next(iter(held_out.values()))[:1, :64]
    seconds = time_switching(arguments.model, adapters, probe, max(arguments.switches, len(adapters)))

    print(f"\n| held-out perplexity | {' | '.join(adapters)} | adapter, kB |\n|---{'|---' * (len(adapters) + 1)}|")
    for name, row in rows.items():
        size = sum(file.stat().st_size for file in (arguments.out / name).glob("*.safetensors")) / 1000
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} | {size:,.0f} |")
    print("\n| to another task | ms | of the first |\n|---|---|---|")
    slowest = seconds["load the base again"]
    for way, value in seconds.items():
        print(f"| {way} | {value * 1000:.1f} | 1/{slowest / value:.0f} |")
    print("\nlogits are the same, whichever way")

    if arguments.serve:
        model = PeftModel.from_pretrained(load_model(arguments.model), next(iter(adapters.values())))
        page = build_page(TaskModel(model, tokenizer, adapters), arguments.prompt)
        print(f"\n{launch(page, arguments.port)}", flush=True)
        page.block_thread()


if __name__ == "__main__":
    main()
