# SPDX-License-Identifier: Apache-2.0
"""CIDEr-D, BLEU and ROUGE-L of captions, without Java.

Every function takes references and hypotheses as mappings from image id to text (or as two lists of
equal length, whose ids are then ``"0"``, ``"1"``, ...), one hypothesis and one or more references
per image, and returns the corpus score with the scores per image. Given the same tokens all of them
equal pycocoevalcap to 1e-9.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmq_evals.errors import EvalError
from mmq_evals.metrics.inputs import (
    Hypotheses,
    References,
    tokenize_pairs,
    tokenize_references,
)
from mmq_evals.metrics.tokenize import Tokens

FloatArray = npt.NDArray[np.float64]

MAX_ORDER = 4
_CIDER_SIGMA = 6.0
_ROUGE_BETA = 1.2


@dataclass(frozen=True)
class CaptionScores:
    """A metric's value per image, and of the corpus: their mean, but for METEOR its aggregate."""

    corpus: float
    per_image: dict[str, float]


@dataclass(frozen=True)
class BleuScores:
    """BLEU-1..4. The corpus value is not the mean of the values per image.

    ``statistics`` has shape (images, 10), in the order of ``per_image``: n-grams of order 1..4
    matched, n-grams of order 1..4 in the hypothesis, hypothesis length, reference length. Their
    column sums are sufficient for the corpus value; see `bleu_from_statistics`.
    """

    corpus: tuple[float, float, float, float]
    per_image: dict[str, tuple[float, float, float, float]]
    statistics: FloatArray


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many of ``n_images`` reference sets each n-gram of order 1..4 occurs.

    A sub-sample scored with its own frequencies is inflated, so a limited run and a shard take the
    table of the full split.
    """

    n_images: int
    counts: dict[Tokens, int]
    tokenizer: str

    @cached_property
    def idf(self) -> dict[Tokens, float]:
        """ln N - ln df for the n-grams of the table; every other n-gram has ln N."""
        log_n = math.log(self.n_images)
        return {ngram: log_n - math.log(max(1, count)) for ngram, count in self.counts.items()}

    def sha256(self) -> str:
        """Hash of the content, the same for equal tables."""
        return hashlib.sha256(self._json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the table as JSON, n-grams sorted, tokens joined by single spaces."""
        path.write_text(self._json(), encoding="utf-8")

    def _json(self) -> str:
        counts = {" ".join(ngram): self.counts[ngram] for ngram in sorted(self.counts)}
        head = {"format": "mmq-document-frequency", "version": 1, "tokenizer": self.tokenizer}
        return json.dumps({**head, "n_images": self.n_images, "counts": counts})

    @staticmethod
    def load(path: Path) -> DocumentFrequency:
        """Read a table that `save` wrote.

        Raises:
            EvalError: the file is missing, is not such a table or has a count above ``n_images``.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EvalError(f"document frequencies: no file {path}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EvalError(f"document frequencies: {path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != "mmq-document-frequency":
            raise EvalError(f"document frequencies: {path} is not a document frequency table")
        if data.get("version") != 1:
            raise EvalError(
                f"document frequencies: {path}: expected version 1, got {data.get('version')}"
            )
        try:
            counts = {tuple(ngram.split(" ")): int(n) for ngram, n in data["counts"].items()}
            n_images, tokenizer = int(data["n_images"]), str(data["tokenizer"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EvalError(f"document frequencies: {path} is out of form: {error!r}") from None
        if n_images < 1 or max(counts.values(), default=0) > n_images:
            raise EvalError(f"document frequencies: {path}: a count exceeds {n_images} images")
        return DocumentFrequency(n_images, counts, tokenizer)


def document_frequency(references: References, *, tokenizer: str = "py") -> DocumentFrequency:
    """Count the images whose reference set contains each n-gram of order 1..4."""
    return _document_frequency(list(tokenize_references(references, tokenizer).values()), tokenizer)


def cider(
    references: References,
    hypotheses: Hypotheses,
    *,
    df: str | DocumentFrequency = "corpus",
    tokenizer: str = "py",
) -> CaptionScores:
    """CIDEr-D (Vedantam et al. 2015), what papers call CIDEr; papers print it times 100.

    Args:
        df: ``"corpus"`` counts documents in these references; ``"table:<file>"`` or a
            `DocumentFrequency` fixes them.

    Raises:
        EvalError: ids differ, an image has no reference, or the table is of another tokenizer.
    """
    refs, hyps = tokenize_pairs(references, hypotheses, tokenizer)
    table = _resolve_df(df, refs, tokenizer)
    if table.n_images == 1:
        warnings.warn(
            "CIDEr over one image is 0 by definition: every idf is ln 1; give a table of the split",
            stacklevel=2,
        )
    log_n = math.log(table.n_images)
    idf = table.idf
    per_image: dict[str, float] = {}
    for image_id, hypothesis in hyps.items():
        hyp_vector = _tfidf(hypothesis, idf, log_n)
        total = sum(
            _cider_similarity(hyp_vector, _tfidf(reference, idf, log_n))
            for reference in refs[image_id]
        )
        per_image[image_id] = 10.0 * total / (MAX_ORDER * len(refs[image_id]))
    return CaptionScores(_mean(per_image), per_image)


def bleu(references: References, hypotheses: Hypotheses, *, tokenizer: str = "py") -> BleuScores:
    """Corpus BLEU-1..4 with the closest reference length and no smoothing.

    Raises:
        EvalError: ids differ or an image has no reference.
    """
    refs, hyps = tokenize_pairs(references, hypotheses, tokenizer)
    statistics = np.array(
        [_bleu_statistics(refs[image_id], hypothesis) for image_id, hypothesis in hyps.items()],
        dtype=np.float64,
    )
    values = bleu_from_statistics(statistics)
    per_image = {image_id: _four(row) for image_id, row in zip(hyps, values, strict=True)}
    return BleuScores(_four(bleu_from_statistics(statistics.sum(axis=0))), per_image, statistics)


def bleu_from_statistics(statistics: FloatArray) -> FloatArray:
    """BLEU-1..4, shape (..., 4), of summed statistics, shape (..., 10); see `BleuScores`."""
    matched, total = statistics[..., 0:4], statistics[..., 4:8]
    precision = (matched + 1e-15) / (total + 1e-9)
    value = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, MAX_ORDER + 1))
    ratio = (statistics[..., 8:9] + 1e-15) / (statistics[..., 9:10] + 1e-9)
    penalty = np.exp(1.0 - 1.0 / np.minimum(ratio, 1.0))
    return np.asarray(value * penalty, dtype=np.float64)


def rouge_l(
    references: References, hypotheses: Hypotheses, *, tokenizer: str = "py"
) -> CaptionScores:
    """ROUGE-L with beta 1.2; best precision and best recall over references taken independently.

    Raises:
        EvalError: ids differ or an image has no reference.
    """
    refs, hyps = tokenize_pairs(references, hypotheses, tokenizer)
    per_image = {
        image_id: _rouge_l(refs[image_id], hypothesis) for image_id, hypothesis in hyps.items()
    }
    return CaptionScores(_mean(per_image), per_image)


# ---- document frequencies ------------------------------------------------------------------------


def _resolve_df(
    df: str | DocumentFrequency, refs: dict[str, list[Tokens]], tokenizer: str
) -> DocumentFrequency:
    if df == "corpus":
        return _document_frequency(list(refs.values()), tokenizer)
    if isinstance(df, str):
        if not df.startswith("table:"):
            raise EvalError(f"df: expected 'corpus', 'table:<file>' or a table, got {df!r}")
        df = DocumentFrequency.load(Path(df.removeprefix("table:")))
    if df.tokenizer != tokenizer:
        raise EvalError(f"df: expected a table of tokenizer {tokenizer!r}, got {df.tokenizer!r}")
    return df


# ---- the metrics on tokens -----------------------------------------------------------------------


def _ngrams(tokens: Tokens) -> Counter[Tokens]:
    """N-grams of order 1..4 with their counts."""
    length = len(tokens)
    return Counter(
        tokens[start : start + order]
        for order in range(1, MAX_ORDER + 1)
        for start in range(length - order + 1)
    )


def _document_frequency(
    reference_sets: Sequence[Sequence[Tokens]], tokenizer: str
) -> DocumentFrequency:
    counts: Counter[Tokens] = Counter()
    for reference_set in reference_sets:
        counts.update({ngram for tokens in reference_set for ngram in _ngrams(tokens)})
    return DocumentFrequency(len(reference_sets), dict(counts), tokenizer)


@dataclass(frozen=True)
class _Vector:
    weights: dict[Tokens, float]
    norms: list[float]
    n_bigrams: int


def _tfidf(tokens: Tokens, idf: dict[Tokens, float], default_idf: float) -> _Vector:
    """Raw count times idf; an n-gram that no reference has gets idf ln N."""
    weights: dict[Tokens, float] = {}
    squares = [0.0] * MAX_ORDER
    for ngram, count in _ngrams(tokens).items():
        weight = count * idf.get(ngram, default_idf)
        weights[ngram] = weight
        squares[len(ngram) - 1] += weight * weight
    # The "length" of the length penalty is the number of bigrams, as in the reference code.
    return _Vector(weights, [math.sqrt(square) for square in squares], max(0, len(tokens) - 1))


def _cider_similarity(hyp: _Vector, ref: _Vector) -> float:
    """Sum over orders 1..4 of the clipped cosine, times the length penalty."""
    dots = [0.0] * MAX_ORDER
    for ngram, hyp_weight in hyp.weights.items():
        ref_weight = ref.weights.get(ngram)
        if ref_weight is not None:
            dots[len(ngram) - 1] += min(hyp_weight, ref_weight) * ref_weight
    total = 0.0
    for dot, hyp_norm, ref_norm in zip(dots, hyp.norms, ref.norms, strict=True):
        total += dot / (hyp_norm * ref_norm) if hyp_norm != 0.0 and ref_norm != 0.0 else dot
    delta = hyp.n_bigrams - ref.n_bigrams
    return total * math.exp(-(delta * delta) / (2.0 * _CIDER_SIGMA * _CIDER_SIGMA))


def _bleu_statistics(references: Sequence[Tokens], hypothesis: Tokens) -> list[int]:
    limits: dict[Tokens, int] = {}
    for reference in references:
        for ngram, count in _ngrams(reference).items():
            if count > limits.get(ngram, 0):
                limits[ngram] = count
    matched = [0] * MAX_ORDER
    for ngram, count in _ngrams(hypothesis).items():
        matched[len(ngram) - 1] += min(count, limits.get(ngram, 0))
    length = len(hypothesis)
    total = [max(0, length - order + 1) for order in range(1, MAX_ORDER + 1)]
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return [*matched, *total, length, closest]


def _rouge_l(references: Sequence[Tokens], hypothesis: Tokens) -> float:
    # The reference code splits text on single spaces, so an empty sentence is one empty token.
    hyp = hypothesis or ("",)
    precision = recall = 0.0
    for reference in references:
        ref = reference or ("",)
        common = _lcs_length(hyp, ref)
        precision = max(precision, common / len(hyp))
        recall = max(recall, common / len(ref))
    if precision == 0.0 or recall == 0.0:
        return 0.0
    beta2 = _ROUGE_BETA * _ROUGE_BETA
    return (1.0 + beta2) * precision * recall / (recall + beta2 * precision)


def _lcs_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyro 2004): one bit a token of a."""
    masks: dict[str, int] = {}
    for position, token in enumerate(a):
        masks[token] = masks.get(token, 0) | (1 << position)
    full = (1 << len(a)) - 1
    state = full
    for token in b:
        hits = state & masks.get(token, 0)
        state = ((state + hits) | (state - hits)) & full
    return len(a) - state.bit_count()


def _mean(per_image: dict[str, float]) -> float:
    return math.fsum(per_image.values()) / len(per_image)


def _four(row: FloatArray) -> tuple[float, float, float, float]:
    return float(row[0]), float(row[1]), float(row[2]), float(row[3])
