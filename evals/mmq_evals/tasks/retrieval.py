# SPDX-License-Identifier: Apache-2.0
"""Image-text retrieval with BLIP-2: contrastive similarity, then re-ranking by the matching head.

Stage 1 compares one feature of a text with the query features of an image. Stage 2 runs the
Q-Former on image and text together for the best ``k_test`` candidates of every query, on cached
outputs of the vision tower; a pair that is a candidate in both directions is computed once. Work
is divided by images; features are files that processes share (features.py).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmq_evals.data.items import RetrievalItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.metrics.retrieval import chance_recall
from mmq_evals.rows import WHOLE, Row, Shard
from mmq_evals.stats import FloatArray
from mmq_evals.summary import KS, retrieval_scores
from mmq_evals.tasks.base import failed_row
from mmq_evals.tasks.matching import (
    MAX_TEXT_TOKENS,
    MAX_WORDS,
    EncodedImages,
    match_pairs,
    prepare_text,
    tokenize_texts,
)

# Pairs in a batch of the Q-Former for each image in a batch of the vision tower.
PAIRS_PER_IMAGE = 8
# Similarities are sorted in blocks of so many rows: the ranks of 5,000 x 25,000 take 1 GB at once.
ROWS_PER_BLOCK = 512


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
            "padding_side": "right",
            "score": "mean over queries of matching logit 1, plus contrastive similarity",
            "ties": "pessimistic",
        }

    @property
    def part_ids(self) -> list[str]:
        return self.ids[: len(self.items)]

    def predict(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int,
        scratch: Path,
        done: Container[str] = (),
        shard: Shard = WHOLE,
    ) -> Iterator[Row]:
        """A part is an image with all pairs that it is to be scored in: with its best ``k_test``
        texts, and with the texts among whose best ``k_test`` images it is."""
        part_ids = self.part_ids
        todo = [
            number
            for number, start in enumerate(range(0, len(part_ids), batch_size))
            if number % shard.count == shard.rank
            and any(key not in done for key in part_ids[start : start + batch_size])
        ]
        if not todo:
            return
        step = batch_size * PAIRS_PER_IMAGE
        owners = np.array(self.owners)
        captions = [prepare_text(text) for item in self.items for text in item.captions]
        texts = tokenize_texts(processor, captions)
        images = EncodedImages(model, processor, self.dataset.name, self.items, batch_size, scratch)
        images.encode(shard)
        # Captions of images that decode, and similarities of these images with these captions.
        kept_texts = np.flatnonzero(images.decoded[owners])
        sim = images.similarities(images.encode_texts(texts, step, shard))[:, kept_texts]
        wanted = np.zeros(sim.shape, dtype=bool)
        np.put_along_axis(wanted, top_candidates(sim, self.k_test), True, axis=1)
        np.put_along_axis(wanted.T, top_candidates(sim.T, self.k_test), True, axis=1)
        lengths = texts["attention_mask"].sum(dim=1).numpy()
        places = np.cumsum(images.decoded) - 1
        for number in todo:
            batch = range(len(part_ids))[number * batch_size :][:batch_size]
            yield from (
                failed_row(part_ids[i], images.failed[self.items[i].id])
                for i in batch
                if not images.decoded[i]
            )
            rows = [i for i in batch if images.decoded[i]]
            if not rows:
                continue
            pairs = np.argwhere(wanted[places[rows]])
            text = kept_texts[pairs[:, 1]]
            # Texts of like length stand in one batch, so that little padding is computed.
            order = np.argsort(lengths[text], kind="stable")
            vision, matching = images.vision(number), np.empty(len(pairs))
            for start in range(0, len(pairs), step):
                chosen = order[start : start + step]
                matching[chosen] = match_pairs(model, vision, texts, pairs[chosen, 0], text[chosen])
            similar = sim[places[rows]][pairs[:, 0], pairs[:, 1]]
            for index, i in enumerate(rows):
                mine = pairs[:, 0] == index
                yield {
                    "id": part_ids[i],
                    "texts": text[mine].tolist(),
                    "similarity": _plain(similar[mine]),
                    "matching": _plain(matching[mine]),
                }

    def asking(self, items: Sequence[RetrievalItem]) -> None:
        """No language model is asked."""

    def rows(self, parts: Mapping[str, Row]) -> list[Row]:
        """Rows of all images, then of all their captions. The candidates of a query are the best
        ``k_test`` by similarity, of equal ones those that come first."""
        ids, owners, items = self.ids, self.owners, self.items
        found = [parts[key] for key in self.part_ids]
        failed = {index: part["failed"] for index, part in enumerate(found) if "failed" in part}
        found = [part for part in found if "failed" not in part]
        if not found:
            return [failed_row(key, why) for key in ids for why in [failed[0]]]
        # Numbers among what decodes.
        decoded = np.array([index not in failed for index in range(len(items))])
        image_number, text_number = np.cumsum(decoded) - 1, np.cumsum(decoded[owners]) - 1
        image = np.repeat(np.arange(len(found)), [len(part["texts"]) for part in found])
        text = text_number[[number for part in found for number in part["texts"]]]
        sim = _floats(value for part in found for value in part["similarity"])
        final = sim + _floats(value for part in found for value in part["matching"])
        by_image = ranked(image, text, sim, self.k_test)
        by_text = ranked(text, image, sim, self.k_test)
        n_texts = int(decoded[owners].sum())
        rows = []
        for index, item in enumerate(items):
            if index in failed:
                rows.append(failed_row(ids[index], failed[index]))
                continue
            own = [int(text_number[t]) for t, owner in enumerate(owners) if owner == index]
            pairs = by_image[image_number[index]]
            head = {"id": ids[index], "cluster": item.id, "direction": "txt", "of": n_texts}
            rows.append(head | _candidates(own, text[pairs], final[pairs]))
        for number, owner in enumerate(owners):
            row_id = ids[len(items) + number]
            if owner in failed:
                rows.append(failed_row(row_id, failed[owner]))
                continue
            pairs = by_text[text_number[number]]
            head = {"id": row_id, "cluster": items[owner].id, "direction": "img", "of": len(found)}
            rows.append(head | _candidates([int(image_number[owner])], image[pairs], final[pairs]))
        return rows

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


def _candidates(positives: list[int], candidates: npt.NDArray[np.int64], scores: FloatArray) -> Row:
    return {
        "positives": positives,
        "candidates": candidates.tolist(),
        "prediction": _plain(scores),
    }


def _plain(values: npt.NDArray[Any]) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _floats(values: Iterable[float | None]) -> FloatArray:
    return np.array([math.nan if value is None else value for value in values])


def top_candidates(sim: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Indices of the k best columns of each row, best first, equal ones in order, NaN last."""
    blocks = [
        np.argsort(-np.where(np.isnan(block), -np.inf, block), axis=1, kind="stable")[:, :k]
        for block in np.array_split(sim, max(1, len(sim) // ROWS_PER_BLOCK))
    ]
    return np.concatenate(blocks)


def ranked(
    query: npt.NDArray[np.int64], candidate: npt.NDArray[np.int64], sim: FloatArray, k: int
) -> list[npt.NDArray[np.int64]]:
    """For every query the places of its k best pairs, in the order of `top_candidates`."""
    order = np.lexsort((candidate, -np.where(np.isnan(sim), -np.inf, sim), query))
    ends = np.cumsum(np.bincount(query))
    return [places[:k] for places in np.split(order, ends[:-1])]
