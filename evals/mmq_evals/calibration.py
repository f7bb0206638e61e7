# SPDX-License-Identifier: Apache-2.0
"""Calibration samples for a model: an image with a text that matches, as the model meets it.

They come from the training split of a dataset, never from the split that is evaluated. Language
models see prompt and reference answer, teacher-forced, with labels on the answer; the retrieval
model an image and one of its captions. Nothing is padded: one sample is one row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmq_evals.data import layouts
from mmq_evals.data.images import read_image
from mmq_evals.data.items import CaptionItem, VqaItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.tasks.build import Data, model_class
from mmq_evals.tasks.captioning import PROTOCOLS as CAPTION_PROTOCOLS
from mmq_evals.tasks.matching import MAX_TEXT_TOKENS, prepare_text
from mmq_evals.tasks.vqa import LLAVA
from mmq_evals.tiny.data import CalibrationSample, teacher_forced
from mmq_evals.tiny.data import calibration_samples as tiny_samples

_TINY_OF = {
    "Blip2ForConditionalGeneration": "tiny-blip2-caption",
    "Blip2ForImageTextRetrieval": "tiny-blip2-retrieval",
    "LlavaForConditionalGeneration": "tiny-llava",
}


def calibration_samples(
    model: Any, processor: Any, *, data: Data = "tiny", count: int = 128, seed: int = 0
) -> list[CalibrationSample]:
    """``count`` samples for ``model``, drawn by ``seed``.

    Args:
        model: a supported model; only its class and configuration are read.
        processor: its processor.
        data: ``"tiny"`` for the calibration split of the built-in data, or the folder of a
            published dataset: captions (COCO, Flickr30k) for BLIP-2, questions (VQAv2, else GQA)
            for LLaVA.
        count: how many.
        seed: which.

    Raises:
        EvalError: the data has no training split, or too few items; an image does not decode.
    """
    name = model_class(model)
    if count < 1:
        raise EvalError(f"calibration samples: expected at least 1, got {count}")
    if not isinstance(data, Path):
        return tiny_samples(_TINY_OF[name], processor, count, seed)
    rng = random.Random(seed)
    if name == "LlavaForConditionalGeneration":
        questions = _training_items(_question_set(data), data, count)
        return [_question_sample(item, processor) for item in rng.sample(questions, count)]
    captions = _training_items(layouts.captions(data), data, count)
    retrieval = name == "Blip2ForImageTextRetrieval"
    encoder_decoder = bool(getattr(model.config.text_config, "is_encoder_decoder", False))
    return [
        _caption_sample(item, rng.choice(item.references), processor, retrieval, encoder_decoder)
        for item in rng.sample(captions, count)
    ]


def _question_set(root: Path) -> Dataset[VqaItem]:
    return layouts.vqav2(root) if layouts.has_vqav2(root) else layouts.gqa(root)


def _training_items(dataset: Dataset[Any], root: Path, count: int) -> Sequence[Any]:
    if dataset.train is None:
        raise EvalError(
            f"{root}: expected a training split of {dataset.name} to calibrate on, found only "
            f"{dataset.split}, which is evaluated"
        )
    items = dataset.train()
    if len(items) < count:
        raise EvalError(f"{root}: expected at least {count} training items, got {len(items)}")
    return items


def _question_sample(item: VqaItem, processor: Any) -> CalibrationSample:
    prompt = LLAVA.prompt.replace("{}", item.question)
    answer = max(item.answers, key=item.answers.count)
    image = read_image(item.id, item.image)
    answer += processor.tokenizer.eos_token or ""
    return CalibrationSample(item.id, teacher_forced(processor, image, prompt, answer))


def _caption_sample(
    item: CaptionItem, caption: str, processor: Any, retrieval: bool, encoder_decoder: bool
) -> CalibrationSample:
    image = read_image(item.id, item.image)
    if retrieval:
        tokens = processor.tokenizer(
            prepare_text(caption), truncation=True, max_length=MAX_TEXT_TOKENS, return_tensors="pt"
        )
        pixels = processor.image_processor(image, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return CalibrationSample(item.id, {**pixels, **{name: tokens[name] for name in names}})
    prompt = CAPTION_PROTOCOLS["lavis"][0]
    if encoder_decoder:
        inputs = dict(processor(images=image, text=prompt, return_tensors="pt"))
        labels: torch.Tensor = processor.tokenizer(caption, return_tensors="pt").input_ids
        return CalibrationSample(item.id, {**inputs, "labels": labels})
    caption += processor.tokenizer.eos_token or ""
    return CalibrationSample(item.id, teacher_forced(processor, image, prompt, caption))
