# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[demo]"]
# ///
"""Fine-tune the scales of a GPTQ model with PEQA and the stock Trainer, merge them, and serve the result.

Without arguments, on a CPU and without a model hub: SmolLM2-135M-Instruct is quantized to 4 bits on Wikipedia text,
tuned on the King James Bible, merged, and loaded again by a process that uses transformers alone.

    python peqa_finetuning.py

With your own GPTQ checkpoint and text, each a path or a Hub id:

    python peqa_finetuning.py --model user/model-gptq-4bit --dataset user/dataset --column text --steps 500

Every stage is kept under --work-dir and not done twice. --smoke runs all of it in seconds, on a tiny random model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parents[1]))  # what the examples share
from stages import Stages, digest, parse, versions  # noqa: I001

import demo_assets
import smoke_model
import torch
from datasets import load_dataset
from measure import evaluate, probe_logits, windows
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuning import Settings, tune

import peft_quant
from peft_quant.evaluation.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GPTQ checkpoint: path or Hub id; by default SmolLM2 is quantized")
    parser.add_argument("--dataset", help="text file or Hub data set to tune on; by default the King James Bible")
    parser.add_argument("--column", default="text", help="column of a Hub data set")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens to evaluate on, each text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parse(parser, "peqa_finetuning", steps=4, sequence_length=64, windows=2)

    assets: Any = smoke_model if arguments.smoke else demo_assets
    work = arguments.work_dir
    texts = read_texts(arguments, assets)
    (tune_train, tune_held_out), (_, general_held_out) = texts["tuned"], texts["general"]
    evaluated_on = digest(windows=arguments.windows, text=tune_held_out)
    stages = Stages(work / f"results-{evaluated_on}.json")

    base, float_directory = arguments.model, None
    if base is None:
        stages.run("decode SmolLM2 from its package", lambda: str(assets.float_model()))
        stages.run("quantize to 4 bits", lambda: str(assets.gptq_model()))
        base, float_directory = assets.gptq_model(), assets.float_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out = {
        name: windows(tokenizer, text, 512, arguments.windows)
        for name, text in (("tuned", tune_held_out), ("general", general_held_out))
    }

    rows: dict[str, dict[str, float]] = {}
    if float_directory is not None:
        rows["float (bf16)"] = stages.run(
            "evaluate float",
            lambda: evaluate(AutoModelForCausalLM.from_pretrained(float_directory, dtype=torch.float32), held_out),
        )
    rows["GPTQ"] = stages.run(f"evaluate {base}", lambda: evaluate(load_model(base), held_out))

    settings = Settings(
        str(base),
        tune_train,
        arguments.steps,
        arguments.batch_size,
        arguments.sequence_length,
        arguments.learning_rate,
        arguments.seed,
    )
    adapter = work / settings.name
    stages.run(f"tune {adapter.name}", lambda: tune(settings, adapter, tune_held_out), adapter)

    def evaluate_adapter() -> dict[str, float]:
        model = PeftModel.from_pretrained(load_model(base), adapter)
        torch.save(probe_logits(model, held_out["tuned"]), adapter.with_suffix(".pt"))
        return evaluate(model, held_out)

    rows["GPTQ + PEQA adapter"] = stages.run(f"evaluate {adapter.name}", evaluate_adapter, adapter.with_suffix(".pt"))

    merged = work / adapter.name.replace("adapter", "merged")
    if not merged.exists():
        stages.run(f"merge {merged.name}", lambda: str(peft_quant.merge_checkpoint(base, adapter, merged)), merged)
    rows["merged, plain transformers"] = stages.run(
        f"evaluate {merged.name}",
        lambda: evaluate_in_fresh_process(merged, work, held_out, texts),
        merged.with_suffix(".pt"),
    )

    differences = stages.run(f"compare {merged.name}", lambda: compare(adapter, merged, held_out["tuned"]))
    write_cards(arguments, adapter, merged, rows, settings)
    report(rows, differences, stages, adapter)


def read_texts(arguments: argparse.Namespace, assets: Any) -> dict[str, tuple[str, str]]:
    """Training and held-out text of the domain to tune on, and general text; the held-out ones also as files."""
    general = assets.wikipedia()
    if arguments.dataset is None:
        tuned = assets.king_james()
    else:
        if Path(arguments.dataset).is_file():
            text = Path(arguments.dataset).read_text(encoding="utf-8")
        else:
            text = "\n\n".join(load_dataset(arguments.dataset, split="train")[arguments.column])
        cut = int(len(text) * 0.9)
        tuned = text[:cut], text[cut:]
    for name, (_, held_out) in {"tuned": tuned, "general": general}.items():
        (arguments.work_dir / f"{name}.txt").write_text(held_out, encoding="utf-8")
    return {"tuned": tuned, "general": general}


def evaluate_in_fresh_process(
    merged: Path, work: Path, held_out: dict[str, torch.Tensor], texts: dict[str, Any]
) -> dict[str, float]:
    """Perplexities of the merged checkpoint, by a process that imports transformers and never peft_quant."""
    output = merged.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).resolve().parents[1] / "measure.py"), str(merged), str(output)]
    command += ["--windows", str(len(held_out["tuned"]))]
    for name in texts:
        command += ["--text", f"{name}={work / name}.txt"]
    subprocess.run(command, check=True)
    return json.loads(output.read_text())


def compare(adapter: Path, merged: Path, batch: torch.Tensor) -> dict[str, float]:
    """Largest difference of a logit between the adapter and the merged checkpoint, and the largest logit."""
    expected = torch.load(adapter.with_suffix(".pt"))
    served = torch.load(merged.with_suffix(".pt"))
    under_fresh_adapter = get_peft_model(load_model(merged), peft_quant.PEQAConfig(task_type="CAUSAL_LM"))
    return {
        "same_arithmetic": (probe_logits(under_fresh_adapter, batch) - expected).abs().max().item(),
        "engine": (served - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
    }


def write_cards(
    arguments: argparse.Namespace, adapter: Path, merged: Path, rows: dict[str, dict[str, float]], settings: Settings
) -> None:
    """What the model cards of the adapter and of the merged checkpoint cannot know by themselves."""
    on_hub = arguments.dataset is not None and not Path(arguments.dataset).is_file()
    tuned = arguments.dataset if on_hub else Path(arguments.dataset or "King James Bible").name
    perplexity = {
        name: {tuned: round(row["tuned"], 2), "Wikipedia": round(row["general"], 2)} for name, row in rows.items()
    }
    own = {adapter: perplexity.pop("GPTQ + PEQA adapter"), merged: perplexity.pop("merged, plain transformers")}
    unnamed = ("model", "train_text", "target_modules")
    options = {name: value for name, value in asdict(settings).items() if name not in unnamed}
    if on_hub:
        options = {"dataset": arguments.dataset, "column": arguments.column, **options}
    if arguments.model is not None and not Path(arguments.model).exists():
        options = {"model": arguments.model, **options}
    command = [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]
    for directory, values in own.items():
        peft_quant.write_model_card(
            directory,
            language="en" if arguments.dataset is None else None,
            datasets=arguments.dataset if on_hub else None,
            settings={"text": tuned, **options},
            command=" ".join(["python peqa_finetuning.py", *command]),
            perplexity=values,
            compared_with=perplexity,
        )


def report(rows: dict[str, dict[str, float]], differences: dict[str, float], stages: Stages, adapter: Path) -> None:
    print("\n| held-out perplexity | text tuned on | Wikipedia |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['tuned']:.2f} | {row['general']:.2f} |")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"\nadapter: {size / 1e6:.1f} MB, {adapter}")
    print(
        f"max |logit difference|, adapter against merged: {differences['same_arithmetic']:g} in the same arithmetic, "
        f"{differences['engine']:.3f} through the engine's own kernel (largest logit {differences['largest']:.1f})"
    )
    print("\n| stage | seconds | peak memory of the process so far, GB |\n|---|---|---|")
    for name, stage in stages.results.items():
        print(f"| {name} | {stage['seconds']} | {stage['peak_gb']} |")
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
