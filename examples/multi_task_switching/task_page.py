"""One model in memory, its adapter exchanged from request to request: generation, and a page to try it on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import gradio as gr
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

import peft_quant


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


def build_page(model: TaskModel, prompt: str, max_new_tokens: int = 48) -> gr.Blocks:
    """A page with a choice of tasks, a prompt and what the model makes of it."""

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


def launch(page: gr.Blocks, port: int | None = None) -> str:
    """Serve a page on loopback, on a free port by default, and give its address; does not wait."""
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=False, prevent_thread_lock=True, quiet=True, footer_links=[]
    )
    return address
