"""Steps of `train lrec --teacher`: the adapter's initialization, and the teacher or its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .console import is_first_process, say
from .training import measure, with_adapter


Start = Literal["zero", "svd", "whitened"]


@dataclass
class Distillation:
    """Options of the command and its training arguments."""

    teacher: str
    start: Start
    calibration_windows: int
    cache: Path | None
    top_k: int
    arguments: Any

    def student(self, model: str, config: Any, windows: Any, output: Path) -> Any:
        """The model with its initialized adapter, which is kept in `output/start`."""
        from peft import PeftModel

        from ..evaluation.loading import load_model
        from ..files import new_directory

        start = output / "start"
        with self.arguments.main_process_first(desc="the initialization"):
            if not start.exists():
                student = with_adapter(model, config, self.arguments)
                with new_directory(start) as directory:
                    if self.start != "zero":
                        self._initialize(student, windows, output)
                    student.save_pretrained(directory)
                del student
        return PeftModel.from_pretrained(load_model(model, device=self.arguments.device), start, is_trainable=True)

    def _initialize(self, student: Any, windows: Any, output: Path) -> None:
        import torch

        from .. import initialize_lrec_weights, plot_layer_errors
        from ..evaluation.text import spread

        batches = torch.tensor(spread(windows, self.calibration_windows)["input_ids"][:]).split(4)
        report = initialize_lrec_weights(student, self.teacher, self.start, batches)
        (output / "layer_errors.md").write_text(f"{report}\n", encoding="utf-8")
        try:
            plot_layer_errors(report, output / "layer_errors.png")
        except ImportError as error:
            say(str(error), error=True)

    def teach(self, windows: Any, evaluated: Any, measured: Any) -> tuple[dict[str, Any], float | None]:
        """The trainer's options for the teacher, and the teacher's perplexity on `measured` if it had to be loaded."""
        from accelerate.utils import release_memory
        from datasets import concatenate_datasets
        from torch.utils.data import DataLoader
        from transformers import default_data_collator

        from .. import cache_teacher
        from ..evaluation.loading import load_model, load_tokenizer

        arguments, tokenizer = self.arguments, load_tokenizer(self.teacher)
        options: dict[str, Any] = {"teacher": self.cache, "teacher_processing_class": tokenizer}
        if self.cache is not None and _is_complete(self.cache):
            return options, None
        if not (arguments.kl_weight or arguments.hidden_weight):
            return {**options, "teacher": None}, None
        teacher = load_model(self.teacher, device=arguments.device)
        perplexity = measure(teacher, arguments, measured, "float")
        if self.cache is None:
            return {**options, "teacher": teacher}, perplexity
        samples = windows if evaluated is None else concatenate_datasets([windows, evaluated])
        batches: Any = DataLoader(samples, arguments.per_device_train_batch_size, collate_fn=default_data_collator)
        with arguments.main_process_first(desc="the teacher's cache"):
            if is_first_process():
                cache_teacher(
                    teacher, batches, self.cache, k=self.top_k, temperature=arguments.temperature, tokenizer=tokenizer
                )
        del teacher
        release_memory()
        return options, perplexity


def _is_complete(cache: Path) -> bool:
    from ..trainers.distillation.cache import CachedTeacher

    try:
        CachedTeacher(cache)
    except ValueError:
        return False
    return True
