# SPDX-License-Identifier: Apache-2.0
"""Tables of results: read, checked, and divided into grids of one model and one method.

A table has a line for every run: bit widths by component (16: untouched), scores, and whatever else
is known. Those of `mmq sweep` are understood as they are; any other table is, too, if its columns
of widths have "bit" in their names and its scores have names of known metrics, or if the caller
names both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError
from mmq_evals.study.columns import (
    FULL_METHODS,
    Record,
    Value,
    bit_columns,
    check_ids,
    chosen,
    number_in,
    score_columns,
    width_in,
    with_agreement,
)
from mmq_evals.study.places import levels_of, options_of, places_of
from mmq_evals.study.readers import READERS, find_file

FULL_BITS = 16.0
# What tells two runs of equal widths apart; columns that a table lacks do not count. Runs that
# differ in the seed of their calibration alone are repetitions of one cell.
GROUPING = ("model", "method", "group_size", "zero", "clip", "upstream", "mode")
SEED = "seed"
METHODS = ("uniform", "rtn", "gptq", "awq")


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
    which is among the cells, too. Of runs that differ in the calibration's seed the one of the
    lowest seed is the cell, and all of them are its ``repetitions``.
    """

    label: str
    key: Mapping[str, Value]
    factors: tuple[str, ...]
    names: tuple[str, ...]
    cells: Mapping[tuple[float, ...], Run] = field(repr=False)
    full: Run | None = None
    options: tuple[str, ...] = ()
    repetitions: Mapping[tuple[float, ...], tuple[Run, ...]] = field(
        default_factory=dict, repr=False
    )

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
    check_ids(file, records)
    failed = [record for record in records if record.get("status", "done") != "done"]
    found = [record for record in records if record.get("status", "done") == "done"]
    if not found:
        raise EvalError(f"results: {file}: expected a finished run, got {len(failed)} failed ones")
    if failed:
        notes.append(f"{len(failed)} runs failed and are left out")
    factors = chosen("bits", bits, columns) or bit_columns(file, columns)
    done = with_agreement(found)
    columns = list(dict.fromkeys(key for record in done for key in record))
    targets = chosen("scores", scores, columns) or score_columns(file, columns, factors)
    runs = []
    for number, record in enumerate(done, start=1):
        key = str(record.get("run_id", f"row {number}"))
        # A column counts as numeric, or the table is refused: nothing is dropped in silence.
        widths = {column: width_in(file, key, column, record.get(column)) for column in factors}
        numbers = {column: number_in(file, key, column, record.get(column)) for column in targets}
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
        EvalError: two runs of one grid have the same widths and seed, or a model is untouched
            twice.
    """
    groups: dict[tuple[Any, ...], list[tuple[Mapping[str, float], Run]]] = {}
    full: dict[str, list[Run]] = {}
    for run in table.runs:
        if str(run.values.get("method", "")).lower() in FULL_METHODS:
            full.setdefault(str(run.values.get("model", "")), []).append(run)
            continue
        columns = tuple(_hashable(run.values.get(column)) for column in by)
        for place in run.places:
            groups.setdefault((columns, run.options, tuple(place)), []).append((place, run))
    for model, runs in full.items():
        _check_full(table, model, runs)
    groups = dict(sorted(groups.items(), key=lambda group: _rank(by, group[0][0])))
    if not groups:
        raise EvalError(f"results: {table.path}: expected quantized runs, got full precision alone")
    sizes: dict[tuple[Any, ...], int] = {}
    for (columns, _, _), members in groups.items():
        sizes[columns] = sizes.get(columns, 0) + len(members)
    found = []
    for (columns, options, factors), members in groups.items():
        key = dict(zip(by, columns, strict=True))
        untouched = _fitting(full.get(str(key.get("model", "")), []), members, table.targets)
        label = ", ".join([*_label(by, columns, sizes), *options]) or table.path.stem
        found.append(_grid(table, label, key, factors, members, untouched, options))
    return found


def base_of(grid: Grid, everything: Sequence[Grid]) -> Grid | None:
    """For a grid with options the one that differs from it in nothing else; None for others."""
    if not grid.options:
        return None
    same = (g for g in everything if not g.options and g.factors == grid.factors)
    return next((other for other in same if other.key == grid.key), None)


def _label(
    by: Sequence[str], columns: tuple[Value, ...], sizes: Mapping[tuple[Value, ...], int]
) -> list[str]:
    """The method, and the columns that tell it apart from others of its model.

    Where one of them has more runs than all others together, it needs no more than the method.
    """
    key = dict(zip(by, columns, strict=True))
    head = [str(key["method"])] if key.get("method") is not None else []
    rivals = {
        other: size
        for other, size in sizes.items()
        if all(dict(zip(by, other, strict=True)).get(c) == key.get(c) for c in ("model", "method"))
    }
    if 2 * sizes[columns] > sum(rivals.values()):
        return head
    differing = [
        column
        for index, column in enumerate(by)
        if column not in ("model", "method")
        and len({json.dumps(other[index]) for other in rivals}) > 1
        # A mode is no more than another word for the upstream.
        and not (column == "mode" and "upstream" in by)
    ]
    return head + [f"{column.replace('_', ' ')} {key[column]}" for column in differing]


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
    options: tuple[str, ...],
) -> Grid:
    by_seed: dict[tuple[float, ...], dict[float, Run]] = {}
    for place, run in members:
        bits = tuple(place[factor] for factor in factors)
        known = by_seed.setdefault(bits, {})
        seed = run.number(SEED) or 0.0
        if seed in known:
            one, two = known[seed].values, run.values
            differing = [c for c in one if c in two and one[c] != two[c] and c != "run_id"]
            raise EvalError(
                f"results: {table.path}: {known[seed].id} and {run.id} are both {label} with "
                f"widths {width_text(bits)}; they differ in {', '.join(differing[:8]) or 'nothing'}"
                " (a column that tells them apart can be named with --by)"
            )
        known[seed] = run
    ordered = {bits: tuple(dict(sorted(runs.items())).values()) for bits, runs in by_seed.items()}
    cells = {bits: runs[0] for bits, runs in ordered.items()}
    untouched = (FULL_BITS,) * len(factors)
    if full is not None:
        cells.setdefault(untouched, full)
    names = tuple(table.name(factor) for factor in factors)
    key = {column: value for column, value in key.items() if value is not None}
    repetitions = {bits: runs for bits, runs in ordered.items() if len(runs) > 1}
    return Grid(label, key, factors, names, cells, cells.get(untouched), options, repetitions)


def width_text(bits: Iterable[float]) -> str:
    """4/8/3; widths that are no integers with their digits."""
    return "/".join(f"{width:g}" for width in bits)


def target_text(column: str) -> str:
    """A target's name in tables: ``score.vqa.accuracy`` is vqa accuracy, an agreement likewise."""
    return column.removeprefix("score.").removeprefix("agreement.").replace(".", " ", 1)


def _hashable(value: Value) -> Value:
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
