# SPDX-License-Identifier: Apache-2.0
"""Recall at K of image-text retrieval, as a hit rate.

A query is a hit at K if its best-ranked correct candidate stands among the first K. This is the
figure of the retrieval papers and not set recall, which for five correct captions could not pass
0.2 at K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmq_evals.errors import EvalError

TIES = ("pessimistic", "average")


@dataclass(frozen=True)
class RecallScores:
    """Recall at each K in [0, 1], the 0-based rank of every query, and the NaN scores met."""

    recall: dict[int, float]
    ranks: list[float]
    n_nan: int


def best_rank(
    scores: npt.ArrayLike, positives: Iterable[int], *, ties: str = "pessimistic"
) -> float:
    """0-based rank of the best correct candidate of one query.

    The number of candidates scored strictly above it, plus the number of incorrect candidates
    tied with it (``pessimistic``) or half of them (``average``). NaN counts as minus infinity. A
    model that scores all alike thus gets no credit for the order of its candidates.

    Args:
        scores: shape (candidates,).
        positives: indices of the correct candidates.

    Raises:
        EvalError: no positive, an index out of range, scores not of rank 1, unknown tie rule.
    """
    values = np.array(scores, dtype=np.float64)
    if values.ndim != 1:
        raise EvalError(f"best_rank: expected scores of rank 1, got shape {values.shape}")
    if ties not in TIES:
        raise EvalError(f"ties: expected one of {TIES}, got {ties!r}")
    correct = np.zeros(len(values), dtype=bool)
    indices = list(positives)
    if not indices or min(indices) < 0 or max(indices) >= len(values):
        raise EvalError(
            f"positives: expected at least one index in [0, {len(values)}), got {indices[:10]}"
        )
    correct[indices] = True
    values[np.isnan(values)] = -np.inf
    best = values[correct].max()
    above = int((values > best).sum())
    tied = int((values[~correct] == best).sum())
    return above + (tied if ties == "pessimistic" else tied / 2)


def recall_at_k(
    scores: npt.ArrayLike,
    positives: Sequence[Iterable[int]],
    *,
    ks: Sequence[int] = (1, 5, 10),
    ties: str = "pessimistic",
) -> RecallScores:
    """Share of queries whose best-ranked correct candidate has 0-based rank < K.

    Args:
        scores: shape (queries, candidates), higher is better, -inf for pairs not scored.
        positives: for each query the indices of its correct candidates.

    Raises:
        EvalError: scores not of rank 2, no queries, as many positives as queries missing, or as
            `best_rank`.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) == 0 or len(matrix) != len(positives):
        raise EvalError(
            f"recall_at_k: expected scores (queries, candidates) and {len(positives)} > 0 queries, "
            f"got shape {matrix.shape}"
        )
    ranks = [
        best_rank(row, correct, ties=ties) for row, correct in zip(matrix, positives, strict=True)
    ]
    recall = {k: sum(rank < k for rank in ranks) / len(ranks) for k in ks}
    return RecallScores(recall, ranks, int(np.isnan(matrix).sum()))


def chance_recall(n_candidates: int, n_positives: int, k: int) -> float:
    """Expected hit at K of one query when candidates are in random order."""
    if not 0 < n_positives <= n_candidates:
        raise EvalError(f"expected 1..{n_candidates} positives, got {n_positives}")
    incorrect = n_candidates - n_positives
    return 1.0 - math.comb(incorrect, min(k, n_candidates)) / math.comb(
        n_candidates, min(k, n_candidates)
    )
