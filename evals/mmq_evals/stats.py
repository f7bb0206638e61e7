# SPDX-License-Identifier: Apache-2.0
"""Intervals and paired tests of scores that come per sample.

Samples of one image move together: every function resamples clusters, which are images, and a
sample without a given cluster is its own. Results depend on the ids and the seed and not on the
order in which samples arrive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmq_evals.errors import EvalError

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
# Elements of a block of resampling weights: 32 MB of float64.
_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval around ``value``."""

    value: float
    low: float
    high: float
    samples: int
    clusters: int


@dataclass(frozen=True)
class PairedDifference:
    """The mean of ``a - b`` over equal ids, its interval, and a two-sided sign-flip p-value."""

    value: float
    low: float
    high: float
    p_value: float
    samples: int
    clusters: int


def bootstrap_mean(
    values: Mapping[str, float],
    clusters: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % interval of the mean over samples, by resampling clusters.

    Args:
        values: sample id to score.
        clusters: sample id to cluster id; default: every sample its own.

    Raises:
        EvalError: no values, a value that is not finite, or a sample without a cluster.
    """
    sums = _cluster_sums({key: (value, 1.0) for key, value in values.items()}, clusters)
    low, high = _percentiles(
        np.concatenate(
            [_ratio(block @ sums) for block in _bootstrap_weights(len(sums), resamples, seed)]
        )
    )
    value = float(_ratio(sums.sum(axis=0)))
    return Interval(value, low, high, len(values), len(sums))


def bootstrap_statistic(
    statistics: Mapping[str, Sequence[float]],
    function: Callable[[FloatArray], FloatArray],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """95 % interval of a function of sums, such as corpus BLEU.

    Args:
        statistics: cluster id to K additive statistics.
        function: maps summed statistics, shape (B, K), to values, shape (B,).

    Raises:
        EvalError: no clusters, or a statistic that is not finite.
    """
    sums = _cluster_sums(statistics, None)
    low, high = _percentiles(
        np.concatenate(
            [function(block @ sums) for block in _bootstrap_weights(len(sums), resamples, seed)]
        )
    )
    value = float(function(sums.sum(axis=0, keepdims=True))[0])
    return Interval(value, low, high, len(sums), len(sums))


def paired_difference(
    a: Mapping[str, float],
    b: Mapping[str, float],
    clusters: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """Mean of ``a - b`` over the same samples: joint bootstrap, and a sign-flip permutation test.

    Raises:
        EvalError: the ids differ, or as `bootstrap_mean`.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise EvalError(
            f"paired difference: expected equal ids, got {len(a)} and {len(b)}; in one only: "
            f"{odd[:5]}"
        )
    sums = _cluster_sums({key: (a[key] - b[key], 1.0) for key in a}, clusters)
    low, high = _percentiles(
        np.concatenate(
            [_ratio(block @ sums) for block in _bootstrap_weights(len(sums), resamples, seed)]
        )
    )
    total = sums[:, 0]
    observed = abs(total.sum())
    # Equal sums taken in another order may differ in the last bits; they count as ties.
    margin = 1e-9 * float(np.abs(total).sum())
    rng = np.random.default_rng(seed + 1)
    extreme = 0
    for size in _block_sizes(len(total), resamples):
        signs = rng.integers(0, 2, (size, len(total)), dtype=np.int8) * 2.0 - 1.0
        extreme += int((np.abs(signs @ total) >= observed - margin).sum())
    return PairedDifference(
        value=float(_ratio(sums.sum(axis=0))),
        low=low,
        high=high,
        p_value=(1 + extreme) / (1 + resamples),
        samples=len(a),
        clusters=len(sums),
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of a family of p-values."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[key]))
        adjusted[key] = worst
    return adjusted


def minimum_detectable_difference(sd_difference: float, samples: int) -> float:
    """Difference found with 80 % power at the 5 % level: 2.8 sd / sqrt(n), sd of paired scores."""
    return 2.8 * sd_difference / math.sqrt(samples)


def _cluster_sums(
    statistics: Mapping[str, Sequence[float]], clusters: Mapping[str, str] | None
) -> FloatArray:
    """Sums by cluster, shape (clusters, K), summed in the order of the sorted ids."""
    if not statistics:
        raise EvalError("statistics: expected at least one sample, got none")
    ids = sorted(statistics)
    values = np.array([statistics[key] for key in ids], dtype=np.float64)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise EvalError(
            f"statistics: expected finite scores, got {values[~finite][0]} at "
            f"{ids[int(np.argmin(finite))]!r}"
        )
    if clusters is None:
        return values
    missing = [key for key in ids if key not in clusters]
    if missing:
        raise EvalError(f"statistics: expected a cluster for every sample, none for {missing[:5]}")
    names = sorted({clusters[key] for key in ids})
    position = {name: index for index, name in enumerate(names)}
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, [position[clusters[key]] for key in ids], values)
    return sums


def _block_sizes(n: int, resamples: int) -> Iterator[int]:
    size = max(1, _BLOCK_ELEMENTS // n)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _bootstrap_weights(n: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Blocks of shape (b, n): how often each of n clusters was drawn in each of b resamples."""
    rng = np.random.default_rng(seed)
    for size in _block_sizes(n, resamples):
        drawn = rng.integers(0, n, (size, n))
        drawn += np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _ratio(sums: FloatArray) -> FloatArray:
    return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def _percentiles(values: FloatArray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
