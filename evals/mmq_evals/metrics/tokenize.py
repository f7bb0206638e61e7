# SPDX-License-Identifier: Apache-2.0
"""Caption tokenizers by name; all but ``ptb`` need no Java.

``py`` follows the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 with the options and the
dropped punctuation of the COCO caption evaluation (lower-cased, so that bracket names survive).
``simple`` only lower-cases and blanks punctuation; it is a cross-check. ``none`` takes text that is
already tokenized, tokens separated by single spaces. ``ptb`` is the Java tokenizer itself, for
exact published numbers; see `mmq_evals.metrics.java`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

from mmq_evals.errors import EvalError

Tokens = tuple[str, ...]
Tokenizer = Callable[[str], Tokens]

# Every character at which some reader (Java, str.splitlines) ends a line, and the null byte.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x00]")

# Text that rules 2 to 9 leave alone but for a final period and the words of _SPLIT_WORDS.
_PLAIN = re.compile(r"[a-z0-9 ]*\.?\s*\Z")

_SINGLE_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'"})
_TO_SPACE = re.compile('["`;!?\\x00-\\x1f\\x7f\u201c\u201d\u201e\u201f\u2026\ufffd]|\\.{2,}|-{2,}')
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")
_BRACKET_NAMES = frozenset(_BRACKETS.values())
_COMMA_COLON = re.compile(r"(?<!\d)[,:]|[,:](?!\d)")
# A markup tag, such as a stray <unk> or </s>, is one token.
_SYMBOL = re.compile(r"(</?[a-z]\w*>|[%#$@&*=+<>\\^|~])")
# Unicode categories whose characters the reference tokenizer drops (control, format, private,
# unassigned, lone surrogates; dashes and angle quotes become tokens that are dropped later), and
# those that it makes tokens of their own. Measured over all 63,488 characters below U+10000.
_DROPPED = frozenset(("Cc", "Cf", "Co", "Cn", "Cs", "Pd", "Pi", "Pf"))
_ALONE = frozenset(("So", "Sm"))
_LETTERS_WITH_PERIODS = re.compile(r"(?:[^\W\d_]\.)+\Z")
_ABBREVIATIONS = frozenset("mr. mrs. ms. dr. st. jr. sr. vs. co. inc. ltd. etc. no. ft.".split())  # noqa: SIM905
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
_CLITIC = re.compile(r"(n't|'(?:s|m|re|ve|ll|d))\Z")
_LONE_CLITICS = frozenset(["'s", "'t"])


def sanitize(text: str) -> str:
    """Replace every line separator and null byte of ``text`` by a space; length is kept."""
    return _LINE_BREAKS.sub(" ", text)


def tokenize_py(text: str) -> Tokens:
    """Tokenize one caption as the Penn Treebank tokenizer of the COCO evaluation does.

    Agrees with it on the token sequence of 99.9 % of COCO reference captions. Never raises on any
    string, lone surrogates included; an empty caption has no tokens.
    """
    text = sanitize(text).lower()
    if _PLAIN.match(text):
        words = text.split()
        if words and words[-1][-1] == "." and not _keeps_period(words[-1]):
            words[-1] = words[-1][:-1]
        if _SPLIT_WORDS.keys().isdisjoint(words):
            return tuple(word for word in words if word)
    if not text.isascii():
        text = "".join(map(_foreign, text.translate(_SINGLE_QUOTES)))
    text = _TO_SPACE.sub(" ", text)
    text = _BRACKET.sub(lambda match: f" {_BRACKETS[match.group()]} ", text)
    text = _COMMA_COLON.sub(" ", text)
    text = _SYMBOL.sub(r" \1 ", text)
    tokens: list[str] = []
    for word in text.split():
        if word in _BRACKET_NAMES or (word.isalnum() and word not in _SPLIT_WORDS):
            tokens.append(word)
        else:
            tokens.extend(_split_word(word))
    return tuple(tokens)


@lru_cache(maxsize=4096)
def _foreign(character: str) -> str:
    """What becomes of one character that may lie outside ASCII."""
    if character.isascii():
        return character
    if character == "\u00ad":  # A soft hyphen joins what it stands between.
        return ""
    category = unicodedata.category(character)
    # Java reads a character above U+FFFF as two halves and drops both.
    if character > "\uffff" or category in _DROPPED:
        return " "
    return f" {character} " if category in _ALONE else character


def _keeps_period(word: str) -> bool:
    return word in _ABBREVIATIONS or _LETTERS_WITH_PERIODS.match(word) is not None


def _split_word(word: str) -> list[str]:
    """Rules 6 to 9 on one word: hyphens, final periods, split words, clitics, quotes."""
    word = word.strip("-")
    if word.endswith(".") and not _keeps_period(word):
        word = word.rstrip(".")
    if word in _SPLIT_WORDS:
        return list(_SPLIT_WORDS[word])
    clitic = ""
    match = _CLITIC.search(word)
    if match is not None:
        word, clitic = word[: match.start()], match.group()
    if word not in _LONE_CLITICS:
        word = word.strip("'")
    return [token for token in (word, clitic) if token]


_NOT_SIMPLE = re.compile(r"[^\w\s'-]")


def tokenize_simple(text: str) -> Tokens:
    """Lower-case, blank every character but word characters, ``'`` and ``-``, split."""
    return tuple(_NOT_SIMPLE.sub(" ", sanitize(text).lower()).split())


def tokenize_none(text: str) -> Tokens:
    """Split text that is already tokenized on single spaces."""
    return tuple(token for token in text.split(" ") if token)


_TOKENIZERS: dict[str, Tokenizer] = {
    "py": tokenize_py,
    "simple": tokenize_simple,
    "none": tokenize_none,
}
TOKENIZERS = (*_TOKENIZERS, "ptb")


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name``: one of `TOKENIZERS`. ``ptb`` starts Java at every call.

    Raises:
        EvalError: for any other name.
    """
    if name == "ptb":
        return lambda text: tokenize_all([text], name)[0]
    if name not in _TOKENIZERS:
        raise EvalError(f"tokenizer: expected one of {sorted(TOKENIZERS)}, got {name!r}")
    return _TOKENIZERS[name]


def tokenize_all(texts: Sequence[str], name: str) -> list[Tokens]:
    """Tokens of every text, in order, with the tokenizer called ``name``.

    Raises:
        EvalError: an unknown name; for ``ptb``, Java or pycocoevalcap is missing.
    """
    if name == "ptb":
        from mmq_evals.metrics.java import tokenize_ptb

        return tokenize_ptb(texts)
    return list(map(get_tokenizer(name), texts))
