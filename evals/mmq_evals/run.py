# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on tasks: rows per sample, scores with intervals, one result file.

In the output folder every task leaves ``<task>.jsonl``, one row a line with the raw prediction and
its scores, and the run leaves ``result.json``. While a run is under way its rows stand in the files
of rows.py, from which a run that was killed goes on; files of an earlier run are replaced only when
all tasks are done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmq_evals.against import against_reference, compare_logits, logit_stores, read_against
from mmq_evals.errors import EvalError
from mmq_evals.protocol import protocol_hash, run_protocols
from mmq_evals.report import format_result
from mmq_evals.results import (
    FORMAT,
    FORMAT_VERSION,
    RESULT_FILE,
    read_result,
    write_json,
)
from mmq_evals.rows import WHOLE, Progress, Row, RowStore, Shard, model_fingerprint
from mmq_evals.stats import detectable_line
from mmq_evals.summary import clusters_of, score_rows
from mmq_evals.tasks.base import Task, scored
from mmq_evals.tasks.build import (
    Data,
    Limit,
    build_tasks,
    model_class,
    tasks_for,
)
from mmq_evals.tasks.captioning import Captioning

__all__ = [
    "Prepared",
    "evaluate",
    "evaluate_prepared",
    "format_result",
    "make_folder",
    "predict_shard",
    "prepare",
    "protocol_hash",
    "read_result",
    "tasks_for",
]

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 32
POLL_SECONDS = 1.0
# Folder of the output folder for features of images while a run is under way.
FEATURES = "features.part"


@dataclass(frozen=True)
class Prepared:
    """Tasks built once for a model, to be run with any weights of it; see `prepare`."""

    tasks: dict[str, Task]
    protocols: dict[str, dict[str, Any]]
    batch_size: int

    @cached_property
    def baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """Scores without the image, by task."""
        return {name: task.baselines() for name, task in self.tasks.items()}


def evaluate(
    model: Any,
    processor: Any,
    tasks: Sequence[str] | None,
    *,
    out_dir: Path,
    data: Data = "tiny",
    split: str = "test",
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
    features: Path | None = None,
    reference: Path | None = None,
    reference_model: Any | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate ``model`` and write rows and ``result.json`` into ``out_dir``.

    A run that was killed goes on: its rows are taken up where model, protocol and device are the
    same, and the result is that of an undisturbed run. So are rows that `predict_shard` left.

    Args:
        model: a BLIP-2 or LLaVA model of transformers, dense or with packed linears.
        processor: its processor.
        tasks: names; None takes those that fit the model and the data, see `tasks_for`.
        out_dir: folder for the files, made if missing.
        data: ``"tiny"`` for the built-in data or the folder of a published dataset.
        split: ``"test"`` is the split that results are published on.
        limit: only the first items: images, or questions. Document frequencies of CIDEr stay those
            of the whole split.
        batch_size: images or questions a batch.
        seed: of the bootstrap; nothing else is random.
        features: folder in which features of images are kept for other runs with the same images
            and the same vision tower. None keeps them in ``out_dir`` until the run is done.
        reference: ``result.json`` (or its folder) of a run to compare with, over the same samples
            under the same protocol: paired differences, p-values and agreement are added.
        reference_model: the model of that run, on the same device: the KL of the logits on its
            answers joins the agreement. A `ReferenceModel` around it, given to many runs over the
            same data, computes its logits once. Retrieval has no language model and needs none.
        progress: called after every row.
        announce: called before the model runs with a line for every task: which difference its
            number of samples can show.

    Returns:
        What ``result.json`` holds. Scores are in [0, 1], CIDEr in [0, 10].

    Raises:
        EvalError: a task does not fit the model, a weight is not finite, data is missing,
            ``out_dir`` is a file or holds rows of an unfinished run of another configuration, the
            reference is of another protocol or ``reference_model`` is not that of the reference, or
            no image decodes. All but the last are found before
            the model runs. Single images that do not decode are counted, named and not scored.
    """
    prepared = prepare(
        model, processor, tasks, data=data, split=split, limit=limit, batch_size=batch_size
    )
    return evaluate_prepared(
        model,
        processor,
        prepared,
        out_dir=out_dir,
        seed=seed,
        reference=reference,
        reference_model=reference_model,
        features=features,
        progress=progress,
        announce=announce,
    )


def evaluate_prepared(
    model: Any,
    processor: Any,
    prepared: Prepared,
    *,
    out_dir: Path,
    seed: int = 0,
    reference: Path | None = None,
    reference_model: Any | None = None,
    features: Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """`evaluate` on tasks that are built already; many runs of one model share them."""
    built, protocols, batch_size = prepared.tasks, prepared.protocols, prepared.batch_size
    _check_finite(model)
    against = read_against(reference, reference_model, protocols)
    fingerprint, stores = _open_stores(model, protocols, out_dir)
    logits = logit_stores(built, stores, against)
    for store in (*stores.values(), *logits.values()):
        store.read()  # refuses another configuration before the model runs
    detectable = {
        name: detectable_line(task.primary, len(task.ids)) for name, task in built.items()
    }
    for name, line in detectable.items():
        if announce is not None:
            announce(f"{name}, {line}")
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": {
            "class": model_class(model),
            "name": str(getattr(model.config, "_name_or_path", "")),
            "fingerprint": fingerprint,
            "device": str(model.device),
        },
        "machine": {"platform": platform.platform(), "processors": os.cpu_count()},
        "seed": seed,
        "tasks": {},
    }
    parts: dict[Path, Path] = {}
    for name, task in built.items():
        started = time.monotonic()
        part = out_dir / f"{name}.jsonl.part"
        parts[part] = out_dir / f"{name}.jsonl"
        scratch = features or out_dir / FEATURES
        _predict(task, model, processor, batch_size, stores[name], WHOLE, scratch, progress)
        found = task.rows(stores[name].read())
        failed = {row["id"]: row["failed"] for row in found if "failed" in row}
        rows = scored(task, [row for row in found if "failed" not in row])
        if not rows:
            raise EvalError(f"{name}: no image decodes: {next(iter(failed.values()), 'no items')}")
        _write_rows(part, rows)
        if against is not None and name in logits:
            given = (model, processor, batch_size, logits[name], WHOLE, progress)
            compare_logits(task, against, *given)
        predicted = time.monotonic()
        entry: dict[str, Any] = {
            "rows": parts[part].name,
            "primary": task.primary,
            "shown": list(task.shown),
            "counts": {
                "rows": len(rows),
                "clusters": len(set(clusters_of(rows).values())),
                "failed": len(failed),
            },
            "failed": failed,
            "scores": {key: asdict(value) for key, value in score_rows(rows, seed=seed).items()},
            "breakdown": task.breakdown(rows),
            "baselines": prepared.baselines[name],
            "detectable": detectable[name],
            "protocol": protocols[name],
            "protocol_hash": protocol_hash(protocols[name]),
        }
        if isinstance(task, Captioning) and task.limit is not None:
            # The references in the rows do not give the table of the whole split.
            entry["document_frequency"] = f"{name}.df.json"
            task.df.save(out_dir / entry["document_frequency"])
        if against is not None:
            compared, kept = against_reference(task, rows, against, logits.get(name), seed)
            if name in logits:
                part = out_dir / f"{name}.logits.jsonl.part"
                parts[part] = out_dir / f"{name}.logits.jsonl"
                compared["logits"] = parts[part].name
                _write_rows(part, kept)
            entry["against_reference"] = compared
        entry["seconds"] = {
            "predict": round(predicted - started, 3),
            "score": round(time.monotonic() - predicted, 3),
        }
        result["tasks"][name] = entry
        logger.info("%s: %d rows in %.1f s", name, len(rows), predicted - started)
    for part, final in parts.items():
        os.replace(part, final)
    write_json(out_dir / RESULT_FILE, result)
    for store in (*stores.values(), *logits.values()):
        store.remove()
    shutil.rmtree(out_dir / FEATURES, ignore_errors=True)
    return result


def predict_shard(
    model: Any,
    processor: Any,
    tasks: Sequence[str] | None,
    shard: Shard,
    *,
    out_dir: Path,
    data: Data = "tiny",
    split: str = "test",
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    features: Path | None = None,
    reference: Path | None = None,
    reference_model: Any | None = None,
    progress: Progress | None = None,
    wait: bool = False,
) -> bool:
    """Predict one process's share of the batches; `evaluate` with the same arguments scores them.

    What others have already predicted, in whatever number of processes, is left out. Returns
    whether the rows of all shards are there; with ``wait`` not before they are.

    Raises:
        EvalError: as `evaluate`.
    """
    prepared = prepare(
        model, processor, tasks, data=data, split=split, limit=limit, batch_size=batch_size
    )
    built = prepared.tasks
    _check_finite(model)
    against = read_against(reference, reference_model, prepared.protocols)
    _, stores = _open_stores(model, prepared.protocols, out_dir)
    logits = logit_stores(built, stores, against)
    for name, task in built.items():
        scratch = features or out_dir / FEATURES
        _predict(task, model, processor, batch_size, stores[name], shard, scratch, progress)
        if against is not None and name in logits:
            given = (model, processor, batch_size, logits[name], shard, progress)
            compare_logits(task, against, *given)

    def complete() -> bool:
        return all(
            store.read().keys() >= set(built[name].part_ids)
            for kind in (stores, logits)
            for name, store in kind.items()
        )

    while wait and not complete():
        time.sleep(POLL_SECONDS)
    return complete()


def prepare(
    model: Any,
    processor: Any,
    tasks: Sequence[str] | None,
    *,
    data: Data = "tiny",
    split: str = "test",
    limit: Limit = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Prepared:
    """The tasks of a run and their protocols; arguments as `evaluate`.

    ``limit`` may be by task, without an entry for those that are not limited.

    Raises:
        EvalError: all that `evaluate` raises without looking at the weights.
    """
    if batch_size < 1:
        raise EvalError(f"batch_size: expected at least 1, got {batch_size}")
    if tasks is None:
        tasks = tasks_for(model, data)
        if not tasks:
            raise EvalError(f"data: {data} has no dataset for any task of {model_class(model)}")
    built = build_tasks(model, tasks, data, split, limit)
    return Prepared(built, run_protocols(model, processor, built, batch_size, limit), batch_size)


def _open_stores(
    model: Any, protocols: dict[str, dict[str, Any]], out_dir: Path
) -> tuple[str, dict[str, RowStore]]:
    """The model's fingerprint, and where each task's rows are kept while the run is under way."""
    make_folder(out_dir)
    model.eval()
    fingerprint = model_fingerprint(model)
    stores = {}
    for name, protocol in protocols.items():
        key = json.dumps([protocol_hash(protocol), fingerprint, model.device.type])
        stores[name] = RowStore(out_dir, name, hashlib.sha256(key.encode()).hexdigest()[:16])
    return fingerprint, stores


def make_folder(path: Path) -> None:
    """The folder with its parents; EvalError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"out: expected a folder, got {path} ({error.strerror})") from error


def _check_finite(model: Any) -> None:
    """A broken checkpoint gives answers, too; packed weights are checked where they are loaded."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise EvalError(f"{name}: expected finite weights, got NaN or infinity")


# ---- rows ----------------------------------------------------------------------------------------


def _predict(
    task: Task,
    model: Any,
    processor: Any,
    batch_size: int,
    store: RowStore,
    shard: Shard,
    scratch: Path,
    progress: Progress | None,
) -> None:
    """Predict what is missing of a shard, storing every part as it comes."""
    total, done = len(task.part_ids), store.read()
    if done:
        logger.info("%s: going on after %d of %d", task.name, len(done), total)
    rows = task.predict(
        model, processor, batch_size=batch_size, scratch=scratch, done=done, shard=shard
    )
    store.keep(rows, done, shard, progress, task.name, total)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="ascii") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
