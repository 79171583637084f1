# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]"]
# ///
r"""Fine-tune every parameter of a model in int8 with QFTTrainer, and export the result.

Weights, gradients and momentum are int8. The tuned model is saved in int8, and exported as a plain bf16 and an 8-bit
GPTQ checkpoint. On SmolLM2-135M-Instruct, on a CPU and without a model hub:

    python examples/demo_assets.py
    python examples/qft_finetuning/qft_finetuning.py --model .cache/assets/smollm2-135m-instruct \
        --data .cache/assets/king-james --eval-data .cache/assets/king-james .cache/assets/wikipedia

With your own float model and text, each a path or a Hub id:

    python qft_finetuning.py --model user/model --data user/data --eval-data user/data --steps 500
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

import peft_quant
from peft_quant.evaluation.perplexity import perplexity
from peft_quant.evaluation.text import read_texts, token_windows


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="float model: path or Hub id")
    parser.add_argument(
        "--data", required=True, help="text file, directory or Hub data set to tune on, its split train"
    )
    parser.add_argument(
        "--eval-data", nargs="+", required=True, help="texts to evaluate on, their split test; a file is taken whole"
    )
    parser.add_argument("--column", default="text", help="column of the texts in a data set")
    parser.add_argument("--fused", action="store_true", help="use each gradient within backward, and keep none")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of Lion: 3 to 10 times less than AdamW's")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if DEVICE == "cuda" else "float32",
        help="of the parameters left in float, and of products",
    )
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".cache/qft_finetuning"), help="new directory to write")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists: remove it, or name a new directory")

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def windows(source: str, split: str, size: int, number: int) -> Dataset:
        return token_windows(read_texts(source, arguments.column, split), tokenizer, size, number)

    held_out = {
        Path(source).stem: torch.tensor(windows(source, "test", 512, arguments.windows)["input_ids"][:])
        for source in arguments.eval_data
    }

    def evaluate() -> dict[str, float]:
        return {
            name: perplexity(model, tokens, description=f"perplexity, {name}") for name, tokens in held_out.items()
        }

    set_seed(arguments.seed)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=getattr(torch, arguments.dtype),
        device_map=DEVICE,
        quantization_config=peft_quant.QFTConfig(),
    )
    rows = {"before": evaluate()}
    trainer = peft_quant.QFTTrainer(
        model,
        peft_quant.QFTTrainingArguments(
            output_dir=str(arguments.out / "checkpoints"),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, arguments.steps // 10),
            weight_decay=0.0,
            max_grad_norm=0.0,  # Lion takes signs, so that clipping changes little, and a fused step cannot
            fused=arguments.fused,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            dataloader_pin_memory=DEVICE == "cuda",
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=windows(
            arguments.data, "train", arguments.sequence_length, arguments.steps * arguments.batch_size
        ),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    print(f"\n{trainer.memory_report}")
    rows["QFT"] = evaluate()
    trainer.save_model(str(arguments.out / "int8"))

    inputs = {"input_ids": next(iter(held_out.values()))[:1, :128].to(model.device)}
    errors = {
        name: peft_quant.export_qft(model, arguments.out / name, name, inputs=inputs, tokenizer=tokenizer)
        for name in ("bf16", "gptq")
    }

    print(f"\n| held-out perplexity | {' | '.join(held_out)} |\n|---{'|---' * len(held_out)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row.values())} |")
    for name, error in errors.items():
        print(
            f"\nlogits of the export to {name}, against the int8 model's (largest {error.largest_logit:.1f}): "
            f"off by {error.largest:.3f} at most, {error.mean:.4f} on average"
        )

    options = ("steps", "batch_size", "sequence_length", "learning_rate", "dtype", "seed")
    before, after = ({text: round(value, 2) for text, value in row.items()} for row in rows.values())
    peft_quant.write_model_card(
        arguments.out / "int8",
        settings={"text": Path(arguments.data).stem, **{name: getattr(arguments, name) for name in options}},
        perplexity=after,
        compared_with={"before": before},
    )


if __name__ == "__main__":
    main()
