# SPDX-License-Identifier: Apache-2.0
"""METEOR, SPICE and the Penn Treebank tokenizer: against pycocoevalcap, on garbage, and absent."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmq_evals import score
from mmq_evals.errors import EvalError
from mmq_evals.metrics import cider, java, meteor, spice
from mmq_evals.metrics.java import meteor_from_statistics
from mmq_evals.metrics.tokenize import sanitize, tokenize_all, tokenize_py
from mmq_evals.score import format_scores, score_captions

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="no Java or no pycocoevalcap",
)

REFS = {
    "x": ["a man riding a horse on the beach", "a person rides a horse"],
    "y": ["two dogs playing in the snow"],
    "z": ["a red kite in the sky", "a kite flying high", "someone flies a kite"],
}
HYPS = {"x": "a man on a horse", "y": "dogs play in snow", "z": "a plane"}

GARBAGE = [
    "",
    " ",
    "a\rdog\u2028on\x0bthe\x0cmat\x85here\u2029now\x1c.\x00end",
    "\ufffd\ufffd",
    "\ud800 lone",
    "\x01\x1b[0m\x07\x7f",
    "a ||| b |||",
    "EVAL ||| 1 2 3",
    "\U0001f600 caf\u00e9 \u4e2d\u6587",
    "x" * 10_000,
    "dog " * 2_500,
    "<b>tag</b> &amp; &nbsp; http://x.com/?a=1",
    "last one",
]


@needs_java
def test_meteor_equals_pycocoevalcap() -> None:
    reference = pytest.importorskip("pycocoevalcap.meteor.meteor")
    expected, per_image = reference.Meteor().compute_score(
        REFS, {key: [text] for key, text in HYPS.items()}
    )
    ours = meteor(REFS, HYPS, tokenizer="none")
    assert ours.corpus == expected
    assert list(ours.per_image.values()) == per_image
    # The corpus value is the aggregate of summed statistics, not the mean.
    assert abs(ours.corpus - sum(per_image) / len(per_image)) > 1e-3


@needs_java
def test_meteor_of_statistics_is_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its interval comes from resampled sums; per image and of every corpus."""
    refs, hyps = natural_captions(20)
    hyps |= {"same": refs["0"][0], "none": "x", "empty": ""}
    refs |= dict.fromkeys(("same", "none", "empty"), refs["0"])
    # Synonyms and paraphrases.
    hyps |= {"large": "a big dog", "person": "a man on a horse"}
    hyps["house"] = "dogs of the large house run in the park quickly"
    refs |= {"large": ["a large dog"], "person": ["a person rides a horse"]}
    refs["house"] = ["the big dogs of the house are running quickly in a park"]
    theirs = meteor(refs, hyps)
    statistics, values = np.array(theirs.statistics), list(theirs.per_image.values())
    np.testing.assert_allclose(meteor_from_statistics(statistics), values, rtol=0, atol=1e-12)
    corpus = float(meteor_from_statistics(statistics.sum(axis=0)))
    assert corpus == pytest.approx(theirs.corpus, abs=1e-12)
    # Of a part of the images, from sums of the statistics that the whole corpus gave.
    part = ["0", "1", "same", "none", "empty"]
    chosen = statistics[[list(hyps).index(key) for key in part]]
    smaller = meteor({key: refs[key] for key in part}, {key: hyps[key] for key in part})
    corpus = float(meteor_from_statistics(chosen.sum(axis=0)))
    assert corpus == pytest.approx(smaller.corpus, abs=1e-12)
    assert values[list(hyps).index("none")] == values[list(hyps).index("empty")] == 0.0
    # The report's interval; starting the program takes seconds, so its answer is given.
    monkeypatch.setitem(score._BY_IMAGE, "meteor", lambda *_, **__: theirs)
    found = score_captions(refs, hyps, metrics=["meteor"])["scores"]["meteor"]
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(theirs.corpus, abs=1e-12)
    weights = java._METEOR_WEIGHTS
    # A fifth more of weight on exact matches, synonyms or paraphrases would be noticed. (The
    # program has found no stems, even of words such as "walks" and "walking".)
    for kind in (0, 2, 3):
        monkeypatch.setattr(
            java, "_METEOR_WEIGHTS", weights * np.where(np.arange(4) == kind, 1.2, 1)
        )
        assert np.abs(meteor_from_statistics(statistics) - values).max() > 1e-3, kind


@needs_java
def test_meteor_ignores_the_locale_and_survives_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    hyps = {"first": "a dog", **{str(n): text for n, text in enumerate(GARBAGE)}, "end": "a dog"}
    refs = {name: ["a dog on the mat", *GARBAGE[:8]] for name in hyps}
    expected = meteor(refs, hyps)
    for name in ("LC_ALL", "LANG"):
        monkeypatch.setenv(name, "C")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert meteor(refs, hyps) == expected
    assert expected.per_image["0"] == 0.0
    # Nothing is shifted: the same caption scores the same before and after the garbage.
    assert expected.per_image["end"] == expected.per_image["first"] > 0.2


@needs_java
def test_ptb_keeps_one_line_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = java.tokenize_ptb([*GARBAGE, "", "A man's caf\u00e9 (closed)."])
    assert len(tokens) == len(GARBAGE) + 2
    assert tokens[0] == tokens[1] == tokens[-2] == ()
    assert " ".join(tokens[2]) == "a dog on the mat here now end"
    assert tokens[-1] == ("a", "man", "'s", "caf\u00e9", "-lrb-", "closed", "-rrb-")
    assert java.tokenize_ptb([]) == []
    monkeypatch.setenv("LC_ALL", "C")
    assert java.tokenize_ptb(["caf\u00e9"]) == [("caf\u00e9",)]
    # Ours agrees on all of the garbage but the markup, which it does not know as such.
    for text, theirs in zip(GARBAGE, tokens, strict=False):
        if "&amp;" not in text:
            assert tokenize_py(text) == theirs, text


@needs_java
def test_ptb_is_a_tokenizer_of_every_metric() -> None:
    hyps = {"x": "A man's on a horse.", "y": "dogs\u2028play", "z": "a kite!"}
    ptb, py = cider(REFS, hyps, tokenizer="ptb"), cider(REFS, hyps)
    assert ptb == py
    assert tokenize_all(["a dog."], "ptb") == [("a", "dog")]


@needs_java
def test_corpus_scores_of_our_tokenizer_are_those_of_the_reference_pipeline() -> None:
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    scorers = {
        "cider": pytest.importorskip("pycocoevalcap.cider.cider").Cider(),
        "rouge_l": pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge(),
        "bleu": pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4),
    }
    refs, hyps = natural_captions(300)
    raw_refs = {key: [{"caption": text} for text in texts] for key, texts in refs.items()}
    # The reference pipeline itself would take the line separators for new captions.
    clean = {key: [{"caption": sanitize(text)}] for key, text in hyps.items()}
    theirs = ptb.tokenize(raw_refs), ptb.tokenize(clean)
    report = score_captions(refs, hyps)["scores"]
    for name, scorer in scorers.items():
        expected = scorer.compute_score(*theirs, **({"verbose": 0} if name == "bleu" else {}))[0]
        names = [f"bleu_{order}" for order in range(1, 5)] if name == "bleu" else [name]
        values = [report[key]["value"] for key in names]
        assert values == pytest.approx(expected if name == "bleu" else [expected], abs=1e-4), name
        assert 0.05 < values[-1] < 9


def natural_captions(n: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Sentences with the punctuation, clitics and capitals of people's captions."""
    rng = random.Random(0)
    subjects = [
        "A man's dog",
        "Two boys",
        "The children's bus",
        "An old-fashioned TV",
        "It's a cat",
    ]
    verbs = ["isn't moving", "is sitting", "stands", "plays", "can't be seen", "waits (alone)"]
    places = [
        "on the beach.", "at 3:30 p.m.", "next to a red/white sign", "in front of St. Mary's.",
        "on a half-eaten pizza!", "near 1,000 people...", 'below a "STOP" sign', "- in the U.S.",
        "with a hat , and a coat .", "at 50% of $5.00?", "by the Smiths' caf\u00e9; outside",
    ]  # fmt: skip

    def sentence() -> str:
        return " ".join(rng.choice(words) for words in (subjects, verbs, places))

    refs = {str(index): [sentence() for _ in range(5)] for index in range(n)}
    return refs, {key: sentence().replace(" a ", "\u2028a ") for key in refs}


@needs_java
def test_a_program_that_breaks_the_lines_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "sanitize", lambda text: text)
    with pytest.raises(EvalError, match="expected 2 lines from Java, got 3"):
        java.tokenize_ptb(["a\nb", "c"])


@needs_java
def test_a_program_that_dies_is_reported() -> None:
    with pytest.raises(EvalError, match=r"METEOR: unavailable, Java ended with 1: Invalid"):
        meteor(REFS, HYPS, heap="none")


def test_without_java_or_package_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(EvalError, match=r"expected the program java on .*JAVA_HOME.*default-jre"):
        java.find_java()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EvalError, match=r"expected the program java on the PATH"):
        meteor(REFS, HYPS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for metric in (meteor, spice):
        with pytest.raises(EvalError, match=r"install mmq\[java\]|program java"):
            metric(REFS, HYPS)
    with pytest.raises(EvalError, match=r"install mmq\[java\]"):
        cider(REFS, HYPS, tokenizer="ptb")


def fake_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(java, "_package", lambda: folder)


def test_spice_names_the_models_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(EvalError, match=r"expected .*stanford-corenlp-3.6.0.jar; .*nlp.stanford"):
        spice(REFS, HYPS)
    with pytest.raises(EvalError, match=r"expected equal ids"):
        spice(REFS, {"x": "a"})


def fake_spice(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: str) -> Path:
    """A program in Java's place that writes ``answer``; returns the file of its arguments."""
    (folder / "spice" / "lib").mkdir(parents=True)
    for name in java._SPICE_MODELS:
        (folder / "spice" / "lib" / name).touch()
    fake_package(monkeypatch, folder)
    program = folder / "bin" / "java"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nfor arg; do printf "%s\\n" "$arg" >> ' + f"{folder}/arguments\n"
        "  case $last in -out) out=$arg;; esac; case $arg in *in.json) cp $arg "
        f"{folder}/given;; esac; last=$arg\ndone\nprintf '%s' '{answer}' > $out\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(folder))
    return folder / "arguments"


def test_spice_protocol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [(2, "null"), (0, "0.5"), (1, "0.25")]
    answer = ",".join(f'{{"image_id": {i}, "scores": {{"All": {{"f": {f}}}}}}}' for i, f in rows)
    arguments = fake_spice(monkeypatch, tmp_path, f"[{answer}]")
    scores = spice(REFS, HYPS | {"y": "a\u2028dog"}, heap="3G")
    assert scores.per_image == {"x": 0.5, "y": 0.25, "z": 0.0}
    assert scores.corpus == pytest.approx(0.25)
    given = arguments.read_text().splitlines()
    assert {"-Xmx3G", "-Duser.language=en", "-subset"} <= set(given)
    assert "-cache" not in given
    assert '"test": "a dog"' in (tmp_path / "given").read_text()


def test_spice_answers_out_of_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_spice(monkeypatch, tmp_path, "[]")
    with pytest.raises(EvalError, match="expected 3 images in the answer, got 0"):
        spice(REFS, HYPS)
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\necho 'x Exception: no' >&2; exit 1\n")
    with pytest.raises(EvalError, match="SPICE: unavailable, Java ended with 1: x Exception: no"):
        spice(REFS, HYPS)
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\n")
    with pytest.raises(EvalError, match="SPICE: unavailable, its answer is out of form"):
        spice(REFS, HYPS)


def test_a_metric_that_cannot_run_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    report = score_captions(REFS, HYPS, metrics=["meteor", "cider"])
    assert report["scores"]["cider"]["value"] == pytest.approx(cider(REFS, HYPS).corpus)
    assert report["scores"]["meteor"]["value"] is None
    assert report["protocol"]["java"] is None
    assert "meteor                  unavailable: Java: expected" in format_scores(report)
    with pytest.raises(java.JavaUnavailableError, match="expected the program java"):
        score_captions(REFS, HYPS, metrics=["meteor"])
    with pytest.raises(java.JavaUnavailableError):
        score_captions(REFS, HYPS, tokenizer="ptb")
    # Bad input is bad input.
    with pytest.raises(EvalError, match="expected equal ids"):
        score_captions(REFS, {"x": "a"}, metrics=["meteor", "cider"])
