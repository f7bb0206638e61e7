# SPDX-License-Identifier: Apache-2.0
"""How far a quantized model agrees with full precision, sample by sample and without any reference.

These resolve 5 to 8 bits, where task scores cannot. Both runs must be over the same samples under
the same generation protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmq_evals.errors import EvalError
from mmq_evals.metrics.vqa import normalize_always

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AnswerFlips:
    """Ids of the answers that flipped, that went from right to wrong (or less right), and back."""

    flipped: tuple[str, ...]
    right_to_wrong: tuple[str, ...]
    wrong_to_right: tuple[str, ...]


@dataclass(frozen=True)
class TokenAgreement:
    """Per token: KL(full || quantized) in nats, and whether both models rank one token first."""

    kl: FloatArray
    same_first: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Divergence:
    """Of many samples: KL averaged per sample and then over samples, its 99th percentile over all
    tokens, and the share of tokens on which both models rank the same token first."""

    kl: float
    kl_p99: float
    same_first: float
    per_sample: dict[str, float]


def identical_captions(full: Mapping[str, str], quantized: Mapping[str, str]) -> tuple[str, ...]:
    """Ids of the captions that are equal after stripping.

    Raises:
        EvalError: no captions, or different ids.
    """
    _check_ids(full, quantized)
    return tuple(key for key in full if full[key].strip() == quantized[key].strip())


def answer_flips(
    full: Mapping[str, str],
    quantized: Mapping[str, str],
    full_scores: Mapping[str, float],
    quantized_scores: Mapping[str, float],
) -> AnswerFlips:
    """Answers that differ after the normalisation ``always``, and how their scores moved.

    Args:
        full_scores, quantized_scores: accuracy in [0, 1] by the same ids; any rise or fall counts.

    Raises:
        EvalError: no answers, or different ids.
    """
    for other in (quantized, full_scores, quantized_scores):
        _check_ids(full, other)
    change = {key: quantized_scores[key] - full_scores[key] for key in full}
    return AnswerFlips(
        tuple(
            key for key in full if normalize_always(full[key]) != normalize_always(quantized[key])
        ),
        tuple(key for key, moved in change.items() if moved < 0),
        tuple(key for key, moved in change.items() if moved > 0),
    )


def token_agreement(
    full: npt.ArrayLike, quantized: npt.ArrayLike, *, vocabulary: int | None = None
) -> TokenAgreement:
    """Compare the logits of two models at the same positions of the same, teacher-forced text.

    Args:
        full, quantized: shape (tokens, vocabulary or more), any float type.
        vocabulary: tokens that exist; columns beyond are padding of the table and are left out.

    Raises:
        EvalError: shapes that differ, are not of rank 2 or hold too few columns; values that are
            not finite.
    """
    p, q = np.asarray(full, dtype=np.float64), np.asarray(quantized, dtype=np.float64)
    columns = p.shape[-1] if vocabulary is None else vocabulary
    if p.ndim != 2 or p.shape != q.shape or not 0 < columns <= p.shape[1]:
        raise EvalError(
            f"token_agreement: expected two arrays (tokens, >= {columns}), got {p.shape} and "
            f"{q.shape}"
        )
    p, q = p[:, :columns], q[:, :columns]
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise EvalError("token_agreement: expected finite logits, got NaN or infinity")
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    # Rounding may leave a tiny negative number where the models agree.
    return TokenAgreement(np.maximum(kl, 0.0), p.argmax(axis=1) == q.argmax(axis=1))


def divergence(samples: Mapping[str, TokenAgreement]) -> Divergence:
    """Summary of many samples.

    Raises:
        EvalError: no samples, or a sample without tokens.
    """
    empty = [key for key, sample in samples.items() if len(sample.kl) == 0]
    if not samples or empty:
        raise EvalError(f"divergence: expected samples with tokens, got none for {empty[:5]}")
    per_sample = {key: float(sample.kl.mean()) for key, sample in samples.items()}
    tokens = np.concatenate([sample.kl for sample in samples.values()])
    same = np.concatenate([sample.same_first for sample in samples.values()])
    return Divergence(
        float(np.mean(list(per_sample.values()))),
        float(np.quantile(tokens, 0.99)),
        float(same.mean()),
        per_sample,
    )


def rank_correlation(full: npt.ArrayLike, quantized: npt.ArrayLike) -> float:
    """Spearman's correlation of two models' scores of the same candidates of one query.

    Equal scores share the mean of their ranks and NaN counts as minus infinity. Scores that are all
    equal order nothing: the correlation is 0, so that a collapsed model gets no credit.

    Args:
        full, quantized: shape (candidates,), on full precision's best candidates.

    Raises:
        EvalError: shapes that differ or are not of rank 1, or fewer than two candidates.
    """
    a, b = np.asarray(full, dtype=np.float64), np.asarray(quantized, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise EvalError(
            f"rank_correlation: expected two arrays of at least 2 candidates, got {a.shape} and "
            f"{b.shape}"
        )
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0.0 else 0.0


def _ranks(scores: FloatArray) -> FloatArray:
    values = np.where(np.isnan(scores), -np.inf, scores)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    # The last rank of a group of equal scores, less half of the group's spread.
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return np.asarray(mean_ranks[place.ravel()], dtype=np.float64)


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _check_ids(a: Mapping[str, object], b: Mapping[str, object]) -> None:
    if not a or a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise EvalError(
            f"agreement: expected the same ids, got {len(a)} and {len(b)}; in one only: {odd[:5]}"
        )
