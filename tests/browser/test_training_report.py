"""The training report of a run, as a reader sees it."""

import pytest
from gptq_models import load, tiny_tokenizer
from peft import get_peft_model
from quick_training import SETTINGS, sequences
from transformers import Trainer, TrainingArguments

from peft_quant import PEQAConfig, ReportCallback


SECTIONS = ["summary", "training", "evaluation", "memory", "changes", "samples"]
FIGURES = 3  # loss, learning rate and norm of the gradients, change of the layers


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    settings = {**SETTINGS, "learning_rate": 2e-3, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    Trainer(
        get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM")),
        TrainingArguments(str(directory), **settings),
        train_dataset=sequences(),
        eval_dataset=sequences(4),
        # as long as a line, without a place to break it
        callbacks=[ReportCallback(prompts=["w5 w6 w7", "w9" * 200], tokenizer=tiny_tokenizer(), max_new_tokens=8)],
    ).train()
    return directory / "training_report.html"


def test_nothing_goes_wrong_and_nothing_is_fetched(visit, report):
    opened = visit(report)
    opened.page.wait_for_load_state("networkidle")
    assert opened.errors == []
    assert opened.requests == [report.as_uri()]
    assert opened.page.title() == "PEQA on llama"


@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
@pytest.mark.parametrize("width", (1280, 390))
def test_everything_is_seen(visit, report, width, dark):
    page = visit(report, width, dark)
    assert page.overflow() == 0
    page = page.page
    shown = [section.get_attribute("id") for section in page.query_selector_all("section") if section.is_visible()]
    assert shown == SECTIONS
    figures = page.query_selector_all("figure svg")
    assert len(figures) == FIGURES
    for figure in figures:
        box = figure.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 100
        texts = [text.bounding_box() for text in figure.query_selector_all("text")]
        assert len(texts) > 5
        assert all(text["width"] > 0 and text["height"] > 0 for text in texts)
        # within the figure
        assert all(box["y"] - 1 <= text["y"] <= box["y"] + box["height"] for text in texts)
    images = page.query_selector_all("#changes svg image")
    assert len(images) == 2  # the map and its scale
    assert all(page.evaluate(LOADED, image.get_attribute("xlink:href")) for image in images)


LOADED = """async (address) => {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image.naturalWidth > 0;
}"""


@pytest.mark.parametrize("dark", (False, True), ids=("light", "dark"))
def test_everything_can_be_read(visit, report, dark):
    """Text stands out from what is behind it, 4.5 to 1 as WCAG 2.2 asks, lines of figures 3 to 1."""
    page = visit(report, dark=dark).page
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts["texts"]) > 50
    assert min(contrasts["texts"]) >= 4.5
    assert len(contrasts["lines"]) > 2
    assert min(contrasts["lines"]) >= 3


CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [red, green, blue] = channels(color).map((value) => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (channels(color).length === 3) return color;
    }
  };
  const contrast = (color, element) => {
    const [dark, light] = [color, behind(element)].map(luminance).sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const style = (element) => getComputedStyle(element);
  const has_text = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const shown = [...document.querySelectorAll("main *")].filter((element) => element.getClientRects().length);
  return {
    texts: shown.filter(has_text).map((e) => contrast(e.ownerSVGElement ? style(e).fill : style(e).color, e)),
    lines: shown.filter((e) => style(e).strokeWidth === "1.5px").map((e) => contrast(style(e).stroke, e)),
  };
}"""
