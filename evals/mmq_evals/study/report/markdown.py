# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown with PNG charts, in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmq_evals.study.repeat_tables import repeat_tables
from mmq_evals.study.report.charts import main_grids
from mmq_evals.study.report.facts import Facts
from mmq_evals.study.report.plots import plot_target
from mmq_evals.study.report.verdict import verdict
from mmq_evals.study.text import number, percent, spread_text

Data = Mapping[str, Any]

REPORT_NAME = "report.md"
ALT = {
    "size": "score against size",
    "dose": "score by bits of one component",
    "importance": "shares of variance by range",
}


def cell(text: str) -> str:
    """Text of others in a table: what would end the cell, or begin HTML or a link, is escaped."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text).replace("\n", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; cells are Markdown already."""
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def write_markdown(out: Path, title: str, found: Data, facts: Facts) -> Path:
    """Write ``report.md`` and its charts into the folder ``out``, made if missing."""
    out.mkdir(exist_ok=True)
    lines = [f"# {cell(title)}", ""]
    lines += [f"{found['table']['runs']:,} runs. Scores are times 100, with 95 % intervals.", ""]
    lines += [f"- {cell(note)}" for note in facts.notes]
    for index, model in enumerate(found["models"]):
        for position, target in enumerate(model["targets"]):
            charts = plot_target(target, out, f"t{index}-{position}")
            lines += _target(model["model"], target, charts)
        lines += _repeats(model)
    lines += ["", "## Cost"]
    lines += table(
        ["model", "method", "runs", "s quantizing", "s evaluating", "s a run, median"],
        [
            [cell(row.model), cell(row.method), str(row.runs), f"{row.quantize:.0f}",
             f"{row.evaluate:.0f}", f"{row.median:.1f}"]
            for row in facts.cost
        ],
    )  # fmt: skip
    lines += ["## How this was made", ""]
    lines += [
        f"- {cell(name)}: {cell(value) if plain else f'`{value}`'}"
        for name, value, plain in facts.made
    ]
    path = out / REPORT_NAME
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def _target(model: str, target: Data, charts: Mapping[str, str]) -> list[str]:
    name = f"{model}, {target['name']}" if model else target["name"]
    lines = ["", f"## {cell(name)}", ""]
    if target["full"] is not None:
        lines += [f"Full precision {number(target['full'])}.", ""]
    lines += [f"- **{head}.** {cell(text)}" for head, text in verdict(target)]
    for grid in target["grids"]:
        lines += [f"- Warning, {cell(grid['label'])}: {cell(line)}" for line in grid["warnings"]]
    lines += [""] + [f"![{ALT[kind]}]({name})" for kind, name in charts.items()]
    grids = main_grids(target)
    widths = sorted({row["bits"] for grid in grids for row in grid["dose_response"]})
    rows = []
    for grid in grids:
        known = {(row["factor"], row["bits"]): row for row in grid["dose_response"]}
        for name in dict.fromkeys(row["factor"] for row in grid["dose_response"]):
            changes = (known.get((name, width)) for width in widths)
            rows.append(
                [f"{cell(grid['label'])}, {cell(name)}"]
                + ["" if row is None else number(row["difference"], sign=True) for row in changes]
            )
    if rows:
        lines += ["", "### One component at a time, difference to full precision"]
        lines += table(["", *(f"{width:g} bits" for width in widths)], rows)
    lines += _importance(grids, target["images"]) + _bins(target) + _methods(target, grids)
    return lines


def _repeats(model: Data) -> list[str]:
    lines = []
    for name, note, head, rows in repeat_tables(model):
        lines += ["", f"## {cell(model['model'])}: {name}", "", cell(note)]
        lines += table([*map(cell, head)], [[*map(cell, row)] for row in rows])
    return lines


def _importance(grids: Sequence[Data], images: int) -> list[str]:
    rows = []
    spread = ""
    for grid in grids:
        for part in grid["importance"]:
            head = [cell(grid["label"]), cell(part["range"])]
            if part["kind"] == "refused":
                rows.append([*head, "", "", f"refused: {cell(part['reason'])}", ""])
                continue
            spread = spread_text(part, images)
            shares = ", ".join(
                f"{cell(' x '.join(s['factors']))} {percent(s)}" for s in part["shares"]
            )
            shapley = ", ".join(f"{cell(s['factor'])} {percent(s)}" for s in part["shapley"])
            noise = "" if part["noise"] is None else f"{100 * min(part['noise'], 1.0):.0f} %"
            rows.append([*head, str(part["cells"]), noise, shares, shapley])
    if not rows:
        return []
    lines = ["", "### Importance by range: shares of the variance, percent", "", f"{spread}."]
    return lines + table(["grid", "range", "cells", "noise", "shares", "Shapley"], rows)


def _bins(target: Data) -> list[str]:
    if not target["bins"]:
        return []
    rows = [
        [f"{row['low']:g} to {row['high']:g}", cell(row["grid"]), cell(row["widths"]),
         f"{row['bpw']:.2f}", number(row["score"]), number(row["difference"], sign=True),
         number(row["behind"], sign=True), str(row["runs"])]
        for row in target["bins"]
    ]  # fmt: skip
    lines = ["", f"### Best run by size ({target['size']})"]
    return lines + table(
        ["bits", "grid", "widths", "size", "score", "minus full", "minus best", "of runs"], rows
    )


def _methods(target: Data, grids: Sequence[Data]) -> list[str]:
    coarse = {tuple(grid["factors"]) for grid in grids}
    rows = [
        [f"{cell(row['a'])} - {cell(row['b'])}", f"{row['at_least']:g}", str(row["cells"]),
         number(row, sign=True)]
        for row in target["methods"]
        if tuple(row["factors"]) in coarse
    ]  # fmt: skip
    if not rows:
        return []
    lines = ["", "### Methods at equal widths"]
    return lines + table(["A - B", "from bits", "cells", "mean difference"], rows)
