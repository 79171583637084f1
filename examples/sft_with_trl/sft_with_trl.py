# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]", "trl>=1.15"]
# ///
r"""Tune a GPTQ model on chats with TRL's SFTTrainer, by PEQA or LREC.

Every chat is rendered by the model's own template, and only its last answer counts in the loss. On
SmolLM2-135M-Instruct in 4 bits, which learns to answer with WordNet's definitions, on a CPU and without a model hub:

    python examples/demo_assets.py --wordnet
    python examples/sft_with_trl/sft_with_trl.py --model .cache/assets/smollm2-135m-instruct-gptq-4bit \
        --data .cache/assets/definitions-chat

With your own checkpoint and chats (JSON lines or a Hub data set with a column `messages`), each a path or a Hub id:

    python sft_with_trl.py --model user/model-gptq-4bit --data user/chats --method lrec --steps 500
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

import peft_quant
from peft_quant.evaluation.loading import load_model


METHODS = {"peqa": peft_quant.PEQAConfig, "lrec": peft_quant.LRECConfig}
HELD_OUT = 50  # chats
LONGEST_ANSWER = 48  # tokens


def read_chats(source: str, number: int) -> tuple[Dataset, Dataset]:
    """At most `number` chats to train on, and chats held out: those of the split test, if there is one."""
    data = load_dataset("json", data_files=source) if Path(source).is_file() else load_dataset(source)
    if "test" not in data:
        data = data["train"].train_test_split(HELD_OUT, seed=0)
    chats, held_out = (
        data[split].select(range(min(size, len(data[split]))))
        for split, size in (("train", number), ("test", HELD_OUT))
    )
    return tuple(part.map(split_last_answer, remove_columns=part.column_names) for part in (chats, held_out))


def split_last_answer(chat: dict[str, Any]) -> dict[str, Any]:
    """Split a chat into TRL's prompt and completion.

    Works with every template, where TRL's own `assistant_only_loss=True` needs one that marks the answers.
    """
    return {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]}


@torch.no_grad()
def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """The model's answer, greedily, on one line."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.eval().generate(**inputs.to(model.device), do_sample=False, max_new_tokens=LONGEST_ANSWER)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(answer.replace("|", " ").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="peqa")
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--data", required=True, help="chats: JSON lines, a directory of such files, or Hub data set")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a chat; what is longer is cut")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".cache/sft_with_trl"), help="directory for the adapter")
    arguments = parser.parse_args()

    chats, held_out = read_chats(arguments.data, arguments.steps * arguments.batch_size)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    set_seed(arguments.seed)
    trainer = SFTTrainer(
        load_model(arguments.model),
        args=SFTConfig(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            warmup_steps=max(1, arguments.steps // 10),
            completion_only_loss=True,
            max_length=arguments.max_length,
            packing=False,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to="none",
            seed=arguments.seed,
        ),
        train_dataset=chats,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=METHODS[arguments.method](task_type="CAUSAL_LM"),
    )
    question, answer = held_out[0]["prompt"], held_out[0]["completion"][0]["content"]

    def measure() -> tuple[float, str]:
        return trainer.evaluate()["eval_loss"], reply(trainer.model, tokenizer, question)

    rows = {"before": measure()}
    trainer.train()
    trainer.save_model()
    rows["after"] = measure()

    print(f"\n{question[-1]['content']}\n> {answer} (held out)")
    print(f"\n| {arguments.method.upper()} | held-out loss | answer |\n|---|---|---|")
    for when, (loss, text) in rows.items():
        print(f"| {when} | {loss:.3f} | {text} |")
    print(f"\n{trainer.model.num_parameters(only_trainable=True):,} parameters trained, {arguments.out}")


if __name__ == "__main__":
    main()
