# SPDX-License-Identifier: Apache-2.0
"""Agreement with full precision, by hand and against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmq_evals.errors import EvalError
from mmq_evals.metrics import agreement


def test_identical_captions() -> None:
    full = {"x": "a cat ", "y": "a dog", "z": ""}
    assert agreement.identical_captions(full, {"x": "a cat", "y": "A dog", "z": " "}) == ("x", "z")
    with pytest.raises(EvalError, match=r"the same ids, got 3 and 1; in one only: \['y', 'z'\]"):
        agreement.identical_captions(full, {"x": "a cat"})
    with pytest.raises(EvalError, match="the same ids, got 0 and 0"):
        agreement.identical_captions({}, {})


def test_answer_flips() -> None:
    full = {"a": "Two.", "b": "red", "c": "no", "d": "cat"}
    quantized = {"a": "2", "b": "blue", "c": "yes", "d": "dog"}
    before, after = dict(zip(full, (1, 1, 0.3, 0), strict=True)), dict.fromkeys(full, 0.6)
    flips = agreement.answer_flips(full, quantized, before, after | {"a": 1})
    assert flips == agreement.AnswerFlips(("b", "c", "d"), ("b",), ("c", "d"))


def test_kl_is_torchs_and_leaves_padding_out() -> None:
    rng = np.random.default_rng(0)
    full, quantized = rng.normal(0, 5, (2, 7, 50))
    result = agreement.token_agreement(full, quantized, vocabulary=40)
    p, q = (torch.from_numpy(x[:, :40]).log_softmax(1) for x in (full, quantized))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)
    np.testing.assert_allclose(result.kl, expected.numpy(), rtol=1e-12)
    assert result.same_first.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert agreement.token_agreement(full, quantized).kl[0] != result.kl[0]
    # By hand: (1/2, 1/2) against (1/4, 3/4), whatever is added to the logits.
    one = agreement.token_agreement([[9.0, 9.0]], [[0.0, math.log(3)]])
    assert one.kl[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    same = agreement.token_agreement(full, full)
    assert same.kl.max() == 0.0
    assert same.same_first.all()


def test_divergence_averages_samples_not_tokens() -> None:
    short = agreement.TokenAgreement(np.array([1.0]), np.array([False]))
    long = agreement.TokenAgreement(np.zeros(3), np.ones(3, dtype=bool))
    result = agreement.divergence({"x": short, "y": long})
    assert (result.kl, result.same_first) == (0.5, 0.75)
    assert result.per_sample == {"x": 1.0, "y": 0.0}
    assert result.kl_p99 == pytest.approx(np.quantile([1, 0, 0, 0], 0.99))
    with pytest.raises(EvalError, match="samples with tokens"):
        agreement.divergence({})


def test_rank_correlation() -> None:
    assert agreement.rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert agreement.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1 2 3 4 against 1 2.5 2.5 4: the sums of products are 4.5, 5 and 4.5.
    expected = 4.5 / math.sqrt(5 * 4.5)
    assert agreement.rank_correlation([1, 2, 3, 4], [0, 7, 7, 9]) == pytest.approx(expected)
    assert agreement.rank_correlation([1, 2, 3], [5, 5, 5]) == 0.0
    assert agreement.rank_correlation([1, 2, 3], [np.nan, 1, 2]) == pytest.approx(1.0)


def test_bad_input() -> None:
    with pytest.raises(EvalError, match=r"two arrays \(tokens, >= 3\), got \(1, 2\) and \(1, 2\)"):
        agreement.token_agreement([[1.0, 2.0]], [[1.0, 2.0]], vocabulary=3)
    with pytest.raises(EvalError, match="expected finite logits"):
        agreement.token_agreement([[1.0, math.nan]], [[1.0, 2.0]])
    for a, b in (([1], [1]), ([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]])):
        with pytest.raises(EvalError, match="at least 2 candidates"):
            agreement.rank_correlation(a, b)
