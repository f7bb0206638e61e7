# SPDX-License-Identifier: Apache-2.0
"""Result files: written, read, and compared with those of a reference run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError
from mmq_evals.metrics.caption import DocumentFrequency
from mmq_evals.protocol import differing_keys, protocol_hash
from mmq_evals.rows import Row
from mmq_evals.summary import agreement_rows, paired_rows

FORMAT = "mmq-eval-result"
FORMAT_VERSION = 1
RESULT_FILE = "result.json"


def write_json(path: Path, data: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="ascii") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


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


def read_rows(file: Path) -> list[Row]:
    """The rows that `evaluate` wrote.

    Raises:
        EvalError: the file is missing or not JSON lines.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        raise EvalError(f"rows: no file {file}") from None
    except ValueError as error:
        raise EvalError(f"rows: {file} is not JSON lines: {error}") from None


@dataclass(frozen=True)
class Reference:
    """A run to compare with: its rows by task, and the model's fingerprint and folder."""

    rows: dict[str, list[Row]]
    fingerprint: str
    model: str


def read_reference(path: Path, protocols: Mapping[str, dict[str, Any]]) -> Reference:
    """A reference run with the tasks of ``protocols``.

    Raises:
        EvalError: as `read_result` and `read_rows`; a task is missing or ran under another
            protocol.
    """
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
            raise EvalError(
                f"reference: {path}: task {name!r} ran under another protocol; different: "
                f"{', '.join(differing_keys(protocol, entry['protocol']))}"
            )
        rows[name] = read_rows(folder / entry["rows"])
    return Reference(rows, result["model"]["fingerprint"], result["model"]["name"])


def compare_rows(
    rows: Sequence[Row],
    reference: Sequence[Row],
    primary: str,
    *,
    df: DocumentFrequency | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Paired ``differences`` of every score and ``agreement``, over the samples that both runs
    could score, of which there are ``samples``; see `paired_rows` and `agreement_rows`.

    Raises:
        EvalError: no sample was scored in both runs.
    """
    both = {row["id"] for row in rows} & {row["id"] for row in reference}
    if not both:
        raise EvalError("reference: no sample was scored in both runs")
    rows = [row for row in rows if row["id"] in both]
    reference = [row for row in reference if row["id"] in both]
    differences = paired_rows(rows, reference, seed=seed)
    return {
        "differences": {metric: asdict(value) for metric, value in differences.items()},
        "agreement": agreement_rows(rows, reference, primary, df=df, seed=seed),
        "samples": len(both),
    }
