# SPDX-License-Identifier: Apache-2.0
"""VQA accuracy under the five normalisations in use, from strings alone.

The official scorer, its copies and its descendants disagree on when an answer is normalised; which
one was used moves scores by more than 4-bit quantization does. The quirks kept here on purpose are
marked ``Quirk``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from mmq_evals.errors import EvalError

PROTOCOLS = ("official-2021", "official-2017", "always", "m4c", "vlmevalkit")

_MARKS = (
    ";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`",
    ",", "?", "!",
)  # fmt: skip
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_PERIOD_BETWEEN_NO_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")
# Quirk: re.UNICODE, which is 32, stands where the count belongs.
_MAX_PERIODS = 32

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))

# Key: the word without its apostrophe.
_WITHOUT_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()  # noqa: SIM905
# Keys: "couldnt've" and "couldn'tve", both for "couldn't've".
_WITH_HAVE = """
couldn't hadn't mightn't shouldn't wouldn't he'd I'd it'd she'd somebody'd someone'd something'd
there'd they'd we'd who'd you'd
""".split()  # noqa: SIM905
_IRREGULAR = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",  # Quirk: reversed in the official table.
}


def contraction_table() -> dict[str, str]:
    """The 120 entries of the official table.

    Quirk: four keys with a capital I never match, since words are lower-cased first.
    """
    table = {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHE}
    for word in _WITH_HAVE:
        table[word.replace("'", "") + "'ve"] = word + "'ve"
        table[word + "ve"] = word + "'ve"
    return table | _IRREGULAR


_CONTRACTIONS = contraction_table()


def clean(text: str) -> str:
    """Newlines and tabs to spaces, then strip."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def strip_punctuation(text: str, period: re.Pattern[str] = _PERIOD_BEFORE_NO_DIGIT) -> str:
    """Delete or blank the 21 marks, then delete periods that ``period`` matches, at most 32.

    A mark is deleted where the text has it next to a space, or where the text has a comma between
    digits anywhere; else it becomes a space. Both tests look at the original text.
    """
    result = text
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _MARKS:
        delete = delete_all or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if delete else " ")
    return period.sub("", result, count=_MAX_PERIODS)


@lru_cache(maxsize=1 << 16)
def normalize_words(text: str) -> str:
    """Lower-case, number words to digits, drop articles, repair contractions, single spaces."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_always(text: str) -> str:
    """The normalisation of protocol ``always``: clean, punctuation, words."""
    return normalize_words(strip_punctuation(clean(text)))


def _normalize_m4c(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_always(text)


def _normalize_vlmevalkit(text: str) -> str:
    return normalize_words(strip_punctuation(clean(text), _PERIOD_BETWEEN_NO_DIGITS))


def vqa_accuracy(prediction: str, answers: Sequence[str], protocol: str = "always") -> float:
    """Mean over annotators of min(1, matching other annotators / 3), in [0, 1].

    For ten annotators of whom k match: 0, 0.3, 0.6, 0.9, then 1.0 for k = 0, 1, 2, 3, 4 or more.

    Args:
        prediction: raw model output.
        answers: the annotators' strings, ten for VQAv2.
        protocol: one of `PROTOCOLS`.

    Raises:
        EvalError: unknown protocol, or fewer than two answers (one annotator has no others, so
            every prediction would score 0; use `exact_match`).
    """
    if isinstance(answers, str) or len(answers) < 2:
        raise EvalError(
            f"vqa_accuracy: expected at least 2 annotators' answers, got {answers!r}; "
            "for one answer use exact_match"
        )
    prediction, references = _normalize(prediction, answers, protocol)
    matching = sum(reference == prediction for reference in references)
    n = len(references)
    # A matching annotator sees one match fewer among the others; a non-matching one sees all.
    total = matching * min(1.0, (matching - 1) / 3) + (n - matching) * min(1.0, matching / 3)
    return total / n


def exact_match(prediction: str, answer: str, protocol: str = "always") -> float:
    """1.0 if the normalised prediction equals the one normalised answer, else 0.0.

    Raises:
        EvalError: unknown protocol.
    """
    prediction, references = _normalize(prediction, (answer,), protocol)
    return float(prediction == references[0])


def _normalize(prediction: str, answers: Sequence[str], protocol: str) -> tuple[str, list[str]]:
    for text in (prediction, *answers):
        if not isinstance(text, str):
            raise EvalError(f"VQA: expected answers to be strings, got {text!r}")
    if protocol == "official-2021":
        prediction, references = clean(prediction), [clean(answer) for answer in answers]
        if len(set(references)) > 1:
            prediction = normalize_words(strip_punctuation(prediction))
            references = [normalize_words(strip_punctuation(answer)) for answer in references]
        return prediction, references
    if protocol == "official-2017":
        references = list(answers)
        if len(set(references)) > 1:
            references = [strip_punctuation(answer) for answer in references]
        return normalize_always(prediction), references
    normalizers: dict[str, Callable[[str], str]] = {
        "always": normalize_always,
        "m4c": _normalize_m4c,
        "vlmevalkit": _normalize_vlmevalkit,
    }
    if protocol not in normalizers:
        raise EvalError(f"VQA protocol: expected one of {PROTOCOLS}, got {protocol!r}")
    normalize = normalizers[protocol]
    return normalize(prediction), [normalize(answer) for answer in answers]
