"""Texts from files and data sets, and windows of their tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

TEXT = "text"
_LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_BETWEEN_ROWS = "\n\n"
_ROWS_AT_ONCE = 1000


def read_texts(source: str | os.PathLike[str], column: str = TEXT, split: str = "train") -> Dataset:
    """Texts of a file or a data set, a row each, in a column named `text`.

    Args:
        source: a text file, which is one row; a `.jsonl`, `.json`, `.csv` or `.parquet` file; a directory of such
            files, or of what `Dataset.save_to_disk` wrote; or the Hub id of a data set, `user/data` or
            `user/data:config`.
        column: column of the texts.
        split: split of a directory or of a Hub id, in the way of `datasets`, for instance `"train[:10%]"`. A file is
            taken whole.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: `source` is neither a path nor a Hub id that can be reached.
        ValueError: there is no such split or column, or the column does not hold text.
    """
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise ImportError('Reading texts needs datasets: `pip install "peft-quant[cli]"`.') from error

    path = Path(source)
    if path.is_file():
        loader = _LOADERS.get(path.suffix)
        if loader is None:
            data: Any = load_dataset("text", data_files=str(path), split="train", sample_by="document")
        else:
            data = load_dataset(loader, data_files=str(path), split="train")
    elif path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"{path} has no split {split!r}: it has {', '.join(data)}.")
            data = data[split]
    elif path.is_dir() and not any(file.suffix in _LOADERS for file in path.rglob("*")):
        data = load_dataset("text", data_dir=str(path), split=split, sample_by="document")
    else:
        name, _, config = (str(path), "", "") if path.is_dir() else os.fspath(source).partition(":")
        if not path.is_dir() and name.count("/") > 1:
            raise FileNotFoundError(f"{source} does not exist, and is no Hub id: give a file, a directory or an id.")
        data = load_dataset(name, config or None, split=split)
    if column not in data.column_names:
        raise ValueError(f"{source} has no column {column!r}: it has {', '.join(data.column_names)}.")
    data = data.select_columns([column])
    if len(data) and not isinstance(data[0][column], str):
        raise ValueError(
            f"The column {column!r} of {source} holds {type(data[0][column]).__name__}, for instance "
            f"{str(data[0][column])[:80]!r}: give a column of texts."
        )
    return data.rename_column(column, TEXT) if column != TEXT else data


def token_windows(texts: Dataset, tokenizer: Any, size: int, number: int | None = None) -> Dataset:
    """Cut a text into windows of tokens, without overlap, with the same tokens as `labels`.

    Rows are joined by an empty line, a thousand at a time, and tokenized without special tokens; each batch's partial
    last window is dropped.

    Args:
        texts: texts from [`read_texts`].
        tokenizer: the model's tokenizer.
        size: tokens per window.
        number: how many windows to take, spread evenly over the text; all by default, and if there are fewer.

    Returns:
        Rows of `input_ids` and `labels`, `size` integers each.

    Raises:
        ValueError: the text does not fill one window.
    """

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = tokenizer(_BETWEEN_ROWS.join(rows[TEXT]), add_special_tokens=False, verbose=False)["input_ids"]
        windows = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": windows, "labels": windows}

    windows = texts.map(
        cut, batched=True, batch_size=_ROWS_AT_ONCE, remove_columns=texts.column_names, desc="tokenizing"
    )
    if not len(windows):
        raise ValueError(
            f"The text has fewer than {size} tokens, which is one window: give more text, or choose a smaller window."
        )
    return windows if number is None else spread(windows, number)


def spread(windows: Dataset, number: int) -> Dataset:
    """Take at most `number` rows, spread evenly over all."""
    number = min(number, len(windows))
    return windows.select([i * len(windows) // number for i in range(number)])
