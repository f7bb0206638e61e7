# SPDX-License-Identifier: Apache-2.0
"""What single widths, pairs and methods do to a score: tables before any share of importance.

Differences are in the score's own unit; a negative one is damage. Where there are scores per
sample, intervals are paired over images (see `evidence`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mmq_evals.stats import holm
from mmq_evals.study.evidence import Estimate, Evidence
from mmq_evals.study.table import Grid, Run, has

# Interactions are additive only away from the floor: scores above this share of full precision.
FLOOR_SHARE = 0.5
# Shares of full precision whose smallest size is looked up.
GOALS = (0.95, 0.98, 0.99)
BIN_BITS = 0.5

Data = dict[str, Any]


def estimate_data(estimate: Estimate) -> Data:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def dose_response(grid: Grid, evidence: Evidence) -> list[Data]:
    """One factor at a time, the others untouched: score and difference by width."""
    full = _full(grid, evidence.target)
    if full is None:
        return []
    rows = []
    for axis, name in enumerate(grid.names):
        for width in grid.levels(evidence.target)[axis]:
            run = _at(grid, evidence.target, {axis: width})
            if run is not None and run is not full:
                rows.append({"factor": name, "bits": width, **_against(evidence, run, full)})
    return rows


def leave_one_full(grid: Grid, evidence: Evidence) -> list[Data]:
    """All factors at one width, and one of them given back to full precision: what it recovers."""
    full = _full(grid, evidence.target)
    if full is None or len(grid.factors) < 2:
        return []
    rows = []
    for width in sorted(set.intersection(*map(set, grid.levels(evidence.target)))):
        everything = dict.fromkeys(range(len(grid.factors)), width)
        together = _at(grid, evidence.target, everything)
        if together is None or together is full:
            continue
        for axis, name in enumerate(grid.names):
            spared = {a: w for a, w in everything.items() if a != axis}
            run = _at(grid, evidence.target, spared)
            if run is None:
                continue
            gain = evidence.combination([(1.0, run), (-1.0, together)])
            lost = evidence.scores[full.id] - evidence.scores[together.id]
            rows.append(
                {
                    "bits": width,
                    "spared": name,
                    "together": estimate_data(evidence.score(together)),
                    "recovered": estimate_data(gain),
                    "share": gain.value / lost if lost > 0 else None,
                }
            )
    return rows


def interactions(grid: Grid, evidence: Evidence) -> list[Data]:
    """By pair of factors: does quantizing both cost more than the sum of each alone?

    Excess = y(a) + y(b) - y(a, b) - y(full), the others untouched; positive: more than the sum.
    Cells near the floor, where nothing is left to lose, do not count: all three scores must exceed
    `FLOOR_SHARE` of full precision.

    Returns:
        For each pair: the mean excess over its cells with interval, the single cells, and how many
        differ from zero in either direction after Holm's adjustment over the pair's cells.
    """
    full = _full(grid, evidence.target)
    if full is None:
        return []
    floor = FLOOR_SHARE * evidence.scores[full.id]
    levels = grid.levels(evidence.target)
    found = []
    for a, b in combinations(range(len(grid.factors)), 2):
        cells, near_floor = [], 0
        for one in levels[a]:
            for two in levels[b]:
                first, second, both = (
                    _at(grid, evidence.target, widths)
                    for widths in ({a: one}, {b: two}, {a: one, b: two})
                )
                if first is None or second is None or both is None:
                    continue
                if full in (first, second):
                    continue
                if min(evidence.scores[run.id] for run in (first, second, both)) <= floor:
                    near_floor += 1
                    continue
                cells.append(((one, two), [(1.0, first), (1.0, second), (-1.0, both)]))
        if not cells and not near_floor:
            continue
        found.append(
            {"factors": [grid.names[a], grid.names[b]], "near_floor": near_floor}
            | _excesses(evidence, full, cells)
        )
    return found


def _excesses(
    evidence: Evidence,
    full: Run,
    cells: Sequence[tuple[tuple[float, float], list[tuple[float, Run]]]],
) -> Data:
    rows, p_values = [], {}
    everything: list[tuple[float, Run]] = []
    for bits, terms in cells:
        whole = [*terms, (-1.0, full)]
        everything += [(weight / len(cells), run) for weight, run in whole]
        rows.append({"bits": list(bits), **estimate_data(evidence.combination(whole))})
        if full.id in evidence.resampled:
            drawn = sum((w * evidence.resampled[run.id] for w, run in whole), np.zeros(()))
            p_values[str(len(rows) - 1)] = normal_p(rows[-1]["value"], float(np.std(drawn)))
    significant = [int(key) for key, p in holm(p_values).items() if p < 0.05]
    return {
        "mean": estimate_data(evidence.combination(everything)) if cells else None,
        "cells": rows,
        "more_than_sum": sum(rows[index]["value"] > 0 for index in significant),
        "less_than_sum": sum(rows[index]["value"] < 0 for index in significant),
        "tested": bool(p_values),
    }


def normal_p(value: float, deviation: float) -> float:
    """Two-sided p-value of a mean that is normal around zero; bootstrap tails end at 1/B."""
    if deviation <= 0.0:
        return 1.0 if abs(value) < 1e-12 else 0.0
    return math.erfc(abs(value) / deviation / math.sqrt(2.0))


def compare_methods(grids: Sequence[Grid], evidence: Evidence, at_least: float) -> list[Data]:
    """Pairs of grids on the cells that both have: mean difference of their scores.

    Full precision is left out, and so are widths below ``at_least`` bits.
    """
    found = []
    for one, two in combinations(grids, 2):
        if one.factors != two.factors:
            continue
        shared = [
            bits
            for bits in sorted(one.cells.keys() & two.cells.keys())
            if min(bits) >= at_least
            and one.cells[bits].id != two.cells[bits].id
            and has(one.cells[bits], evidence.target)
            and has(two.cells[bits], evidence.target)
        ]
        if not shared:
            continue
        weight = 1.0 / len(shared)
        terms = [(weight, one.cells[bits]) for bits in shared]
        terms += [(-weight, two.cells[bits]) for bits in shared]
        found.append(
            {
                "a": one.label,
                "b": two.label,
                "factors": list(one.names),
                "cells": len(shared),
                "at_least": at_least,
                **estimate_data(evidence.combination(terms)),
            }
        )
    return found


def front(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the points that no other beats in size (``bpw``) and score, by size."""
    order = sorted(range(len(points)), key=lambda i: (points[i]["bpw"], -points[i]["score"]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index]["score"] > points[kept[-1]]["score"]:
            kept.append(index)
    return kept


def best_per_bin(
    grids: Sequence[Grid], evidence: Evidence, column: str, full: Run | None
) -> list[Data]:
    """The best run of every grid in bins of `BIN_BITS` bits per weight, [low, high).

    The best of many is the luckiest of many, too: the score that is shown tends to be too high.
    ``behind`` is the paired difference to the best of all grids in the bin, None for that one.
    """
    bins: dict[tuple[float, str], list[tuple[float, float, str, Run]]] = {}
    for grid in grids:
        for bits, run in grid.cells.items():
            bpw = run.number(column)
            if bpw is None or not has(run, evidence.target) or run is grid.full:
                continue
            low = math.floor(bpw / BIN_BITS + 1e-9) * BIN_BITS
            bins.setdefault((low, grid.label), []).append(
                (evidence.scores[run.id], -bpw, grid.widths(bits), run)
            )
    best = {key: max(members, key=lambda member: member[:2]) for key, members in bins.items()}
    rows = []
    for (low, label), (_, _, widths, run) in sorted(best.items(), key=lambda item: item[0]):
        leader = max((b for (at, _), b in best.items() if at == low), key=lambda b: b[:2])[3]
        rows.append(
            {
                "low": low,
                "high": low + BIN_BITS,
                "grid": label,
                "runs": len(bins[low, label]),
                "run": run.id,
                "widths": widths,
                "bpw": run.number(column),
                "behind": None
                if run is leader
                else estimate_data(evidence.combination([(1.0, run), (-1.0, leader)])),
                **(
                    {"score": estimate_data(evidence.score(run)), "difference": None}
                    if full is None
                    else _against(evidence, run, full)
                ),
            }
        )
    return rows


def smallest_reaching(grid: Grid, evidence: Evidence, column: str) -> list[Data]:
    """By goal (a share of full precision): the smallest run that reaches it.

    Of many noisy runs some reach a goal by luck. So ``certain`` is the size of the smallest run
    whose paired interval lies above the goal, None if there is none or no interval.
    """
    full = _full(grid, evidence.target)
    if full is None or evidence.scores[full.id] <= 0.0:
        return []
    sized = []
    for bits, run in grid.cells.items():
        bpw = run.number(column)
        if bpw is not None and has(run, evidence.target) and run is not full:
            sized.append((bpw, bits, run))
    sized.sort(key=lambda entry: entry[:2])
    lowest = {run.id: evidence.combination([(1.0, run), (-1.0, full)]).low for _, _, run in sized}
    rows: list[Data] = []
    for goal in GOALS:
        needed = goal * evidence.scores[full.id]
        allowed = needed - evidence.scores[full.id]
        certain = next(
            (
                bpw
                for bpw, _, run in sized
                if (low := lowest[run.id]) is not None and low >= allowed
            ),
            None,
        )
        reached = [entry for entry in sized if evidence.scores[entry[2].id] >= needed]
        if reached:
            bpw, bits, run = reached[0]
            rows.append(
                {
                    "goal": goal,
                    "bpw": bpw,
                    "certain": certain,
                    "widths": grid.widths(bits),
                    "run": run.id,
                    **_against(evidence, run, full),
                }
            )
        else:
            rows.append({"goal": goal, "bpw": None, "certain": None})
    return rows


def _full(grid: Grid, target: str) -> Run | None:
    return grid.full if grid.full is not None and has(grid.full, target) else None


def _at(grid: Grid, target: str, widths: Mapping[int, float]) -> Run | None:
    """The run with some widths, the other factors untouched."""
    bits = tuple(widths.get(axis, 16.0) for axis in range(len(grid.factors)))
    run = grid.cells.get(bits)
    return run if run is not None and has(run, target) else None


def _against(evidence: Evidence, run: Run, full: Run) -> Data:
    return {
        "score": estimate_data(evidence.score(run)),
        "difference": estimate_data(evidence.combination([(1.0, run), (-1.0, full)])),
    }
