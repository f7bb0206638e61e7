# SPDX-License-Identifier: Apache-2.0
"""What the draw of the calibration samples does to a score, and what single options do.

Two sources of doubt stand beside each other: the items of the test, over which intervals are
resampled, and the calibration's seed, over which runs are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmq_evals.stats import holm
from mmq_evals.study.effects import estimate_data, normal_p
from mmq_evals.study.evidence import Evidence
from mmq_evals.study.table import SEED, Grid, Run, base_of, has

Data = dict[str, Any]


def runs_of(grid: Grid) -> list[Run]:
    """All runs of a grid, repetitions among them."""
    return [*grid.cells.values(), *(run for runs in grid.repetitions.values() for run in runs[1:])]


def seed_spread(grid: Grid, evidence: Evidence) -> list[Data]:
    """By repeated cell: mean of the scores over seeds, their standard deviation and range.

    ``sampling`` is the standard deviation of the same differences (of a run from the mean of all)
    that resampled items alone would make, None without scores per sample.
    """
    rows = []
    for bits, every in sorted(grid.repetitions.items()):
        runs = [run for run in every if has(run, evidence.target)]
        if len(runs) < 2:
            continue
        scores = np.array([evidence.scores[run.id] for run in runs])
        sampling = None
        if all(run.id in evidence.resampled for run in runs):
            drawn = np.stack([evidence.resampled[run.id] for run in runs])
            apart = drawn - drawn.mean(axis=0)
            freed = len(runs) / (len(runs) - 1)
            sampling = math.sqrt(freed * float(apart.var(axis=1).mean()))
        rows.append(
            {
                "grid": grid.label,
                "widths": grid.widths(bits),
                "seeds": len(runs),
                "mean": float(scores.mean()),
                "deviation": float(scores.std(ddof=1)),
                "lowest": float(scores.min()),
                "highest": float(scores.max()),
                "sampling": sampling,
            }
        )
    return rows


def compare_options(grids: Sequence[Grid], evidence: Evidence) -> list[Data]:
    """Grids with options beside those without, cell by cell over the seeds that both have.

    Returns:
        For each cell the mean difference with its interval over items, the lowest and highest of
        single seeds, and ``adjusted``, its p-value by Holm over all rows (None without scores per
        sample).
    """
    rows: list[Data] = []
    p_values: dict[str, float] = {}
    for grid in grids:
        base = base_of(grid, grids)
        if base is None:
            continue
        for bits in sorted(grid.cells.keys() & base.cells.keys()):
            if grid.cells[bits] is grid.full:
                continue
            one, two = (_by_seed(g, bits, evidence.target) for g in (grid, base))
            seeds = sorted(one.keys() & two.keys())
            if not seeds:
                continue
            weight = 1.0 / len(seeds)
            terms = [(weight, one[seed]) for seed in seeds] + [(-weight, two[s]) for s in seeds]
            single = [evidence.scores[one[s].id] - evidence.scores[two[s].id] for s in seeds]
            if all(run.id in evidence.resampled for _, run in terms):
                drawn = sum((w * evidence.resampled[run.id] for w, run in terms), np.zeros(()))
                p_values[str(len(rows))] = normal_p(sum(single) * weight, float(np.std(drawn)))
            rows.append(
                {
                    "grid": grid.label,
                    "base": base.label,
                    "options": list(grid.options),
                    "widths": grid.widths(bits),
                    "seeds": len(seeds),
                    "lowest": min(single),
                    "highest": max(single),
                    **estimate_data(evidence.combination(terms)),
                    "adjusted": None,
                }
            )
    for key, p in holm(p_values).items():
        rows[int(key)]["adjusted"] = p
    return rows


def _by_seed(grid: Grid, bits: tuple[float, ...], target: str) -> Mapping[float, Run]:
    runs = grid.repetitions.get(bits, (grid.cells[bits],))
    return {run.number(SEED) or 0.0: run for run in runs if has(run, target)}
