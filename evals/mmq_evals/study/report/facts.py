# SPDX-License-Identifier: Apache-2.0
"""What a report says beside its scores: cost, versions, protocols, warnings."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from mmq_evals.results import RESULT_FILE, read_result
from mmq_evals.study.table import Run, Table

PACKAGES = ("mmq", "torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Cost:
    """Seconds of all runs of one model with one method; ``median`` is that of a whole run."""

    model: str
    method: str
    runs: int
    quantize: float
    evaluate: float
    median: float


@dataclass(frozen=True)
class Facts:
    """``made``: name, value, and whether the value is prose and not code."""

    cost: tuple[Cost, ...]
    made: tuple[tuple[str, str, bool], ...]
    notes: tuple[str, ...]


def facts_of(table: Table, found: dict[str, Any], command: str, commit: str | None) -> Facts:
    """The facts of a table and its analysis.

    Args:
        command: that made the report.
        commit: of the code that made the runs; default: that of this package's repository.
    """
    failed = [
        f"{row.get('run_id', '?')} failed: {row.get('error', 'no reason given')}"
        for row in table.failed[:5]
    ]
    notes = [*table.notes, *failed]
    names = ", ".join(target.removeprefix("score.") for target in table.targets)
    made = [
        ("table", f"{table.path.name}, SHA-256 {_sha256(table.path)}", False),
        ("runs", f"{len(table.runs):,} finished, {len(table.failed):,} failed", True),
        ("judged by", names, True),
        ("command", command, False),
        ("commit", commit or repository_commit() or "not known", False),
        *_protocols(table),
        ("bootstrap", f"seed {found['seed']}, percentile intervals of 95 %", True),
        ("machine of this report", platform.platform(), True),
    ]
    return Facts(tuple(_costs(table.runs)), tuple(made), tuple(notes))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def repository_commit() -> str | None:
    """The commit of the repository that holds this package, None outside of one."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None


def _protocols(table: Table) -> list[tuple[str, str, bool]]:
    """Versions and the hash of every protocol, from the evaluations behind the table."""
    versions: dict[str, set[str]] = {}
    hashes: dict[str, set[str]] = {}
    for run in table.runs:
        rows = run.values.get("rows")
        if not rows or not (table.path.parent / str(rows) / RESULT_FILE).is_file():
            continue
        for task, entry in read_result(table.path.parent / str(rows))["tasks"].items():
            name = f"{run.values.get('model', '')} {task}".strip()
            hashes.setdefault(name, set()).add(entry["protocol_hash"])
            for package, number in entry["protocol"].get("versions", {}).items():
                versions.setdefault(package, set()).add(str(number))
    if not versions:
        versions = {package: {_installed(package)} for package in PACKAGES}
    stated = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in versions.items())
    return [
        ("versions", stated, True),
        *((f"protocol of {name}", ", ".join(sorted(h)), False) for name, h in hashes.items()),
    ]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _costs(runs: Sequence[Run]) -> list[Cost]:
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        quantize, evaluate = run.number("seconds.quantize"), run.number("seconds.eval")
        if quantize is not None and evaluate is not None:
            key = (str(run.values.get("model", "")), str(run.values.get("method", "")))
            groups.setdefault(key, []).append((quantize, evaluate))
    return [
        Cost(
            model,
            method,
            len(times),
            sum(quantize for quantize, _ in times),
            sum(evaluate for _, evaluate in times),
            median(quantize + evaluate for quantize, evaluate in times),
        )
        for (model, method), times in groups.items()
    ]
