# SPDX-License-Identifier: Apache-2.0
"""Intervals of a quantile over values of which every image has several, such as one a token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mmq_evals.errors import EvalError
from mmq_evals.stats import RESAMPLES, FloatArray, Interval, bootstrap_weights, percentiles

IntArray = npt.NDArray[np.intp]


def bootstrap_quantile(
    values: Mapping[str, Sequence[float]], q: float, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """95 % interval of a quantile over all values, by resampling clusters.

    A resample's quantile is that of its values, each as often as its cluster was drawn, between
    two values interpolated as `numpy.quantile` does. ``samples`` of the result counts values.

    Args:
        values: cluster id to its values, any number of them.
        q: in [0, 1].

    Raises:
        EvalError: ``q`` out of range, no values in all or in a cluster, or one that is not finite.
    """
    if not 0.0 <= q <= 1.0:
        raise EvalError(f"quantile: expected 0 to 1, got {q}")
    names = sorted(values)
    empty = [name for name in names if len(values[name]) == 0]
    if not names or empty:
        raise EvalError(f"quantile: expected values in every cluster, got none for {empty[:5]}")
    counts = np.array([len(values[name]) for name in names])
    flat = np.concatenate([np.asarray(values[name], dtype=np.float64) for name in names])
    if not np.isfinite(flat).all():
        raise EvalError("quantile: expected finite values, got NaN or infinity")
    order = np.argsort(-flat, kind="stable")
    owner = np.repeat(np.arange(len(names)), counts)[order]
    found = [
        _quantiles(flat[order], owner, weights, weights @ counts, q)
        for weights in bootstrap_weights(len(names), resamples, seed)
    ]
    low, high = percentiles(np.concatenate(found))
    once = np.ones((1, len(names)))
    (value,) = _quantiles(flat[order], owner, once, once @ counts, q)
    return Interval(float(value), low, high, len(flat), len(names))


def _quantiles(
    falling: FloatArray, owner: IntArray, weights: FloatArray, totals: FloatArray, q: float
) -> FloatArray:
    """The quantile of each resample, shape (B,), from all values in falling order.

    Args:
        owner: the cluster of each value.
        weights: shape (B, clusters), how often each was drawn; ``totals`` values in all.
    """
    depth = (1.0 - q) * (totals - 1.0)  # how many of its values stand above the quantile
    above = np.floor(depth)
    below = np.minimum(above + 1.0, totals - 1.0)
    # A high quantile stands among the largest values: no more are weighted than are needed.
    count = min(len(falling), 32 + math.ceil(3.0 * (1.0 - q) * len(falling)))
    while True:
        reached = np.cumsum(weights[:, owner[:count]], axis=1)
        if count == len(falling) or (reached[:, -1] > below).all():
            break
        count = min(len(falling), 2 * count)
    upper, lower = (falling[(reached <= rank[:, None]).sum(axis=1)] for rank in (above, below))
    return np.asarray(upper + (depth - above) * (lower - upper))
