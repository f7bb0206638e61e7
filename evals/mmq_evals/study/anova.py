# SPDX-License-Identifier: Apache-2.0
"""Exact functional ANOVA of a complete factorial grid, and Shapley shares of its variance.

Cells y[i_1 .. i_d] under a product of level weights (equal by default): mu is their mean. For a set
S of factors, f_S = the mean over the other axes minus all f_U of proper subsets U, f_{} = mu; V_S =
the mean of f_S^2, and the V_S sum to Var(y). A factor's Shapley share is the sum of V_S / |S| over
the sets S that hold it. No model is fitted: shares are facts about the grid, and about it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import factorial

import numpy as np
import numpy.typing as npt

from mmq_evals.errors import EvalError

FloatArray = npt.NDArray[np.float64]
Subset = tuple[int, ...]

MAX_FACTORS = 10
MAX_REGRESSED = 6
# Scores that differ by less than this share of the largest are equal: rounding is no variance.
EQUAL = 1e-12


@dataclass(frozen=True)
class Decomposition:
    """Mean and variance of a grid, and ``parts``: variance by set of axes (0-based, not empty).

    All are arrays of the batch's shape, () for a single grid.
    """

    mean: FloatArray
    variance: FloatArray
    parts: Mapping[Subset, FloatArray]

    def shares(self) -> dict[Subset, FloatArray]:
        """Parts over the variance; NaN for a grid whose cells are all equal."""
        return {subset: _over(part, self.variance) for subset, part in self.parts.items()}

    def shapley(self) -> list[FloatArray]:
        """Shares of every axis; they sum to 1 as well."""
        axes = max(len(subset) for subset in self.parts)
        return [
            _over(
                sum(
                    (part / len(subset) for subset, part in self.parts.items() if axis in subset),
                    start=np.zeros_like(self.variance),
                ),
                self.variance,
            )
            for axis in range(axes)
        ]


def decompose(
    values: FloatArray, axes: int, weights: Sequence[FloatArray] | None = None
) -> Decomposition:
    """Decompose the variance of the last ``axes`` dimensions; those before them are a batch.

    Args:
        values: shape (..., L_1, .., L_d).
        axes: d.
        weights: by axis, shape (L_i,) or (..., L_i) with the batch; not negative, some positive.

    Raises:
        EvalError: d is not from 1 to `MAX_FACTORS`, a value is not finite, or weights do not fit.
    """
    if not 1 <= axes <= min(values.ndim, MAX_FACTORS):
        raise EvalError(f"anova: expected 1 to {MAX_FACTORS} factors, got {axes}")
    if not np.isfinite(values).all():
        raise EvalError("anova: expected finite scores in every cell")
    measures = _measures(values, axes, weights)
    # Rounding of a mean of large numbers must not look like variance.
    shift = values.mean(axis=tuple(range(values.ndim - axes, values.ndim)), keepdims=True)
    centred = values - shift
    effects: dict[Subset, FloatArray] = {(): _mean(centred, measures, range(axes))}
    parts: dict[Subset, FloatArray] = {}
    for subset in subsets(axes):
        others = [axis for axis in range(axes) if axis not in subset]
        effect = _mean(centred, measures, others)
        for inner, known in effects.items():
            if set(inner) < set(subset):
                effect = effect - known
        effects[subset] = effect
        parts[subset] = _drop(_mean(effect**2, measures, subset), axes)
    mean = effects[()]
    variance = _drop(_mean((centred - mean) ** 2, measures, range(axes)), axes)
    variance = np.where(variance <= (EQUAL * float(np.abs(values).max())) ** 2, 0.0, variance)
    return Decomposition(_drop(mean + shift, axes), variance, parts)


def subsets(axes: int) -> Iterator[Subset]:
    """All sets of axes that are not empty, small ones first."""
    for size in range(1, axes + 1):
        yield from combinations(range(axes), size)


def complete_grid(
    cells: Mapping[tuple[float, ...], float], levels: Sequence[Sequence[float]]
) -> FloatArray:
    """The cells of a product of levels as an array.

    Raises:
        EvalError: a cell is missing; how many are, and the first of them.
    """
    wanted = list(product(*levels))
    missing = [bits for bits in wanted if bits not in cells]
    if missing:
        shown = ", ".join("/".join(f"{width:g}" for width in bits) for bits in missing[:3])
        raise EvalError(
            f"incomplete grid: {len(missing)} of {len(wanted)} cells are missing, the first {shown}"
        )
    return np.array([cells[bits] for bits in wanted]).reshape([len(axis) for axis in levels])


@dataclass(frozen=True)
class Regression:
    """What least squares say of a grid that is not complete; all as shares of the variance.

    ``parts`` are those of one or two axes, ``shapley`` those of every axis, which sum to
    ``explained`` (R^2). What is missing to 1 is triple interaction, or noise.
    """

    parts: Mapping[Subset, float]
    shapley: Sequence[float]
    explained: float


def regress(cells: Mapping[tuple[float, ...], float]) -> Regression:
    """Fit categorical main effects and pairwise interactions of every set of factors.

    A part is the inclusion-exclusion of R^2 over the subsets of its set, a Shapley share Shapley's
    value of the game R^2. On a complete grid without triple interactions both equal `decompose`.

    Raises:
        EvalError: more than `MAX_REGRESSED` factors, or cells that are all equal.
    """
    keys = sorted(cells)
    axes = len(keys[0])
    if axes > MAX_REGRESSED:
        raise EvalError(f"regression: expected at most {MAX_REGRESSED} factors, got {axes}")
    values = np.array([cells[key] for key in keys])
    centred = values - values.mean()
    total = float((centred**2).sum())
    if total <= (EQUAL * float(np.abs(values).max())) ** 2 * len(values):
        raise EvalError("regression: all cells have the same score")
    codes = [np.unique([key[axis] for key in keys], return_inverse=True)[1] for axis in range(axes)]

    def fitted(chosen: Subset) -> float:
        columns = [np.ones((len(keys), 1)), *(_indicators(codes[axis]) for axis in chosen)]
        columns += [
            _indicators(codes[a] * (int(codes[b].max()) + 1) + codes[b])
            for a, b in combinations(chosen, 2)
        ]
        design = np.concatenate(columns, axis=1)
        solution = np.linalg.lstsq(design, centred, rcond=None)[0]
        return 1.0 - float(((centred - design @ solution) ** 2).sum()) / total

    game = {(): 0.0} | {subset: fitted(subset) for subset in subsets(axes)}
    shapley = []
    for axis in range(axes):
        value = 0.0
        for subset in game:
            if axis not in subset:
                orders = factorial(len(subset)) * factorial(axes - len(subset) - 1)
                gain = game[tuple(sorted((*subset, axis)))] - game[subset]
                value += orders / factorial(axes) * gain
        shapley.append(value)
    parts: dict[Subset, float] = {(axis,): game[axis,] for axis in range(axes)}
    for a, b in combinations(range(axes), 2):
        parts[a, b] = game[a, b] - game[a,] - game[b,]
    return Regression(parts, shapley, game[tuple(range(axes))])


def _indicators(codes: npt.NDArray[np.int64]) -> FloatArray:
    dense = np.unique(codes, return_inverse=True)[1]
    return np.eye(int(dense.max()) + 1)[dense]


def _measures(
    values: FloatArray, axes: int, weights: Sequence[FloatArray] | None
) -> list[FloatArray]:
    """Normalised weights of every axis, shaped to multiply ``values``."""
    batch, shape = values.shape[: values.ndim - axes], values.shape[values.ndim - axes :]
    if weights is None:
        weights = [np.ones(length) for length in shape]
    if len(weights) != axes:
        raise EvalError(f"anova: expected weights for {axes} factors, got {len(weights)}")
    measures = []
    for axis, (weight, length) in enumerate(zip(weights, shape, strict=True)):
        good = weight.shape in ((length,), (*batch, length))
        if not good or (weight < 0).any() or (weight.sum(axis=-1) <= 0).any():
            raise EvalError(
                f"anova: expected {length} weights of factor {axis}, none negative, got "
                f"{weight.tolist() if weight.ndim == 1 else weight.shape}"
            )
        normal = weight / weight.sum(axis=-1, keepdims=True)
        ones = (1,) * (axes - axis - 1)
        lead = normal.shape[:-1] if weight.ndim > 1 else (1,) * len(batch)
        measures.append(normal.reshape(*lead, *(1,) * axis, length, *ones))
    return measures


def _mean(values: FloatArray, measures: Sequence[FloatArray], over: Sequence[int]) -> FloatArray:
    """Weighted mean over some axes, which stay with length 1."""
    axes = len(measures)
    for axis in over:
        values = (values * measures[axis]).sum(axis=axis - axes, keepdims=True)
    return values


def _drop(values: FloatArray, axes: int) -> FloatArray:
    return values.reshape(values.shape[: values.ndim - axes])


def _over(part: FloatArray, variance: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(variance > 0, part / variance, np.nan))
