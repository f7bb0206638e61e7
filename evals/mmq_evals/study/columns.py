# SPDX-License-Identifier: Apache-2.0
"""The columns of a table of results: which are widths and which are scores, and their values."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError

Value = Any
Record = Mapping[str, Value]

# The metric that stands for its task where a table has several; others are asked for by name.
PRIMARY = ("cider", "r_mean", "accuracy_always")
# Agreement with full precision, a share or a correlation: 1 where nothing has changed.
AGREEMENT = ("identical_captions", "same_answers", "rank_correlation")
FULL_METHODS = ("none", "full", "full precision", "fp16", "fp32")
# Columns of a number per run that are no scores, whatever their names hold.
_OTHER = re.compile(r"^(low|high|diff|diff_low|diff_high|p|seconds|layer_errors)\.|size|bytes|bpw")
_METRIC = re.compile(
    r"cider|bleu|rouge|meteor|spice|acc|vqa|gqa|r_mean|recall|score|(^|_)(t|i|txt_|img_)?r@?\d+$",
    re.IGNORECASE,
)


def check_ids(file: Path, records: Sequence[Record]) -> None:
    counts = Counter(record["run_id"] for record in records if record.get("run_id") is not None)
    doubled = sorted(str(key) for key, count in counts.items() if count > 1)
    if doubled:
        raise EvalError(
            f"results: {file}: expected one row for every run_id, got several for "
            f"{', '.join(doubled[:5])}" + (" ..." if len(doubled) > 5 else "")
        )


def chosen(option: str, names: Sequence[str] | None, columns: Sequence[str]) -> list[str]:
    missing = [name for name in names or () if name not in columns]
    if missing:
        raise EvalError(
            f"--{option}: no column {', '.join(missing)}; the table has {', '.join(columns)}"
        )
    return list(names or ())


def bit_columns(file: Path, columns: Sequence[str]) -> list[str]:
    found = [name for name in columns if name.startswith("bits.")] or [
        name for name in columns if "bit" in name.lower() and "per" not in name.lower()
    ]
    if not found:
        raise EvalError(
            f"results: {file}: no column of widths (bits.*, or with 'bit' in its name) among "
            f"{', '.join(columns)}; name them with --bits"
        )
    return found


def primary_scores(columns: Iterable[str]) -> list[str]:
    """Of the columns ``score.<task>.<metric>`` the one that stands for every task."""
    by_task: dict[str, list[str]] = {}
    for column in columns:
        task, _, metric = column.removeprefix("score.").partition(".")
        by_task.setdefault(task, []).append(metric)
    found = []
    for task, metrics in by_task.items():
        wanted = ("accuracy_lavis", *PRIMARY) if task == "gqa" else PRIMARY
        metric = next((name for name in wanted if name in metrics), metrics[0])
        found.append(f"score.{task}.{metric}" if metric else f"score.{task}")
    return found


def with_agreement(records: Sequence[Record]) -> list[Record]:
    """Records with agreement in one form: answers as ``same_answers``, so that 1 is agreement
    everywhere, and 1 for full precision, which is compared with nothing: it agrees with itself."""
    found: list[Record] = []
    for record in records:
        same = {
            column.replace("flipped_answers", "same_answers"): 1.0 - float(value)
            for column, value in record.items()
            if column.startswith("agreement.")
            and column.endswith(".flipped_answers")
            and value is not None
        }
        found.append({**record, **same})
    columns = {
        column
        for record in found
        for column in record
        if column.startswith("agreement.") and column.rpartition(".")[2] in AGREEMENT
    }
    for index, record in enumerate(found):
        if str(record.get("method", "")).lower() in FULL_METHODS:
            tasks = {column.split(".")[1] for column in record if column.startswith("score.")}
            own = {column: 1.0 for column in columns if column.split(".")[1] in tasks}
            found[index] = {**record, **own}
    return found


def score_columns(file: Path, columns: Sequence[str], factors: Sequence[str]) -> list[str]:
    found = primary_scores(name for name in columns if name.startswith("score."))
    if found:
        agreement = (
            f"agreement.{name.split('.')[1]}.{measure}" for name in found for measure in AGREEMENT
        )
        return found + [name for name in agreement if name in columns]
    found = [
        name
        for name in columns
        if name not in factors and _METRIC.search(name) and not _OTHER.search(name)
    ]
    if not found:
        raise EvalError(
            f"results: {file}: no column of scores (score.*, or named like a metric) among "
            f"{', '.join(columns)}; name them with --scores"
        )
    return found


def number_in(file: Path, run: str, column: str, value: Value) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EvalError(
            f"results: {file}: expected a finite number in column {column!r} of {run}, "
            f"got {value!r}"
        )
    return float(value)


def width_in(file: Path, run: str, column: str, value: Value) -> float | None:
    number = number_in(file, run, column, value)
    if number is not None and not 1.0 <= number <= 32.0:
        raise EvalError(
            f"results: {file}: expected a width from 1 to 32 in column {column!r} of {run}, "
            f"got {value!r}"
        )
    return number
