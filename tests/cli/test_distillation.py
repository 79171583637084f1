"""`peft-quant train lrec --teacher`."""

import json
import shutil

import pytest
import torch
from gptq_models import load
from peft import PeftModel
from safetensors.torch import load_file


@pytest.fixture
def distill(run, models, text, tmp_path):
    def distill(*options, output=tmp_path / "out", command=("train", "lrec")):
        own = ("--model", models / "base", "--teacher", models / "float", "--data", text, "--output", output)
        steps = ("--sequence_length", 16, "--max_steps", 6, "--per_device_train_batch_size", 4, "--use_cpu")
        return run(*command, *own, *steps, "--learning_rate", 1e-2, "--r", 4, "--lora_alpha", 4, *options)

    return distill


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_a_start_and_what_follows(distill, models, tmp_path):
    result = distill("--calibration-windows", 16)
    assert result.code == 0, result.stderr
    assert list(result.table) == ["float", "GPTQ", "start: whitened", "LREC"]
    out = tmp_path / "out"
    assert (out / "layer_errors.png").read_bytes().startswith(b"\x89PNG")
    assert "| mean |" in (out / "layer_errors.md").read_text()
    model = PeftModel.from_pretrained(load(models / "base"), out)
    assert model.peft_config["default"].init_lrec_weights == "whitened"
    start, trained = adapter(out / "start"), adapter(out)
    assert any(not torch.equal(start[name], tensor) for name, tensor in trained.items())
    assert "start: whitened" in (out / "README.md").read_text()


def test_from_zero_there_are_no_errors_to_draw(distill, tmp_path):
    result = distill("--start", "zero", "--held-out", 0)
    assert result.code == 0, result.stderr
    assert result.table == {}
    assert not (tmp_path / "out" / "layer_errors.png").exists()


def test_the_cache_teaches_the_same(distill, tmp_path):
    live = distill("--start", "svd")
    # all 128 words are kept, so that only fp16 is between the two
    options = ("--start", "svd", "--cache", tmp_path / "cache", "--top-k", 128)
    cached = distill(*options, output=tmp_path / "first")
    again = distill(*options, output=tmp_path / "second")
    assert (live.code, cached.code, again.code) == (0, 0, 0), again.stderr
    assert list(again.table) == ["GPTQ", "start: svd", "LREC"]  # the teacher was not loaded
    for name, tensor in adapter(tmp_path / "out").items():
        assert torch.equal(adapter(tmp_path / "first")[name], adapter(tmp_path / "second")[name])
        torch.testing.assert_close(adapter(tmp_path / "first")[name], tensor, rtol=0, atol=0.02)


def test_evaluated_samples_are_cached_too(distill, tmp_path):
    result = distill("--start", "zero", "--cache", tmp_path / "cache", "--eval_strategy", "steps", "--eval_steps", 3)
    assert result.code == 0, result.stderr
    assert "'eval_kl'" in result.stdout


def test_resuming_gives_the_same(distill, tmp_path):
    whole = distill("--start", "svd", "--save_steps", 3)
    shutil.copytree(tmp_path / "out" / "start", tmp_path / "half" / "start")
    shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "half" / "checkpoint-3")
    resumed = distill("--start", "svd", "--save_steps", 3, "--resume", output=tmp_path / "half")
    assert resumed.code == 0, resumed.stderr
    assert resumed.table == whole.table
    assert all(torch.equal(adapter(tmp_path / "half")[name], t) for name, t in adapter(tmp_path / "out").items())


def test_options_of_the_loss(distill, tmp_path):
    result = distill("--start", "zero", "--ce_weight", 0.5, "--kl_weight", 0)
    assert result.code == 0, result.stderr
    assert "float" not in result.table  # nobody was asked
    arguments = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (arguments.ce_weight, arguments.kl_weight) == (0.5, 0.0)
    assert "ce_weight 0.5" in json.dumps((tmp_path / "out" / "README.md").read_text())


def test_another_models_weights_are_no_start(distill, models, tmp_path):
    from gptq_models import float_llama, tiny_tokenizer

    float_llama(seed=1).half().save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    result = distill("--teacher", tmp_path / "other")
    assert result.code == 1
    assert "is not the model this GPTQ model was quantized from" in result.stderr
    assert not (tmp_path / "out" / "start").exists()


def test_the_old_command_does_the_same_and_names_the_new_one(distill, tmp_path):
    new = distill("--start", "zero")
    old = distill("--start", "zero", output=tmp_path / "old", command=("correct",))
    assert (old.code, old.table) == (0, new.table)
    assert "`peft-quant correct` is now `peft-quant train lrec --teacher`" in old.stderr
    assert "is now" not in new.stderr
    assert all(torch.equal(adapter(tmp_path / "old")[name], t) for name, t in adapter(tmp_path / "out").items())


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("peqa", "--teacher", "user/model"), "--teacher is for lrec, not for peqa"),
        (("lrec", "--start", "svd"), "--start goes with --teacher"),
        (("lrec", "--top_k", 8), "--top-k goes with --teacher"),
        (("lrec", "--kl_weight", 1), "--kl_weight is unknown"),
    ),
)
def test_options_that_need_a_teacher(run, models, text, tmp_path, options, message):
    result = run("train", *options, "--model", models / "base", "--data", text, "--output", tmp_path / "out")
    assert result.code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
