# SPDX-License-Identifier: Apache-2.0
"""KL of a model's logits from those of full precision, teacher-forced on full precision's answers.

Both models run in the same process, a batch at a time, so that no logits are stored: a row holds
the KL of every token and whether both models rank the same token first. Full precision's logits
can be kept in memory for the runs that follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Final

import numpy as np
from PIL import Image

from mmq_evals.errors import EvalError
from mmq_evals.metrics.agreement import TokenAgreement, divergence, token_agreement
from mmq_evals.quantiles import bootstrap_quantile
from mmq_evals.rows import WHOLE, Row, Shard, model_fingerprint
from mmq_evals.stats import FloatArray, bootstrap_mean, bootstrap_statistic
from mmq_evals.tasks.base import Task, batches, failed_row, read_images
from mmq_evals.tasks.generation import Asking, forced_logits

KEPT_BYTES: Final = 512 << 20
QUANTILE: Final = 0.99


class ReferenceModel:
    """The model that others are compared with, and the logits that it has given to earlier runs.

    Kept are the logits that come first, up to ``capacity`` bytes in float32 on the CPU; the others
    are computed every time. An image is known by the id of its item: one object serves runs over
    one dataset, with one processor.
    """

    def __init__(self, model: Any, capacity: int = KEPT_BYTES) -> None:
        self.model = model.eval()
        self._room = capacity
        self._kept: dict[object, list[FloatArray]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """As `model_fingerprint`, computed once: the weights must stay what they are."""
        return model_fingerprint(self.model)

    def logits(
        self,
        processor: Any,
        ids: Sequence[str],
        images: Sequence[Image.Image],
        asking: Asking,
        tokens: Sequence[Sequence[int]],
    ) -> list[FloatArray]:
        """As `forced_logits`, for the items called ``ids``."""
        key = (tuple(ids), asking, tuple(map(tuple, tokens)))
        found = self._kept.get(key)
        if found is None:
            found = _logits(self.model, processor, images, asking, tokens)
            size = sum(rows.nbytes for rows in found)
            if size <= self._room:
                self._room -= size
                self._kept[key] = found
        return found


def _logits(model: Any, *given: Any) -> list[FloatArray]:
    return [rows.cpu().numpy() for rows in forced_logits(model, *given)]


def answers_of(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Row id to the tokens of the answer.

    Raises:
        EvalError: rows without tokens.
    """
    try:
        return {row["id"]: row["tokens"] for row in rows}
    except KeyError:
        raise EvalError(
            "reference: its rows hold no tokens to compare logits on; evaluate it again"
        ) from None


def predict_divergence(
    task: Task,
    reference: ReferenceModel,
    model: Any,
    processor: Any,
    answers: Mapping[str, Sequence[int]],
    *,
    batch_size: int,
    done: Container[str] = (),
    shard: Shard = WHOLE,
) -> Iterator[Row]:
    """A row for every item: ``kl`` in nats and ``same_first`` by token of the reference's answer.

    A model whose logits are not finite has no KL and another first token. Batches are those of
    `Task.predict`, ``done`` and ``shard`` too.
    """
    for batch in batches(task.items, batch_size, done, shard):
        answered = [item for item in batch if item.id in answers]
        for item in batch:
            if item.id not in answers:
                yield failed_row(item.id, f"item {item.id!r}: the reference has no answer")
        readable, images, failed = read_images(answered)
        yield from itertools.starmap(failed_row, failed.items())
        asking = task.asking(readable)
        if not readable or asking is None:
            continue
        tokens = [answers[item.id] for item in readable]
        ids = [item.id for item in readable]
        before = reference.logits(processor, ids, images, asking, tokens)
        after = _logits(model, processor, images, asking, tokens)
        for name, full, quantized in zip(ids, before, after, strict=True):
            yield {"id": name, **_row(full, quantized)}


def _row(full: FloatArray, quantized: FloatArray) -> Row:
    if not np.isfinite(quantized).all():
        return {"kl": [None] * len(full), "same_first": [False] * len(full)}
    found = token_agreement(full, quantized)
    return {"kl": found.kl.tolist(), "same_first": found.same_first.tolist()}


def divergence_agreement(
    rows: Sequence[Row], clusters: Mapping[str, str], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The measures of agreement in rows of `predict_divergence`, as `agreement_rows` gives its own.

    KL is averaged per sample and then over samples, its 99th percentile is over all tokens; both
    come with intervals over images. Samples without a finite KL count in the share of equal first
    tokens and not in KL, which says so.

    Args:
        rows: of all samples that both runs could score.
        clusters: sample id to image.
    """
    agreements = {
        row["id"]: TokenAgreement(
            np.array(row["kl"], dtype=np.float64), np.array(row["same_first"])
        )
        for row in rows
    }
    finite = {key: each for key, each in agreements.items() if np.isfinite(each.kl).all()}
    result: dict[str, dict[str, Any]] = {}
    if finite:
        found = divergence(finite)
        broken = {"not_finite": len(agreements) - len(finite)}
        interval = bootstrap_mean(found.per_sample, clusters, seed=seed)
        result["logit KL"] = {**asdict(interval), "unit": "nats", **broken}
        tokens: dict[str, list[float]] = {}
        for key, each in finite.items():
            tokens.setdefault(clusters[key], []).extend(each.kl.tolist())
        tail = bootstrap_quantile(tokens, QUANTILE, seed=seed)
        result["logit KL, 99th percentile over tokens"] = {
            **asdict(tail),
            "unit": "nats",
            **broken,
        }
    sums: dict[str, list[float]] = {}
    for key, each in agreements.items():
        columns = sums.setdefault(clusters[key], [0.0, 0.0])
        columns[0] += float(each.same_first.sum())
        columns[1] += float(len(each.same_first))
    share = bootstrap_statistic(sums, lambda s: s[:, 0] / s[:, 1], seed=seed)
    result["same first token"] = asdict(share)
    return result
