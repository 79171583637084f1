"""`resize_token_embeddings` of transformers, on models in int8."""

import pytest
import torch
from qft_models import FAMILIES, VOCABULARY, assert_equal, family_trainer, int8_model

from peft_quant import Int8Weight, QFTConfig


# tied and untied, one list of blocks and two, one table of tokens for two of them
RESIZED = ("Llama", "Llama, tied", "GPT-2", "BERT", "T5", "T5, untied", "BART", "Qwen2.5-VL", "Gemma 3 with images")


def rows(weight, count):
    parts = weight.parts if isinstance(weight, Int8Weight) else {"": weight.detach()}
    return {name: part[:count].clone() for name, part in parts.items()}


@pytest.mark.parametrize("family", RESIZED)
@pytest.mark.parametrize("embeddings", (False, True))
class TestResizing:
    @pytest.mark.parametrize("mean", (False, True))
    @pytest.mark.parametrize("size", (VOCABULARY - 20, VOCABULARY + 12))
    def test_rows_stay_and_new_ones_are_added(self, tmp_path, family, embeddings, mean, size):
        model = int8_model(family, QFTConfig(embeddings=embeddings), torch.float32)
        table, head = (each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()))
        tied, kept = head is table, min(size, VOCABULARY)
        before = rows(table, kept), rows(head, kept)
        model.resize_token_embeddings(size, mean_resizing=mean)
        table, head = (each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()))
        assert isinstance(table, Int8Weight) == embeddings
        assert (head is table) == tied
        assert table.shape[0] == head.shape[0] == model.config.get_text_config().vocab_size == size
        for expected, found in zip(before, (rows(table, kept), rows(head, kept))):
            assert found.keys() == expected.keys()
            assert all(torch.equal(part, expected[name]) for name, part in found.items())
        if mean and size > VOCABULARY:
            dense = table.dequantize().float() if embeddings else table.detach().float()
            # a new row is the mean of the old ones, encoded, with 127 steps to its largest value
            off = (dense[VOCABULARY:] - dense[:VOCABULARY].mean(0)).abs().max()
            assert off < 0.02 * dense[VOCABULARY:].abs().max()
        model.save_pretrained(tmp_path)
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_equal(loaded, model)

    def test_it_trains_on(self, tmp_path, family, embeddings):
        model = int8_model(family, QFTConfig(embeddings=embeddings), torch.float32)
        model.resize_token_embeddings(VOCABULARY + 12)
        run = family_trainer(tmp_path, family, model, max_steps=1)
        run.train()
        run.save_model(tmp_path / "saved")
        assert_equal(type(model).from_pretrained(tmp_path / "saved"), model)
        assert FAMILIES[family].logits(model).isfinite().all()
