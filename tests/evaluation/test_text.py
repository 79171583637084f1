import json

import pytest
from datasets import Dataset, DatasetDict
from gptq_models import tiny_tokenizer

from peft_quant.evaluation.text import read_texts, spread, token_windows


ROWS = [f"w{i} w{i + 1} w{i + 2}" for i in range(10)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_text_file_is_one_row(tmp_path):
    (tmp_path / "a.md").write_text("one\n\ntwo\nthree\n")
    assert read_texts(tmp_path / "a.md")["text"][:] == ["one\n\ntwo\nthree\n"]


@pytest.mark.parametrize("kind", ("json", "jsonl", "csv", "parquet"))
def test_files_of_rows(tmp_path, kind):
    file, data = tmp_path / f"rows.{kind}", Dataset.from_dict({"number": range(10), "words": ROWS})
    {"csv": data.to_csv, "parquet": data.to_parquet}.get(kind, data.to_json)(file)
    texts = read_texts(file, "words")
    assert texts.column_names == ["text"]
    assert texts["text"][:] == ROWS


def test_what_datasets_saved(tmp_path):
    splits = {"train": Dataset.from_dict({"text": ROWS}), "test": Dataset.from_dict({"text": ["w5"]})}
    DatasetDict(splits).save_to_disk(tmp_path / "splits")
    splits["train"].save_to_disk(tmp_path / "one")
    assert read_texts(tmp_path / "splits", split="test")["text"][:] == ["w5"]
    assert read_texts(tmp_path / "one")["text"][:] == ROWS
    with pytest.raises(ValueError, match="has no split 'validation': it has train, test"):
        read_texts(tmp_path / "splits", split="validation")


def test_directories_of_files(tmp_path):
    for directory in ("texts", "rows"):
        (tmp_path / directory).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\ntwo")
    (tmp_path / "texts" / "b.txt").write_text("three")
    (tmp_path / "rows" / "train.jsonl").write_text(json.dumps({"text": "of train"}))
    (tmp_path / "rows" / "test.jsonl").write_text(json.dumps({"text": "of test"}))
    assert read_texts(tmp_path / "texts")["text"][:] == ["one\ntwo", "three"]
    assert read_texts(tmp_path / "rows", split="test")["text"][:] == ["of test"]


def test_columns_that_are_no_texts(tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}))
    with pytest.raises(ValueError, match="has no column 'text': it has messages"):
        read_texts(tmp_path / "chat.jsonl")
    with pytest.raises(ValueError, match=r"holds list, for instance .*give a column of texts"):
        read_texts(tmp_path / "chat.jsonl", "messages")


def test_neither_a_path_nor_an_id():
    with pytest.raises(FileNotFoundError, match="there/is/nothing does not exist"):
        read_texts("there/is/nothing")


class TestWindows:
    def test_are_the_texts_tokens(self):
        windows = token_windows(Dataset.from_dict({"text": ROWS}), tiny_tokenizer(), 4)
        tokens = [token for row in windows["input_ids"] for token in row]
        assert tokens == tiny_tokenizer()(" ".join(ROWS)).input_ids[:28]
        assert windows["labels"][:] == windows["input_ids"][:]

    def test_spread_evenly(self):
        texts = Dataset.from_dict({"text": ROWS})
        every = token_windows(texts, tiny_tokenizer(), 3)["input_ids"][:]
        assert token_windows(texts, tiny_tokenizer(), 3, 5)["input_ids"][:] == every[::2]
        assert token_windows(texts, tiny_tokenizer(), 3, 100)["input_ids"][:] == every
        assert spread(Dataset.from_dict({"n": range(7)}), 3)["n"][:] == [0, 2, 4]

    def test_too_little_text(self):
        with pytest.raises(ValueError, match="fewer than 31 tokens"):
            token_windows(Dataset.from_dict({"text": ROWS}), tiny_tokenizer(), 31)
