# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of docs/study.md from a table of results: `python tests/study_claims.py DIR`.

A second folder, of the grid tiny-parts, adds the tables of parts of components.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmq.inspect import inspect_model
from mmq_evals import tiny
from mmq_evals.study.analyze import Options, analyze
from mmq_evals.study.importance import Range
from mmq_evals.study.repeat_tables import OPTIONS_NOTE, SEEDS_NOTE, options_table, seeds_table
from mmq_evals.study.report.charts import main_grids
from mmq_evals.study.text import number, percent, points

RANGES = ("all", ">=3", ">=4", "language>=3")
Data = Mapping[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def sizes(model: str) -> dict[str, float]:
    """Share of every component in the weights of all linears that can be quantized."""
    components = inspect_model(tiny.path(model))["components"]
    weights = {name: part["counts"]["linear"] for name, part in components.items()}
    if weights.get("connector") == 0:  # LLaVA's projector counts as heads
        weights["connector"] = components["connector"]["counts"]["head"]
    return {name: count / sum(weights.values()) for name, count in weights.items()}


def name_of(model: Data, target: Data) -> str:
    return f"{model['model'].removeprefix('tiny-')}, {target['name'].replace('_', ' ')}"


def importance(found: Data) -> None:
    print("\n## Importance (Shapley shares of the variance, percent) beside size")
    rows = []
    for model in found["models"]:
        share = sizes(model["model"])
        for target in model["targets"]:
            for grid in main_grids(target):
                for part in grid["importance"]:
                    if part["kind"] == "refused" or part["range"] not in RANGES:
                        continue
                    cells = {entry["factor"]: percent(entry, 0) for entry in part["shapley"]}
                    rows.append(
                        [name_of(model, target), grid["label"], part["range"], str(part["cells"])]
                        + [cells.get(c, "-") for c in ("vision", "connector", "language")]
                        + ["-" if part["noise"] is None else f"{100 * part['noise']:.0f}"]
                    )
        print(model["model"], {name: f"{100 * value:.1f} %" for name, value in share.items()})
    head = ["task", "method", "widths", "cells", "vision", "connector", "language", "noise"]
    table(head, rows)


def one_at_a_time(found: Data, widths: Sequence[float] = (2.0, 3.0, 4.0)) -> None:
    print("\n## One component at a time, difference to full precision")
    rows = []
    for model in found["models"]:
        for target in model["targets"]:
            for grid in main_grids(target):
                known = {(r["factor"], r["bits"]): r for r in grid["dose_response"]}
                for factor in dict.fromkeys(row["factor"] for row in grid["dose_response"]):
                    cells = (known.get((factor, width)) for width in widths)
                    rows.append(
                        [name_of(model, target), grid["label"], factor]
                        + ["-" if c is None else number(c["difference"], sign=True) for c in cells]
                    )
    table(["task", "method", "component", *(f"{w:g} bits" for w in widths)], rows)


def even_widths(found: Data) -> None:
    print("\n## All components that vary together at one width: score")
    rows = []
    for model in found["models"]:
        for target in model["targets"]:
            full = number(target["full"])
            for grid in main_grids(target):
                known = {row["bits"]: row["together"] for row in grid["leave_one_full"]}
                if known:
                    rows.append(
                        [name_of(model, target), grid["label"]]
                        + [number(known.get(width)) for width in (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)]
                        + [full]
                    )
    table(["task", "method", "2", "3", "4", "5", "6", "8", "16"], rows)


def pairs(found: Data) -> None:
    print("\n## Interactions: mean loss of both beyond the sum")
    rows = []
    for model in found["models"]:
        for target in model["targets"]:
            for grid in main_grids(target):
                for pair in grid["interactions"]:
                    name = " x ".join(pair["factors"])
                    significant = f"{pair['more_than_sum']} / {pair['less_than_sum']}"
                    cells = [number(pair["mean"], sign=True), str(len(pair["cells"])), significant]
                    rows.append([name_of(model, target), grid["label"], name, *cells])
    table(["task", "method", "pair", "mean excess", "cells", "more / less"], rows)


def methods(found: Data) -> None:
    print("\n## Methods at equal widths")
    rows = []
    for model in found["models"]:
        for target in model["targets"]:
            for row in target["methods"]:
                pair = f"{row['a']} - {row['b']}"
                cells = str(row["cells"])
                span = f"{row['at_least']:g}"
                rows.append([name_of(model, target), pair, span, cells, number(row, sign=True)])
    table(["task", "A - B", "from bits", "cells", "difference"], rows)


def reaching(found: Data) -> None:
    print("\n## Smallest sizes that keep a share of full precision (whole paired interval)")
    rows = []
    for model in found["models"]:
        for target in model["targets"]:
            for grid in main_grids(target):
                cells = []
                for row in grid["reaching"]:
                    certain = "-" if row["certain"] is None else f"{row['certain']:.2f}"
                    reached = "-" if row["bpw"] is None else f"{row['bpw']:.2f}"
                    cells.append(f"{reached} ({certain})")
                rows.append([name_of(model, target), grid["label"], *cells])
    table(["task", "method", "95 %", "98 %", "99 %"], rows)


def parts(found: Data) -> None:
    print("\n## Parts of components at 2 bits, difference to full precision")
    rows = []
    for model in found["models"]:
        for target in model["targets"]:
            known = {}
            for grid in target["grids"]:
                for row in grid["dose_response"]:
                    known[grid["label"], row["factor"]] = row["difference"]
            labels = dict.fromkeys(label for label, _ in known)
            for label in labels:
                for component in ("vision", "language"):
                    for third in ("front", "middle", "end"):
                        place = f"{component}.{third}"
                        found_parts = [
                            known.get((label, place + kind)) for kind in (".attention", ".mlp", "")
                        ]
                        excess = "-"
                        if all(part is not None for part in found_parts):
                            values = [part["value"] for part in found_parts if part is not None]
                            excess = points(values[0] + values[1] - values[2], sign=True)
                        cells = [number(part, sign=True) for part in found_parts]
                        rows.append([name_of(model, target), label, place, *cells, excess])
    head = ["task", "method", "part", "attention", "mlp", "both", "both beyond the sum"]
    table(head, rows)


def repeats(found: Data) -> None:
    for model in found["models"]:
        for name, note, (head, rows) in (
            ("Calibration seeds", SEEDS_NOTE, seeds_table(model)),
            ("Options", OPTIONS_NOTE, options_table(model)),
        ):
            print(f"\n## {name}, {model['model']}\n\n{note}")
            table(head, rows)


def main() -> None:
    options = Options(ranges=[Range.parse(text) for text in RANGES])
    found = analyze(Path(sys.argv[1]), options)
    print(found["table"])
    for show in (importance, one_at_a_time, even_widths, pairs, methods, reaching, repeats):
        show(found)
    if len(sys.argv) > 2:
        parts(analyze(Path(sys.argv[2])))


if __name__ == "__main__":
    main()
