# SPDX-License-Identifier: Apache-2.0
"""The run that a run is compared with: its rows, its model's logits, what both add to a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmq_evals.divergence import (
    ReferenceModel,
    answers_of,
    divergence_agreement,
    predict_divergence,
)
from mmq_evals.errors import EvalError
from mmq_evals.results import Reference, compare_rows, read_reference
from mmq_evals.rows import Progress, Row, RowStore, Shard
from mmq_evals.summary import clusters_of
from mmq_evals.tasks.base import Task
from mmq_evals.tasks.captioning import Captioning


@dataclass(frozen=True)
class Against:
    """A reference run, and its model where logits are to be compared, too."""

    run: Reference
    model: ReferenceModel | None


def read_against(
    path: Path | None, model: Any | None, protocols: Mapping[str, dict[str, Any]]
) -> Against | None:
    """The reference run, if there is one, and the check that ``model`` is the one that made it.

    Raises:
        EvalError: as `read_reference`, or the model is another one.
    """
    if path is None:
        if model is not None:
            raise EvalError("reference_model: expected a reference run beside it, got none")
        return None
    found = read_reference(path, protocols)
    if model is None:
        return Against(found, None)
    reference = model if isinstance(model, ReferenceModel) else ReferenceModel(model)
    if reference.fingerprint != found.fingerprint:
        raise EvalError(
            f"reference_model: expected the model of {path}, got another (or another dtype)"
        )
    return Against(found, reference)


def logit_stores(
    tasks: Mapping[str, Task], stores: Mapping[str, RowStore], against: Against | None
) -> dict[str, RowStore]:
    """Where the rows about logits are kept, for the tasks that can have them."""
    if against is None or against.model is None:
        return {}
    return {
        name: stores[name].beside("logits", against.run.fingerprint)
        for name, task in tasks.items()
        if task.asking([]) is not None
    }


def compare_logits(
    task: Task,
    against: Against,
    model: Any,
    processor: Any,
    batch_size: int,
    store: RowStore,
    shard: Shard,
    progress: Progress | None,
) -> None:
    """Compare the logits of the reference and the model on what is missing of a shard."""
    assert against.model is not None
    done = store.read()
    answers = answers_of(against.run.rows[task.name])
    rows = predict_divergence(
        *(task, against.model, model, processor, answers),
        batch_size=batch_size,
        done=done,
        shard=shard,
    )
    label = f"{task.name}, logits"
    store.keep(rows, done, shard, progress, label, len(task.ids))


def against_reference(
    task: Task, rows: Sequence[Row], against: Against, logits: RowStore | None, seed: int
) -> tuple[dict[str, Any], list[Row]]:
    """The comparison as a result holds it, and the rows about logits that it is made of: those of
    the samples that both runs could score."""
    df = task.df if isinstance(task, Captioning) else None
    before = against.run.rows[task.name]
    compared = compare_rows(rows, before, task.primary, df=df, seed=seed)
    compared["fingerprint"] = against.run.fingerprint
    if logits is None:
        return compared, []
    found, ids = logits.read(), {row["id"] for row in before}
    kept = [found[row["id"]] for row in rows if row["id"] in ids and "kl" in found[row["id"]]]
    compared["agreement"] |= divergence_agreement(kept, clusters_of(rows), seed=seed)
    return compared, kept
