# SPDX-License-Identifier: Apache-2.0
"""Recall at K: ties, NaN, hit rate, chance."""

from __future__ import annotations

import numpy as np
import pytest

from mmq_evals.errors import EvalError
from mmq_evals.metrics import best_rank, chance_recall, recall_at_k


def test_by_hand() -> None:
    scores = [[0.9, 0.5, 0.1], [0.2, 0.3, 0.4], [0.1, 0.7, 0.2]]
    result = recall_at_k(scores, [[0], [0], [2]], ks=(1, 2, 3))
    assert result.ranks == [0, 2, 1]
    assert result.recall == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})


def test_it_is_a_hit_rate_not_set_recall() -> None:
    # Five correct captions of ten; the first place is correct: 1.0, where set recall would be 0.2.
    scores = np.arange(10.0)[::-1][None]
    assert recall_at_k(scores, [range(5)], ks=(1,)).recall[1] == 1.0
    assert best_rank([5, 4, 3, 2], [1, 3]) == 1


def test_ties() -> None:
    assert best_rank([1, 1, 1, 0], [0]) == 2
    assert best_rank([1, 1, 1, 0], [0], ties="average") == 1
    # A tie among the correct ones costs nothing.
    assert best_rank([1, 1, 0], [0, 1]) == 0
    constant = np.zeros((100, 100))
    positives = [[n] for n in range(100)]
    for ties in ("pessimistic", "average"):
        assert recall_at_k(constant, positives, ties=ties).recall[1] <= 0.01


def test_nan_and_minus_infinity() -> None:
    result = recall_at_k([[np.nan, 0.0], [np.nan, np.nan]], [[0], [0]], ks=(1,))
    assert result.n_nan == 3
    assert result.ranks == [1, 1]
    assert best_rank([-np.inf, -np.inf, 3.0], [0]) == 2
    all_nan = recall_at_k(np.full((20, 20), np.nan), [[n] for n in range(20)])
    assert all_nan.recall[10] == 0.0


def test_chance_is_what_random_scores_get() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((20_000, 30))
    recall = recall_at_k(scores, [range(5)] * 20_000).recall
    for k in (1, 5, 10):
        assert recall[k] == pytest.approx(chance_recall(30, 5, k), abs=0.015)
    assert chance_recall(1000, 1, 1) == pytest.approx(0.001)
    assert chance_recall(3, 1, 10) == 1.0


def test_bad_input() -> None:
    with pytest.raises(EvalError, match="got shape"):
        recall_at_k([0.1, 0.2], [[0]])
    with pytest.raises(EvalError, match="2 > 0 queries"):
        recall_at_k([[0.1, 0.2]], [[0], [1]])
    with pytest.raises(EvalError, match=r"index in \[0, 2\), got \[2\]"):
        recall_at_k([[0.1, 0.2]], [[2]])
    with pytest.raises(EvalError, match="got \\[\\]"):
        recall_at_k([[0.1, 0.2]], [[]])
    with pytest.raises(EvalError, match="ties"):
        best_rank([1.0], [0], ties="optimistic")
