# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]", "trl>=1.15"]
# ///
"""Tune a 4-bit model on chats with TRL's SFTTrainer, by PEQA or LREC.

Without arguments, on a CPU and without a model hub: SmolLM2-135M-Instruct in 4 bits learns to answer with WordNet's
definitions. Every chat is rendered by the model's own template, and only its last answer counts in the loss.

    python sft_with_trl.py
    python sft_with_trl.py --method lrec

With your own checkpoint and chats (JSON lines or a Hub data set with a column `messages`), each a path or a Hub id:

    python sft_with_trl.py --model user/model-gptq-4bit --dataset user/chats --steps 500

Every run is kept under --work-dir and not done twice. --smoke runs all of it in seconds, on a tiny random model.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, digest, parse, versions  # noqa: I001

import demo_assets
import smoke_model
import torch
from datasets import Dataset, load_dataset
from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

import peft_quant
from peft_quant.evaluation.loading import load_model


METHODS = {"peqa": peft_quant.PEQAConfig, "lrec": peft_quant.LRECConfig}
QUESTION = re.compile(r'(Define the \w+ ".+"\.)\n(.+)\n')
HELD_OUT = 50  # chats
LONGEST_ANSWER = 48  # tokens


def wordnet_chats(text: str) -> Dataset:
    """Questions and answers of a text as chats of one turn."""
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in QUESTION.findall(text)
        ]
    )


def split_last_answer(chat: dict[str, Any]) -> dict[str, Any]:
    """Split a chat into TRL's prompt and completion.

    Works with every template, where TRL's own `assistant_only_loss=True` needs one that marks the answers.
    """
    return {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]}


def peft_config(method: str) -> PeftConfig:
    return METHODS[method](task_type="CAUSAL_LM")


@torch.no_grad()
def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """The model's answer, greedily."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.eval().generate(**inputs.to(model.device), do_sample=False, max_new_tokens=LONGEST_ANSWER)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def train(arguments: argparse.Namespace, base: str, chats: Dataset, held_out: Dataset, out: Path) -> dict[str, Any]:
    """Train, measure before and after, and save the adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_seed(arguments.seed)
    config = SFTConfig(
        output_dir=str(out.with_name(out.name + "-checkpoints")),
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
    )
    trainer = SFTTrainer(
        load_model(base),
        args=config,
        train_dataset=chats,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(arguments.method),
    )

    def measure() -> dict[str, Any]:
        return {
            "loss": trainer.evaluate()["eval_loss"],
            "reply": reply(trainer.model, tokenizer, held_out[0]["prompt"]),
        }

    before = measure()
    trainer.train()
    trainer.save_model(str(out))
    return {"before": before, "after": measure(), "parameters": trainer.model.num_parameters(only_trainable=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="peqa")
    parser.add_argument("--model", help="GPTQ checkpoint: path or Hub id; by default SmolLM2 in 4 bits")
    parser.add_argument("--dataset", help="JSON lines or Hub data set of chats; by default WordNet's definitions")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a chat; what is longer is cut")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, "sft_with_trl", steps=2, batch_size=2)

    assets: Any = smoke_model if arguments.smoke else demo_assets
    base = arguments.model or str(assets.gptq_model())
    chats, held_out = read_chats(arguments, assets)
    options = {name: value for name, value in vars(arguments).items() if name not in ("work_dir", "smoke")}
    name = f"{arguments.method}-{digest(**{**options, 'model': base})}"
    adapter = arguments.work_dir / name
    stages = Stages(arguments.work_dir / f"results-{name}.json")
    result = stages.run("train", lambda: train(arguments, base, chats, held_out, adapter), adapter)

    print(f"\n{held_out[0]['prompt'][-1]['content']}\n> {held_out[0]['completion'][0]['content']} (held out)")
    print(f"\n| {arguments.method.upper()} | held-out loss | answer |\n|---|---|---|")
    for when in ("before", "after"):
        answer = " ".join(result[when]["reply"].replace("|", " ").split())
        print(f"| {when} | {result[when]['loss']:.3f} | {answer} |")
    print(f"\n{result['parameters']:,} parameters trained in {stages.results['train']['seconds']} s, {adapter}")
    print(f"\n{versions()}")


def read_chats(arguments: argparse.Namespace, assets: Any) -> tuple[Dataset, Dataset]:
    """Chats to train on and chats held out, split into what is read and what is learnt."""
    if arguments.dataset is None:
        train_text, held_out_text = assets.wordnet()
        number = arguments.steps * arguments.batch_size
        chats, held_out = wordnet_chats(train_text).select(range(number)), wordnet_chats(held_out_text)
        held_out = held_out.select(range(HELD_OUT))
    else:
        is_file = Path(arguments.dataset).is_file()
        both = load_dataset("json", data_files=arguments.dataset) if is_file else load_dataset(arguments.dataset)
        split = both["train"].train_test_split(HELD_OUT, seed=0)
        chats, held_out = split["train"], split["test"]
    return tuple(part.map(split_last_answer, remove_columns=part.column_names) for part in (chats, held_out))


if __name__ == "__main__":
    main()
