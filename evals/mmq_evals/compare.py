# SPDX-License-Identifier: Apache-2.0
"""Compare two finished runs sample by sample: paired tests, flips, and the samples that changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmq_evals.divergence import divergence_agreement
from mmq_evals.errors import EvalError
from mmq_evals.metrics.caption import DocumentFrequency
from mmq_evals.protocol import differing_keys
from mmq_evals.report import agreement_lines
from mmq_evals.results import (
    compare_rows,
    read_result,
    read_rows,
)
from mmq_evals.rows import Row
from mmq_evals.summary import clusters_of

SHOWN_SAMPLES = 10


def compare(a: Path, b: Path, *, force: bool = False, seed: int = 0) -> dict[str, Any]:
    """What changed from run ``a`` to run ``b``, folders of `evaluate`, for every task of both.

    Args:
        force: compare runs of different protocols, too; the difference is then in the result. The
            samples must be the same in any case.
        seed: of the bootstrap and the permutation test.

    Returns:
        By task: ``differences`` (b - a) of every score with interval and p-value over images,
        ``agreement`` of the predictions (such as flips), the ``changed`` ones with both scores,
        how many samples got ``worse`` and ``better`` in the primary metric, and ``protocol`` (the
        keys that differ).

    Raises:
        EvalError: no task is in both runs, protocols differ without ``force``, or samples differ.
    """
    first, second = read_result(a), read_result(b)
    tasks = [name for name in first["tasks"] if name in second["tasks"]]
    if not tasks:
        raise EvalError(
            f"compare: no task is in both runs: {', '.join(first['tasks'])} and "
            f"{', '.join(second['tasks'])}"
        )
    found = {}
    for name in tasks:
        one, two = first["tasks"][name], second["tasks"][name]
        keys = differing_keys(one["protocol"], two["protocol"])
        if keys and not force:
            raise EvalError(
                f"compare: task {name!r} ran under two protocols; different: {', '.join(keys)} "
                "(--force compares all the same)"
            )
        folders = [path if path.is_dir() else path.parent for path in (a, b)]
        rows_a = read_rows(folders[0] / one["rows"])
        rows_b = read_rows(folders[1] / two["rows"])
        table = one.get("document_frequency")
        df = None if table is None else DocumentFrequency.load(folders[0] / table)
        changes = _compare_task(rows_a, rows_b, one["primary"], df, seed)
        against = two.get("against_reference", {})
        if against.get("fingerprint") == first["model"]["fingerprint"] and "logits" in against:
            logits = read_rows(folders[1] / against["logits"])
            changes["agreement"] |= divergence_agreement(logits, clusters_of(rows_b), seed=seed)
        found[name] = changes | {"protocol": keys}
    return found


def _compare_task(
    a: Sequence[Row], b: Sequence[Row], primary: str, df: DocumentFrequency | None, seed: int
) -> dict[str, Any]:
    old = {row["id"]: row for row in a}
    new = {row["id"]: row for row in b}
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise EvalError(
            f"compare: expected the same samples, got {len(old)} and {len(new)}; in one only: "
            f"{odd[:5]}"
        )
    moved = {
        key: new[key]["scores"].get(primary, 0.0) - row["scores"].get(primary, 0.0)
        for key, row in old.items()
    }
    return {
        "primary": primary,
        **compare_rows(b, a, primary, df=df, seed=seed),
        "worse": sum(change < 0 for change in moved.values()),
        "better": sum(change > 0 for change in moved.values()),
        "changed": [
            {
                "id": key,
                "a": row["prediction"],
                "b": new[key]["prediction"],
                "score_a": row["scores"].get(primary),
                "score_b": new[key]["scores"].get(primary),
            }
            for key, row in old.items()
            if row["prediction"] != new[key]["prediction"]
        ],
    }


def format_comparison(found: dict[str, Any], samples: int = SHOWN_SAMPLES) -> str:
    """A plain text of `compare`'s result: the samples whose score moved most come first."""
    lines = ["B minus A, times 100, with 95 % bootstrap intervals over images."]
    for name, task in found.items():
        if task["protocol"]:
            lines.append(f"{name}: the protocols differ in {', '.join(task['protocol'])}")
        lines.append(
            f"{name}: {len(task['changed'])} of {task['samples']} predictions changed; by "
            f"{task['primary']} {task['worse']} worse, {task['better']} better"
        )
        for metric, change in task["differences"].items():
            lines.append(
                f"  {metric:<24}{100 * change['value']:+8.2f}  [{100 * change['low']:+.2f}, "
                f"{100 * change['high']:+.2f}]  p {change['p_value']:.4f}"
                + ("  *" if metric == task["primary"] else "")
            )
        lines += agreement_lines(task["agreement"])
        moved = sorted(
            task["changed"],
            key=lambda row: -abs((row["score_b"] or 0.0) - (row["score_a"] or 0.0)),
        )
        for row in moved[:samples]:
            if isinstance(row["a"], str):
                lines.append(f"  {row['id']}: {row['a']!r} -> {row['b']!r}")
            else:
                lines.append(f"  {row['id']}: {row['score_a']} -> {row['score_b']}")
        if len(moved) > samples:
            lines.append(f"  ... and {len(moved) - samples} more")
    return "\n".join(lines)
