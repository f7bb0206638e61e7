# SPDX-License-Identifier: Apache-2.0
"""Image-text retrieval with BLIP-2: contrastive similarity, then re-ranking by the matching head.

Stage 1 compares one feature of a text with the query features of an image. Stage 2 runs the
Q-Former on image and text together for the best ``k_test`` candidates of every query, on cached
outputs of the vision tower; a pair that is a candidate in both directions is computed once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

from mmq_evals.data.items import RetrievalItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.metrics.retrieval import chance_recall
from mmq_evals.rows import WHOLE, Row, Shard
from mmq_evals.stats import FloatArray
from mmq_evals.summary import KS, retrieval_scores
from mmq_evals.tasks.base import (
    batches,
    failed_row,
    read_images,
    to_model,
)

MAX_WORDS = 50
MAX_TEXT_TOKENS = 35
# Pairs in a batch of the Q-Former for each image in a batch of the vision tower.
PAIRS_PER_IMAGE = 8

_BLANKED = re.compile(r'[.!"()*#:;~]')


def prepare_text(caption: str) -> str:
    """Lower-case, blank ten marks, collapse spaces, keep the first 50 words."""
    return " ".join(_BLANKED.sub(" ", caption.lower()).split()[:MAX_WORDS])


@dataclass(frozen=True)
class Retrieval:
    """Retrieval over the first ``limit`` images of ``dataset`` and all their captions.

    Queries are the images (``txt_*``, text retrieval) and the captions (``img_*``). A row holds
    the candidates by their index in the captions or in the images, with final scores; a score that
    is NaN is stored as null and counts as minus infinity, as do pairs outside the candidates.

    A row's ``r_mean`` is its mean hit. That of the corpus is no mean of the rows', since it weighs
    both directions equally, though there are more captions than images.
    """

    dataset: Dataset[RetrievalItem]
    k_test: int = 128
    limit: int | None = None
    name: str = "retrieval"
    primary: str = "r_mean"

    @property
    def shown(self) -> tuple[str, ...]:
        each = tuple(f"{direction}_r{k}" for direction in ("txt", "img") for k in KS)
        return (*each, "r_mean")

    def __post_init__(self) -> None:
        if self.k_test < 1:
            raise EvalError(f"k_test: expected at least 1, got {self.k_test}")
        empty = [item.id for item in self.dataset.items if not item.captions]
        if empty:
            raise EvalError(f"{self.dataset.name}: images without captions: {empty[:5]}")

    @property
    def items(self) -> Sequence[RetrievalItem]:
        return self.dataset.items[: self.limit]

    @property
    def owners(self) -> list[int]:
        """Index of the image of every caption; captions are numbered in the order of the images."""
        return [index for index, item in enumerate(self.items) for _ in item.captions]

    @property
    def ids(self) -> list[str]:
        owners, items = self.owners, self.items
        texts = [f"text {number} of {items[owner].id}" for number, owner in enumerate(owners)]
        return [f"image {item.id}" for item in items] + texts

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "k_test": self.k_test,
            "max_words": MAX_WORDS,
            "max_text_tokens": MAX_TEXT_TOKENS,
            "pairs_per_image": PAIRS_PER_IMAGE,
            "score": "mean over queries of matching logit 1, plus contrastive similarity",
            "ties": "pessimistic",
        }

    def predict(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int,
        done: Container[str] = (),
        shard: Shard = WHOLE,
    ) -> Iterator[Row]:
        # Every score depends on all images and texts: the first process does the whole.
        if shard.rank > 0 or all(row_id in done for row_id in self.ids):
            return
        vision, image_features, failed = encode_images(model, processor, self.items, batch_size)
        owner_ids = [item.id for item in self.items]
        owner_ids += [self.items[owner].id for owner in self.owners]
        for row_id, owner_id in zip(self.ids, owner_ids, strict=True):
            if owner_id in failed:
                yield failed_row(row_id, failed[owner_id])
        # The others, under the ids that they have among all.
        kept = [item for item in self.items if item.id not in failed]
        ids = [
            row_id
            for row_id, owner_id in zip(self.ids, owner_ids, strict=True)
            if owner_id not in failed
        ]
        texts = tokenize_texts(
            processor, [prepare_text(text) for item in kept for text in item.captions]
        )
        text_features = encode_texts(model, texts, batch_size * PAIRS_PER_IMAGE)
        sim = similarity(image_features, text_features, batch_size)
        text_candidates = top_candidates(sim, self.k_test)
        image_candidates = top_candidates(sim.T, self.k_test)
        # NaN marks pairs that were not asked for, besides those the model scored NaN.
        final = np.full(sim.shape, np.nan)
        wanted = np.zeros(sim.shape, dtype=bool)
        np.put_along_axis(wanted, text_candidates, True, axis=1)
        np.put_along_axis(wanted.T, image_candidates, True, axis=1)
        pairs = np.argwhere(wanted)
        # Texts of like length stand in one batch, so that little padding is computed.
        lengths = texts["attention_mask"].sum(dim=1).numpy()
        pairs = pairs[np.argsort(lengths[pairs[:, 1]], kind="stable")]
        step = batch_size * PAIRS_PER_IMAGE
        for start in range(0, len(pairs), step):
            image, text = pairs[start : start + step].T
            matching = match_pairs(model, vision, texts, image, text)
            final[image, text] = matching + sim[image, text]
        yield from _rows(kept, ids, final, text_candidates, image_candidates)

    def sample_scores(self, row: Row) -> dict[str, float]:
        return retrieval_scores(row)

    def breakdown(self, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        unscored = sum(score is None for row in rows for score in row["prediction"])
        return {"scores": {"NaN": float(unscored)}} if unscored else {}

    def baselines(self) -> dict[str, dict[str, float]]:
        sizes = [len(item.captions) for item in self.items]
        chance = {
            f"txt_r{k}": float(np.mean([chance_recall(sum(sizes), size, k) for size in sizes]))
            for k in KS
        }
        chance |= {f"img_r{k}": chance_recall(len(sizes), 1, k) for k in KS}
        chance["r_mean"] = float(np.mean(list(chance.values())))
        return {"chance": chance}


def _rows(
    items: Sequence[RetrievalItem],
    ids: Sequence[str],
    final: FloatArray,
    text_candidates: npt.NDArray[np.int64],
    image_candidates: npt.NDArray[np.int64],
) -> Iterator[Row]:
    """Rows of all images, then of all their captions, with ``ids`` in that order."""
    owners = np.array([index for index, item in enumerate(items) for _ in item.captions])
    for index, item in enumerate(items):
        yield _row(
            ids[index],
            item.id,
            "txt",
            np.flatnonzero(owners == index).tolist(),
            text_candidates[index],
            final[index],
        )
    for number, owner in enumerate(owners.tolist()):
        yield _row(
            ids[len(items) + number],
            items[owner].id,
            "img",
            [owner],
            image_candidates[number],
            final[:, number],
        )


def _row(
    row_id: str,
    cluster: str,
    direction: str,
    positives: list[int],
    candidates: npt.NDArray[np.int64],
    scores: FloatArray,
) -> Row:
    given = scores[candidates].tolist()
    return {
        "id": row_id,
        "cluster": cluster,
        "direction": direction,
        "positives": positives,
        "of": len(scores),
        "candidates": candidates.tolist(),
        "prediction": [None if math.isnan(score) else score for score in given],
    }


# ---- the model -----------------------------------------------------------------------------------


def tokenize_texts(processor: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Ids and mask, each (texts, 35), padded on the right; no image tokens."""
    encoded = processor.tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=MAX_TEXT_TOKENS,
        padding_side="right",
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def encode_images(
    model: Any, processor: Any, items: Sequence[RetrievalItem], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    """Vision tower outputs (images, patches, width), unit features (images, queries, dim), and why
    images failed to decode, by item; these have no row in the others.

    Tensors stay on the model's device in its dtype. Raises EvalError if no image decodes.
    """
    outputs, features = [], []
    failed: dict[str, str] = {}
    for batch in batches(items, batch_size):
        _, images, broken = read_images(batch)
        failed |= broken
        if not images:
            continue
        pixels = processor.image_processor(images=images, return_tensors="pt")
        embeds = model.vision_model(**to_model(model, pixels)).last_hidden_state
        hidden = model.qformer(
            query_embeds=model.query_tokens.expand(len(images), -1, -1),
            encoder_hidden_states=embeds,
            encoder_attention_mask=_ones(embeds),
        ).last_hidden_state
        hidden = hidden.to(model.vision_projection.weight.dtype)
        outputs.append(embeds)
        features.append(normalize(model.vision_projection(hidden), dim=-1))
    if not outputs:
        raise EvalError(f"retrieval: no image decodes: {next(iter(failed.values()))}")
    return torch.cat(outputs), torch.cat(features), failed


@torch.no_grad()
def encode_texts(model: Any, texts: dict[str, torch.Tensor], batch_size: int) -> torch.Tensor:
    """Unit text features (texts, dim): the first token of the text-only pass."""
    features = []
    for start in range(0, len(texts["input_ids"]), batch_size):
        ids, mask = _text_batch(model, texts, slice(start, start + batch_size))
        hidden = model.qformer(
            query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        hidden = hidden[:, 0].to(model.text_projection.weight.dtype)
        features.append(normalize(model.text_projection(hidden), dim=-1))
    return torch.cat(features)


@torch.no_grad()
def similarity(
    image_features: torch.Tensor, text_features: torch.Tensor, batch_size: int
) -> FloatArray:
    """Largest dot product over the queries of an image, (images, texts), float64."""
    rows = [
        torch.einsum("iqd,td->iqt", part, text_features).amax(dim=1).double().cpu()
        for part in torch.split(image_features, batch_size)
    ]
    return np.asarray(torch.cat(rows).numpy(), dtype=np.float64)


@torch.no_grad()
def match_pairs(
    model: Any,
    vision: torch.Tensor,
    texts: dict[str, torch.Tensor],
    image: npt.NDArray[np.int64],
    text: npt.NDArray[np.int64],
) -> FloatArray:
    """Matching logit 1, mean over the queries, of pairs of image and text indices, (pairs,)."""
    ids, mask = _text_batch(model, texts, torch.from_numpy(text))
    embeds = vision[torch.from_numpy(image).to(vision.device)]
    queries = model.query_tokens.expand(len(ids), -1, -1)
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=torch.cat([_ones(queries), mask], dim=1),
        encoder_hidden_states=embeds,
        encoder_attention_mask=_ones(embeds),
    ).last_hidden_state
    hidden = hidden[:, : queries.shape[1]].to(model.itm_head.weight.dtype)
    logits = model.itm_head(hidden).mean(dim=1)[:, 1]
    return np.asarray(logits.double().cpu().numpy(), dtype=np.float64)


def top_candidates(sim: FloatArray, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k best columns of each row, best first, equal ones in order, NaN last."""
    scores = np.where(np.isnan(sim), -np.inf, sim)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _ones(states: torch.Tensor) -> torch.Tensor:
    return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)


def _text_batch(
    model: Any, texts: dict[str, torch.Tensor], index: slice | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of some texts, cut to the longest of them: padding is masked anyway."""
    ids, mask = texts["input_ids"][index], texts["attention_mask"][index]
    longest = max(1, int(mask.sum(dim=1).max()))
    return ids[:, :longest].to(model.device), mask[:, :longest].to(model.device)
