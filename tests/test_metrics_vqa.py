# SPDX-License-Identifier: Apache-2.0
"""VQA and GQA accuracy: closed form, every measured disagreement of the protocols."""

from __future__ import annotations

import pytest

from mmq_evals.errors import EvalError
from mmq_evals.metrics import exact_match, gqa, gqa_accuracy, vqa, vqa_accuracy


@pytest.mark.parametrize("protocol", vqa.PROTOCOLS)
def test_closed_form(protocol: str) -> None:
    expected = [0.0, 0.3, 0.6, 0.9] + [1.0] * 7
    for k, value in enumerate(expected):
        answers = ["yes"] * k + ["no"] * (10 - k)
        assert vqa_accuracy("yes", answers, protocol) == pytest.approx(value)
    # Not min(k / 3, 1), and with another number of annotators the sum runs over those.
    assert vqa_accuracy("yes", ["yes", "yes", "no"], protocol) == pytest.approx((2 / 3 + 2 / 3) / 3)


# prediction, answers, score under official-2021, official-2017, always, m4c, vlmevalkit. The first
# six are measured, the others follow from the rules by hand.
CASES = [
    ("Black.", ["black"] * 10, (0, 1, 1, 1, 1)),
    ("two", ["2"] * 10, (0, 1, 1, 1, 1)),
    ("two", ["2"] * 9 + ["3"], (1, 1, 1, 1, 1)),
    ("the cat", ["the cat"] * 9 + ["cat"], (1, 0.3, 1, 1, 1)),
    ("the cat", ["the cat"] * 10, (1, 0, 1, 1, 1)),
    ("don't know", ["dont know"] * 5 + ["a", "b", "c", "d", "e"], (1, 0, 1, 1, 1)),
    # Equal references: clean alone, for 2021 on both sides; 2017 prepares the prediction.
    (" red\n", ["red"] * 10, (1, 1, 1, 1, 1)),
    ("red\tcar", ["red car"] * 10, (1, 1, 1, 1, 1)),
    ("t-shirt", ["t-shirt"] * 10, (1, 0, 1, 1, 1)),
    # One comma between digits: marks are deleted, "12 ab"; m4c blanks the hyphen, "12 b".
    ("1,2 a-b", ["12 ab"] * 10, (0, 1, 1, 0, 1)),
    ("1,2 a-b", ["12 b"] * 10, (0, 0, 0, 1, 0)),
    # A period after a digit goes, but for vlmevalkit; between letters it always goes.
    ("5.", ["5"] * 9 + ["6"], (1, 1, 1, 1, 0)),
    ("a.b", ["ab"] * 9 + ["b"], (1, 1, 1, 1, 1)),
    # A clitic is cut off by m4c on both sides, so that only the others tell the words apart.
    ("dog's", ["dog 's"] * 9 + ["cat"], (0, 0, 0, 1, 0)),
    # An article is dropped from references by all but 2017; "a" alone is then empty.
    ("a", ["the"] * 9 + ["dog"], (1, 0, 1, 1, 1)),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), CASES)
def test_measured_disagreements(
    prediction: str, answers: list[str], expected: tuple[float, ...]
) -> None:
    assert vqa.PROTOCOLS == ("official-2021", "official-2017", "always", "m4c", "vlmevalkit")
    scores = [vqa_accuracy(prediction, answers, protocol) for protocol in vqa.PROTOCOLS]
    assert scores == pytest.approx(list(expected))


def test_every_two_protocols_differ_on_a_case() -> None:
    columns = list(zip(*(case[2] for case in CASES), strict=True))
    assert len(set(columns)) == 5


def test_contraction_table() -> None:
    table = vqa.contraction_table()
    assert len(table) == 120
    assert (len(vqa._WITHOUT_APOSTROPHE), 2 * len(vqa._WITH_HAVE), len(vqa._IRREGULAR)) == (
        75,
        34,
        11,
    )
    assert table["dont"] == "don't"
    assert table["twas"] == "'twas"
    assert table["couldnt've"] == table["couldn'tve"] == "couldn't've"
    assert "somebodyd" not in table
    assert table["somebody'd"] == "somebodyd"
    assert table["let's"] == "let's"
    assert table["Im"] == "I'm"
    for word in ("shed", "were", "well", "its", "ill", "im"):
        assert word not in table


def test_punctuation_quirks() -> None:
    # One comma between digits turns every mark into a deletion.
    assert vqa.normalize_always("1,2 a-b") == "12 ab"
    assert vqa._normalize_m4c("1,2 a-b") == "12 b"
    assert vqa.strip_punctuation("a-b") == "a b"
    assert vqa.strip_punctuation("a- b") == "a b"
    assert vqa.strip_punctuation("a.b 5. 3.5 .5") == "ab 5 3.5 .5"
    assert vqa.strip_punctuation("." * 40) == "." * 8
    assert vqa._normalize_vlmevalkit("5.") == "5."
    assert vqa.normalize_always("5.") == "5"
    assert vqa._normalize_vlmevalkit("yes.") == "yes"
    assert vqa.strip_punctuation("it's 3:30 & 50%") == "it's 3:30 & 50%"


def test_words() -> None:
    assert vqa.normalize_words("The ONE  and an None ten") == "1 and 0 10"
    # The number map goes first, then articles, then contractions.
    assert vqa.normalize_words("dont a thats") == "don't that's"
    assert vqa.clean(" a\nb\tc ") == "a b c"


def test_exact_match_for_one_answer() -> None:
    assert exact_match("The circle.", "circle") == 1.0
    assert exact_match("", "circle") == 0.0
    assert exact_match("The circle.", "circle", "official-2021") == 0.0


def test_vqa_refuses_bad_input() -> None:
    with pytest.raises(EvalError, match="at least 2 annotators"):
        vqa_accuracy("yes", ["yes"])
    with pytest.raises(EvalError, match="at least 2 annotators"):
        vqa_accuracy("yes", "yes")
    with pytest.raises(EvalError, match=r"expected one of .* got 'lavis'"):
        vqa_accuracy("yes", ["yes", "no"], "lavis")
    with pytest.raises(EvalError, match=r"answers to be strings, got 5"):
        vqa_accuracy("yes", ["yes", 5])  # type: ignore[list-item]
    with pytest.raises(EvalError, match=r"answers to be strings, got None"):
        gqa_accuracy(None, "yes")  # type: ignore[arg-type]


# prediction, gold, score under official, llava, lavis, lmms-eval, vlmevalkit
GQA_CASES = [
    ("yes", "yes", (1, 1, 1, 1, 1)),
    ("Yes", "yes", (0, 1, 1, 1, 1)),
    ("yes.", "yes", (0, 1, 1, 1, 0)),
    (" yes", "yes", (0, 0, 1, 0, 1)),
    ("the dog", "dog", (0, 0, 1, 0, 0)),
    ("t-shirt", "t shirt", (0, 0, 1, 0, 0)),
    ("tshirt", "t-shirt", (0, 0, 0, 1, 0)),
    ("Dog", "Dog", (1, 0, 1, 1, 1)),
    ("it is yes", "yes", (0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize(("prediction", "gold", "expected"), GQA_CASES)
def test_gqa_protocols(prediction: str, gold: str, expected: tuple[int, ...]) -> None:
    scores = [gqa_accuracy(prediction, gold, protocol) for protocol in gqa.PROTOCOLS]
    assert scores == list(expected)


def test_gqa_protocols_all_differ_on_the_cases() -> None:
    columns = list(zip(*(case[2] for case in GQA_CASES), strict=True))
    assert len(set(columns)) == 5
    with pytest.raises(EvalError, match="expected one of"):
        gqa_accuracy("yes", "yes", "always")


@pytest.mark.parametrize(
    "garbage",
    ["", " ", "\ufffd", "\x00\x01\x1b[0m", "a\u2028b\u2029c\x85d\x0be", "x" * 10_000,
     "." * 10_000, "1,000 " * 2_000, "n't " * 2_500],
)  # fmt: skip
def test_garbage_never_raises_and_is_only_right_as_itself(garbage: str) -> None:
    for protocol in vqa.PROTOCOLS:
        assert vqa_accuracy(garbage, ["red"] * 5 + ["blue"] * 5, protocol) == 0.0
        assert vqa_accuracy("red", [garbage] * 5 + ["red"] * 5, protocol) == 1.0
        assert vqa_accuracy(garbage, [garbage] * 10, protocol) == 1.0 or protocol == "official-2017"
        assert exact_match(garbage, "red", protocol) == 0.0
    for protocol in gqa.PROTOCOLS:
        assert gqa_accuracy(garbage, "red", protocol) == 0.0
