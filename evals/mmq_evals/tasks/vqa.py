# SPDX-License-Identifier: Apache-2.0
"""Visual question answering: generated scenes, easy-vqa, VQAv2 and GQA, with BLIP-2 and LLaVA."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmq_evals.data.items import VqaItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.metrics import gqa, vqa
from mmq_evals.rows import WHOLE, Row, Shard
from mmq_evals.summary import by_metric
from mmq_evals.tasks.base import (
    batches,
    failed_row,
    read_images,
    scored,
)
from mmq_evals.tasks.generation import Asking, Generation, generate


@dataclass(frozen=True)
class Style:
    """Prompt with one place for the question, decoding, and the tokens a prompt is cut to."""

    prompt: str
    generation: Generation
    max_prompt_tokens: int | None = None


_BLIP2_PROMPT = "Question: {} Short answer:"
LLAVA = Style(
    "USER: <image>\n{}\nAnswer the question using a single word or phrase. ASSISTANT:",
    Generation(16),
)
# The published protocols, by family of models.
PROTOCOLS: dict[str, Style] = {
    "blip2-opt": Style(_BLIP2_PROMPT, Generation(10, 1, num_beams=5, length_penalty=0.0), 32),
    "blip2-t5": Style(_BLIP2_PROMPT, Generation(10, 1, num_beams=5, length_penalty=-1.0), 32),
    "llava": LLAVA,
}


@dataclass(frozen=True)
class VisualQuestions:
    """Questions of ``dataset``, cut to the first ``limit``.

    With ten answers a question (VQAv2) the score is VQA accuracy; with one answer it is equality
    after the same normalisations; for ``name`` "gqa" it is equality under GQA's five protocols.
    """

    dataset: Dataset[VqaItem]
    style: str
    name: str = "vqa"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.style not in PROTOCOLS:
            raise EvalError(f"style: expected one of {sorted(PROTOCOLS)}, got {self.style!r}")
        counts = {len(item.answers) for item in self.dataset.items}
        if 0 in counts or len(counts) > 1 or (self.name == "gqa" and counts != {1}):
            raise EvalError(
                f"{self.dataset.name}: expected equally many answers to every question, "
                f"got {sorted(counts)}"
            )

    @property
    def primary(self) -> str:
        return "accuracy_lavis" if self.name == "gqa" else "accuracy_always"

    @property
    def shown(self) -> tuple[str, ...]:
        if self.name == "gqa":
            return tuple(f"accuracy_{protocol}" for protocol in gqa.PROTOCOLS)
        return "accuracy_always", "accuracy_official-2021"

    @property
    def items(self) -> Sequence[VqaItem]:
        return self.dataset.items[: self.limit]

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]

    @property
    def part_ids(self) -> list[str]:
        return self.ids

    def asking(self, items: Sequence[VqaItem]) -> Asking:
        style = PROTOCOLS[self.style]
        # Not str.format: a question may hold braces.
        prompts = tuple(style.prompt.replace("{}", item.question) for item in items)
        return Asking(prompts, style.generation, style.max_prompt_tokens)

    def rows(self, parts: Mapping[str, Row]) -> list[Row]:
        return [parts[row_id] for row_id in self.ids]

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "style": self.style,
            **asdict(PROTOCOLS[self.style]),
            "padding_side": "left",
            "accuracies": list(gqa.PROTOCOLS if self.name == "gqa" else vqa.PROTOCOLS),
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
                yield _row(item, answer.text) | {"tokens": list(answer.tokens)}

    def sample_scores(self, row: Row) -> dict[str, float]:
        prediction, answers = row["prediction"], row["answers"]
        if self.name == "gqa":
            return {
                f"accuracy_{protocol}": gqa.gqa_accuracy(prediction, answers[0], protocol)
                for protocol in gqa.PROTOCOLS
            }
        if len(answers) == 1:
            return {
                f"accuracy_{protocol}": vqa.exact_match(prediction, answers[0], protocol)
                for protocol in vqa.PROTOCOLS
            }
        return {
            f"accuracy_{protocol}": vqa.vqa_accuracy(prediction, answers, protocol)
            for protocol in vqa.PROTOCOLS
        }

    def breakdown(self, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for field in ("answer_type", "question_type"):
            groups: dict[str, list[float]] = {}
            for row in rows:
                if row[field]:
                    groups.setdefault(row[field], []).append(row["scores"][self.primary])
            if groups:
                result[field] = {key: float(np.mean(groups[key])) for key in sorted(groups)}
        if self.name == "gqa":
            binary = {"binary": [], "open": []}  # type: dict[str, list[float]]
            for row in rows:
                kind = "open" if row["question_type"] == "query" else "binary"
                binary[kind].append(row["scores"][self.primary])
            result["form"] = {key: float(np.mean(v)) for key, v in binary.items() if v}
        return result

    def baselines(self) -> dict[str, dict[str, float]]:
        if self.dataset.train is None:
            # Chosen on the questions it is scored on: an upper bound of any constant answer.
            answer = _majority(self.items)
            return {
                "majority answer chosen on the test questions": self._blind(
                    [answer] * len(self.items)
                )
            }
        train = self.dataset.train()
        majority = _majority(train)
        counts: dict[str, Counter[str]] = {}
        for item in train:
            counts.setdefault(item.question, Counter())[_common(item)] += 1
        by_question = {question: _top(counter) for question, counter in counts.items()}
        return {
            "majority answer": self._blind([majority] * len(self.items)),
            "majority answer to the same question": self._blind(
                [by_question.get(item.question, majority) for item in self.items]
            ),
        }

    def _blind(self, answers: Sequence[str]) -> dict[str, float]:
        rows = [_row(item, text) for item, text in zip(self.items, answers, strict=True)]
        samples = by_metric(scored(self, rows))
        return {metric: float(np.mean(list(values.values()))) for metric, values in samples.items()}


def _row(item: VqaItem, text: str) -> Row:
    return {
        "id": item.id,
        "cluster": item.image_id,
        "question": item.question,
        "prediction": text,
        "answers": list(item.answers),
        "answer_type": item.answer_type,
        "question_type": item.question_type,
    }


def _top(counter: Counter[str]) -> str:
    return min(counter, key=lambda text: (-counter[text], text))


def _common(item: VqaItem) -> str:
    return _top(Counter(item.answers))


def _majority(items: Sequence[VqaItem]) -> str:
    return _top(Counter(_common(item) for item in items))
