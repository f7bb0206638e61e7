# SPDX-License-Identifier: Apache-2.0
"""Rows of tables from JSON lines, CSV and Parquet, as they stand in the file.

A reader takes the file and a list to which it adds what the reader of a table should know.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError

RESULTS_FILES = ("results.jsonl", "results.parquet", "results.csv")


def find_file(path: Path) -> Path:
    """The table that a path names: itself, or one of `RESULTS_FILES` in a folder.

    Raises:
        EvalError: there is none, or it is of no known format.
    """
    if path.is_dir():
        for name in RESULTS_FILES:
            if (path / name).is_file():
                return path / name
        raise EvalError(f"results: expected one of {', '.join(RESULTS_FILES)} in {path}")
    if not path.is_file():
        raise EvalError(f"results: no file {path}")
    if path.suffix.lower() not in READERS:
        raise EvalError(f"results: expected {', '.join(READERS)}, got {path.name}")
    return path


def _read_jsonl(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    records = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvalError(f"results: {file} is not UTF-8: {error}") from None
    lines = text.split("\n")
    if lines.pop():
        notes.append("the last line has no end, as a kill leaves it, and is left out")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise EvalError(f"results: {file}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise EvalError(f"results: {file}, line {number}: expected an object")
        records.append(record)
    return records


def _read_csv(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [line for line in csv.reader(stream, delimiter=delimiter) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvalError(f"results: {file} is not CSV: {error}") from None
    if not lines:
        return []
    header = [name.strip() for name in lines[0]]
    if header[0] == "":
        header[0] = "index"  # what pandas writes without a name
    doubled = [name for name, count in Counter(header).items() if count > 1 or not name]
    if doubled:
        raise EvalError(f"results: {file}: expected different column names, got {doubled} again")
    records = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(header):
            raise EvalError(
                f"results: {file}, line {number}: expected {len(header)} values, got {len(cells)}"
            )
        records.append(dict(zip(header, map(_parsed, cells), strict=True)))
    return records


def _parsed(cell: str) -> Any:
    text = cell.strip()
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _read_parquet(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise EvalError(f"results: {file.name} needs pyarrow (pip install pyarrow)") from None
    try:
        return list(parquet.read_table(file).to_pylist())
    except (ArrowException, OSError) as error:
        raise EvalError(f"results: {file} is not Parquet: {error}") from None


READERS = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
