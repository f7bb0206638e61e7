# SPDX-License-Identifier: Apache-2.0
"""Scores beside those of LAVIS and lmms-eval on the same predictions, where these install.

Neither package is imported, which would need all it depends on: the file or function that scores
is.
    pip install --no-deps --target harnesses lmms-eval salesforce-lavis pycocotools
    PYTHONPATH=harnesses pytest tests/test_metrics_harnesses.py
"""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import random
import re
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmq_evals.metrics import gqa_accuracy, vqa, vqa_accuracy
from mmq_evals.metrics.tokenize import sanitize
from mmq_evals.score import score_captions

WORDS = """
the a an one Two TEN none zero red cat dog's dont don't isnt couldnt've y'all somebody'd Im shed
well 1,000 3.5 5. .5 a.b u.s. t-shirt red/white 50% $5 (x) [y] wi-fi yes No maybe 2 3
""".split()  # noqa: SIM905
MARKS = (*vqa._MARKS, ".", "..", "'", ":", "*", "&", "\n", "\t", " ", "  ")


def source(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    path = next((p for folder in folders if (p := Path(folder) / file).is_file()), None)
    if path is None:
        pytest.skip(f"{package} is not installed")
    return path


def scorer(package: str, file: str) -> Any:
    """The module in ``file`` of an installed package."""
    spec = importlib.util.spec_from_file_location(f"{package}_scorer", source(package, file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function(package: str, file: str, name: str, **names: Any) -> Callable[..., Any]:
    """One function of ``file``, in which ``names`` stand for what the file imports."""
    path = source(package, file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    assert len(found) == 1, (path, name)
    exec(compile(ast.Module(list(found), []), str(path), "exec"), names)
    result: Callable[..., Any] = names[name]
    return result


def questions(n: int = 4000) -> list[tuple[str, list[str]]]:
    """Predictions and ten answers each, which mostly are variants of one another."""
    rng = random.Random(0)

    def phrase() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))

    def variant(text: str) -> str:
        for _ in range(rng.randint(0, 2)):
            place = rng.randint(0, len(text))
            text = text[:place] + rng.choice(MARKS) + text[place:]
        return rng.choice([text, text, text.upper(), text.capitalize(), f"the {text}"])

    result = []
    for _ in range(n):
        base = phrase()
        same = rng.random() < 0.2
        answers = [base if same or rng.random() < 0.3 else variant(base) for _ in range(10)]
        answers = [phrase() if not same and rng.random() < 0.2 else text for text in answers]
        result.append((variant(base), answers))
    return result


Score = Callable[[str, list[str]], float]


def lavis_scorer() -> Score:
    """LAVIS's accuracy of one prediction."""
    module = scorer("lavis", "common/vqa_tools/vqa_eval.py")

    def score(prediction: str, answers: list[str]) -> float:
        rows = [{"answer": text, "answer_id": n} for n, text in enumerate(answers)]
        entry = {"answers": rows, "question_type": "q", "answer_type": "a"}
        asked = SimpleNamespace(qa={1: entry}, getQuesIds=lambda: [1])
        given = SimpleNamespace(qa={1: {"answer": prediction}})
        evaluation = module.VQAEval(asked, given, n=10)
        evaluation.updateProgress = lambda progress: None
        # It prints at every call.
        with redirect_stdout(StringIO()):
            evaluation.evaluate([1])
        return float(evaluation.accuracy["overall"]) / 100

    return score


def lmms_scorer(task: str) -> Score:
    """lmms-eval's accuracy of one prediction in its task vqav2 or textvqa.

    Those functions need the whole package; what they do around the processor is repeated here.
    """
    processor = scorer("lmms_eval", "tasks/_task_utils/vqa_eval_metric.py").EvalAIAnswerProcessor()

    def prepare(text: str) -> str:
        if task == "textvqa":
            return str(processor(text))
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return str(processor.process_digit_article(processor.process_punctuation(text)))

    def score(prediction: str, answers: list[str]) -> float:
        given, texts = prepare(prediction), [prepare(answer) for answer in answers]
        others = [texts[:place] + texts[place + 1 :] for place in range(len(texts))]
        return statistics.mean(min(1, row.count(given) / 3) for row in others)

    return score


def lavis_gqa() -> Callable[[str, str], float]:
    """LAVIS's accuracy of one GQA prediction: its task normalises the prediction alone."""
    tool = scorer("lavis", "common/vqa_tools/vqa_eval.py").VQAEval()

    def score(prediction: str, gold: str) -> float:
        return float(tool.processDigitArticle(tool.processPunctuation(prediction)) == gold)

    return score


def lmms_gqa() -> Callable[[str, str], float]:
    """lmms-eval's accuracy of one GQA prediction, with the options of its task gqa."""
    names = {"np": np, "re": re, "string": string}
    exact = function("lmms_eval", "api/metrics.py", "exact_match_hf_evaluate", **names)

    def score(prediction: str, gold: str) -> float:
        found = exact([prediction], [gold], ignore_case=True, ignore_punctuation=True)
        return float(found["exact_match"])

    return score


def lmms_captions(
    refs: Mapping[str, Sequence[str]], hyps: Mapping[str, str], metrics: Sequence[str]
) -> dict[str, float]:
    """Corpus scores of lmms-eval's captioning tasks (flickr30k; coco's does the same), by its names
    of metrics. It tokenizes anew for each."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    from pycocoevalcap.eval import Bleu, Cider, COCOEvalCap, Meteor, Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    from pycocotools.coco import COCO

    aggregate = function(
        *("lmms_eval", "tasks/flickr30k/utils.py", "flickr_aggregation_result"),
        **{cls.__name__: cls for cls in (Bleu, Cider, COCOEvalCap, Meteor, Rouge)},
        **{cls.__name__: cls for cls in (PTBTokenizer, COCO)},
        eval_logger=logging.getLogger(__name__),
        generate_submission_file=lambda *_: os.devnull,
        json=json,
    )
    rows = [
        {"image_id": place, "pred": sanitize(hyps[name]), "answer": list(refs[name])}
        for place, name in enumerate(refs)
    ]
    with redirect_stdout(StringIO()):
        return {metric: float(aggregate(rows, metric, None)) for metric in metrics}


def test_gqa_is_the_harness() -> None:
    pairs = [(text, answers[0]) for text, answers in questions()]
    pairs += [(variant, gold) for _, gold in pairs[:500] for variant in (gold, gold + ".")]
    lmms, right = lmms_gqa(), 0.0
    for prediction, gold in pairs:
        ours = gqa_accuracy(prediction, gold, "lmms-eval")
        assert ours == lmms(prediction, gold), (prediction, gold)
        right += ours
    assert 0.1 < right / len(pairs) < 0.9


def test_gqa_of_lavis_leaves_the_gold_answer_as_it_is() -> None:
    """Ours normalises both sides; they are equal wherever that leaves the gold answer as it is."""
    lavis, same, right, other = lavis_gqa(), 0, 0.0, 0
    for prediction, answers in questions():
        gold = answers[0]
        ours, theirs = gqa_accuracy(prediction, gold, "lavis"), lavis(prediction, gold)
        if vqa.normalize_words(vqa.strip_punctuation(gold)) == gold:
            assert ours == theirs, (prediction, gold)
            same, right = same + 1, right + ours
        else:
            assert ours >= theirs, (prediction, gold)
            other += ours > theirs
    assert same > 300
    assert right > 50
    assert other > 100
    assert (lavis("t-shirt", "t-shirt"), gqa_accuracy("t-shirt", "t-shirt", "lavis")) == (0.0, 1.0)


def test_captions_are_the_harness() -> None:
    rng = random.Random(0)
    subjects, verbs = ["A man's dog", "two boys", "It's a cat"], ["sits", "isn't moving", "plays"]
    places = ["on the beach.", "at 3:30 p.m.", "by a red/white sign", "(outside)"]

    def sentence() -> str:
        return " ".join(rng.choice(words) for words in (subjects, verbs, places))

    refs = {str(n): [sentence() for _ in range(5)] for n in range(40)}
    hyps = {name: sentence() for name in refs}
    theirs = lmms_captions(refs, hyps, ["CIDEr", "Bleu_4"])
    ours = score_captions(refs, hyps)["scores"]
    assert ours["cider"]["value"] == pytest.approx(theirs["CIDEr"], abs=1e-4)
    assert ours["bleu_4"]["value"] == pytest.approx(theirs["Bleu_4"], abs=1e-4)


@pytest.mark.parametrize(
    ("protocol", "make"),
    [
        ("official-2017", lavis_scorer),
        ("always", lambda: lmms_scorer("vqav2")),
        ("m4c", lambda: lmms_scorer("textvqa")),
    ],
)
def test_protocol_is_the_harness(protocol: str, make: Callable[[], Score]) -> None:
    theirs = make()
    scores = []
    for prediction, answers in questions():
        ours = vqa_accuracy(prediction, answers, protocol)
        expected = theirs(prediction, list(answers))
        assert ours == pytest.approx(expected, abs=1e-12), (prediction, answers)
        scores.append(ours)
    # The answers try the scorer: neither nearly all right nor nearly all wrong.
    assert 0.1 < statistics.mean(scores) < 0.9
    assert len({round(score, 3) for score in scores}) > 4
