"""The page of a training run, from plain rows."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from peft_quant.estimate.report import MemoryRow
from peft_quant.trainers.report.page import (
    Changes,
    Evaluation,
    Sample,
    TrainingReport,
    format_bytes,
    format_seconds,
    write_training_report,
)


LOG = [{"step": step, "loss": 3 / step, "learning_rate": 1e-3, "grad_norm": 0.5} for step in range(1, 6)]
WHOLE = TrainingReport(
    title="PEQA on <model>",
    status="finished, 5 steps",
    summary={"Method": "PEQA & more"},
    command=["python", "train.py", "--text", "a b"],
    log=[*LOG, {"step": 5, "eval_loss": 0.7}, {"step": 0, "eval_loss": 2.0}],
    memory=[MemoryRow("packed weights", "4 bits", 1000, 600, True), MemoryRow("logits", "fp32", 50, 200, False)],
    peak=("CUDA memory allocated", 3_210_000_000),
    changes=Changes(
        "Change of the scales", {f"model.layers.{i}.mlp.{m}_proj": 0.01 * i for i in (0, 1) for m in "ab"}
    ),
    evaluations=[Evaluation("", 2.0, 0.7, True)],
    samples=[Sample("<b>prompt</b>", "before\n  indented", "after")],
    seconds=75.4,
    versions={"peft-quant": "0.1.0"},
)


def write(tmp_path, report):
    return write_training_report(report, tmp_path / "report.html").read_text(encoding="utf-8")


def sections(text):
    return re.findall(r'<section id="(\w+)">', text)


def figures(text):
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_whole(tmp_path):
    text = write(tmp_path, WHOLE)
    assert sections(text) == ["summary", "training", "evaluation", "memory", "changes", "samples"]
    assert len(figures(text)) == 3  # loss; learning rate and norm of the gradients; changes
    assert "python train.py --text &#39;a b&#39;" in text
    assert f"<strong>{math.exp(0.7):.4g}</strong>" in text
    assert f"from {math.exp(2):.4g}" in text
    assert "<strong>3.21 GB</strong>" in text
    assert "<strong>1 min 15 s</strong>" in text


def test_text_is_text(tmp_path):
    text = write(tmp_path, WHOLE)
    assert "<title>PEQA on &lt;model&gt;</title>" in text
    assert "&lt;b&gt;prompt&lt;/b&gt;" in text
    assert "PEQA &amp; more" in text
    assert "before\n  indented</pre>" in text


def test_dollars_in_names_are_no_formulas(tmp_path):
    log = [{**entry, "eval_$\\frac{$_loss": 1.0, "eval_b_loss": 2.0} for entry in LOG]
    text = write(tmp_path, TrainingReport("LREC", "", log=log))
    assert r"$\frac{$" in "".join(figures(text)[0].itertext())


def test_nothing_is_asked_for(tmp_path):
    text = write(tmp_path, WHOLE)
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', text)
    assert addresses
    assert all(address.startswith(("#", "data:")) for found in addresses for address in found if address)


def test_figures_take_the_colors_of_the_page(tmp_path):
    for figure in figures(write(tmp_path, WHOLE)):
        assert "width" not in figure.attrib
        colors = {
            match
            for element in figure.iter()
            for match in re.findall(r"(?:fill|stroke): ([^;]+)", element.get("style", ""))
        }
        assert {color.partition("(")[0] for color in colors} <= {"none", "currentColor", "var"}


def test_what_is_not_known_is_left_out(tmp_path):
    text = write(tmp_path, TrainingReport("LREC", "in training, step 0 of 5"))
    assert sections(text) == []
    assert "<svg" not in text
    text = write(tmp_path, TrainingReport("LREC", "in training", samples=[Sample("prompt", "before", None)]))
    assert sections(text) == ["samples"]
    assert "after</h3>" not in text


def test_a_single_value_is_no_curve(tmp_path):
    assert sections(write(tmp_path, TrainingReport("LREC", "", log=LOG[:1]))) == []


def test_numbers_that_are_not_finite(tmp_path):
    log = [*LOG, {"step": 6, "loss": math.nan, "grad_norm": math.inf}]
    evaluations = [Evaluation("", 2.0, math.nan, True), Evaluation("other", 1e4, None, True)]
    text = write(tmp_path, TrainingReport("LREC", "", log=log, evaluations=evaluations))
    assert len(figures(text)) == 2
    assert "nan</td>" in text


def test_losses_that_are_no_perplexities(tmp_path):
    text = write(tmp_path, TrainingReport("DPO", "", evaluations=[Evaluation("pairs", 0.69, 0.4, False)]))
    assert "Perplexity" not in text
    assert re.findall(r'<td class="right">(.*?)</td>', text) == ["0.69", "0.4"]


def test_terms_of_the_loss_have_a_figure(tmp_path):
    log = [{**entry, "kl": 0.1, "ce": 0.2} for entry in LOG]
    text = write(tmp_path, TrainingReport("LREC", "", log=log))
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == [
        "Loss",
        "Terms of the loss",
        "Learning rate",
        "Norm of the gradients",
    ]


def test_the_file_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(tmp_path, WHOLE)
    before = path.read_bytes()
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        write_training_report(TrainingReport("another", ""), path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("count", "text"), ((0, "0 B"), (999, "999 B"), (1920, "1.92 kB"), (12_345_678, "12.3 MB"), (4.2e12, "4,200 GB"))
)
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), ((1.234, "1.2 s"), (75.4, "1 min 15 s"), (7260, "2 h 1 min")))
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text
