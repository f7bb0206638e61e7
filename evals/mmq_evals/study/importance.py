# SPDX-License-Identifier: Apache-2.0
"""Importance of factors: exact shares of variance by range of widths, with their spread.

Importance belongs to a range: one level at which a model collapses decides it. So every share
stands beside its range, ranges are compared on the levels that all factors and methods share, and
a factor that lacks a level which others have is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Any

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.stats import FloatArray, percentiles
from mmq_evals.study.anova import Decomposition, complete_grid, decompose, regress
from mmq_evals.study.evidence import Evidence
from mmq_evals.study.table import FULL_BITS, Grid, has

Data = dict[str, Any]
Levels = list[list[float]]

COMMON = "common levels"
LEVEL_RESAMPLES = 1_000
# Above this share of sampling noise in the variance of the cells their shares mean little.
NOISY = 0.5


@dataclass(frozen=True)
class Range:
    """Widths from ``low`` to ``high`` bits, both included, of one factor or of all."""

    name: str
    low: float = 0.0
    high: float = 32.0
    factor: str | None = None

    @classmethod
    def parse(cls, text: str) -> Range:
        """From "all", ">=3", "3-8", or "language>=3": that factor alone is bounded.

        Raises:
            EvalError: anything else, or no width between the bounds.
        """
        if text == "all":
            return cls(text)
        at_least = re.fullmatch(r"([\w.]*)\s*>=\s*(\d+(?:\.\d+)?)", text)
        if at_least:
            return cls(text.replace(" ", ""), float(at_least[2]), factor=at_least[1] or None)
        bounds = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
        if bounds is None or float(bounds[1]) > float(bounds[2]):
            raise EvalError(f"range: expected all, >=3, 3-8 or language>=3, got {text!r}")
        return cls(text, float(bounds[1]), float(bounds[2]))

    def of(self, names: Sequence[str], levels: Levels) -> Levels:
        """The levels of factors within the range."""
        return [
            [w for w in axis if self.factor not in (None, name) or self.low <= w <= self.high]
            for name, axis in zip(names, levels, strict=True)
        ]


DEFAULT_RANGES = (Range("all"), Range(">=3", 3.0), Range(">=4", 4.0))


def missing_levels(names: Sequence[str], levels: Levels) -> list[str]:
    """A line for each factor that lacks a level which another has. One that never varies is none
    of the grid's, and has no share."""
    varying = [(n, a) for n, a in zip(names, levels, strict=True) if len(a) > 1]
    if not varying:
        return []
    names, levels = [n for n, _ in varying], [a for _, a in varying]
    union = sorted(set().union(*levels))
    lines = []
    for name, axis in zip(names, levels, strict=True):
        missing = [width for width in union if width not in axis]
        if missing:
            holders = [n for n, a in zip(names, levels, strict=True) if set(missing) & set(a)]
            lines.append(
                f"{name} has no {', '.join(f'{width:g}' for width in missing)} bits, "
                f"{' and '.join(holders)} {'have' if len(holders) > 1 else 'has'}: shares of the "
                "whole grid are not comparable between them"
            )
    return lines


def common_levels(grids: Sequence[Grid], target: str) -> list[float]:
    """The widths that every factor of every grid has."""
    axes = [set(axis) for grid in grids for axis in grid.levels(target)]
    return sorted(set.intersection(*axes)) if axes else []


def importance(
    grid: Grid,
    evidence: Evidence,
    ranges: Sequence[Range] = DEFAULT_RANGES,
    *,
    common: Sequence[float] = (),
    incomplete: str = "refuse",
    weights: Mapping[float, float] | None = None,
    seed: int = 0,
) -> list[Data]:
    """Shares of the variance of a grid's scores, for every range.

    Args:
        common: if not empty, one more range of these widths in every factor.
        incomplete: where cells are missing, the largest complete factorial of some factors is
            taken with the others untouched (``fixed``). Where there is none, "refuse" gives a
            reason instead of shares, and "regress" fits main effects and pairs by least squares.
        weights: of widths, the same for every factor; default: equal.
        seed: of the resampling of levels, where there are no scores per sample.

    Returns:
        For each range ``shares`` by set of factors, ``shapley`` by factor, ``kind`` (exact,
        regression or refused), mean and deviation of the cells, ``noise`` (the share of their
        variance that sampling explains; None if unknown) and what ``spread`` is over.

    Raises:
        EvalError: ``incomplete`` is neither, or a weight is missing or negative.
    """
    if incomplete not in ("refuse", "regress"):
        raise EvalError(f"incomplete: expected refuse or regress, got {incomplete!r}")
    levels = grid.levels(evidence.target)
    wanted = [(span.name, span.of(grid.names, levels)) for span in ranges]
    if common:
        wanted.append((COMMON, [list(common)] * len(levels)))
    found, seen = [], []
    for name, chosen in wanted:
        if chosen in seen:
            continue  # the range leaves nothing out that an earlier one has
        seen.append(chosen)
        head: Data = {"range": name, "levels": dict(zip(grid.names, chosen, strict=True))}
        head["fixed"] = []
        found.append(head | _one_range(grid, evidence, chosen, incomplete, weights, seed))
    return found


def _one_range(
    grid: Grid,
    evidence: Evidence,
    levels: Levels,
    incomplete: str,
    weights: Mapping[float, float] | None,
    seed: int,
) -> Data:
    varying = [axis for axis, known in enumerate(grid.levels(evidence.target)) if len(known) > 1]
    if 0 < len(varying) < len(levels):
        moved = _slice(grid, evidence.target, [set(axis) for axis in levels], varying)
        inner = [levels[axis] for axis in varying]
        found = _one_range(moved, evidence, inner, incomplete, weights, seed)
        fixed = [name for name in grid.names if name not in moved.names]
        return found | {"fixed": [*fixed, *found.get("fixed", ())]}
    reason = _unusable(grid, evidence.target, levels)
    if reason:
        return _refused(reason)
    scores = grid.scored(evidence.target)
    try:
        values = complete_grid(scores, levels)
    except EvalError as error:
        part = _largest_slice(grid, evidence.target, levels)
        if part is not None:
            found = _one_range(
                part, evidence, part.levels(evidence.target), "refuse", weights, seed
            )
            fixed = [name for name in grid.names if name not in part.names]
            return found | {"fixed": fixed, "levels": levels_by_name(part, evidence.target)}
        if incomplete == "refuse":
            return _refused(str(error))
        inside = {
            bits: score
            for bits, score in scores.items()
            if all(width in axis for width, axis in zip(bits, levels, strict=True))
        }
        return _regression(grid.names, inside, str(error))
    return _exact(grid, evidence, levels, values, weights, seed)


def _unusable(grid: Grid, target: str, levels: Levels) -> str:
    """Why a range says nothing: a factor has no level in it, or one of several."""
    empty = [name for name, axis in zip(grid.names, levels, strict=True) if not axis]
    if empty:
        return f"no level of {', '.join(empty)} in this range"
    # A factor that never varies has no share, but its one level stays in every cell.
    single = [
        name
        for name, axis, known in zip(grid.names, levels, grid.levels(target), strict=True)
        if len(axis) == 1 and (len(known) > 1 or max(map(len, levels)) == 1)
    ]
    return f"{', '.join(single)}: one level in this range" if single else ""


def joint_grid(grid: Grid, target: str) -> Grid:
    """The factors that vary together: the grid itself, or its largest complete part."""
    levels = grid.levels(target)
    varying = [axis for axis, known in enumerate(levels) if len(known) > 1]
    if 0 < len(varying) < len(levels):
        grid = _slice(grid, target, [set(axis) for axis in levels], varying)
        levels = grid.levels(target)
    if prod(map(len, levels)) == len(grid.scored(target)):
        return grid
    return _largest_slice(grid, target, levels) or grid


def _largest_slice(grid: Grid, target: str, levels: Levels) -> Grid | None:
    """The largest complete factorial of two or more factors with the others untouched."""
    for size in range(len(levels) - 1, 1, -1):
        slices = []
        for axes in combinations(range(len(levels)), size):
            part = _slice(grid, target, [set(axis) for axis in levels], axes)
            lengths = [len(axis) for axis in part.levels(target)]
            if part.cells and min(lengths) > 1 and prod(lengths) == len(part.cells):
                slices.append(part)
        if slices:
            return max(slices, key=lambda part: len(part.cells))
    return None


def _slice(grid: Grid, target: str, levels: Sequence[set[float]], axes: Sequence[int]) -> Grid:
    """Some factors of a grid within some levels, the others at the one width that they have, or
    untouched if they have several."""
    at = [known[0] if len(known) == 1 else FULL_BITS for known in grid.levels(target)]
    cells = {
        tuple(bits[axis] for axis in axes): run
        for bits, run in grid.cells.items()
        if has(run, target)
        and all(bits[axis] in levels[axis] for axis in axes)
        and all(w == at[axis] for axis, w in enumerate(bits) if axis not in axes)
    }
    return replace(
        grid,
        factors=tuple(grid.factors[axis] for axis in axes),
        names=tuple(grid.names[axis] for axis in axes),
        cells=cells,
    )


def levels_by_name(grid: Grid, target: str) -> dict[str, list[float]]:
    """The widths of every factor by name."""
    return dict(zip(grid.names, grid.levels(target), strict=True))


def _refused(reason: str) -> Data:
    return {"kind": "refused", "reason": reason}


def _regression(names: Sequence[str], cells: Mapping[tuple[float, ...], float], why: str) -> Data:
    try:
        fit = regress(cells)
    except EvalError as error:
        return _refused(f"{why}; {error}")
    values = np.array(list(cells.values()))
    return {
        "kind": "regression",
        "reason": f"{why}; least squares on {len(cells)} cells",
        "cells": len(cells),
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "shares": [
            {"factors": [names[axis] for axis in subset], "value": part, "low": None, "high": None}
            for subset, part in fit.parts.items()
        ],
        "shapley": [
            {"factor": name, "value": part, "low": None, "high": None}
            for name, part in zip(names, fit.shapley, strict=True)
        ],
        "explained": fit.explained,
        "noise": None,
        "spread": "none",
    }


def _exact(
    grid: Grid,
    evidence: Evidence,
    levels: Levels,
    values: FloatArray,
    weights: Mapping[float, float] | None,
    seed: int,
) -> Data:
    measures = None if weights is None else [_weights(weights, axis) for axis in levels]
    exact = decompose(values, len(levels), measures)
    if not float(exact.variance) > 0.0:
        return _refused("all cells have the same score")
    noise = None
    if evidence.resampled:
        drawn = _resampled_cells(grid, evidence, levels)
        spread, copies = "samples", decompose(drawn, len(levels), measures)
        noise = _noise(drawn) / float(exact.variance)
    else:
        spread, copies = "levels", _over_levels(values, measures, seed)
    return {
        "kind": "exact",
        "cells": int(values.size),
        "mean": float(exact.mean),
        "deviation": float(np.sqrt(exact.variance)),
        "shares": [
            {"factors": [grid.names[axis] for axis in subset]} | part
            for subset, part in _with_spread(exact.shares(), copies.shares()).items()
        ],
        "shapley": [
            {"factor": name} | part
            for name, part in zip(
                grid.names,
                _with_spread(
                    dict(enumerate(exact.shapley())), dict(enumerate(copies.shapley()))
                ).values(),
                strict=True,
            )
        ],
        "noise": noise,
        "spread": spread,
    }


def _weights(weights: Mapping[float, float], levels: Sequence[float]) -> FloatArray:
    missing = [width for width in levels if width not in weights]
    if missing:
        raise EvalError(f"level weights: none for {', '.join(f'{w:g}' for w in missing)} bits")
    return np.array([weights[width] for width in levels], dtype=np.float64)


def _with_spread(
    values: Mapping[Any, FloatArray], copies: Mapping[Any, FloatArray]
) -> dict[Any, Data]:
    spread = {}
    for key, value in values.items():
        finite = copies[key][np.isfinite(copies[key])]
        low, high = percentiles(finite) if finite.size else (None, None)
        spread[key] = {"value": float(value), "low": low, "high": high}
    return spread


def _resampled_cells(grid: Grid, evidence: Evidence, levels: Levels) -> FloatArray:
    """Shape (resamples, L_1, .., L_d)."""
    cells = {bits: evidence.resampled.get(run.id) for bits, run in grid.cells.items()}
    shape = [len(axis) for axis in levels]
    index = np.stack(np.meshgrid(*levels, indexing="ij"), axis=-1).reshape(-1, len(levels))
    columns = [cells[tuple(map(float, bits))] for bits in index]
    return np.stack([c for c in columns if c is not None], axis=-1).reshape(-1, *shape)


def _noise(drawn: FloatArray) -> float:
    """Variance among cells that resampling alone makes: what moves all cells at once is none."""
    flat = drawn.reshape(len(drawn), -1)
    apart = flat - flat.mean(axis=1, keepdims=True)
    return float(apart.var(axis=0).mean())


def _over_levels(
    values: FloatArray, measures: Sequence[FloatArray] | None, seed: int
) -> Decomposition:
    """The decomposition under resampled levels: how far shares hang on which widths were tried."""
    rng = np.random.default_rng(seed)
    drawn = []
    for axis, length in enumerate(values.shape):
        even = np.full(length, 1.0 / length)
        share = even if measures is None else measures[axis] / measures[axis].sum()
        drawn.append(rng.multinomial(length, share, size=LEVEL_RESAMPLES).astype(np.float64))
    copies = np.broadcast_to(values, (LEVEL_RESAMPLES, *values.shape))
    return decompose(copies, values.ndim, drawn)
