# SPDX-License-Identifier: Apache-2.0
"""Score predictions from plain files: no model, no images, no task.

The answers are JSON-ready: ``scores`` with bootstrap intervals over images in the metric's own
unit (CIDEr in [0, 10], all others in [0, 1]), ``groups`` such as answer types, ``per_sample`` for
paired tests, and the ``protocol`` under which all of it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.metrics import gqa, vqa
from mmq_evals.metrics.caption import (
    DocumentFrequency,
    bleu,
    cider,
    document_frequency,
    rouge_l,
)
from mmq_evals.metrics.inputs import Hypotheses, References
from mmq_evals.metrics.java import (
    JavaUnavailableError,
    MeteorScores,
    find_java,
    java_version,
    meteor,
    spice,
)
from mmq_evals.predictions import (
    Question,
    gqa_groups,
    read_json,
    read_predictions,
    read_questions,
    read_references,
)
from mmq_evals.stats import bootstrap_mean
from mmq_evals.summary import bleu_corpus, meteor_corpus, retrieval_scores, score_rows

FORMAT = "mmq-scores"
FORMAT_VERSION = 1
CAPTION_METRICS = ("cider", "bleu", "rouge_l", "meteor", "spice")
DEFAULT_CAPTION_METRICS = ("cider", "bleu", "rouge_l")

Samples = dict[str, dict[str, float]]


def score_captions(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    metrics: Sequence[str] = DEFAULT_CAPTION_METRICS,
    tokenizer: str = "py",
    df: str | DocumentFrequency = "corpus",
    subset: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Corpus scores, intervals and scores per image of one caption an image.

    Args:
        metrics: some of `CAPTION_METRICS`; the last two need Java.
        tokenizer: one of `mmq_evals.metrics.tokenize.TOKENIZERS`.
        df: document frequencies of CIDEr: ``"corpus"`` counts them in all ``references``,
            ``"table:<file>"`` or a `DocumentFrequency` fixes them.
        subset: score the predicted images alone where references has more of them; document
            frequencies stay those of all references.
        seed: of the bootstrap.

    Raises:
        EvalError: an unknown metric, or as the metrics: different ids, ... Beside other metrics,
            METEOR or SPICE that cannot run is reported in its place and does not raise.
    """
    unknown = [name for name in metrics if name not in CAPTION_METRICS]
    if unknown or not metrics:
        raise EvalError(f"metrics: expected some of {', '.join(CAPTION_METRICS)}, got {unknown}")
    table = df
    source = df if isinstance(df, str) else "table"
    if df == "corpus" and "cider" in metrics:
        table = document_frequency(references, tokenizer=tokenizer)
    elif isinstance(df, str) and df.startswith("table:"):
        table = DocumentFrequency.load(Path(df.removeprefix("table:")))
    if subset:
        references = {key: texts for key, texts in references.items() if key in predictions}
    protocol: dict[str, Any] = {"metrics": list(metrics), "tokenizer": tokenizer}
    if isinstance(table, DocumentFrequency) and "cider" in metrics:
        frequencies = {"source": source, "images": table.n_images, "sha256": table.sha256()}
        protocol["document_frequency"] = frequencies
    if {"meteor", "spice"} & set(metrics) or tokenizer == "ptb":
        try:
            protocol["java"] = java_version(find_java())
        except JavaUnavailableError:
            protocol["java"] = None

    scores: dict[str, dict[str, Any]] = {}
    samples: Samples = {key: {} for key in predictions}
    for name in metrics:
        if name == "bleu":
            _score_bleu(references, predictions, tokenizer, seed, scores, samples)
            continue
        try:
            result = (
                cider(references, predictions, df=table, tokenizer=tokenizer)
                if name == "cider"
                else _BY_IMAGE[name](references, predictions, tokenizer=tokenizer)
            )
        except JavaUnavailableError as error:
            if name not in ("meteor", "spice") or len(metrics) == 1:
                raise
            scores[name] = {"value": None, "low": None, "high": None, "unavailable": str(error)}
            continue
        for key, value in result.per_image.items():
            samples[key][name] = value
        if isinstance(result, MeteorScores):
            intervals = meteor_corpus(result).intervals(seed)
            # The program's own value, which is the same but for the order of additions.
            scores[name] = asdict(replace(intervals[name], value=result.corpus))
        else:
            scores[name] = asdict(bootstrap_mean(result.per_image, seed=seed))
    return _report("captions", protocol, scores, samples, {})


_BY_IMAGE: dict[str, Callable[..., Any]] = {"rouge_l": rouge_l, "meteor": meteor, "spice": spice}


def _score_bleu(
    references: References,
    predictions: Hypotheses,
    tokenizer: str,
    seed: int,
    scores: dict[str, dict[str, Any]],
    samples: Samples,
) -> None:
    result = bleu(references, predictions, tokenizer=tokenizer)
    intervals = bleu_corpus(result).intervals(seed)
    scores |= {name: asdict(interval) for name, interval in intervals.items()}
    for key, values in result.per_image.items():
        samples[key] |= dict(zip(intervals, values, strict=True))


def score_vqa(
    questions: Mapping[str, Question],
    predictions: Mapping[str, str],
    *,
    protocols: Sequence[str] = vqa.PROTOCOLS,
    seed: int = 0,
) -> dict[str, Any]:
    """VQA accuracy under every protocol, in all and by answer type and question type.

    With ten annotators it is VQA accuracy; with one answer to every question, equality after the
    same normalisation.

    Raises:
        EvalError: an unknown protocol, a question without prediction or a prediction without
            question, or questions of unequal numbers of answers of which some have one.
    """
    _check_protocols(protocols, vqa.PROTOCOLS)
    single = {len(question.answers) == 1 for question in questions.values()}
    if len(single) > 1:
        raise EvalError("questions: expected all or none to have one answer alone, got both")

    def accuracy(prediction: str, question: Question, protocol: str) -> float:
        if len(question.answers) == 1:
            return vqa.exact_match(prediction, question.answers[0], protocol)
        return vqa.vqa_accuracy(prediction, question.answers, protocol)

    return _score_answers("vqa", questions, predictions, protocols, accuracy, seed)


def score_gqa(
    questions: Mapping[str, Question],
    predictions: Mapping[str, str],
    *,
    protocols: Sequence[str] = gqa.PROTOCOLS,
    seed: int = 0,
) -> dict[str, Any]:
    """GQA accuracy under every protocol, in all, binary and open, by structural and semantic type.

    Predictions of other questions, such as unbalanced ones, are left out.

    Raises:
        EvalError: an unknown protocol, a question without prediction, or one of several answers.
    """
    _check_protocols(protocols, gqa.PROTOCOLS)
    several = [key for key, question in questions.items() if len(question.answers) != 1]
    if several:
        raise EvalError(f"GQA: expected one answer to every question, got several: {several[:5]}")

    def accuracy(prediction: str, question: Question, protocol: str) -> float:
        return gqa.gqa_accuracy(prediction, question.answers[0], protocol)

    kept = {key: text for key, text in predictions.items() if key in questions}
    typed = {
        key: replace(question, groups=gqa_groups(question.groups))
        for key, question in questions.items()
    }
    return _score_answers("gqa", typed, kept, protocols, accuracy, seed)


def score_retrieval(
    rows: Sequence[Mapping[str, Any]], *, ties: str = "pessimistic", seed: int = 0
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in both directions and their means, from the rows of an evaluation.

    Args:
        rows: queries with ``direction`` ("txt": an image asks for texts, or "img"), ``candidates``,
            their ``prediction`` (scores, None for NaN), ``of`` (candidates in all), ``positives``.
        ties: rule for equal scores, one of `mmq_evals.metrics.retrieval.TIES`.

    Raises:
        EvalError: no rows, a field is missing, or as `retrieval_scores`.
    """
    scored = []
    for row in rows:
        try:
            kept = {key: row[key] for key in ("id", "cluster", "direction")}
            scored.append({**kept, "scores": retrieval_scores(row, ties=ties)})
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EvalError(f"retrieval: a row is out of form: {error!r}") from None
    intervals = {metric: asdict(value) for metric, value in score_rows(scored, seed=seed).items()}
    samples = {row["id"]: row["scores"] for row in scored}
    return _report("retrieval", {"ties": ties}, intervals, samples, {})


def score_result(folder: Path, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Score the stored raw predictions of an evaluation anew, by task.

    Args:
        folder: what `mmq eval --out` wrote.

    Raises:
        EvalError: no result there, or rows that are missing or out of form.
    """
    from mmq_evals.run import read_result

    reports: dict[str, dict[str, Any]] = {}
    for name, entry in read_result(folder)["tasks"].items():
        file = folder / entry["rows"]
        rows = read_json(file)
        first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        if "references" in first:
            table = entry.get("document_frequency")
            reports[name] = score_captions(
                read_references(file),
                read_predictions(file),
                df="corpus" if table is None else f"table:{folder / table}",
                seed=seed,
            )
        elif "answers" in first:
            score = score_gqa if name == "gqa" else score_vqa
            reports[name] = score(read_questions(file), read_predictions(file), seed=seed)
        elif "candidates" in first:
            reports[name] = score_retrieval(rows, seed=seed)
        else:
            raise EvalError(f"{file}: expected rows of captions, answers or retrieval")
    return reports


def _check_protocols(protocols: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in protocols if name not in known]
    if unknown or not protocols:
        raise EvalError(f"protocols: expected some of {', '.join(known)}, got {unknown}")


def _score_answers(
    kind: str,
    questions: Mapping[str, Question],
    predictions: Mapping[str, str],
    protocols: Sequence[str],
    accuracy: Callable[[str, Question, str], float],
    seed: int,
) -> dict[str, Any]:
    if not questions or questions.keys() != predictions.keys():
        odd = sorted(questions.keys() ^ predictions.keys())
        raise EvalError(
            f"{kind}: expected a prediction for every question, got {len(predictions)} for "
            f"{len(questions)}; in one only: {odd[:5]}"
        )
    samples: Samples = {
        key: {
            f"accuracy_{protocol}": accuracy(predictions[key], question, protocol)
            for protocol in protocols
        }
        for key, question in questions.items()
    }
    clusters = {key: question.cluster for key, question in questions.items()}
    names = [f"accuracy_{protocol}" for protocol in protocols]
    scores = {
        name: asdict(
            bootstrap_mean({key: row[name] for key, row in samples.items()}, clusters, seed=seed)
        )
        for name in names
    }
    members: dict[str, dict[str, list[str]]] = {}
    for key, question in questions.items():
        for group, value in question.groups.items():
            members.setdefault(group, {}).setdefault(value, []).append(key)
    groups = {
        group: {
            value: {
                "samples": len(keys),
                **{name: float(np.mean([samples[key][name] for key in keys])) for name in names},
            }
            for value, keys in sorted(by_value.items())
        }
        for group, by_value in sorted(members.items())
    }
    return _report(kind, {"accuracies": list(protocols)}, scores, samples, groups)


def _report(
    kind: str,
    protocol: dict[str, Any],
    scores: dict[str, dict[str, Any]],
    samples: Samples,
    groups: dict[str, Any],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": kind,
        "protocol": protocol,
        "scores": scores,
        "groups": groups,
        "per_sample": samples,
    }


def format_scores(report: Mapping[str, Any]) -> str:
    """A plain table: scores times 100 with intervals, then every group."""
    lines = [
        f"{report['kind']}: {len(report['per_sample'])} samples; scores times 100, with 95 % "
        "bootstrap intervals over images"
    ]
    for name, score in report["scores"].items():
        if score["value"] is None:
            lines.append(f"  {name:<24}unavailable: {score['unavailable']}")
            continue
        line = f"  {name:<24}{100 * score['value']:8.2f}"
        if score["low"] is not None:
            line += f"  [{100 * score['low']:.2f}, {100 * score['high']:.2f}]"
        lines.append(line)
    for group, by_value in report["groups"].items():
        lines.append(f"{group}:")
        for value, row in by_value.items():
            shown = ", ".join(
                f"{name.removeprefix('accuracy_')} {100 * number:.2f}"
                for name, number in row.items()
                if name != "samples"
            )
            lines.append(f"  {value} ({row['samples']}): {shown}")
    return "\n".join(lines)
