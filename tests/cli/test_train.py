"""`peft-quant train`."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from gptq_models import load
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_quant import Int8Weight


STEPS = ("--sequence_length", 16, "--max_steps", 4, "--per_device_train_batch_size", 4, "--use_cpu")


@pytest.fixture
def train(run, models, text, tmp_path):
    def train(method, *options, output=tmp_path / "out", model=models / "base"):
        own = ("--model", model, "--data", text, "--output", output)
        return run("train", method, *own, *STEPS, "--learning_rate", 1e-2, *options)

    return train


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_equal(directory, other):
    trained, expected = tensors(directory), tensors(other)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())


class TestMethods:
    @pytest.mark.parametrize(("method", "options"), (("peqa", ()), ("lrec", ("--r", 4, "--use_rslora"))))
    def test_adapters(self, train, models, tmp_path, method, options):
        result = train(method, *options)
        assert result.code == 0, result.stderr
        before, after = (float(cells[0]) for cells in result.table.values())
        assert after < before
        assert list(result.table) == ["before", method.upper()]
        model = PeftModel.from_pretrained(load(models / "base"), tmp_path / "out")
        config = model.peft_config["default"]
        assert config.peft_type.value == method.upper()
        assert config.task_type == "CAUSAL_LM"
        assert all(getattr(config, name.strip("-")) for name in options[::2] if isinstance(name, str))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert tokenizer("w0 w1").input_ids == [3, 4]

    @pytest.mark.parametrize("base", ("float", "base"))
    def test_int8(self, train, models, tmp_path, base):
        options = ("--outlier_ratio", 0, "--max_grad_norm", 0, "--fused", "--lion_beta1", 0.8)
        result = train("qft", *options, "--learning_rate", "1e-3", model=models / base)
        assert result.code == 0, result.stderr
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.quantization_config.outlier_ratio == 0
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, Int8Weight)
        # and that goes on
        again = train("qft", "--learning_rate", "1e-3", model=tmp_path / "out", output=tmp_path / "again")
        assert again.code == 0, again.stderr
        assert float(again.table["before"][0]) == pytest.approx(float(result.table["QFT"][0]), rel=1e-3)

    def test_the_card(self, train, tmp_path, text):
        train("peqa")
        card = (tmp_path / "out" / "README.md").read_text()
        assert "peft-quant train peqa --model base --data counting.txt --sequence_length 16 --max_steps 4" in card
        assert "--use_cpu true" in card
        assert "counting.txt, held-out part" in card
        assert str(text.parent) not in card
        assert str(tmp_path) not in card

    def test_a_float_model_has_no_scales(self, train, models):
        result = train("peqa", model=models / "float")
        assert result.code == 1
        assert "is not a GPTQ checkpoint" in result.stderr
        assert "peft-quant quantize" in result.stderr


class TestTexts:
    def test_formats_give_the_same(self, train, tmp_path, rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"words": row}) + "\n" for row in rows))
        (tmp_path / "rows.csv").write_text("number,words\n" + "".join(f"{i},{row}\n" for i, row in enumerate(rows)))
        train("peqa")
        for kind in ("jsonl", "csv"):
            file = tmp_path / f"rows.{kind}"
            result = train("peqa", "--data", file, "--column", "words", output=tmp_path / kind)
            assert result.code == 0, result.stderr
            assert_equal(tmp_path / kind, tmp_path / "out")

    def test_a_directory(self, train, text, tmp_path):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "one.txt").write_text(text.read_text())
        train("peqa")
        result = train("peqa", "--data", tmp_path / "texts", output=tmp_path / "directory")
        assert result.code == 0, result.stderr
        assert_equal(tmp_path / "directory", tmp_path / "out")

    def test_another_text_to_measure_on(self, train, text, tmp_path):
        (tmp_path / "other.txt").write_text(text.read_text()[::-1].replace("w", " "))
        result = train("peqa", "--eval-data", text, "--held-out", 0.5, "--eval_windows", 3)
        assert "| model | perplexity, counting.txt |" in result.stdout
        with_rest = train("peqa", "--held-out", 0, "--eval-data", text, output=tmp_path / "rest")
        assert with_rest.table["before"] != result.table["before"]

    def test_nothing_to_measure_on(self, train):
        result = train("peqa", "--held-out", 0)
        assert result.code == 0, result.stderr
        assert result.table == {}

    @pytest.mark.parametrize(
        ("options", "message"),
        (
            (("--data", "no/such/file.txt"), "no/such/file.txt does not exist"),
            (("--column", "nothing"), "has no column 'nothing': it has text"),
            (("--sequence_length", 4096), "fewer than 4096 tokens"),
            (("--sequence_length", 1000), "none is left to train on"),
        ),
    )
    def test_what_cannot_be_trained_on(self, train, options, message):
        result = train("peqa", *options)
        assert result.code == 1
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()[-1].split("error: ")) == 2
        assert "Traceback" not in result.stderr


class TestOptions:
    def test_of_the_config_and_of_the_arguments(self, train, tmp_path):
        options = ("--r", 2, "--rank_pattern", "{q_proj: 3}", "--target-modules", "[q_proj, up_proj]", "--seed", 7)
        scheduler = ("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--optim=sgd")
        result = train("lrec", *options, *scheduler)
        assert result.code == 0, result.stderr
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"]) == (2, {"q_proj": 3})
        assert set(config["target_modules"]) == {"q_proj", "up_proj"}
        arguments = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
        assert (arguments.seed, arguments.optim, arguments.learning_rate) == (7, "sgd", 1e-2)
        assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}

    def test_the_command_line_wins_over_the_file(self, run, models, text, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(
            f"model: {models / 'base'}\ndata: {text}\noutput_dir: {tmp_path / 'out'}\nsequence-length: 16\n"
            "learning_rate: 1e-2\nmax_steps: 2\nper_device_train_batch_size: 4\nuse_cpu: true\nseed: 5\n"
            "target_modules: [q_proj]\ninit_weights: false\nlr_scheduler_kwargs: {num_cycles: 1}\n"
            "lr_scheduler_type: cosine\nlabel_names: [labels]\nweight_decay: null\n"
        )
        result = run("train", "peqa", "--config", file, "--max_steps", 3, "--seed=6", "--output", tmp_path / "other")
        assert result.code == 0, result.stderr
        arguments = torch.load(tmp_path / "other" / "training_args.bin", weights_only=False)
        assert (arguments.learning_rate, arguments.max_steps, arguments.seed) == (1e-2, 3, 6)
        assert (arguments.lr_scheduler_kwargs, arguments.label_names) == ({"num_cycles": 1}, ["labels"])
        config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["q_proj"]
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "other" / "checkpoint-3").is_dir()

    @pytest.mark.parametrize(
        ("options", "message"),
        (
            (("--learning_rat", "1e-3"), "learning_rat is unknown: did you mean learning_rate"),
            (("--r", "4"), "--r is unknown"),  # PEQA has no rank
            (("--max_steps", "many"), "invalid int value: 'many'"),
            (("--target_modules", "[q_proj"), "is not YAML"),
            (("--resume_from_checkpoint", "here"), "use --resume"),
            (("extra",), "extra is unknown"),
        ),
    )
    def test_wrong_usage(self, train, tmp_path, options, message):
        result = train("peqa", *options)
        assert result.code == 2
        assert message in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_wrong_method(self, train):
        result = train("lora")
        assert result.code == 2
        assert "'lora' is not one of 'peqa', 'lrec', 'qft'" in result.stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        (
            ("learning_rat: 1", "learning_rat in the file of --config is unknown: did you mean learning_rate"),
            ("max_steps: many", "invalid int value: 'many'"),
            ("[1, 2]", "write options as `name: value`"),
            ("a: [", "is not YAML"),
        ),
    )
    def test_wrong_files(self, train, tmp_path, content, message):
        (tmp_path / "run.yaml").write_text(content)
        result = train("peqa", "--config", tmp_path / "run.yaml")
        assert result.code == 2
        assert message in result.stderr

    def test_values_that_contradict_each_other_are_the_librarys_to_refuse(self, train):
        result = train("lrec", "--lora_dropout", 2)
        assert result.code == 1
        assert result.stderr.splitlines()[-1].startswith("error: lora_dropout=2: use a probability")


class TestResuming:
    def test_an_output_that_is_there(self, train, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        result = train("peqa")
        assert result.code == 1
        assert "out is not empty" in result.stderr
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_nothing_to_resume(self, train):
        result = train("peqa", "--resume")
        assert result.code == 1
        assert "there is nothing to resume" in result.stderr

    def test_what_ctrl_c_stopped_goes_on_to_the_same_result(self, train, models, text, tmp_path):
        many = ("--max_steps", 40, "--logging_steps", 1)
        own = ("--model", models / "base", "--data", text, "--output", tmp_path / "stopped")
        command = [sys.executable, "-m", "peft_quant", "train", "peqa", *own, *STEPS, "--learning_rate", 1e-2, *many]
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TORCHDYNAMO_DISABLE": "1"},
        )
        for line in process.stdout:
            if "'loss'" in line:
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 130, errors
        (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
        assert 1 <= int(checkpoint.name.removeprefix("checkpoint-")) < 40
        assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
        assert "--resume" in errors.splitlines()[-1]
        assert "Traceback" not in errors

        whole = train("peqa", *many, output=tmp_path / "whole")
        resumed = train("peqa", *many, "--resume", output=tmp_path / "stopped")
        assert resumed.code == 0, resumed.stderr
        assert str(checkpoint) in resumed.stdout
        assert resumed.table == whole.table
        assert_equal(tmp_path / "stopped", tmp_path / "whole")


def test_the_group_of_processes_is_left(train):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert train("peqa").code == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_two_processes_of_accelerate(train, models, text, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sgd = ("--optim", "sgd", "--max_grad_norm", 0)  # moves by the gradient's size
    own = ("--model", models / "base", "--data", text, "--output", tmp_path / "two", *STEPS, *sgd)
    # `--cpu` would start a single process; with `--multi_gpu` it is `--use_cpu` that decides
    launcher = ("--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no")
    command = ("-m", "accelerate.commands.launch", *launcher, "--dynamo_backend", "no", "--main_process_port", port)
    half = ("--learning_rate", 1e-2, "--per_device_train_batch_size", 2)
    result = subprocess.run(
        [sys.executable, *map(str, (*command, "-m", "peft_quant", "train", "peqa", *own, *half))],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| model | perplexity") == 1
    train("peqa", *sgd, output=tmp_path / "one")
    trained, alone = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    for name, delta in alone.items():
        # the order of sums differs
        torch.testing.assert_close(trained[name], delta, rtol=1e-4, atol=1e-4 * delta.abs().max().item())
