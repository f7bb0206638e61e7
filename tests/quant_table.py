# SPDX-License-Identifier: Apache-2.0
"""The tiny models at full precision, 4 and 3 bits: scores, flips and paired tests as one table.

    make eval-table        (or: python tests/quant_table.py --out out/eval-table --method gptq)

Every model is quantized in groups of 64, evaluated on its own tasks (easy-vqa among them) and
compared with full precision on the same items. p-values are adjusted by Holm's method over all rows
of the table, since it makes many comparisons. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mmq
from mmq_evals import tiny
from mmq_evals.calibration import calibration_samples
from mmq_evals.demo import LIMITS
from mmq_evals.divergence import ReferenceModel
from mmq_evals.report import changed_share
from mmq_evals.run import evaluate, tasks_for
from mmq_evals.stats import holm

GROUP_SIZE = 64
BITS = (4, 3)
CALIBRATION_SAMPLES = 64
COLUMNS = (
    "model, task",
    "bits",
    "items",
    "score [95 %]",
    "minus full [95 %]",
    "p",
    "p (Holm)",
    "changed [95 %]",
    "right to wrong, back",
    "KL, mnat [95 %]",
    "KL, 99th percentile [95 %]",
    "same first token [95 %]",
    "rank correlation [95 %]",
)


def runs(out: Path, method: str, limit: int | None) -> list[dict[str, Any]]:
    """A row for every model, task and width."""
    rows = []
    for name in tiny.MODELS:
        full, processor = mmq.load(tiny.path(name)), mmq.load_processor(tiny.path(name))
        reference = ReferenceModel(full)
        samples = calibration_samples(full, processor, count=CALIBRATION_SAMPLES)
        tasks = tasks_for(full)
        folder = out / name
        for task in tasks:
            result = evaluate(
                *(full, processor, [task]),
                out_dir=folder / "full" / task,
                limit=min(limit or LIMITS[task], LIMITS[task]),
            )
            rows.append(_row(name, task, "16", result))
        for bits in BITS:
            model = mmq.load(tiny.path(name))
            recipe = mmq.Recipe.simple(method, bits, group_size=GROUP_SIZE)
            mmq.quantize(model, recipe, [sample.inputs for sample in samples])
            for task in tasks:
                result = evaluate(
                    *(model, processor, [task]),
                    out_dir=folder / str(bits) / task,
                    limit=min(limit or LIMITS[task], LIMITS[task]),
                    reference=folder / "full" / task,
                    reference_model=reference,
                )
                rows.append(_row(name, task, str(bits), result))
    # By task: sorting keeps the order of the widths.
    order = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    return sorted(rows, key=lambda row: order.index((row["model"], row["task"])))


def _row(model: str, task: str, bits: str, result: dict[str, Any]) -> dict[str, Any]:
    entry = result["tasks"][task]
    metric = entry["primary"]
    against = entry.get("against_reference", {})
    return {
        "model": model,
        "task": task,
        "metric": metric,
        "bits": bits,
        "items": entry["counts"]["rows"],
        "score": entry["scores"][metric],
        "difference": against.get("differences", {}).get(metric),
        "agreement": against.get("agreement", {}),
    }


def adjust(rows: list[dict[str, Any]]) -> None:
    """Adds Holm's p-value over all differences of the table."""
    p_values = {
        str(place): row["difference"]["p_value"]
        for place, row in enumerate(rows)
        if row["difference"] is not None
    }
    for place, value in holm(p_values).items():
        rows[int(place)]["difference"]["holm"] = value


def _interval(found: dict[str, Any] | None, factor: float, digits: int, sign: str = "") -> str:
    if found is None:
        return "-"
    value, low, high = (
        f"{factor * found[key]:{sign}.{digits}f}" for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row as text: scores and shares times 100."""
    change, agreement = row["difference"], row["agreement"]
    moved = "-"
    if "right to wrong" in agreement:
        moved = f"{agreement['right to wrong']['count']}, {agreement['wrong to right']['count']}"
    return (
        f"{row['model']}, {row['task']}: {row['metric']}",
        row["bits"],
        str(row["items"]),
        _interval(row["score"], 100, 1),
        _interval(change, 100, 1, "+"),
        "-" if change is None else f"{change['p_value']:.4f}",
        "-" if change is None else f"{change['holm']:.4f}",
        _interval(changed_share(agreement), 100, 1),
        moved,
        _interval(agreement.get("logit KL"), 1000, 2),
        _interval(agreement.get("logit KL, 99th percentile over tokens"), 1000, 1),
        _interval(agreement.get("same first token"), 100, 2),
        _interval(agreement.get("rank correlation"), 1, 4),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="out/eval-table")
    parser.add_argument("--method", default="gptq", help="rtn, gptq or awq")
    parser.add_argument("--limit", type=int, help="the first N items of each task only")
    args = parser.parse_args()
    rows = runs(Path(args.out), args.method, args.limit)
    adjust(rows)
    print(
        f"{args.method}, groups of {GROUP_SIZE}, {CALIBRATION_SAMPLES} calibration samples; scores "
        "and shares times 100, intervals over images. Tiny models trained from scratch: they say "
        "nothing about the damage to checkpoints of billions of parameters.\n"
    )
    print(table(rows))
    print(json.dumps({"method": args.method, "limit": args.limit, "rows": rows}))


if __name__ == "__main__":
    main()
