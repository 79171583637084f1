"""Appends measurements to the CSV files under `results/`, with the hardware and versions they were measured on."""

from __future__ import annotations

import csv
import datetime
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


_WHERE = "versions,command"
COLUMNS = {
    "kernels": f"date,gpu,op,peer,bits,group,M,K,N,dtype,us,gb_per_s,share_of_copy,{_WHERE}",
    "train_step": "date,gpu,method,peer,bits,group,layers,batch,seq,checkpointing,step_ms,fwd_ms,bwd_ms,opt_ms,"
    f"peak_gb,model_gb,{_WHERE}",
    "quality": f"date,model,method,init,bits,group,rank,seed,train_tokens,corpus,split,tokens,ppl,loss,{_WHERE}",
}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def versions(*packages: str) -> str:
    """Versions of the given packages that are installed, as `name version; ...`."""
    found = []
    for package in ("torch", "triton", "peft", "transformers", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "; ".join(found)


def _command() -> str:
    """The command line of this process, without the output directory."""
    arguments = sys.argv.copy()
    if "--out" in arguments:
        position = arguments.index("--out")
        del arguments[position : position + 2]
    return shlex.join(["python", *arguments])


def append(table: str, directory: Path, **row: Any) -> None:
    """Append one row; columns that are not given stay empty.

    Raises:
        KeyError: the table does not have a column.
    """
    columns = COLUMNS[table].split(",")
    unknown = row.keys() - set(columns)
    if unknown:
        raise KeyError(f"{table}.csv has no columns {sorted(unknown)}")
    row = {
        "date": datetime.date.today().isoformat(),
        "gpu": device_name(),
        "versions": versions(),
        "command": _command(),
        **row,
    }
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{table}.csv"
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if stream.tell() == 0:
            writer.writeheader()
        writer.writerow({name: row.get(name) for name in columns})
