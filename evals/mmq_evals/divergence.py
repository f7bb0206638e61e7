# SPDX-License-Identifier: Apache-2.0
"""KL of a model's logits from those of full precision, teacher-forced on full precision's answers.

Both models run in the same process, a batch at a time, so that no logits are stored: a row holds
the KL of every token and whether both models rank the same token first.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.metrics.agreement import TokenAgreement, divergence, token_agreement
from mmq_evals.rows import WHOLE, Row, Shard
from mmq_evals.stats import FloatArray, bootstrap_mean, bootstrap_statistic
from mmq_evals.tasks.base import Task, batches, failed_row, read_images
from mmq_evals.tasks.generation import forced_logits


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
    reference_model: Any,
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
        logits = [
            forced_logits(each, processor, images, asking, tokens)
            for each in (reference_model, model)
        ]
        for item, full, quantized in zip(readable, *logits, strict=True):
            yield {"id": item.id, **_row(full.cpu().numpy(), quantized.cpu().numpy())}


def _row(full: FloatArray, quantized: FloatArray) -> Row:
    if not np.isfinite(quantized).all():
        return {"kl": [None] * len(full), "same_first": [False] * len(full)}
    found = token_agreement(full, quantized)
    return {"kl": found.kl.tolist(), "same_first": found.same_first.tolist()}


def divergence_agreement(
    rows: Sequence[Row], clusters: Mapping[str, str], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The measures of agreement in rows of `predict_divergence`, as `agreement_rows` gives its own.

    KL is averaged per sample and then over samples, its 99th percentile is over all tokens. Samples
    without a finite KL count in the share of equal first tokens and not in KL, which says so.

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
        result["logit KL, 99th percentile over tokens"] = {
            "value": found.kl_p99, "low": None, "high": None, "unit": "nats", **broken,
        }  # fmt: skip
    sums: dict[str, list[float]] = {}
    for key, each in agreements.items():
        columns = sums.setdefault(clusters[key], [0.0, 0.0])
        columns[0] += float(each.same_first.sum())
        columns[1] += float(len(each.same_first))
    share = bootstrap_statistic(sums, lambda s: s[:, 0] / s[:, 1], seed=seed)
    result["same first token"] = asdict(share)
    return result
