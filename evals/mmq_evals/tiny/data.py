# SPDX-License-Identifier: Apache-2.0
"""The tiny models' data as items: generated scenes, easy-vqa, and calibration samples.

Licences: the scenes are part of mmq (Apache-2.0); easy-vqa is MIT.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image

from mmq_evals.data.items import CaptionItem, RetrievalItem, VqaItem
from mmq_evals.errors import EvalError
from mmq_evals.tasks.vqa import LLAVA

from . import CAPTION_PROMPT, MODELS
from .architectures import Processor
from .scenes import SPLIT_SIZES, Split, captions, questions, render, scenes, widths

VqaSource = Literal["scenes", "widths", "easy-vqa"]
QUESTIONS_PER_SCENE = 4
WIDTH_SCENES = 1_100  # two thousand questions: a difference of two points must show


@dataclass(frozen=True)
class CalibrationSample:
    """One unpadded batch-of-one input of a model's forward, and the id it came from."""

    id: str
    inputs: dict[str, torch.Tensor]


def caption_items(split: Split, limit: int | None = None) -> list[CaptionItem]:
    """Scenes with five reference captions each; 500 in the test split."""
    return [
        CaptionItem(id, partial(render, shown), captions(shown))
        for id, shown in scenes(split, limit)
    ]


def retrieval_items(split: Split, limit: int | None = None) -> list[RetrievalItem]:
    """Scenes with five captions each. No two scenes of the test split have the same content."""
    return [
        RetrievalItem(item.id, item.image, item.references) for item in caption_items(split, limit)
    ]


def vqa_items(
    split: Split, source: VqaSource = "scenes", limit: int | None = None
) -> list[VqaItem]:
    """Questions on scenes (four a scene), on the widths of their objects alone, or easy-vqa's
    official train or test questions.

    Widths are asked of WIDTH_SCENES test scenes; the first are those of the other questions.
    ``limit`` counts questions. Raises ValueError for an unknown source or split, and
    EvalError when easy-vqa is asked for and not installed.
    """
    if source not in get_args(VqaSource):
        raise ValueError(f"expected a source of {', '.join(get_args(VqaSource))}, got {source!r}")
    if source == "easy-vqa":
        return _easy_vqa(split, limit)
    if source == "widths":
        asked = scenes(split, limit, size=WIDTH_SCENES if split == "test" else None)
        return [
            VqaItem(f"{id}-w{n}", id, partial(render, shown), q.text, (q.answer,), q.type)
            for id, shown in asked
            for n, q in enumerate(widths(shown))
        ][:limit]
    scenes_needed = None if limit is None else -(-limit // QUESTIONS_PER_SCENE)
    items = [
        VqaItem(f"{id}-q{n}", id, partial(render, shown), q.text, (q.answer,), q.type)
        for id, shown in scenes(split, scenes_needed)
        for n, q in enumerate(questions(shown, random.Random(id))[:QUESTIONS_PER_SCENE])
    ]
    return items[:limit]


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        pixels: Image.Image = image.convert("RGB")
        return pixels


def _easy_vqa(split: Split, limit: int | None) -> list[VqaItem]:
    if split not in ("train", "test"):
        raise ValueError(f"easy-vqa has the splits train and test, got {split!r}")
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise EvalError(
            "easy-vqa: expected the package easy-vqa (the extra mmq[tiny]), it is not installed"
        ) from error
    folder = Path(easy_vqa.__file__).parent / "data" / split
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))[:limit]
    return [
        VqaItem(
            f"easy-vqa-{split}-{n:06d}",
            f"easy-vqa-{split}-image-{image:05d}",
            partial(_open, folder / "images" / f"{image}.png"),
            question,
            (answer,),
            "easy-vqa",
        )
        for n, (question, answer, image) in enumerate(rows)
    ]


def calibration_samples(
    model_name: str, processor: Processor, n: int, seed: int
) -> list[CalibrationSample]:
    """``n`` samples of the calibration split, drawn by ``seed``.

    Captioning: ``pixel_values``, ``input_ids`` and ``attention_mask`` of the prompt and a reference
    caption; LLaVA: of the prompt, a question and its answer; retrieval: of an image and one of its
    captions. Text ends in the end token where the model generates, and ``labels`` mark what follows
    the prompt. Raises ValueError for an unknown
    model and for more samples than the split has scenes.
    """
    if model_name not in MODELS:
        raise ValueError(f"expected a tiny model of {', '.join(MODELS)}, got {model_name!r}")
    size = SPLIT_SIZES["calibration"]
    if not 0 < n <= size:
        raise ValueError(f"expected between 1 and {size} calibration samples, got {n}")
    rng = random.Random(seed)
    samples = []
    for id, shown in rng.sample(list(scenes("calibration")), n):
        if model_name == "tiny-llava":
            asked = questions(shown, random.Random(id))[rng.randrange(QUESTIONS_PER_SCENE)]
            inputs = teacher_forced(
                processor, render(shown), LLAVA.prompt.format(asked.text), f"{asked.answer}</s>"
            )
        elif model_name == "tiny-blip2-caption":
            text = f"{rng.choice(captions(shown))}</s>"
            inputs = teacher_forced(processor, render(shown), CAPTION_PROMPT, text)
        else:
            text = rng.choice(captions(shown))
            inputs = dict(processor(images=render(shown), text=text, return_tensors="pt"))
        samples.append(CalibrationSample(id, inputs))
    return samples


def teacher_forced(
    processor: Any, image: Image.Image, prompt: str, answer: str
) -> dict[str, torch.Tensor]:
    """Inputs of an image, a prompt and its answer (with the end token), and ``labels``: the tokens
    of the answer, -100 before them."""
    text = f"{prompt} {answer}"
    inputs: dict[str, torch.Tensor] = dict(processor(images=image, text=text, return_tensors="pt"))
    lengths = [len(processor.tokenizer(part).input_ids) for part in (prompt, text)]
    labels = inputs["input_ids"].clone()
    labels[:, : labels.shape[1] - (lengths[1] - lengths[0])] = -100
    return {**inputs, "labels": labels}
