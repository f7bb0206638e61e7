# SPDX-License-Identifier: Apache-2.0
"""Captioning: one generated caption an image, scored with CIDEr-D, BLEU and ROUGE-L."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmq_evals.data.items import CaptionItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.metrics.caption import (
    DocumentFrequency,
    bleu,
    cider,
    document_frequency,
    rouge_l,
)
from mmq_evals.rows import WHOLE, Row, Shard
from mmq_evals.tasks.base import (
    batches,
    failed_row,
    read_images,
)
from mmq_evals.tasks.generation import Asking, Generation, generate
from mmq_evals.tiny import CAPTION_MAX_NEW_TOKENS, CAPTION_PROMPT

# Prompt and decoding by protocol name; "lavis" and "study" are those of published figures, "study"
# with the length that the library defaulted to, "greedy" is that of the built-in tiny model.
PROTOCOLS: dict[str, tuple[str, Generation]] = {
    "lavis": ("a photo of", Generation(30, min_new_tokens=8, num_beams=5)),
    "study": ("", Generation(20)),
    "greedy": (CAPTION_PROMPT, Generation(CAPTION_MAX_NEW_TOKENS)),
}

# The best constant caption is chosen among the most frequent ones, on this many training images.
_CONSTANT_CANDIDATES = 10
_CONSTANT_IMAGES = 100
_SCORED_KEPT = 100_000


@dataclass(frozen=True)
class Captioning:
    """Captions of ``dataset``, cut to the first ``limit`` images.

    Document frequencies always come from the references of the whole split, so that a limited run
    is not inflated.
    """

    dataset: Dataset[CaptionItem]
    decoding: str
    limit: int | None = None
    name: str = "captioning"
    primary: str = "cider"
    shown: tuple[str, ...] = ("cider", "rouge_l", "bleu_1", "bleu_4")

    def __post_init__(self) -> None:
        if self.decoding not in PROTOCOLS:
            raise EvalError(f"decoding: expected one of {sorted(PROTOCOLS)}, got {self.decoding!r}")

    @property
    def items(self) -> Sequence[CaptionItem]:
        return self.dataset.items[: self.limit]

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]

    @property
    def part_ids(self) -> list[str]:
        return self.ids

    def asking(self, items: Sequence[CaptionItem]) -> Asking:
        prompt, generation = PROTOCOLS[self.decoding]
        return Asking((prompt,) * len(items), generation)

    def rows(self, parts: Mapping[str, Row]) -> list[Row]:
        return [parts[row_id] for row_id in self.ids]

    @cached_property
    def df(self) -> DocumentFrequency:
        """Document frequencies of the whole split."""
        return document_frequency([item.references for item in self.dataset.items])

    @property
    def protocol(self) -> dict[str, Any]:
        prompt, generation = PROTOCOLS[self.decoding]
        return {
            "decoding": self.decoding,
            "prompt": prompt,
            "generation": asdict(generation),
            "padding_side": "left",
            "tokenizer": "py",
            "document_frequency": {"images": self.df.n_images, "sha256": self.df.sha256()},
        }

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
        for batch in batches(self.items, batch_size, done, shard):
            readable, images, failed = read_images(batch)
            yield from itertools.starmap(failed_row, failed.items())
            if not readable:
                continue
            answers = generate(model, processor, images, self.asking(readable))
            for item, answer in zip(readable, answers, strict=True):
                yield {
                    "id": item.id,
                    "cluster": item.id,
                    "prediction": answer.text,
                    "tokens": list(answer.tokens),
                    "references": list(item.references),
                }

    @cached_property
    def _scored(self) -> dict[tuple[str, str], dict[str, float]]:
        """Scores of captions that came before: runs of one task say the same of many images."""
        return {}

    def sample_scores(self, row: Row) -> dict[str, float]:
        key = (row["id"], row["prediction"])
        if key not in self._scored:
            if len(self._scored) >= _SCORED_KEPT:
                self._scored.clear()
            refs, hyps = {row["id"]: row["references"]}, {row["id"]: row["prediction"]}
            self._scored[key] = {
                "cider": cider(refs, hyps, df=self.df).corpus,
                "rouge_l": rouge_l(refs, hyps).corpus,
            }
        return dict(self._scored[key])

    def breakdown(self, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        return {}

    def baselines(self) -> dict[str, dict[str, float]]:
        if self.dataset.train is not None:
            name, chosen_from = "constant caption", self.dataset.train()
        else:
            # Chosen on the images it is scored on: an upper bound of any constant caption.
            name, chosen_from = "constant caption chosen on the test images", self.items
        return {name: self._constant(_best_constant(chosen_from, self.df))}

    def _constant(self, caption: str) -> dict[str, float]:
        refs = {item.id: item.references for item in self.items}
        hyps = dict.fromkeys(refs, caption)
        order_4 = bleu(refs, hyps).corpus[3]
        return {
            "cider": cider(refs, hyps, df=self.df).corpus,
            "rouge_l": rouge_l(refs, hyps).corpus,
            "bleu_4": order_4,
        }


def _best_constant(items: Sequence[CaptionItem], df: DocumentFrequency) -> str:
    """The caption that, said of every image, has the best CIDEr on the first of ``items``."""
    counts = Counter(reference for item in items for reference in item.references)
    candidates = sorted(counts, key=lambda text: (-counts[text], text))[:_CONSTANT_CANDIDATES]
    refs = {item.id: item.references for item in items[:_CONSTANT_IMAGES]}
    scores = {text: cider(refs, _said_of_all(refs, text), df=df).corpus for text in candidates}
    return max(candidates, key=lambda text: scores[text])


def _said_of_all(refs: Iterable[str], text: str) -> dict[str, str]:
    return dict.fromkeys(refs, text)
