"""A tiny random model and generated texts under the names of `demo_assets.py`, for `--smoke`."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from stages import temporary_directory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_quant.gptq.quantize import quantize_checkpoint


_NOUNS = ["bread", "fox", "field", "hen", "house", "king", "night", "river", "stone", "voice"]
_ADJECTIVES = ["bright", "grey", "old", "silent", "small"]
_VERBS = ["calls", "finds", "keeps", "leaves", "sees"]
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@cache
def float_model() -> Path:
    """Directory of a Llama of two layers with a byte a token, in bf16."""
    directory = temporary_directory() / "float"
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=_CHAT,
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # so that its layers matter
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@cache
def gptq_model() -> Path:
    """Directory of the same model as a GPTQ checkpoint: 4 bits, group 64, symmetric."""
    sentences = wikipedia()[0].splitlines()[:8]
    return quantize_checkpoint(float_model(), temporary_directory() / "gptq", sentences, bits=4, group_size=64)


def wikipedia() -> tuple[str, str]:
    return _texts("The {adjective} {noun} {verb} the {other}.\n")


def king_james() -> tuple[str, str]:
    return _texts("And the {noun} said unto the {other}, Behold, the {adjective} {noun}.\n")


def wordnet() -> tuple[str, str]:
    return _texts('Define the noun "{noun}".\na {adjective} {other} that {verb}.\n\n')


def _texts(sentence: str) -> tuple[str, str]:
    """Training and held-out text of one form."""
    chosen = random.Random(sentence)

    def lines(number: int) -> str:
        return "".join(
            sentence.format(
                noun=chosen.choice(_NOUNS),
                other=chosen.choice(_NOUNS),
                adjective=chosen.choice(_ADJECTIVES),
                verb=chosen.choice(_VERBS),
            )
            for _ in range(number)
        )

    return lines(600), lines(100)
