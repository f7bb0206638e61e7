# SPDX-License-Identifier: Apache-2.0
"""What rows amount to: corpus scores, paired differences, agreement with another run.

Pure functions of rows that carry their ``scores``; what kind of row it is (a caption, an answer, a
query of retrieval) is told by its fields. A corpus score that is no mean of the rows' scores (BLEU,
the mean of both directions of retrieval) is a function of sums, over which its interval and its
paired difference are formed as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.metrics.agreement import answer_flips, identical_captions, rank_correlation
from mmq_evals.metrics.caption import (
    BleuScores,
    DocumentFrequency,
    bleu,
    bleu_from_statistics,
    cider,
    document_frequency,
)
from mmq_evals.metrics.java import MeteorScores, meteor_from_statistics
from mmq_evals.metrics.retrieval import best_rank
from mmq_evals.rows import Row
from mmq_evals.stats import (
    FloatArray,
    Interval,
    PairedDifference,
    bootstrap_mean,
    bootstrap_statistics,
    paired_difference,
    paired_statistics,
)

KS = (1, 5, 10)


@dataclass(frozen=True)
class CorpusScores:
    """Scores called ``names`` as a function of the ``sums`` of every image: (B, K) to (B, M)."""

    names: tuple[str, ...]
    sums: dict[str, list[float]]
    function: Callable[[FloatArray], FloatArray]

    def intervals(self, seed: int) -> dict[str, Interval]:
        """Values with intervals, by resampling images."""
        found = bootstrap_statistics(self.sums, self.function, seed=seed)
        return dict(zip(self.names, found, strict=True))

    def minus(self, other: CorpusScores, seed: int) -> dict[str, PairedDifference]:
        """Paired differences to the same scores of another run over the same images."""
        found = paired_statistics(self.sums, other.sums, self.function, seed=seed)
        return dict(zip(self.names, found, strict=True))


def bleu_corpus(scores: BleuScores) -> CorpusScores:
    """BLEU-1..4 of a corpus."""
    sums = zip(scores.per_image, scores.statistics.tolist(), strict=True)
    return CorpusScores(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), dict(sums), bleu_from_statistics)


def meteor_corpus(scores: MeteorScores) -> CorpusScores:
    """METEOR of a corpus."""
    sums = zip(scores.per_image, map(list, scores.statistics), strict=True)
    return CorpusScores(("meteor",), dict(sums), lambda s: meteor_from_statistics(s)[:, None])


def retrieval_scores(row: Mapping[str, Any], *, ties: str = "pessimistic") -> dict[str, float]:
    """Hits at 1, 5 and 10 of one query and their mean, called by its direction and ``r_mean``.

    Args:
        row: ``direction`` ("txt": an image asks for texts, or "img"), ``candidates`` by index,
            their scores as ``prediction`` (None for NaN), ``of`` (candidates in all),
            ``positives`` (indices of the correct ones).
        ties: rule for equal scores, one of `mmq_evals.metrics.retrieval.TIES`.

    Raises:
        EvalError: as `best_rank`.
    """
    scores = np.full(row["of"], -np.inf)
    scores[row["candidates"]] = [-np.inf if score is None else score for score in row["prediction"]]
    rank = best_rank(scores, row["positives"], ties=ties)
    hits = {f"{row['direction']}_r{k}": float(rank < k) for k in KS}
    mean = sum(hits.values()) / len(KS)
    return {**hits, f"{row['direction']}_r_mean": mean, "r_mean": mean}


def retrieval_corpus(rows: Sequence[Row]) -> CorpusScores | None:
    """Mean of the two directions' mean recalls; None if a direction has no queries.

    Images differ in their number of captions, so that it is a mean of ratios. By image: sum over
    its queries for texts, their number, and the same of its captions' queries for images.
    """
    sums: dict[str, list[float]] = {}
    for row in rows:
        columns = sums.setdefault(row["cluster"], [0.0] * 4)
        first = 0 if row["direction"] == "txt" else 2
        columns[first] += row["scores"][f"{row['direction']}_r_mean"]
        columns[first + 1] += 1.0
    if len({row["direction"] for row in rows}) < 2:
        return None
    return CorpusScores(("r_mean",), sums, _mean_of_directions)


def _mean_of_directions(sums: FloatArray) -> FloatArray:
    return np.asarray(sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3])[:, None] / 2.0


def _corpus(rows: Sequence[Row]) -> CorpusScores | None:
    if "references" in rows[0]:
        references = {row["id"]: row["references"] for row in rows}
        return bleu_corpus(bleu(references, {row["id"]: row["prediction"] for row in rows}))
    return retrieval_corpus(rows) if "direction" in rows[0] else None


def score_rows(rows: Sequence[Row], *, seed: int = 0) -> dict[str, Interval]:
    """Every score of a corpus with its interval, by metric.

    Raises:
        EvalError: no rows, or a score that is not finite.
    """
    _check_some(rows)
    clusters = clusters_of(rows)
    result = {
        metric: bootstrap_mean(values, clusters, seed=seed)
        for metric, values in by_metric(rows).items()
    }
    corpus = _corpus(rows)
    if corpus is None:
        result.pop("r_mean", None)  # of one direction alone: there is no mean of two
        return result
    return result | corpus.intervals(seed)


def paired_rows(
    rows: Sequence[Row], reference: Sequence[Row], *, seed: int = 0
) -> dict[str, PairedDifference]:
    """``rows`` minus ``reference`` in every score of the corpus that both have, over the same ids.

    Raises:
        EvalError: no rows, different ids, or a score that is not finite.
    """
    _check_some(rows)
    mine, theirs = by_metric(rows), by_metric(reference)
    clusters = clusters_of(rows)
    result = {
        metric: paired_difference(values, theirs[metric], clusters, seed=seed)
        for metric, values in mine.items()
        if metric in theirs
    }
    corpus, other = _corpus(rows), _corpus(reference)
    if corpus is not None and other is not None:
        result |= corpus.minus(other, seed)
    return result


def agreement_rows(
    rows: Sequence[Row],
    reference: Sequence[Row],
    primary: str,
    *,
    df: DocumentFrequency | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """How far the predictions of ``rows`` agree with those of ``reference``, over the same ids.

    Captions: the identical ones, and CIDEr-D against the reference's captions alone. Answers: the
    flipped ones, and those that lost or gained in the score ``primary``. Retrieval: queries with
    the same first candidate, and the rank correlation on the reference's candidates.

    Args:
        df: document frequencies of CIDEr; default: those of the rows' own references.

    Returns:
        By measure ``value`` with ``low`` and ``high``; shares of samples also have a ``count``.

    Raises:
        EvalError: no rows, or different ids.
    """
    _check_some(rows)
    before = {row["id"]: row for row in reference}
    after = {row["id"]: row for row in rows}
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise EvalError(f"agreement: expected the same samples; in one only: {odd[:5]}")
    shares: dict[str, Sequence[str]] = {}
    means: dict[str, dict[str, float]] = {}
    if "direction" in rows[0]:
        shares["same first candidate"] = [
            key for key in after if best_candidate(after[key]) == best_candidate(before[key])
        ]
        means["rank correlation"] = rank_correlations(before, after)
    elif "references" in rows[0]:
        texts = [{key: row["prediction"] for key, row in run.items()} for run in (before, after)]
        shares["identical captions"] = identical_captions(*texts)
        table = df or document_frequency([row["references"] for row in rows])
        against = cider({key: [text] for key, text in texts[0].items()}, texts[1], df=table)
        means["cider against the reference's captions"] = against.per_image
    else:
        texts = [{key: row["prediction"] for key, row in run.items()} for run in (before, after)]
        scores = [{k: row["scores"][primary] for k, row in run.items()} for run in (before, after)]
        flips = answer_flips(*texts, *scores)
        shares["flipped answers"] = flips.flipped
        shares["right to wrong"] = flips.right_to_wrong
        shares["wrong to right"] = flips.wrong_to_right
    clusters = clusters_of(rows)
    result = {}
    for name, ids in shares.items():
        values = dict.fromkeys(after, 0.0) | dict.fromkeys(ids, 1.0)
        interval = asdict(bootstrap_mean(values, clusters, seed=seed))
        result[name] = interval | {"count": len(ids)}
    for name, values in means.items():
        if values:
            result[name] = asdict(bootstrap_mean(values, clusters, seed=seed))
    return result


def rank_correlations(before: Mapping[str, Row], after: Mapping[str, Row]) -> dict[str, float]:
    """Spearman's rank correlation of two runs' final scores, by query id.

    On the candidates of ``before``; one that is no candidate any more comes last.
    """
    return {
        key: rank_correlation(
            _scores_of(row, row["candidates"]), _scores_of(after[key], row["candidates"])
        )
        for key, row in before.items()
        if len(row["candidates"]) > 1
    }


def _scores_of(row: Row, candidates: Sequence[int]) -> list[float]:
    """Final scores of some candidates, minus infinity where there is none."""
    known = dict(zip(row["candidates"], row["prediction"], strict=True))
    found = (known.get(candidate) for candidate in candidates)
    return [-math.inf if score is None else score for score in found]


def best_candidate(row: Row) -> int:
    """The candidate with the best final score; of equal ones the one ranked first in stage 1."""
    scores = [-math.inf if score is None else score for score in row["prediction"]]
    return int(row["candidates"][int(np.argmax(scores))])


def by_metric(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Metric to row id to score, in the order of the rows."""
    result: dict[str, dict[str, float]] = {}
    for row in rows:
        for metric, value in row["scores"].items():
            result.setdefault(metric, {})[row["id"]] = value
    return result


def clusters_of(rows: Sequence[Row]) -> dict[str, str]:
    """Row id to cluster."""
    return {row["id"]: row["cluster"] for row in rows}


def _check_some(rows: Sequence[Row]) -> None:
    if not rows:
        raise EvalError("rows: expected at least one, got none")
