# SPDX-License-Identifier: Apache-2.0
"""The caption tokenizer: every example of its rules, and the reference tokenizer itself."""

from __future__ import annotations

import random
import shutil

import pytest

from mmq_evals.errors import EvalError
from mmq_evals.metrics.tokenize import get_tokenizer, sanitize, tokenize_py, tokenize_simple

# Measured with the Java tokenizer.
EXAMPLES = {
    "A man's dog": "a man 's dog",
    "it isn't": "it is n't",
    "the boys' bikes": "the boys bikes",
    "50%": "50 %",
    "#1": "# 1",
    "$5.00": "$ 5.00",
    "a well-known wi-fi sign": "a well-known wi-fi sign",
    "1,000 at 3:30 o'clock": "1,000 at 3:30 o'clock",
    "1/2 red/white": "1/2 red/white",
    "caf\u00e9 & bar": "caf\u00e9 & bar",
    "(x) [y] {z}": "-lrb- x -rrb- -lsb- y -rsb- -lcb- z -rcb-",
    "bad\ufffd": "bad",
    'He said "hello" - and left...': "he said hello and left",
    "I cannot go": "i can not go",
    "gonna wanna gotta": "gon na wan na got ta",
    "'tis 'twas": "'t is 't was",
    "U.S. flag at 5 p.m.": "u.s. flag at 5 p.m.",
    "Mr. Smith vs. St. Louis etc.": "mr. smith vs. st. louis etc.",
    "they're we've I'll he'd I'm": "they 're we 've i 'll he 'd i 'm",
    "a -- b --- c": "a b c",
    "-start and end- -both-": "start and end both",
    "\u201chello\u201d \u2018there\u2019 it\u2019s": "hello there it 's",
    "What? Yes! No; cat, b: dog.": "what yes no cat b dog",
    "'s": "'s",
    "'": "",
    "-": "",
    ".": "",
    "": "",
    "'STOP'.": "stop",
    "a<b>c </s><unk> 2 < 3": "a <b> c </s> <unk> 2 < 3",
    "x\x01y\x1b[0m \x7f \u200b\u202etab\there": "x y -lsb- 0m tab here",
    "day \u2013 night\u2014dawn \u00absoft\u00ad\u00bb": "day night dawn soft",
    "20\u00b0 \u00a92024 i\u2665ny \U0001f600 \ue000": "20 \u00b0 \u00a9 2024 i \u2665 ny",
    "a\\b|c^d~e": "a \\ b | c ^ d ~ e",
    "lemme gimme": "lem me gim me",
}

CAPTIONS = """
A man riding a wave on top of a surfboard.
Two dogs' leashes are tied to a red/white pole, and it isn't raining.
A close-up of a half-eaten, hand-made pizza (with 2 slices left)
The sign reads "STOP" - nobody's there.
A T-shirt that costs $19.99, 50% off!
A clock showing 3:30 at St. Mary's church
It's a dog's life; he'd rather sleep...
1,000 people can't be wrong, they're at the U.S. embassy.
A woman's hat & a boy's shoes: a still life
a teddy bear's nose , and a  TV  set .
An elephant cannot fly
A black-and-white photo of Mr. Smith vs. Dr. Jones etc.
""".strip().splitlines()


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(text: str) -> None:
    assert " ".join(tokenize_py(text)) == EXAMPLES[text]


def test_fast_path_equals_full_rules() -> None:
    # A trailing symbol sends the same words through the full rules.
    for text in ("a man and a dog", "he cannot go", "A b.", "plan a.", "it is no.", "A man."):
        assert (*tokenize_py(text.rstrip(".")), "%") == tokenize_py(text.rstrip(".") + " %")
    assert tokenize_py("at the u.") == ("at", "the", "u.")
    assert tokenize_py("a dog.") == ("a", "dog")
    assert tokenize_py("number no.") == ("number", "no.")
    assert tokenize_py("he cannot.") == ("he", "can", "not")


def test_line_separators_become_spaces() -> None:
    for separator in ("\r\n", *"\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x00"):
        assert sanitize(f"a{separator}b") == "a" + " " * len(separator) + "b"
        assert len(sanitize(f"a{separator}b").splitlines()) == 1
        assert tokenize_py(f"a{separator}b") == ("a", "b")


def test_garbage_never_raises() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(128), rng.randrange(0xD7FF)])) for _ in range(40)
        )
        tokens = tokenize_py(text)
        assert all(token and len(token.split()) == 1 for token in tokens)
    assert len(tokenize_py("\u00e9" * 10_000)) == 1
    assert tokenize_py("a\ud800b \udfff") == ("a", "b")
    assert len(tokenize_py("\u2028 x" * 10_000)) == 10_000


def test_simple_and_names() -> None:
    assert tokenize_simple("A man's (big) wi-fi.") == ("a", "man's", "big", "wi-fi")
    assert get_tokenizer("none")("a  b.") == ("a", "b.")
    with pytest.raises(EvalError, match=r"expected one of .* got 'ptb5'"):
        get_tokenizer("ptb5")


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_agrees_with_the_reference_tokenizer() -> None:
    reference = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = CAPTIONS + [text for text in EXAMPLES if text]
    captions = {index: [{"caption": text}] for index, text in enumerate(texts)}
    expected = reference.PTBTokenizer().tokenize(captions)
    for index, text in enumerate(texts):
        assert " ".join(tokenize_py(text)) == expected[index][0], text
