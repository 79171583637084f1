# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]"]
# ///
r"""Repair a GPTQ model with LREC, then go on to a task.

A low-rank adapter is initialized from the quantization error and trained on text until the model says what the float
one does; then, with --task-data, the same adapter learns a task. On SmolLM2-135M-Instruct in 3 bits, on a CPU and
without a model hub:

    python examples/demo_assets.py
    peft-quant quantize .cache/assets/smollm2-135m-instruct .cache/smollm2-gptq-3bit --bits 3 --group-size 64 \
        --calibration .cache/assets/wikipedia --samples 64
    python examples/lrec_correction/lrec_correction.py --model .cache/smollm2-gptq-3bit \
        --float-model .cache/assets/smollm2-135m-instruct --data .cache/assets/wikipedia \
        --task-data .cache/assets/king-james --eval-data .cache/assets/wikipedia .cache/assets/king-james

With your own models and texts, each a path or a Hub id:

    python lrec_correction.py --model user/model-gptq-3bit --float-model user/model --data user/data \
        --eval-data user/data
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, Trainer, default_data_collator, set_seed

import peft_quant
from peft_quant.evaluation.loading import load_model
from peft_quant.evaluation.perplexity import perplexity
from peft_quant.evaluation.text import read_texts, token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--float-model", required=True, help="the model that was quantized")
    parser.add_argument("--data", required=True, help="text file, directory or Hub data set to repair on, split train")
    parser.add_argument("--task-data", help="text to go on to")
    parser.add_argument(
        "--eval-data", nargs="+", required=True, help="texts to evaluate on, their split test; a file is taken whole"
    )
    parser.add_argument("--init", choices=("whitened", "svd", "zero"), default="whitened")
    parser.add_argument("--calibration", type=int, default=64, help="windows of 512 tokens for `--init whitened`")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ce-weight", type=float, default=0.5, help="of the text itself in the loss, beside KL")
    parser.add_argument("--top-k", type=int, default=64, help="log-probabilities kept of the teacher, each token")
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".cache/lrec_correction"), help="new directory to write")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists: remove it, or name a new directory")
    out = arguments.out

    tokenizer = AutoTokenizer.from_pretrained(arguments.float_model)

    def windows(source: str, split: str, size: int, number: int) -> Dataset:
        return token_windows(read_texts(source, split=split), tokenizer, size, number)

    held_out = {
        Path(source).stem: torch.tensor(windows(source, "test", 512, arguments.windows)["input_ids"][:])
        for source in arguments.eval_data
    }
    rows: dict[str, dict[str, float]] = {}

    def evaluate(title: str, model: Any) -> None:
        rows[title] = {
            name: perplexity(model, tokens, description=f"perplexity, {name}") for name, tokens in held_out.items()
        }

    size, number = arguments.sequence_length, arguments.steps * arguments.batch_size
    data = windows(arguments.data, "train", size, number)
    training = peft_quant.DistillationTrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 10),
        weight_decay=0.0,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, arguments.steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
        ce_weight=arguments.ce_weight,
    )

    teacher = load_model(arguments.float_model)
    evaluate("float", teacher)
    cache = peft_quant.cache_teacher(teacher, data, out / "teacher", k=arguments.top_k, tokenizer=tokenizer)
    del teacher  # its most likely tokens are on disk

    set_seed(arguments.seed)
    model: Any = load_model(arguments.model)
    evaluate("GPTQ", model)
    config = peft_quant.LRECConfig(task_type="CAUSAL_LM", r=arguments.rank, lora_alpha=arguments.rank)
    model = get_peft_model(model, config)
    if arguments.init != "zero":
        calibration = None
        if arguments.init == "whitened":
            sample = windows(arguments.data, "train", 512, arguments.calibration)
            calibration = torch.tensor(sample["input_ids"][:]).split(16)
        report = peft_quant.initialize_lrec_weights(model, arguments.float_model, arguments.init, calibration)
        peft_quant.plot_layer_errors(report, out / "layer_errors.png")
        (out / "layer_errors.md").write_text(f"{report}\n", encoding="utf-8")
        evaluate(f"initialized: {arguments.init}", model)

    trainer = peft_quant.DistillationTrainer(
        model, training, teacher=cache, train_dataset=data, data_collator=default_data_collator
    )
    trainer.train()
    model.save_pretrained(out / "corrected")
    evaluate("corrected", load_model(out / "corrected"))
    write_card(out / "corrected", arguments, rows)

    if arguments.task_data is not None:
        task = windows(arguments.task_data, "train", size, number)
        Trainer(model, training, train_dataset=task, data_collator=default_data_collator).train()
        model.save_pretrained(out / "task")
        evaluate("task, with the corrected adapter", load_model(out / "task"))

    print(f"\n| held-out perplexity | {' | | '.join(held_out)} | gap closed |\n|---{'|---|---' * len(held_out)}|")
    for title, row in rows.items():
        cells = []
        for text, value in row.items():
            base, floor = rows["GPTQ"][text], rows["float"][text]
            cells += [f"{value:.2f}", f"{(base - value) / (base - floor):.0%}"]
        print(f"| {title} | {' | '.join(cells)} |")
    print(f"\n{out / 'corrected'}")


def write_card(adapter: Path, arguments: argparse.Namespace, rows: dict[str, dict[str, float]]) -> None:
    """What the model card of the corrected adapter cannot know by itself."""
    perplexity = {title: {text: round(value, 2) for text, value in row.items()} for title, row in rows.items()}
    names = ("steps", "batch_size", "sequence_length", "learning_rate", "ce_weight", "top_k", "seed")
    options = {name: getattr(arguments, name) for name in names}
    peft_quant.write_model_card(
        adapter,
        settings={"text": Path(arguments.data).stem, "teacher": "the float model", **options},
        perplexity=perplexity.pop("corrected"),
        compared_with=perplexity,
    )


if __name__ == "__main__":
    main()
