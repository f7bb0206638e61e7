# SPDX-License-Identifier: Apache-2.0
"""CIDEr-D, BLEU and ROUGE-L against pycocoevalcap and by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from mmq_evals.errors import EvalError
from mmq_evals.metrics import (
    DocumentFrequency,
    bleu,
    bleu_from_statistics,
    cider,
    document_frequency,
    rouge_l,
)

WORDS = "a the man dog red blue square circle on of left right two small and it 's -lrb-".split()  # noqa: SIM905


def corpus(n_images: int = 60, seed: int = 0) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Tokenized sentences with repeats, empty, one-token and very long hypotheses."""
    rng = random.Random(seed)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    refs = {f"i{n}": [sentence(1, 12) for _ in range(rng.randint(1, 5))] for n in range(n_images)}
    hyps = {image_id: sentence(0, 14) for image_id in refs}
    hyps["i0"], hyps["i1"], hyps["i2"] = "", "dog", "dog " * 199 + "dog"
    hyps["i3"] = refs["i3"][0]
    hyps["i4"] = "unseen words everywhere in here"
    return refs, hyps


def as_lists(hyps: dict[str, str]) -> dict[str, list[str]]:
    return {image_id: [text] for image_id, text in hyps.items()}


def test_cider_equals_pycocoevalcap() -> None:
    reference = pytest.importorskip("pycocoevalcap.cider.cider")
    refs, hyps = corpus()
    expected, per_image = reference.Cider().compute_score(refs, as_lists(hyps))
    ours = cider(refs, hyps, tokenizer="none")
    assert ours.corpus == pytest.approx(float(expected), abs=1e-9)
    np.testing.assert_allclose(list(ours.per_image.values()), per_image, rtol=0, atol=1e-9)
    assert ours.per_image["i0"] == 0.0
    assert ours.corpus > 0.1


def test_bleu_equals_pycocoevalcap() -> None:
    reference = pytest.importorskip("pycocoevalcap.bleu.bleu")
    refs, hyps = corpus()
    expected, per_image = reference.Bleu(4).compute_score(refs, as_lists(hyps), verbose=0)
    ours = bleu(refs, hyps, tokenizer="none")
    np.testing.assert_allclose(ours.corpus, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        np.array(list(ours.per_image.values())), np.array(per_image).T, rtol=0, atol=1e-9
    )


def test_rouge_l_equals_pycocoevalcap() -> None:
    reference = pytest.importorskip("pycocoevalcap.rouge.rouge")
    refs, hyps = corpus()
    expected, per_image = reference.Rouge().compute_score(refs, as_lists(hyps))
    ours = rouge_l(refs, hyps, tokenizer="none")
    assert ours.corpus == pytest.approx(float(expected), abs=1e-9)
    np.testing.assert_allclose(list(ours.per_image.values()), per_image, rtol=0, atol=1e-9)


def test_cider_by_hand() -> None:
    # Two images: idf(a) = ln 2 - ln 2 = 0 and idf of every other n-gram = ln 2, so "a cat" against
    # "a cat" is 1 in orders 1 and 2 and has nothing in orders 3 and 4: 10 * 2 / 4.
    refs = {"x": ["a cat"], "y": ["a dog"]}
    scores = cider(refs, {"x": "A cat.", "y": "a cat"})
    assert scores.per_image["x"] == pytest.approx(5.0)
    assert scores.per_image["y"] == 0.0
    # One token against two: the bigram counts differ by one.
    scores = cider(refs, {"x": "cat", "y": "dog"})
    assert scores.per_image["x"] == pytest.approx(2.5 * math.exp(-1 / 72))


def test_bleu_by_hand() -> None:
    # Clipping: "the" seven times against at most two in one reference.
    refs = {"x": ["the cat is on the mat", "there is a cat on the mat"]}
    scores = bleu(refs, {"x": "the the the the the the the"})
    assert scores.corpus[0] == pytest.approx(2 / 7, abs=1e-8)
    # Brevity: three tokens against six, every n-gram matched.
    scores = bleu({"x": ["the cat is on the mat"]}, {"x": "the cat is"})
    assert scores.corpus[0] == pytest.approx(math.exp(1 - 2), abs=1e-8)
    # Lengths 3 and 5 are equally close to 4: the shorter one counts.
    scores = bleu({"x": ["a b c", "a b c d e"]}, {"x": "a b c d"}, tokenizer="none")
    assert scores.statistics[0, 8:].tolist() == [4, 3]


def test_bleu_corpus_is_not_the_mean_and_follows_from_statistics() -> None:
    refs, hyps = corpus()
    scores = bleu(refs, hyps, tokenizer="none")
    np.testing.assert_array_equal(
        bleu_from_statistics(scores.statistics.sum(axis=0)), scores.corpus
    )
    mean = np.mean(list(scores.per_image.values()), axis=0)
    assert abs(mean[0] - scores.corpus[0]) > 1e-3


def test_rouge_l_takes_best_precision_and_recall_independently() -> None:
    # P = 2/2 from the long reference, R = 1/1 from the short one.
    scores = rouge_l({"x": ["a b c d", "a"]}, {"x": "a b"}, tokenizer="none")
    assert scores.corpus == pytest.approx(1.0)
    scores = rouge_l({"x": ["a b c d"]}, {"x": "d a"}, tokenizer="none")
    p, r = 1 / 2, 1 / 4
    assert scores.corpus == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p))


def test_sub_sample_keeps_its_scores_under_the_table_of_the_full_split(tmp_path: Path) -> None:
    refs, hyps = corpus()
    full = cider(refs, hyps, tokenizer="none")
    table = document_frequency(refs, tokenizer="none")
    table.save(tmp_path / "df.json")
    loaded = DocumentFrequency.load(tmp_path / "df.json")
    assert loaded == table
    assert loaded.sha256() == table.sha256()
    some = [f"i{n}" for n in range(3, 13)]
    part = cider(
        {i: refs[i] for i in some},
        {i: hyps[i] for i in some},
        df=f"table:{tmp_path / 'df.json'}",
        tokenizer="none",
    )
    assert part.per_image == {i: full.per_image[i] for i in some}
    own = cider({i: refs[i] for i in some}, {i: hyps[i] for i in some}, tokenizer="none")
    assert own.per_image != part.per_image
    with pytest.raises(EvalError, match="expected a table of tokenizer 'py', got 'none'"):
        cider(refs, hyps, df=table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a document frequency table"),
        ('{"format": "mmq-document-frequency", "version": 2}', "expected version 1, got 2"),
        ('{"format": "mmq-document-frequency", "version": 1}', "is out of form: KeyError"),
        (
            '{"format": "mmq-document-frequency", "version": 1, "tokenizer": "py", "n_images": 2,'
            ' "counts": {"a": 3}}',
            "a count exceeds 2 images",
        ),
    ],
)
def test_broken_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "df.json").write_text(text)
    with pytest.raises(EvalError, match=message):
        DocumentFrequency.load(tmp_path / "df.json")


def test_one_document_warns() -> None:
    with pytest.warns(UserWarning, match="one image is 0 by definition"):
        assert cider({"x": ["a cat"]}, {"x": "a cat"}).corpus == 0.0


def test_line_separators_do_not_shift_captions() -> None:
    refs, hyps = corpus()
    clean = cider(refs, hyps)
    for separator in ("\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"):
        dirty = {i: text.replace(" ", separator) for i, text in hyps.items()}
        assert cider(refs, dirty) == clean


def test_garbage_neither_shifts_nor_crashes() -> None:
    garbage = ["", "\ufffd", "\ud800", "\x00\x01\x1b", "\u2028\u2029", "x" * 10_000, "dog " * 2500]
    refs = {str(n): ["a dog on the mat", "two dogs"] for n in range(len(garbage) + 2)}
    refs["other"] = ["a red kite"]
    hyps = dict(zip(refs, ["a dog", *garbage, "a dog", "kite"], strict=True))
    for metric in (cider, rouge_l, bleu):
        scores = metric(refs, hyps).per_image
        assert list(scores) == list(refs)
        assert scores["0"] == scores[str(len(garbage) + 1)]
        for n in range(1, 7):
            assert np.max(scores[str(n)]) < 1e-6
        assert np.isfinite(list(scores.values())).all()


def test_copies_of_references_are_the_ceiling_and_shuffled_ones_are_not() -> None:
    refs, _ = corpus(seed=1)
    one = {i: texts[:1] for i, texts in refs.items()}
    copies = {i: texts[0] for i, texts in refs.items()}
    ids = list(refs)
    shuffled = {i: copies[j] for i, j in zip(ids, ids[7:] + ids[:7], strict=True)}
    # Ceiling by image: 10 times the share of orders that the sentence has.
    orders = {i: min(4, len(text.split())) for i, text in copies.items()}
    ceiling = cider(one, copies, tokenizer="none")
    for i in ids:
        assert ceiling.per_image[i] == pytest.approx(10 * orders[i] / 4)
    assert rouge_l(one, copies, tokenizer="none").corpus == pytest.approx(1.0)
    assert cider(one, shuffled, tokenizer="none").corpus < 0.5 * ceiling.corpus
    assert rouge_l(one, shuffled, tokenizer="none").corpus < 0.6


def test_lists_are_accepted_and_bad_input_is_refused() -> None:
    assert cider([["a cat"], ["a dog"]], ["a cat", "a dog"]).per_image.keys() == {"0", "1"}
    with pytest.raises(EvalError, match=r"expected equal ids, got 2 .* 1 .*\['y'\]"):
        cider({"x": ["a"], "y": ["b"]}, {"x": "a"})
    with pytest.raises(EvalError, match="'x': expected a list of references, got \\[\\]"):
        rouge_l({"x": []}, {"x": "a"})
    with pytest.raises(EvalError, match="'x': expected one hypothesis string, got list"):
        bleu({"x": ["a"]}, {"x": ["a"]})  # type: ignore[dict-item]
    with pytest.raises(EvalError, match="expected at least one image"):
        cider({}, {})
    with pytest.raises(EvalError, match="no file"):
        cider([["a"]], ["a"], df="table:/nonexistent/df.json")
    with pytest.raises(EvalError, match="expected 'corpus'"):
        cider([["a"]], ["a"], df="coco")
