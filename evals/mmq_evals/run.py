# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on tasks: rows per sample, scores with intervals, one result file.

In the output folder every task leaves ``<task>.jsonl``, one row a line with the raw prediction and
its scores, and the run leaves ``result.json``. While a run is under way its rows stand in
``<task>.jsonl.part``; files of an earlier run are replaced only when all tasks are done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmq_evals.errors import EvalError
from mmq_evals.stats import paired_difference
from mmq_evals.tasks.base import Row, Task, by_metric, clusters_of
from mmq_evals.tasks.build import Data, build_tasks, model_class, tasks_for
from mmq_evals.tasks.captioning import Captioning

__all__ = [
    "evaluate",
    "format_result",
    "make_folder",
    "protocol_hash",
    "read_result",
    "tasks_for",
]

logger = logging.getLogger(__name__)

FORMAT = "mmq-eval-result"
FORMAT_VERSION = 1
RESULT_FILE = "result.json"
DEFAULT_BATCH_SIZE = 32

# Called after every row with the task's name, the rows done and the rows in all.
Progress = Callable[[str, int, int], None]


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
    reference: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate ``model`` and write rows and ``result.json`` into ``out_dir``.

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
        reference: ``result.json`` (or its folder) of a run to compare with, over the same samples
            under the same protocol: paired differences, p-values and agreement are added.
        progress: called after every row.

    Returns:
        What ``result.json`` holds. Scores are in [0, 1], CIDEr in [0, 10].

    Raises:
        EvalError: a task does not fit the model, a weight is not finite, data is missing, an image
            does not decode, ``out_dir`` is a file, or the reference is of another protocol. All but
            undecodable images are found before the model runs.
    """
    if batch_size < 1:
        raise EvalError(f"batch_size: expected at least 1, got {batch_size}")
    if tasks is None:
        tasks = tasks_for(model, data)
        if not tasks:
            raise EvalError(f"data: {data} has no dataset for any task of {model_class(model)}")
    built = build_tasks(model, tasks, data, split, limit)
    _check_finite(model)
    common = _common_protocol(model, processor, batch_size)
    protocols = {name: _protocol(task, common, limit) for name, task in built.items()}
    references = None if reference is None else _check_reference(reference, protocols)

    make_folder(out_dir)
    model.eval()
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": {
            "class": model_class(model),
            "name": str(getattr(model.config, "_name_or_path", "")),
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
        rows = _predict(task, model, processor, batch_size, part, progress)
        predicted = time.monotonic()
        entry: dict[str, Any] = {
            "rows": parts[part].name,
            "primary": task.primary,
            "shown": list(task.shown),
            "counts": {"rows": len(rows), "clusters": len(set(clusters_of(rows).values()))},
            "scores": {key: asdict(value) for key, value in task.score(rows, seed=seed).items()},
            "breakdown": task.breakdown(rows),
            "baselines": task.baselines(),
            "protocol": protocols[name],
            "protocol_hash": protocol_hash(protocols[name]),
        }
        if isinstance(task, Captioning) and limit is not None:
            # The references in the rows do not give the table of the whole split.
            entry["document_frequency"] = f"{name}.df.json"
            task.df.save(out_dir / entry["document_frequency"])
        if references is not None:
            entry["against_reference"] = _compare(task, rows, references[name], seed)
        entry["seconds"] = {
            "predict": round(predicted - started, 3),
            "score": round(time.monotonic() - predicted, 3),
        }
        result["tasks"][name] = entry
        logger.info("%s: %d rows in %.1f s", name, len(rows), predicted - started)
    for part, final in parts.items():
        os.replace(part, final)
    _write_json(out_dir / RESULT_FILE, result)
    return result


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


def read_result(path: Path) -> dict[str, Any]:
    """Read ``result.json``, given itself or its folder.

    Raises:
        EvalError: the file is missing, not JSON, or not a result of this version.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvalError(f"result: no file {file}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvalError(f"result: {file} is not JSON: {error}") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise EvalError(f"result: {file} is not an evaluation result")
    if result.get("version") != FORMAT_VERSION:
        raise EvalError(
            f"result: {file}: expected version {FORMAT_VERSION}, got {result.get('version')}"
        )
    return result


def protocol_hash(protocol: dict[str, Any]) -> str:
    """SHA-256 of a protocol block, the same for equal blocks whatever their order."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def format_result(result: dict[str, Any]) -> str:
    """A plain table: scores times 100 with intervals, paired differences, baselines."""
    lines = ["Scores times 100, with 95 % bootstrap intervals over images."]
    for name, entry in result["tasks"].items():
        counts = entry["counts"]
        lines.append(
            f"{name}: {counts['rows']} rows of {counts['clusters']} images "
            f"({entry['protocol']['data']['name']}, {entry['protocol']['data']['split']}), "
            f"{entry['seconds']['predict']:.0f} s"
        )
        paired = entry.get("against_reference", {}).get("differences", {})
        for metric in entry["shown"]:
            score = entry["scores"][metric]
            line = (
                f"  {metric:<24}{100 * score['value']:8.2f}  "
                f"[{100 * score['low']:.2f}, {100 * score['high']:.2f}]"
            )
            if metric in paired:
                change = paired[metric]
                line += (
                    f"  {100 * change['value']:+.2f} [{100 * change['low']:+.2f}, "
                    f"{100 * change['high']:+.2f}] p {change['p_value']:.4f}"
                )
            lines.append(line + ("  *" if metric == entry["primary"] else ""))
        for baseline, scores in entry["baselines"].items():
            shown = ", ".join(
                f"{key} {100 * scores[key]:.2f}" for key in entry["shown"] if key in scores
            )
            lines.append(f"  {baseline}: {shown}")
        for key, value in entry.get("against_reference", {}).get("agreement", {}).items():
            lines.append(f"  {key}: {100 * value:.2f}")
    return "\n".join(lines)


# ---- protocol ------------------------------------------------------------------------------------


def _common_protocol(model: Any, processor: Any, batch_size: int) -> dict[str, Any]:
    image_processor = processor.image_processor
    settings = image_processor.to_dict()
    kept = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std")
    return {
        "model_class": model_class(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "image_processor": {
            "class": type(image_processor).__name__,
            **{key: settings[key] for key in kept if key in settings},
        },
        "tokenizer_class": type(processor.tokenizer).__name__,
        "versions": {
            name: _version(name) for name in ("mmq", "torch", "transformers", "numpy", "pillow")
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _protocol(task: Task, common: dict[str, Any], limit: int | None) -> dict[str, Any]:
    ids = "\n".join(task.ids)
    dataset = task.dataset
    protocol = {
        "task": task.name,
        **task.protocol,
        **common,
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "limit": limit,
            "rows": len(task.ids),
            "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        },
    }
    # As it will be read back: tuples become lists, enumerations their values.
    plain: dict[str, Any] = json.loads(json.dumps(protocol))
    return plain


# ---- rows ----------------------------------------------------------------------------------------


def _predict(
    task: Task,
    model: Any,
    processor: Any,
    batch_size: int,
    part: Path,
    progress: Progress | None,
) -> list[Row]:
    """Predict, appending every row to ``part`` as it comes; returns the rows without scores."""
    total = len(task.ids)
    rows: list[Row] = []
    part.unlink(missing_ok=True)
    with part.open("a", encoding="ascii") as file:
        for row in task.predict(model, processor, batch_size=batch_size):
            # ASCII JSON: no character of a prediction can end a line.
            file.write(json.dumps({**row, "scores": task.sample_scores(row)}) + "\n")
            file.flush()
            rows.append(row)
            if progress is not None:
                progress(task.name, len(rows), total)
    return rows


def _read_rows(file: Path) -> list[Row]:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise EvalError(f"reference: no file {file}") from None
    except ValueError as error:
        raise EvalError(f"reference: {file} is not JSON lines: {error}") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="ascii") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


# ---- comparison ----------------------------------------------------------------------------------


def _check_reference(path: Path, protocols: dict[str, dict[str, Any]]) -> dict[str, list[Row]]:
    """Rows of every task of a reference run, refused unless the protocols are equal."""
    result = read_result(path)
    folder = path if path.is_dir() else path.parent
    rows: dict[str, list[Row]] = {}
    for name, protocol in protocols.items():
        entry = result["tasks"].get(name)
        if entry is None:
            raise EvalError(
                f"reference: {path} has no task {name!r}, only {', '.join(result['tasks'])}"
            )
        if entry["protocol_hash"] != protocol_hash(protocol):
            theirs = entry["protocol"]
            differing = sorted(
                key
                for key in protocol.keys() | theirs.keys()
                if protocol.get(key) != theirs.get(key)
            )
            raise EvalError(
                f"reference: {path}: task {name!r} ran under another protocol; different: "
                f"{', '.join(differing)}"
            )
        rows[name] = _read_rows(folder / entry["rows"])
    return rows


def _compare(
    task: Task, rows: Sequence[Row], reference: Sequence[Row], seed: int
) -> dict[str, Any]:
    mine = by_metric(rows, {row["id"]: task.sample_scores(row) for row in rows})
    theirs = by_metric(reference, {row["id"]: task.sample_scores(row) for row in reference})
    clusters = clusters_of(rows)
    return {
        "differences": {
            metric: asdict(paired_difference(mine[metric], theirs[metric], clusters, seed=seed))
            for metric in mine
        },
        "agreement": task.agreement(rows, reference),
    }
