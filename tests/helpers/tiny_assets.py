"""A tiny random model and texts that count, laid out as `examples/demo_assets.py` does."""

import json
from pathlib import Path

from gptq_models import float_llama, save_tiny_llama, tiny_tokenizer


FLOAT_MODEL, GPTQ_MODEL = "smollm2-135m-instruct", "smollm2-135m-instruct-gptq-4bit"
_STRIDES = {"wikipedia": 1, "king-james": 2, "wordnet": 3}
_CHAT = """\
{% for message in messages %}{{ 'w0' if message.role == 'user' else 'w1' }} {{ message.content }}
{% endfor %}{% if add_generation_prompt %}w1 {% endif %}"""


def write_tiny_assets(directory: Path) -> Path:
    """Write the models, texts with the splits `train` and `test`, and chats."""
    save_tiny_llama(directory / GPTQ_MODEL)
    float_llama().half().save_pretrained(directory / FLOAT_MODEL)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = _CHAT
    for model in (FLOAT_MODEL, GPTQ_MODEL):
        tokenizer.save_pretrained(directory / model)
    for name, stride in _STRIDES.items():
        (directory / name).mkdir()
        for split, words in (("train", 4000), ("test", 1200)):
            text = " ".join(f"w{i * stride % 125}" for i in range(words))
            (directory / name / f"{split}.txt").write_text(text, encoding="utf-8")
    chats = directory / "definitions-chat"
    chats.mkdir()
    for split in ("train", "test"):
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": f"w{i} w{i + 1}"},
                        {"role": "assistant", "content": f"w{i + 2} w{i + 3}"},
                    ]
                }
            )
            for i in range(60)
        ]
        (chats / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory
