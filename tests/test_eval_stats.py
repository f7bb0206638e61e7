# SPDX-License-Identifier: Apache-2.0
"""Bootstrap and permutation on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmq_evals import quantiles, stats
from mmq_evals.errors import EvalError
from mmq_evals.metrics import bleu, bleu_from_statistics


def named(values: np.ndarray) -> dict[str, float]:
    return {f"s{index:04d}": float(value) for index, value in enumerate(values)}


def test_interval_of_a_mean_has_the_normal_width() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    interval = stats.bootstrap_mean(named(values))
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.05)
    assert (interval.samples, interval.clusters) == (400, 400)


def test_clusters_widen_the_interval() -> None:
    # Every image has four equal questions: four times the samples, no more information.
    values = named(np.repeat(np.random.default_rng(0).standard_normal(100), 4))
    clusters = {key: str(int(key[1:]) // 4) for key in values}
    free = stats.bootstrap_mean(values)
    tied = stats.bootstrap_mean(values, clusters)
    assert tied.clusters == 100
    assert tied.value == pytest.approx(free.value)
    assert (tied.high - tied.low) / (free.high - free.low) == pytest.approx(2.0, rel=0.1)


def test_coverage() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        a, b = rng.standard_normal(60), rng.standard_normal(60)
        difference = stats.paired_difference(named(a + 0.3), named(b), seed=trial, resamples=500)
        hits += difference.low <= 0.3 <= difference.high
    assert 180 <= hits <= 198


def test_sign_flip_p_values() -> None:
    rng = np.random.default_rng(1)
    base = rng.standard_normal(200)
    noise = rng.standard_normal(200)
    assert stats.paired_difference(named(base + 0.5), named(base)).p_value < 1e-3
    assert stats.paired_difference(named(base), named(base)).p_value == 1.0
    p_values = [
        stats.paired_difference(
            named(rng.standard_normal(40)), named(rng.standard_normal(40)), resamples=400
        ).p_value
        for _ in range(100)
    ]
    assert 0.3 < float(np.mean(p_values)) < 0.7
    # Exact for one pair of samples: both signs are as extreme.
    assert stats.paired_difference(named(noise[:1]), named(base[:1])).p_value == 1.0


def test_order_of_samples_changes_nothing() -> None:
    values = named(np.random.default_rng(2).standard_normal(50))
    other = {key: value * value for key, value in values.items()}
    clusters = {key: key[-1] for key in values}
    shuffled = dict(reversed(values.items()))
    assert stats.bootstrap_mean(values, clusters) == stats.bootstrap_mean(shuffled, clusters)
    assert stats.paired_difference(values, other, clusters) == stats.paired_difference(
        shuffled, other, clusters
    )
    assert stats.bootstrap_mean(values, seed=1) != stats.bootstrap_mean(values, seed=2)


def test_small_blocks_give_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = named(np.random.default_rng(2).standard_normal(50))
    whole = stats.bootstrap_mean(values, resamples=300)
    monkeypatch.setattr(stats, "_BLOCK_ELEMENTS", 50 * 7)
    assert stats.bootstrap_mean(values, resamples=300).low == pytest.approx(whole.low, rel=1e-12)


def test_bootstrap_of_bleu_statistics() -> None:
    refs = {str(n): [f"a b c d {n % 5} e f"] for n in range(40)}
    hyps = {str(n): f"a b c d {n % 3} e f" for n in range(40)}
    scores = bleu(refs, hyps, tokenizer="none")
    rows = {key: row.tolist() for key, row in zip(scores.per_image, scores.statistics, strict=True)}
    interval = stats.bootstrap_statistic(rows, lambda s: bleu_from_statistics(s)[:, 3])
    assert interval.value == pytest.approx(scores.corpus[3])
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_bootstrap_of_a_quantile_equals_repeated_values(q: float) -> None:
    rng = np.random.default_rng(0)
    # Unequal clusters, ties, and one image with most of the large values.
    values = {f"i{n}": rng.exponential(size=1 + n % 7).round(2).tolist() for n in range(60)}
    values["i9"] = [50.0 + n for n in range(40)]
    found = quantiles.bootstrap_quantile(values, q, seed=3, resamples=400)
    names = sorted(values)
    (weights,) = stats.bootstrap_weights(len(names), 400, 3)
    expected = [
        np.quantile([v for n, w in zip(names, row, strict=True) for v in values[n] * int(w)], q)
        for row in weights
    ]
    low, high = np.quantile(expected, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    flat = np.concatenate(list(values.values()))
    assert found.value == pytest.approx(np.quantile(flat, q), rel=1e-12)
    assert (found.samples, found.clusters) == (sum(map(len, values.values())), 60)
    # One image alone moves the interval: tokens of one image are not independent.
    apart = {f"{name} {n}": [v] for name, row in values.items() for n, v in enumerate(row)}
    if q == 0.99:
        assert found.high - found.low > 2.0 * _width(quantiles.bootstrap_quantile(apart, q))


def _width(interval: stats.Interval) -> float:
    return interval.high - interval.low


def test_quantiles_refuse() -> None:
    for values, q, message in [
        ({"a": [1.0]}, 1.5, "expected 0 to 1, got 1.5"),
        ({}, 0.5, "expected values in every cluster"),
        ({"a": [1.0], "b": []}, 0.5, r"got none for \['b'\]"),
        ({"a": [math.nan]}, 0.5, "expected finite values"),
    ]:
        with pytest.raises(EvalError, match=message):
            quantiles.bootstrap_quantile(values, q)


def test_holm_and_detectable_difference() -> None:
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert stats.minimum_detectable_difference(0.25, 1000) == pytest.approx(0.0221, abs=1e-4)


def test_detectable_difference_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(4)
    n, sd = 80, 0.7
    size = stats.minimum_detectable_difference(sd, n)
    found = 0
    for trial in range(200):
        base = rng.standard_normal(n)
        other = named(base + size + sd * rng.standard_normal(n))
        found += (
            stats.paired_difference(other, named(base), seed=trial, resamples=400).p_value < 0.05
        )
    assert 140 <= found <= 178


def test_detectable_difference_from_a_pilot() -> None:
    rng = np.random.default_rng(5)
    a, b = named(rng.standard_normal(4000)), named(rng.standard_normal(4000))
    expected = stats.minimum_detectable_difference(math.sqrt(2), 1000)
    assert stats.detectable_from_pilot(a, b, samples=1000) == pytest.approx(expected, rel=0.05)
    # Four equal questions an image: as much information as one.
    values = named(np.repeat(rng.standard_normal(500), 4))
    zero = dict.fromkeys(values, 0.0)
    clusters = {key: str(int(key[1:]) // 4) for key in values}
    free, tied = (stats.detectable_from_pilot(values, zero, c) for c in (None, clusters))
    assert tied / free == pytest.approx(2.0, rel=0.05)
    assert stats.detectable_line("cider", 1000).startswith(
        "cider: 1000 samples show differences of 2.21"
    )
    assert "of 0.56 " in stats.detectable_line("accuracy_always", 10_000)
    with pytest.raises(EvalError, match="expected at least 2 images, got 1"):
        stats.detectable_from_pilot({"x": 1.0}, {"x": 0.0})
    for sd, n in ((math.nan, 5), (-1.0, 5), (1.0, 0)):
        with pytest.raises(EvalError, match="expected samples >= 1 and a finite deviation >= 0"):
            stats.minimum_detectable_difference(sd, n)


def test_paired_statistics_of_sums() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal(60) + 0.4, rng.standard_normal(60)
    ones = {key: (value, 1.0) for key, value in named(a).items()}
    other = {key: (value, 1.0) for key, value in named(b).items()}
    plain = stats.paired_difference(named(a), named(b))

    def means(sums: np.ndarray) -> np.ndarray:
        return np.stack([sums[:, 0] / sums[:, 1], 3.0 * sums[:, 0] / sums[:, 1]], axis=1)

    # A mean is a function of sums, too: the same resamples and nearly the same test.
    mean, triple = stats.paired_statistics(ones, other, means)
    assert (mean.value, mean.low, mean.high, mean.p_value) == pytest.approx(
        (plain.value, plain.low, plain.high, plain.p_value), abs=1e-9
    )
    assert (triple.value, triple.low, triple.p_value) == pytest.approx(
        (3 * mean.value, 3 * mean.low, mean.p_value), abs=1e-9
    )
    assert 0.0 < mean.p_value < 0.5
    for same in stats.paired_statistics(ones, ones, means):
        assert (same.value, same.p_value) == (0.0, 1.0)
    with pytest.raises(EvalError, match="equal ids"):
        stats.paired_statistics(ones, {}, means)


def test_bad_input() -> None:
    with pytest.raises(EvalError, match=r"equal ids, got 2 and 1; in one only: \['y'\]"):
        stats.paired_difference({"x": 1.0, "y": 1.0}, {"x": 1.0})
    with pytest.raises(EvalError, match="at least one sample"):
        stats.bootstrap_mean({})
    with pytest.raises(EvalError, match=r"finite scores, got .*nan.* at 'y'"):
        stats.bootstrap_mean({"x": 1.0, "y": math.nan})
    with pytest.raises(EvalError, match=r"a cluster for every sample, none for \['y'\]"):
        stats.bootstrap_mean({"x": 1.0, "y": 1.0}, {"x": "i"})
