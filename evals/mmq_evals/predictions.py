# SPDX-License-Identifier: Apache-2.0
"""Predictions and references in the plain files that people exchange.

A file is JSON, or JSON lines if its name ends in ``.jsonl``; lines end at a line feed alone, so no
character of a prediction can shift what follows. Every function raises EvalError, with the file's
name, for a file that is missing, unreadable or out of form and for an id that comes twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError

Row = dict[str, Any]

_ID_FIELDS = ("id", "image_id", "question_id", "questionId", "cocoid", "filename")
_TEXT_FIELDS = ("prediction", "caption", "answer")


@dataclass(frozen=True)
class Question:
    """The answers to one question; ``cluster`` is its image. ``groups`` is by kind of group."""

    cluster: str
    answers: tuple[str, ...]
    groups: dict[str, str]


def read_json(file: Path) -> Any:
    """The content of a JSON file, or the list of the lines of a JSON lines file."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise EvalError(f"expected a JSON file, got {file} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise EvalError(f"{file}: expected UTF-8, {error.reason}") from None
    try:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise EvalError(f"{file}: not JSON: {error}") from None


def read_predictions(file: Path) -> dict[str, str]:
    """Sample id to predicted text, as it was predicted.

    Accepted are an object id to text, a list of texts (whose ids are their places, from 0), a list
    of objects with an id and a text (the result format of COCO, VQAv2 and GQA, and the rows of an
    evaluation), and any of these under ``"predictions"``.
    """
    data = read_json(file)
    if isinstance(data, dict) and isinstance(data.get("predictions"), list | dict):
        data = data["predictions"]
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        data = _unique(file, ((_id(file, row), _text(file, row)) for row in data))
    elif isinstance(data, list):
        data = {str(index): text for index, text in enumerate(data)}
    return _texts(file, data)


def read_references(file: Path, split: str = "test") -> dict[str, list[str]]:
    """Image id to reference captions.

    Accepted are an object id to list, a list of lists (ids are places, from 0), COCO's annotations
    of captions, a Karpathy file (of which ``split`` is read), rows of an evaluation, and any of the
    plain forms under ``"references"``. A list of lists beside as many ``"predictions"`` with ids,
    which is the study's result format, takes its ids from these.
    """
    data = read_json(file)
    if isinstance(data, dict) and "annotations" in data:
        grouped: dict[str, list[str]] = {}
        for row in _objects(file, data["annotations"]):
            grouped.setdefault(_id(file, row, "image_id"), []).append(_field(file, row, "caption"))
        return grouped
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        return _karpathy(file, data["images"], split)
    if isinstance(data, dict) and isinstance(data.get("references"), list | dict):
        data = _beside_predictions(file, data)
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        return _unique(file, ((_id(file, row), _field(file, row, "references")) for row in data))
    if isinstance(data, list):
        data = {str(index): texts for index, texts in enumerate(data)}
    if not isinstance(data, dict) or not all(isinstance(texts, list) for texts in data.values()):
        raise EvalError(f"{file}: expected a list of reference captions for every image")
    return data


def _beside_predictions(file: Path, data: dict[str, Any]) -> Any:
    references, rows = data["references"], data.get("predictions")
    if not isinstance(references, list) or not isinstance(rows, list):
        return references
    if not rows or not all(isinstance(row, dict) for row in rows):
        return references
    if len(references) != len(rows):
        raise EvalError(
            f"{file}: expected references for every prediction, got {len(references)} for "
            f"{len(rows)}"
        )
    return _unique(file, zip((_id(file, row) for row in rows), references, strict=True))


def read_questions(file: Path) -> dict[str, Question]:
    """Question id to its answers.

    Accepted are the annotations of VQAv2, the questions of GQA (the balanced ones are kept), and
    rows of an evaluation.
    """
    data = read_json(file)
    if isinstance(data, dict) and "annotations" in data:
        rows = _objects(file, data["annotations"])
        return _unique(file, ((_id(file, row, "question_id"), _vqav2(file, row)) for row in rows))
    if isinstance(data, dict):
        return {key: _gqa(file, row) for key, row in data.items() if _balanced(file, row)}
    rows = _objects(file, data)
    return _unique(file, ((_id(file, row, "id"), _from_row(file, row)) for row in rows))


def _vqav2(file: Path, row: Row) -> Question:
    answers = tuple(_field(file, a, "answer") for a in _objects(file, row.get("answers")))
    groups = {key: str(row[key]) for key in ("answer_type", "question_type") if row.get(key)}
    return Question(_id(file, row, "image_id"), answers, groups)


def _balanced(file: Path, row: Any) -> bool:
    if not isinstance(row, dict):
        raise EvalError(f"{file}: expected questions to be objects, got {row!r}")
    return bool(row.get("isBalanced", True))


def _gqa(file: Path, row: Row) -> Question:
    types = row.get("types") or {}
    groups = {"question_type": types.get("structural"), "answer_type": types.get("semantic")}
    kept = {key: value for key, value in groups.items() if value}
    return Question(_id(file, row, "imageId"), (_field(file, row, "answer"),), kept)


def gqa_groups(groups: Mapping[str, str]) -> dict[str, str]:
    """The names of GQA for its types, and the form of the question: open is a structural query."""
    result = {}
    if "question_type" in groups:
        result["structural"] = groups["question_type"]
        result["form"] = "open" if groups["question_type"] == "query" else "binary"
    if "answer_type" in groups:
        result["semantic"] = groups["answer_type"]
    return result


def _from_row(file: Path, row: Row) -> Question:
    answers = _field(file, row, "answers")
    if not isinstance(answers, list):
        raise EvalError(f"{file}: expected a list of answers, got {answers!r}")
    groups = {key: str(row[key]) for key in ("answer_type", "question_type") if row.get(key)}
    return Question(str(row.get("cluster", row["id"])), tuple(answers), groups)


def _karpathy(file: Path, images: list[Any], split: str) -> dict[str, list[str]]:
    rows = [row for row in _objects(file, images) if row.get("split") == split]
    if not rows:
        raise EvalError(f"{file}: expected images of split {split!r}, got none")
    return _unique(
        file,
        (
            (
                str(row.get("cocoid", row.get("filename"))),
                [_field(file, s, "raw") for s in _objects(file, row.get("sentences"))],
            )
            for row in rows
        ),
    )


# ---- fields --------------------------------------------------------------------------------------


def _objects(file: Path, rows: Any) -> list[Row]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvalError(f"{file}: expected a list of objects, got {str(rows)[:80]!r}")
    return rows


def _id(file: Path, row: Row, name: str | None = None) -> str:
    found = next((key for key in ([name] if name else _ID_FIELDS) if key in row), None)
    if found is None:
        expected = name or " or ".join(_ID_FIELDS)
        raise EvalError(f"{file}: expected a field {expected}, got {sorted(row)}")
    return str(row[found])


def _text(file: Path, row: Row) -> Any:
    found = next((key for key in _TEXT_FIELDS if key in row), None)
    if found is None:
        raise EvalError(f"{file}: expected a field {' or '.join(_TEXT_FIELDS)}, got {sorted(row)}")
    return row[found]


def _field(file: Path, row: Row, name: str) -> Any:
    if name not in row:
        raise EvalError(f"{file}: expected a field {name}, got {sorted(row)}")
    return row[name]


def _unique(file: Path, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise EvalError(f"{file}: expected every id once, got {key!r} twice")
        result[key] = value
    return result


def _texts(file: Path, data: Any) -> dict[str, str]:
    if not isinstance(data, Mapping) or not data:
        raise EvalError(f"{file}: expected predictions by id or a list of them")
    for key, text in data.items():
        if not isinstance(text, str):
            raise EvalError(f"{file}: expected predictions to be strings, got {text!r} of {key!r}")
    return dict(data)
