# SPDX-License-Identifier: Apache-2.0
"""Tables of results: read, checked, and divided into grids of one model and one method.

A table has a line for every run: bit widths by component (16: untouched), scores, and whatever else
is known. Those of `mmq sweep` are understood as they are; any other table is, too, if its columns
of widths have "bit" in their names and its scores have names of known metrics, or if the caller
names both.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError
from mmq_evals.study.places import levels_of, options_of, places_of
from mmq_evals.study.readers import READERS, find_file

FULL_BITS = 16.0
# What tells two runs of equal widths apart; columns that a table lacks do not count.
GROUPING = ("model", "method", "group_size", "zero", "clip", "upstream", "mode", "seed")
# The metric that stands for its task where a table has several; others are asked for by name.
PRIMARY = ("cider", "r_mean", "accuracy_always")
# Agreement with full precision, a share or a correlation: 1 where nothing has changed.
AGREEMENT = ("identical_captions", "same_answers", "rank_correlation")
METHODS = ("uniform", "rtn", "gptq", "awq")
FULL_METHODS = ("none", "full", "full precision", "fp16", "fp32")
# Columns of a number per run that are no scores, whatever their names hold.
_OTHER = re.compile(r"^(low|high|diff|diff_low|diff_high|p|seconds|layer_errors)\.|size|bytes|bpw")
_METRIC = re.compile(
    r"cider|bleu|rouge|meteor|spice|acc|vqa|gqa|r_mean|recall|score|(^|_)(t|i|txt_|img_)?r@?\d+$",
    re.IGNORECASE,
)

Value = Any
Record = Mapping[str, Value]


@dataclass(frozen=True)
class Run:
    """One finished run: all its ``values``, and its ``places`` in grids.

    A place gives widths by factor. A run of a sweep over parts of components has one among those
    parts, and another among whole components if each of them has one width throughout.
    ``options`` are settings beyond the table's columns.
    """

    id: str
    places: tuple[Mapping[str, float], ...]
    values: Record
    options: tuple[str, ...] = ()

    def number(self, column: str) -> float | None:
        """The value of a column, None where it is empty or not there."""
        value = self.values.get(column)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Table:
    """Finished runs. ``factors`` and ``targets`` are columns: of widths, and of what is judged."""

    path: Path
    factors: tuple[str, ...]
    targets: tuple[str, ...]
    runs: tuple[Run, ...]
    failed: tuple[Record, ...] = ()
    notes: tuple[str, ...] = ()

    def name(self, factor: str) -> str:
        """A factor's name in tables: ``bits.language`` is language, ``vit_bits`` is vit."""
        short = factor.removeprefix("bits.")
        if short == factor:
            short = re.sub(r"_?(num_?)?bits?_?", "", factor, flags=re.IGNORECASE) or factor
        return short


@dataclass(frozen=True)
class Grid:
    """The runs of one model with one method and one set of options.

    ``cells`` are runs by widths, in the order of ``factors``; ``full`` is the untouched model,
    which is among the cells, too.
    """

    label: str
    key: Mapping[str, Value]
    factors: tuple[str, ...]
    names: tuple[str, ...]
    cells: Mapping[tuple[float, ...], Run] = field(repr=False)
    full: Run | None = None

    def levels(self, target: str | None = None) -> list[list[float]]:
        """The widths of every factor, ascending; only of cells that have a target."""
        kept = [bits for bits, run in self.cells.items() if target is None or has(run, target)]
        return [sorted({bits[axis] for bits in kept}) for axis in range(len(self.factors))]

    def scored(self, target: str) -> dict[tuple[float, ...], float]:
        """A target's value in every cell that has one."""
        return {
            bits: float(run.values[target]) for bits, run in self.cells.items() if has(run, target)
        }

    def widths(self, bits: tuple[float, ...]) -> str:
        """A cell's widths as text: 4/8/3, or named for parts of components."""
        if not any("." in name for name in self.names):
            return width_text(bits)
        named = [f"{n} {w:g}" for n, w in zip(self.names, bits, strict=True) if w != FULL_BITS]
        return ", ".join(named) or "untouched"

    @property
    def model(self) -> str:
        return str(self.key.get("model", ""))


def has(run: Run, column: str) -> bool:
    """Whether a run has a value in a column."""
    return run.values.get(column) is not None


def read_table(
    path: Path, *, bits: Sequence[str] | None = None, scores: Sequence[str] | None = None
) -> Table:
    """Read and check a table.

    Args:
        path: JSON lines (.jsonl), CSV (.csv, .tsv) or Parquet (.parquet, needs pyarrow), or a
            folder with one of `readers.RESULTS_FILES`.
        bits: the columns of widths; default: ``bits.*``, else those with "bit" in their names.
        scores: the columns to judge by; default: the primary one of every task in ``score.*``
            and its agreement with full precision, else all that are named like a metric.

    Raises:
        EvalError: no such file, not in its format, a column that is missing or not numeric, no
            column of widths or scores, no finished run, or an id that two runs share.
    """
    file = find_file(path)
    notes: list[str] = []
    records = READERS[file.suffix.lower()](file, notes)
    if not records:
        raise EvalError(f"results: {file} has no rows")
    columns = list(dict.fromkeys(key for record in records for key in record))
    _check_ids(file, records)
    failed = [record for record in records if record.get("status", "done") != "done"]
    found = [record for record in records if record.get("status", "done") == "done"]
    if not found:
        raise EvalError(f"results: {file}: expected a finished run, got {len(failed)} failed ones")
    if failed:
        notes.append(f"{len(failed)} runs failed and are left out")
    factors = _chosen("bits", bits, columns) or _bit_columns(file, columns)
    done = _with_agreement(found)
    columns = list(dict.fromkeys(key for record in done for key in record))
    targets = _chosen("scores", scores, columns) or _score_columns(file, columns, factors)
    runs = []
    for number, record in enumerate(done, start=1):
        key = str(record.get("run_id", f"row {number}"))
        # A column counts as numeric, or the table is refused: nothing is dropped in silence.
        widths = {column: _width(file, key, column, record.get(column)) for column in factors}
        numbers = {column: _number(file, key, column, record.get(column)) for column in targets}
        present = {column: width for column, width in widths.items() if width is not None}
        levels = {} if bits else levels_of(record)
        places = places_of(present, levels) if levels else (present,)
        runs.append(Run(key, places, {**record, **numbers}, options_of(levels)))
    for column in targets:
        if all(run.values[column] is None for run in runs):
            raise EvalError(f"results: {file}: column {column!r} has no value in any finished run")
    return Table(file, tuple(factors), tuple(targets), tuple(runs), tuple(failed), tuple(notes))


def grids(table: Table, by: Sequence[str] = GROUPING) -> list[Grid]:
    """Divide a table: one grid per combination of the columns ``by`` and set of factors.

    The untouched model of a model name belongs to every grid of it.

    Raises:
        EvalError: two runs of one grid have the same widths, or a model is untouched twice.
    """
    groups: dict[tuple[Any, ...], list[tuple[Mapping[str, float], Run]]] = {}
    full: dict[str, list[Run]] = {}
    for run in table.runs:
        if str(run.values.get("method", "")).lower() in FULL_METHODS:
            full.setdefault(str(run.values.get("model", "")), []).append(run)
            continue
        options = (*(_hashable(run.values.get(column)) for column in by), *run.options)
        for place in run.places:
            groups.setdefault((options, tuple(place)), []).append((place, run))
    for model, runs in full.items():
        _check_full(table, model, runs)
    groups = dict(sorted(groups.items(), key=lambda group: _rank(by, group[0][0])))
    if not groups:
        raise EvalError(f"results: {table.path}: expected quantized runs, got full precision alone")
    keys = [dict(zip(by, options, strict=False)) for options, _ in groups]
    found = []
    for key, ((options, factors), members) in zip(keys, groups.items(), strict=True):
        # Options stand in a label where they tell apart what model and method do not.
        rivals = [
            other
            for other in keys
            if all(other.get(column) == key.get(column) for column in ("model", "method"))
        ]
        parts = [str(key["method"])] if key.get("method") is not None else []
        parts += [
            f"{column.replace('_', ' ')} {value}"
            for column, value in key.items()
            if column not in ("model", "method")
            and len({json.dumps(other.get(column)) for other in rivals}) > 1
        ]
        parts += options[len(by) :]
        untouched = _fitting(full.get(str(key.get("model", "")), []), members, table.targets)
        label = ", ".join(parts) or table.path.stem
        key = {column: value for column, value in key.items() if value is not None}
        found.append(_grid(table, label, key, factors, members, untouched))
    return found


def _rank(by: Sequence[str], options: tuple[Any, ...]) -> int:
    """The place of a method: known ones in their own order, then the others as they come."""
    known = dict(zip(by, options, strict=False))
    method = str(known.get("method", "")).lower()
    return METHODS.index(method) if method in METHODS else len(METHODS)


def _check_full(table: Table, model: str, runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, ...], Run] = {}
    for run in runs:
        scored = tuple(target for target in table.targets if has(run, target))
        if scored in seen:
            raise EvalError(
                f"results: {table.path}: full precision of {model!r} stands there twice: "
                f"{seen[scored].id} and {run.id}"
            )
        seen[scored] = run


def _fitting(
    full: Sequence[Run], members: Sequence[tuple[Any, Run]], targets: Sequence[str]
) -> Run | None:
    """The untouched run that shares most targets with the members of a grid."""
    wanted = [target for target in targets if any(has(run, target) for _, run in members)]
    return max(full, key=lambda run: sum(has(run, target) for target in wanted), default=None)


def _grid(
    table: Table,
    label: str,
    key: Mapping[str, Value],
    factors: tuple[str, ...],
    members: Sequence[tuple[Mapping[str, float], Run]],
    full: Run | None,
) -> Grid:
    cells: dict[tuple[float, ...], Run] = {}
    for place, run in members:
        bits = tuple(place[factor] for factor in factors)
        if bits in cells:
            one, two = cells[bits].values, run.values
            differing = [c for c in one if c in two and one[c] != two[c] and c != "run_id"]
            raise EvalError(
                f"results: {table.path}: {cells[bits].id} and {run.id} are both {label} with "
                f"widths {width_text(bits)}; they differ in {', '.join(differing[:8]) or 'nothing'}"
                " (a column that tells them apart can be named with --by)"
            )
        cells[bits] = run
    untouched = (FULL_BITS,) * len(factors)
    if full is not None:
        cells.setdefault(untouched, full)
    names = tuple(table.name(factor) for factor in factors)
    return Grid(label, key, factors, names, cells, cells.get(untouched))


def width_text(bits: Iterable[float]) -> str:
    """4/8/3; widths that are no integers with their digits."""
    return "/".join(f"{width:g}" for width in bits)


def target_text(column: str) -> str:
    """A target's name in tables: ``score.vqa.accuracy`` is vqa accuracy, an agreement likewise."""
    return column.removeprefix("score.").removeprefix("agreement.").replace(".", " ", 1)


def _hashable(value: Value) -> Value:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


# ---- columns -------------------------------------------------------------------------------------


def _check_ids(file: Path, records: Sequence[Record]) -> None:
    counts = Counter(record["run_id"] for record in records if record.get("run_id") is not None)
    doubled = sorted(str(key) for key, count in counts.items() if count > 1)
    if doubled:
        raise EvalError(
            f"results: {file}: expected one row for every run_id, got several for "
            f"{', '.join(doubled[:5])}" + (" ..." if len(doubled) > 5 else "")
        )


def _chosen(option: str, names: Sequence[str] | None, columns: Sequence[str]) -> list[str]:
    missing = [name for name in names or () if name not in columns]
    if missing:
        raise EvalError(
            f"--{option}: no column {', '.join(missing)}; the table has {', '.join(columns)}"
        )
    return list(names or ())


def _bit_columns(file: Path, columns: Sequence[str]) -> list[str]:
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


def _with_agreement(records: Sequence[Record]) -> list[Record]:
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


def _score_columns(file: Path, columns: Sequence[str], factors: Sequence[str]) -> list[str]:
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


def _number(file: Path, run: str, column: str, value: Value) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise EvalError(
            f"results: {file}: expected a finite number in column {column!r} of {run}, "
            f"got {value!r}"
        )
    return float(value)


def _width(file: Path, run: str, column: str, value: Value) -> float | None:
    number = _number(file, run, column, value)
    if number is not None and not 1.0 <= number <= 32.0:
        raise EvalError(
            f"results: {file}: expected a width from 1 to 32 in column {column!r} of {run}, "
            f"got {value!r}"
        )
    return number
