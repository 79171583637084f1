from importlib.resources import files

import pytest
from huggingface_hub import ModelCard, ModelCardData

from peft_quant import PEQAConfig


@pytest.fixture
def card():
    metadata = ModelCardData(base_model="user/base", library_name="peft", tags=["peqa", "gptq"])
    return ModelCard.from_template(
        metadata,
        template_str=(files("peft_quant") / "hub_cards" / "peqa_adapter.md").read_text(encoding="utf-8"),
        base_model="user/base",
        base_quantization={"bits": 3, "group_size": 64},
        rows={"GPTQ": {"tuned": 30.812, "general": 28.2}},
        settings={"steps": 40},
        versions="peft 0.21.2",
    )


def test_the_card_is_filled_in(card):
    assert (card.data.base_model, card.data.library_name, card.data.tags) == ("user/base", "peft", ["peqa", "gptq"])
    assert "| GPTQ | 30.81 | 28.20 |" in card.text
    assert "| group_size | 64 |" in card.text
    assert "{{" not in card.text


def test_its_first_snippet_registers_the_method_and_names_the_bits(card):
    snippet = card.text.split("```python")[1].split("```")[0]
    assert snippet.strip().startswith("import peft_quant")
    assert 'GPTQConfig(bits=3, backend="gptq_torch")' in snippet
    compile(snippet, "card", "exec")
    assert PEQAConfig().peft_type.value in card.text
