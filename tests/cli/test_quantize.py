"""`peft-quant quantize`."""

import json
import re

import pytest
from gptq_models import load
from safetensors.torch import load_file


pytest.importorskip("gptqmodel")


@pytest.fixture
def quantize(run, models, text, tmp_path):
    def quantize(*options):
        own = ("--calibration", text, "--samples", 8, "--sequence-length", 16, "--group-size", 32)
        return run("quantize", models / "float", tmp_path / "out", *own, *options)

    return quantize


def test_a_checkpoint(quantize, tmp_path, input_ids):
    result = quantize("--bits", 8, "--asymmetric")
    assert result.code == 0, result.stderr
    assert "calibrated on 8 windows of 16 tokens" in result.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (8, 32, False)
    assert "model.layers.0.mlp.up_proj.qweight" in load_file(tmp_path / "out" / "model.safetensors")
    assert load(tmp_path / "out", bits=8)(input_ids).logits.isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_output_that_is_there(quantize, tmp_path):
    (tmp_path / "out").mkdir()
    result = quantize()
    assert result.code == 1
    assert result.stderr.startswith("error: ")
    assert "exists already" in result.stderr


def test_bits_that_gptq_has_not(quantize, tmp_path):
    result = quantize("--bits", 5)
    assert result.code == 1
    assert "5" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


class TestResuming:
    @pytest.fixture
    def interrupted(self, quantize, monkeypatch):
        """`interrupted(5)`: what is printed when Ctrl-C comes in the layer after the fifth."""
        gptq = pytest.importorskip("gptqmodel").quantization.GPTQ

        def interrupted(layers):
            solved = 0
            solve = gptq.fasterquant

            def solve_or_stop(*args, **kwargs):
                nonlocal solved
                if solved == layers:
                    raise KeyboardInterrupt
                solved += 1
                return solve(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(gptq, "fasterquant", solve_or_stop)
                return quantize()

        return interrupted

    def test_what_ctrl_c_stopped_goes_on_to_the_same_result(self, quantize, interrupted, tmp_path):
        assert quantize().code == 0
        (tmp_path / "out").rename(tmp_path / "whole")
        stopped = interrupted(5)
        assert stopped.code == 130
        assert f"stopped after 5 of 14 layers, which are in {tmp_path / 'out.unfinished'}\n" in stopped.stderr
        assert "`quantize`" in stopped.stderr.splitlines()[-1]
        assert "--resume" in stopped.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()

        resumed = quantize("--resume")
        assert resumed.code == 0, resumed.stderr
        assert "resuming from" in resumed.stdout
        assert "5 of 14 layers" in resumed.stdout
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
        for file in (tmp_path / "whole").iterdir():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name

    def test_a_run_that_was_interrupted_is_there(self, quantize, interrupted, tmp_path):
        interrupted(1)
        result = quantize()
        assert result.code == 1
        assert f"error: {tmp_path / 'out.unfinished'} is of a run that was interrupted" in result.stderr
        assert "--resume, or remove it" in result.stderr
        other = quantize("--resume", "--bits", 3)
        assert other.code == 1
        assert "it has bits=4; asked for was bits=3." in other.stderr
        assert quantize("--resume").code == 0

    def test_nothing_to_resume(self, quantize, tmp_path):
        result = quantize("--resume")
        assert result.code == 1
        assert "out.unfinished does not exist, so there is nothing to resume: leave out --resume." in result.stderr

    def test_ctrl_c_before_the_first_layer(self, interrupted, tmp_path):
        stopped = interrupted(0)
        assert stopped.code == 130
        assert "stopped after" not in stopped.stderr
        assert not list(tmp_path.iterdir())


def test_the_time_that_is_left_is_shown(quantize):
    assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d", quantize().stderr)
