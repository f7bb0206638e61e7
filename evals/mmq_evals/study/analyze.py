# SPDX-License-Identifier: Apache-2.0
"""`mmq analyze`: all that a table of results says, as plain data and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError
from mmq_evals.study import effects
from mmq_evals.study.consensus import check_installed, consensus
from mmq_evals.study.evidence import Evidence, gather
from mmq_evals.study.importance import (
    DEFAULT_RANGES,
    Range,
    common_levels,
    importance,
    joint_grid,
    missing_levels,
)
from mmq_evals.study.repeats import compare_options, runs_of, seed_spread
from mmq_evals.study.samples import RESAMPLES
from mmq_evals.study.table import (
    GROUPING,
    Grid,
    Table,
    base_of,
    grids,
    has,
    read_table,
    target_text,
)

FORMAT = "mmq-analysis"
FORMAT_VERSION = 1
# Sizes to judge by, the first that the table has. The nominal one is there if it was asked for.
SIZES = ("bpw_nominal", "bpw_model", "bpw_linears", "bpw")
# Widths below which methods are compared apart, too: the collapse at 2 bits drowns the rest.
COMPARED_FROM = (0.0, 3.0, 4.0)

Data = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How to analyze; see the command's help."""

    bits: Sequence[str] | None = None
    scores: Sequence[str] | None = None
    by: Sequence[str] = GROUPING
    ranges: Sequence[Range] = DEFAULT_RANGES
    incomplete: str = "refuse"
    weights: Mapping[float, float] | None = None
    with_consensus: bool = False
    preset: str | None = None
    resamples: int = RESAMPLES
    seed: int = 0


def analyze(path: Path, options: Options = Options()) -> Data:
    """Tables of effects, importance by range, interactions and sizes of a table of results.

    Args:
        path: a table or its folder, see `read_table`.

    Returns:
        Plain JSON data: ``models``, each with ``targets`` and ``repeats``. Every target has
        ``grids`` (one method with one set of options), ``methods`` (pairs of grids on common
        cells), ``bins`` and ``front``. Grids that only say what an option does to a method are none
        of these; they stand in ``repeats``, see `compare_options`, beside the spread over seeds.

    Raises:
        EvalError: as `read_table`, `grids` and `importance`.
    """
    return analyze_table(read(path, options), options)


def read(path: Path, options: Options) -> Table:
    """The table of `analyze`, with the nominal sizes that the options ask for."""
    if options.with_consensus:
        check_installed()
    table = read_table(path, bits=options.bits, scores=options.scores)
    if options.preset is not None:
        from mmq_evals.study.nominal import with_nominal_size

        table = with_nominal_size(table, options.preset)
    return table


def analyze_table(table: Table, options: Options) -> Data:
    """`analyze` of a table that was read by `read`."""
    everything = grids(table, options.by)
    found = main_part(everything)
    # In the order of the table; the grids come by method.
    models = [
        model
        for model in dict.fromkeys(str(run.values.get("model", "")) for run in table.runs)
        if any(grid.model == model for grid in found)
    ]
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "table": {
            "file": str(table.path),
            "runs": len(table.runs),
            "failed": len(table.failed),
            "factors": list(table.factors),
            "targets": list(table.targets),
            "notes": list(table.notes),
        },
        "seed": options.seed,
        "models": [_model(table, everything, found, model, options) for model in models],
    }


def main_part(everything: Sequence[Grid]) -> list[Grid]:
    """Without the grids that are there to show what an option does: those with options, and the
    smaller ones without that they are compared with."""
    bases = [(grid, base_of(grid, everything)) for grid in everything]
    sides = {id(grid) for grid, base in bases if base is not None}
    for _, base in bases:
        if base is not None and any(
            len(other.cells) > len(base.cells)
            for other in everything
            if not other.options
            and all(other.key.get(c) == base.key.get(c) for c in ("model", "method"))
        ):
            sides.add(id(base))
    return [grid for grid in everything if id(grid) not in sides]


def _model(
    table: Table, everything: Sequence[Grid], found: Sequence[Grid], model: str, options: Options
) -> Data:
    mine = [grid for grid in everything if grid.model == model]
    runs = [run for grid in mine for run in runs_of(grid)]
    targets = [t for t in table.targets if any(has(run, t) for run in runs)]
    # KL is a measure of damage, not a score: it has no place but beside other repeated runs.
    tasks = dict.fromkeys(t.split(".")[1] for t in targets if t.startswith("score."))
    kl = [t for t in (f"agreement.{task}.kl" for task in tasks) if any(has(r, t) for r in runs)]
    evidence = {}
    for target in (*targets, *kl):
        full = next((g.full for g in mine if g.full is not None and has(g.full, target)), None)
        evidence[target] = gather(
            table.path.parent, runs, target, full, seed=options.seed, resamples=options.resamples
        )
    return {
        "model": model,
        "targets": [
            _target(found, model, evidence[target], options)
            for target in targets
            if any(has(run, target) for g in found if g.model == model for run in g.cells.values())
        ],
        "repeats": [
            {
                "target": target,
                "name": target_text(target),
                "unit": "nats" if target in kl else "points",
                "seeds": [
                    row
                    for grid in mine
                    if base_of(grid, mine) is None
                    for row in seed_spread(grid, evidence[target])
                ],
                "options": compare_options(mine, evidence[target]),
            }
            for target in (*targets, *kl)
        ],
    }


def _target(found: Sequence[Grid], model: str, evidence: Evidence, options: Options) -> Data:
    """One target of one model, of whose grids some may lack the target."""
    target = evidence.target
    members = [
        grid
        for grid in found
        if grid.model == model and any(has(run, target) for run in grid.cells.values())
    ]
    runs = [run for grid in members for run in grid.cells.values()]
    full = next((g.full for g in members if g.full is not None and has(g.full, target)), None)
    size = next((name for name in SIZES if any(has(run, name) for run in runs)), None)
    points = _points(members, evidence, size)
    return {
        "target": target,
        "name": target_text(target),
        "full": None if full is None else effects.estimate_data(evidence.score(full)),
        "images": evidence.images,
        "why_no_samples": evidence.why_none,
        "size": size,
        # Of all targets, so that a method has one colour throughout.
        "series": list(dict.fromkeys(grid.label for grid in found)),
        "grids": [_grid(grid, members, evidence, size, options) for grid in members],
        "methods": [
            row
            for at_least in COMPARED_FROM
            for row in effects.compare_methods(members, evidence, at_least)
        ],
        "bins": [] if size is None else effects.best_per_bin(members, evidence, size, full),
        "points": points,
        "front": effects.front(points),
    }


def _grid(
    grid: Grid, members: Sequence[Grid], evidence: Evidence, size: str | None, options: Options
) -> Data:
    target = evidence.target
    levels = grid.levels(target)
    comparable = [other for other in members if other.factors == grid.factors]
    common = common_levels(comparable, target)
    everything = [axis for other in comparable for axis in other.levels(target)]
    uneven = any(axis != common for axis in everything)
    found: Data = {
        "label": grid.label,
        "key": dict(grid.key),
        "factors": list(grid.names),
        "cells": len(grid.scored(target)),
        "levels": dict(zip(grid.names, levels, strict=True)),
        "warnings": missing_levels(grid.names, levels),
        "dose_response": effects.dose_response(grid, evidence),
        "leave_one_full": effects.leave_one_full(joint_grid(grid, target), evidence),
        "importance": importance(
            grid,
            evidence,
            options.ranges,
            common=common if uneven and len(common) > 1 else (),
            incomplete=options.incomplete,
            weights=options.weights,
            seed=options.seed,
        ),
        "interactions": effects.interactions(grid, evidence),
        "reaching": [] if size is None else effects.smallest_reaching(grid, evidence, size),
    }
    if options.with_consensus:
        try:
            found["consensus"] = consensus(grid, target)
        except EvalError as error:
            found["consensus"] = {"refused": str(error)}
    return found


def _points(members: Sequence[Grid], evidence: Evidence, size: str | None) -> list[Data]:
    """Every run once, with its size."""
    points: dict[str, Data] = {}
    for grid in members:
        for bits, run in grid.cells.items():
            bpw = None if size is None else run.number(size)
            if bpw is None or not has(run, evidence.target):
                continue
            untouched = run is grid.full
            points.setdefault(
                run.id,
                {
                    "run": run.id,
                    "grid": "full precision" if untouched else grid.label,
                    "widths": grid.widths(bits),
                    "bpw": bpw,
                    "score": evidence.scores[run.id],
                },
            )
    return list(points.values())
