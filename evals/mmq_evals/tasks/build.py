# SPDX-License-Identifier: Apache-2.0
"""Which task fits which model and data, and the tasks built from their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmq_evals.data import layouts
from mmq_evals.data.items import CaptionItem, RetrievalItem, VqaItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.tasks.base import Task
from mmq_evals.tasks.captioning import Captioning
from mmq_evals.tasks.retrieval import Retrieval
from mmq_evals.tasks.vqa import VisualQuestions

if TYPE_CHECKING:
    from mmq_evals.tiny.data import VqaSource

Data = Literal["tiny"] | Path

# Items of every task, or by task; None, or no entry, is all.
Limit = int | Mapping[str, int] | None

TASKS = ("captioning", "retrieval", "vqa", "widths", "easy-vqa", "gqa")

# Tasks that a model class can do, and those that the built-in tiny model of it was trained for.
_FITTING = {
    "Blip2ForConditionalGeneration": ("captioning", "vqa", "widths", "easy-vqa", "gqa"),
    "Blip2ForImageTextRetrieval": ("retrieval",),
    "LlavaForConditionalGeneration": ("vqa", "widths", "easy-vqa", "gqa"),
}
_TINY = {
    "Blip2ForConditionalGeneration": ("captioning",),
    "Blip2ForImageTextRetrieval": ("retrieval",),
    "LlavaForConditionalGeneration": ("vqa", "widths", "easy-vqa"),
}

# Candidates re-ranked for each query. The tiny set has 500 images; 128 of them would be a quarter.
K_TEST_TINY = 16
K_TEST = 128

# Training items from which baselines are chosen, of the tiny data.
_TINY_TRAIN_SCENES = 1_000
_TINY_TRAIN_QUESTIONS = 5_000


def model_class(model: Any) -> str:
    """The supported model class of ``model``.

    Raises:
        EvalError: for any other class.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for name in names:
        if name in _FITTING:
            return name
    raise EvalError(f"model: expected one of {', '.join(_FITTING)}, got {names[0]}")


def tasks_for(model: Any, data: Data = "tiny") -> list[str]:
    """The tasks that fit a model and for which ``data`` has what is needed.

    Raises:
        EvalError: the model is of no supported class.
    """
    name = model_class(model)
    if not isinstance(data, Path):
        return list(_TINY[name])
    present = {
        "captioning": layouts.has_captions(data),
        "retrieval": layouts.has_captions(data),
        "vqa": layouts.has_vqav2(data),
        "widths": False,
        "easy-vqa": False,
        "gqa": layouts.has_gqa(data),
    }
    return [task for task in _FITTING[name] if present[task]]


def limit_of(limit: Limit, task: str) -> int | None:
    """How many items of ``task`` are evaluated at most; None is all."""
    return limit.get(task) if isinstance(limit, Mapping) else limit


def build_tasks(
    model: Any, names: Sequence[str], data: Data, split: str, limit: Limit
) -> dict[str, Task]:
    """The named tasks on ``data``, by name, each cut to its limit of items.

    Raises:
        EvalError: no or an unknown task, a task that does not fit the model, data that is missing.
    """
    fitting = _FITTING[model_class(model)]
    for name in names:
        most = limit_of(limit, name)
        if most is not None and most < 1:
            raise EvalError(f"limit: expected at least 1, got {most}")
    if not isinstance(data, Path) and data != "tiny":
        raise EvalError(f"data: expected 'tiny' or a Path, got {data!r}")
    if not names or len(set(names)) < len(names):
        raise EvalError(f"tasks: expected different tasks, at least one, got {list(names)}")
    for name in names:
        if name not in TASKS:
            raise EvalError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
        if name not in fitting:
            raise EvalError(
                f"task {name!r} does not fit {model_class(model)}: expected one of "
                f"{', '.join(fitting)}"
            )
    return {name: _build(model, name, data, split, limit_of(limit, name)) for name in names}


def _build(model: Any, name: str, data: Data, split: str, limit: int | None) -> Task:
    real = isinstance(data, Path)
    if name == "captioning":
        dataset = layouts.captions(data, split) if isinstance(data, Path) else _tiny_captions(split)
        return Captioning(dataset, "lavis" if real else "greedy", limit)
    if name == "retrieval":
        return Retrieval(
            layouts.retrieval(data, split) if isinstance(data, Path) else _tiny_retrieval(split),
            K_TEST if real else K_TEST_TINY,
            limit,
        )
    return VisualQuestions(_questions(name, data, split), _asking(model), name, limit)


def _questions(name: str, data: Data, split: str) -> Dataset[VqaItem]:
    if name == "widths":
        return _tiny_questions("widths", split)
    if name == "easy-vqa":
        return _tiny_questions("easy-vqa", split)
    if name == "gqa":
        if not isinstance(data, Path):
            raise EvalError(f"task 'gqa' has no tiny data; expected {layouts.GQA_LAYOUT.strip()}")
        return layouts.gqa(data, split)
    if isinstance(data, Path):
        return layouts.vqav2(data, split)
    return _tiny_questions("scenes", split)


def _asking(model: Any) -> str:
    if model_class(model) == "LlavaForConditionalGeneration":
        return "llava"
    text_config = model.config.text_config
    return "blip2-t5" if getattr(text_config, "is_encoder_decoder", False) else "blip2-opt"


def _tiny_captions(split: str) -> Dataset[CaptionItem]:
    from mmq_evals.tiny import data as tiny

    train = partial(tiny.caption_items, "train", _TINY_TRAIN_SCENES)
    return Dataset("tiny-scenes", split, tiny.caption_items(_tiny_split(split)), train)


def _tiny_retrieval(split: str) -> Dataset[RetrievalItem]:
    from mmq_evals.tiny import data as tiny

    return Dataset("tiny-scenes", split, tiny.retrieval_items(_tiny_split(split)))


def _tiny_questions(source: VqaSource, split: str) -> Dataset[VqaItem]:
    from mmq_evals.tiny import data as tiny

    train = partial(tiny.vqa_items, "train", source, _TINY_TRAIN_QUESTIONS)
    name = "easy-vqa" if source == "easy-vqa" else "tiny-scenes"
    return Dataset(name, split, tiny.vqa_items(_tiny_split(split), source), train)


def _tiny_split(split: str) -> Any:
    if split not in ("test", "calibration", "train"):
        raise EvalError(f"split: expected test, calibration or train of tiny data, got {split!r}")
    return split
