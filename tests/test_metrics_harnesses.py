# SPDX-License-Identifier: Apache-2.0
"""VQA accuracies beside those of LAVIS and lmms-eval on the same answers, where these install.

Neither package is imported, which would need all it depends on: the one file with the scorer is.
    pip install --no-deps --target harnesses lmms-eval salesforce-lavis
    PYTHONPATH=harnesses pytest tests/test_metrics_harnesses.py
"""

from __future__ import annotations

import importlib.util
import random
import statistics
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmq_evals.metrics import vqa, vqa_accuracy

WORDS = """
the a an one Two TEN none zero red cat dog's dont don't isnt couldnt've y'all somebody'd Im shed
well 1,000 3.5 5. .5 a.b u.s. t-shirt red/white 50% $5 (x) [y] wi-fi yes No maybe 2 3
""".split()  # noqa: SIM905
MARKS = (*vqa._MARKS, ".", "..", "'", ":", "*", "&", "\n", "\t", " ", "  ")


def scorer(package: str, file: str) -> Any:
    """The module in ``file`` of an installed package."""
    found = importlib.util.find_spec(package)
    folders = [] if found is None else found.submodule_search_locations or []
    path = next((p for folder in folders if (p := Path(folder) / file).is_file()), None)
    if path is None:
        pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location(f"{package}_scorer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
