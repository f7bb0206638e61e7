# SPDX-License-Identifier: Apache-2.0
"""Samples of a target: image, question, the answers of full precision and of quantized runs.

Samples whose answers changed most come first. Images are those of the built-in data or of a folder
in a published layout; without either, answers stand alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmq_evals.data import layouts
from mmq_evals.data.images import read_image
from mmq_evals.data.items import CaptionItem, OpenImage, VqaItem
from mmq_evals.errors import EvalError
from mmq_evals.results import RESULT_FILE, read_result, read_rows
from mmq_evals.study.importance import joint_grid
from mmq_evals.study.table import FULL_BITS, Grid, Run, has, width_text

MAX_SAMPLES = 12
SHOWN_WIDTHS = (4.0, 3.0)
MAX_RUNS = 8
THUMBNAIL = 112
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Answer:
    """What one run said, its score, and whether full precision said the same."""

    label: str
    text: str
    score: float | None
    changed: bool


@dataclass(frozen=True)
class Sample:
    """One query with its answers; ``image`` is a data URI or empty."""

    id: str
    image: str
    question: str
    expected: str
    full: Answer
    answers: tuple[Answer, ...]


def samples_of(
    folder: Path, grids: Sequence[Grid], target: str, *, data: str | Path | None = None
) -> list[Sample]:
    """The samples of a target that changed most, at most `MAX_SAMPLES`.

    Args:
        folder: that of the table.
        grids: of one model; of each the runs with one width throughout are shown.
        data: "tiny", a dataset folder, or None: no images.

    Raises:
        EvalError: rows or an image are out of form.
    """
    task, _, metric = target.removeprefix("score.").partition(".")
    members = [grid for grid in grids if any(has(run, target) for run in grid.cells.values())]
    full = next((g.full for g in members if g.full is not None and has(g.full, target)), None)
    if full is None or not _rows_file(folder, full, task).is_file():
        return []
    chosen = _even_runs(folder, members, target, task)
    if not chosen:
        return []
    before = {row["id"]: row for row in read_rows(_rows_file(folder, full, task))}
    after = [
        (label, {row["id"]: row for row in read_rows(_rows_file(folder, run, task))})
        for label, run in chosen
    ]
    items = _items(task, data, folder / str(full.values.get("rows")))
    texts = _texts(items, next(iter(before.values())))
    found = []
    for key, row in before.items():
        if any(key not in rows for _, rows in after) or row.get("direction") == "img":
            continue
        first = _answer("full precision", row, row, metric, texts)
        answers = tuple(_answer(label, rows[key], row, metric, texts) for label, rows in after)
        found.append((row, first, answers))
    found.sort(key=lambda entry: (-_moved(entry[1], entry[2]), entry[0]["id"]))
    return [
        Sample(
            row["id"],
            _data_uri(row, items),
            row.get("question", ""),
            _expected(row, texts),
            first,
            answers,
        )
        for row, first, answers in found[:MAX_SAMPLES]
    ]


def _moved(first: Answer, answers: Sequence[Answer]) -> float:
    """How much a sample has to show: changed answers, and scores that moved."""
    moved = sum(
        min(abs((a.score or 0.0) - (first.score or 0.0)), 1.0) for a in answers if a.changed
    )
    return sum(answer.changed for answer in answers) + moved


def _even_runs(
    folder: Path, grids: Sequence[Grid], target: str, task: str
) -> list[tuple[str, Run]]:
    """Runs whose jointly varied factors all have one of `SHOWN_WIDTHS`, the others untouched."""
    chosen = []
    for width in SHOWN_WIDTHS:
        for grid in grids:
            if any("." in name for name in grid.names):
                continue
            joint = joint_grid(grid, target)
            bits = tuple(width if f in joint.factors else FULL_BITS for f in grid.factors)
            run = grid.cells.get(bits)
            if run is not None and has(run, target) and _rows_file(folder, run, task).is_file():
                chosen.append((f"{grid.label} {width_text(bits)}", run))
    return chosen[:MAX_RUNS]


def _rows_file(folder: Path, run: Run, task: str) -> Path:
    return folder / str(run.values.get("rows")) / f"{task}.jsonl"


def _answer(
    label: str, row: Mapping[str, Any], full: Mapping[str, Any], metric: str, texts: Sequence[str]
) -> Answer:
    scores = row.get("scores", {})
    score = scores.get(metric, scores.get(f"{row.get('direction')}_{metric}"))
    mine, theirs = _said(row, texts), _said(full, texts)
    return Answer(label, mine, score, mine != theirs)


def _said(row: Mapping[str, Any], texts: Sequence[str]) -> str:
    """The answer as text: of retrieval the candidate that was ranked first."""
    if "candidates" not in row:
        return str(row["prediction"])
    ranked = zip(row["prediction"], row["candidates"], strict=True)
    # Of equal scores the one that stage 1 ranked first.
    best = max(ranked, key=lambda pair: float("-inf") if pair[0] is None else pair[0])[1]
    return texts[best] if best < len(texts) else f"candidate {best}"


def _expected(row: Mapping[str, Any], texts: Sequence[str]) -> str:
    if "answers" in row:
        return ", ".join(dict.fromkeys(row["answers"]))
    if "references" in row:
        return str(row["references"][0])
    known = [texts[index] for index in row.get("positives", []) if index < len(texts)]
    return known[0] if known else ""


# ---- images --------------------------------------------------------------------------------------

Items = Mapping[str, CaptionItem | VqaItem]


def _items(task: str, data: str | Path | None, run: Path) -> Items:
    """The items of a task by image, in their order."""
    if data is None:
        return {}
    if isinstance(data, Path):
        split = _split(run, task)
        if task == "gqa":
            dataset: Sequence[Any] = layouts.gqa(data, split).items
        elif task in ("captioning", "retrieval"):
            dataset = layouts.captions(data, split).items
        else:
            dataset = layouts.vqav2(data, split).items
    else:
        from mmq_evals.tiny import data as tiny

        if task in ("captioning", "retrieval"):
            dataset = tiny.caption_items("test")
        else:
            dataset = tiny.vqa_items("test", "scenes" if task == "vqa" else _source(task))
    return {getattr(item, "image_id", item.id): item for item in dataset}


def _source(task: str) -> Any:
    if task not in ("widths", "easy-vqa"):
        raise EvalError(f"samples: task {task!r} has no built-in data; name a folder with --data")
    return task


def _split(run: Path, task: str) -> str:
    if not (run / RESULT_FILE).is_file():
        return "test"
    return str(read_result(run)["tasks"][task]["protocol"]["data"]["split"])


def _texts(items: Items, row: Mapping[str, Any]) -> list[str]:
    """The candidate captions of a retrieval task, as many as its rows speak of."""
    if "candidates" not in row:
        return []
    captions = [
        text for item in items.values() if isinstance(item, CaptionItem) for text in item.references
    ]
    return captions[: row["of"]]


def _data_uri(row: Mapping[str, Any], items: Items) -> str:
    item = items.get(str(row["cluster"]))
    return "" if item is None else data_uri(str(row["id"]), item.image)


def data_uri(key: str, image: OpenImage) -> str:
    """A thumbnail as a data URI: PNG where the image is small already, else JPEG."""
    picture = read_image(key, image)
    small = max(picture.size) <= THUMBNAIL
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind, more = ("PNG", {"optimize": True}) if small else ("JPEG", {"quality": JPEG_QUALITY})
    picture.save(buffer, kind, **more)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
