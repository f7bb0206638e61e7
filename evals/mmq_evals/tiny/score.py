# SPDX-License-Identifier: Apache-2.0
"""Quick held-out scores of the tiny models, for their training and tests.

These are not the reported metrics, which the tasks compute: exact captions, exact answers and hit
rates of the contrastive head, each beside its blind baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

import torch

from mmq_evals.data.items import CaptionItem, RetrievalItem, VqaItem
from mmq_evals.tasks.vqa import LLAVA

from . import CAPTION_MAX_NEW_TOKENS, CAPTION_PROMPT
from .architectures import Model, Processor
from .data import VqaSource, caption_items, retrieval_items, vqa_items

BATCH = 50


@torch.no_grad()
def _generate(
    model: Model,
    processor: Processor,
    items: Sequence[CaptionItem | VqaItem],
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        inputs = processor(
            images=[item.image() for item in batch],
            text=list(prompts[start : start + BATCH]),
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts += processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def token_f1(said: str, truth: str) -> float:
    """F1 of the two bags of words, 0 to 1."""
    a, b = Counter(said.split()), Counter(truth.split())
    common = (a & b).total()
    return 2 * common / max(1, a.total() + b.total())


def caption_score(model: Model, processor: Processor, limit: int | None = None) -> dict[str, float]:
    """Share of captions equal to a reference, best token F1, and that of the best constant."""
    items = caption_items("test", limit)
    prompts = [CAPTION_PROMPT] * len(items)
    said = _generate(model, processor, items, prompts, CAPTION_MAX_NEW_TOKENS)

    def f1(texts: Sequence[str]) -> float:
        pairs = zip(texts, items, strict=True)
        return sum(max(token_f1(t, r) for r in i.references) for t, i in pairs) / len(items)

    constants = {item.references[0] for item in caption_items("train", 200)}
    return {
        "exact": sum(t in i.references for t, i in zip(said, items, strict=True)) / len(items),
        "token_f1": f1(said),
        "best_constant_token_f1": max(f1([text] * len(items)) for text in constants),
    }


def vqa_score(model: Model, processor: Processor, limit: int | None = None) -> dict[str, float]:
    """Accuracy on each source, and that of the majority answer and of the best by question."""
    scores = {}
    for source in get_args(VqaSource):
        items, train = vqa_items("test", source, limit), vqa_items("train", source, 20_000)
        prompts = [LLAVA.prompt.format(item.question) for item in items]
        said = _generate(model, processor, items, prompts, LLAVA.generation.max_new_tokens)
        majority = Counter(item.answers[0] for item in train).most_common(1)[0][0]
        by_question: dict[str, Counter[str]] = {}
        for item in train:
            by_question.setdefault(item.question, Counter())[item.answers[0]] += 1
        blind = [
            by_question.get(item.question, Counter({majority: 1})).most_common(1)[0][0]
            for item in items
        ]
        for name, answers in (
            ("accuracy", said),
            ("majority", [majority] * len(items)),
            ("question_only", blind),
        ):
            right = sum(a == i.answers[0] for a, i in zip(answers, items, strict=True))
            scores[f"{source} {name}"] = right / len(items)
    return scores


@torch.no_grad()
def retrieval_score(
    model: Model, processor: Processor, limit: int | None = None
) -> dict[str, float]:
    """R@1 of both directions: contrastive alone, and re-ranked by matching (top 16)."""
    items: list[RetrievalItem] = retrieval_items("test", limit)
    texts = [caption for item in items for caption in item.captions]
    owner = torch.tensor([n for n, item in enumerate(items) for _ in item.captions])
    pixels = processor(images=[item.image() for item in items], return_tensors="pt")["pixel_values"]
    encoded = processor(text=texts, padding=True, return_tensors="pt")
    rows = []
    for start in range(0, len(texts), 250):
        some = slice(start, start + 250)
        output = model(
            pixel_values=pixels,
            input_ids=encoded["input_ids"][some],
            attention_mask=encoded["attention_mask"][some],
        )
        rows.append(output.logits_per_image)
    contrastive = torch.cat(rows, dim=1)
    k = min(16, len(items))
    keep = torch.zeros_like(contrastive, dtype=torch.bool)
    keep.scatter_(1, contrastive.topk(k, dim=1).indices, True)
    keep.scatter_(0, contrastive.topk(k, dim=0).indices, True)
    pairs = keep.nonzero()
    matching = torch.full_like(contrastive, float("-inf"))
    for start in range(0, len(pairs), 256):
        chunk = pairs[start : start + 256]
        logits = model(
            pixel_values=pixels[chunk[:, 0]],
            input_ids=encoded["input_ids"][chunk[:, 1]],
            attention_mask=encoded["attention_mask"][chunk[:, 1]],
            use_image_text_matching_head=True,
        ).logits_per_image[:, 1]
        matching[chunk[:, 0], chunk[:, 1]] = logits + contrastive[chunk[:, 0], chunk[:, 1]]
    scores = {"chance": 1 / len(items)}
    for name, matrix in (("contrastive", contrastive), ("matching", matching)):
        hits = (owner[matrix.argmax(dim=1)] == torch.arange(len(items))).float().mean()
        scores[f"{name} text_r1"] = float(hits)
        scores[f"{name} image_r1"] = float((matrix.argmax(dim=0) == owner).float().mean())
    return scores


SCORES = {
    "tiny-blip2-caption": caption_score,
    "tiny-blip2-retrieval": retrieval_score,
    "tiny-llava": vqa_score,
}
