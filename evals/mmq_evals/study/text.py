# SPDX-License-Identifier: Apache-2.0
"""An analysis as plain text: tables of effects first, then importance by range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmq_evals.study.repeat_tables import repeat_tables

Data = Mapping[str, Any]


def percent(part: Data, digits: int = 1) -> str:
    """A share with its spread: 49.9 [48.0, 51.2]."""
    text = f"{100 * part['value']:.{digits}f}"
    if part["low"] is not None:
        text += f" [{100 * part['low']:.{digits}f}, {100 * part['high']:.{digits}f}]"
    return text


def number(estimate: Data | None, *, sign: bool = False) -> str:
    """A score times 100 with its interval, a dash for none."""
    if estimate is None:
        return "-"
    text = points(estimate["value"], sign=sign)
    if estimate.get("low") is not None:
        ends = ", ".join(points(estimate[end], sign=sign) for end in ("low", "high"))
        text += f" [{ends}]"
    return text


def points(score: float, *, sign: bool = False) -> str:
    """A score times 100 with one decimal; no negative zero."""
    return format(round(100 * score, 1) + 0.0, "+.1f" if sign else ".1f")


def grid_text(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def certain_text(row: Data) -> str:
    """From where the paired interval keeps the goal, too."""
    if row["certain"] is None:
        return "; no run whose paired interval does"
    return f"; with its whole paired interval from {row['certain']:.2f}"


def spread_text(part: Data, images: int) -> str:
    """What the spread behind shares is over."""
    if part["spread"] == "samples":
        return f"spread over {images} resampled images"
    if part["spread"] == "levels":
        return "no scores per sample: spread over cells (resampled levels), not over samples"
    return "no spread"


def format_analysis(found: Data) -> str:
    """All tables of `analyze`'s result. Scores are times 100."""
    table = found["table"]
    lines = [
        f"{table['file']}: {table['runs']} finished runs, {table['failed']} failed; scores times "
        "100 with 95 % intervals"
    ]
    lines += [f"note: {note}" for note in table["notes"]]
    for model in found["models"]:
        for target in model["targets"]:
            head = f"{model['model']}: {target['name']}" if model["model"] else target["name"]
            lines += ["", f"=== {head} ==="]
            if target["full"] is not None:
                lines.append(f"full precision {number(target['full'])}")
            if target["why_no_samples"]:
                lines.append(f"derived figures have no interval: {target['why_no_samples']}")
            for grid in target["grids"]:
                lines += _grid(grid, target)
            lines += _methods(target) + _bins(target)
        lines += _repeats(model)
    return "\n".join(lines)


def _repeats(model: Data) -> list[str]:
    lines = []
    for name, note, head, rows in repeat_tables(model):
        lines += ["", f"=== {model['model']}: {name} ===", note, *grid_text([head, *rows])]
    return lines


def _grid(grid: Data, target: Data) -> list[str]:
    levels = "; ".join(
        f"{name} {', '.join(f'{width:g}' for width in axis)}"
        for name, axis in grid["levels"].items()
    )
    lines = ["", f"{grid['label']}: {grid['cells']} cells ({levels})"]
    lines += [f"warning: {warning}" for warning in grid["warnings"]]
    lines += _dose_response(grid) + _leave_one_full(grid)
    lines += _importance(grid, target["images"])
    if "consensus" in grid:
        lines += _consensus(grid["consensus"])
    lines += _interactions(grid)
    for row in grid["reaching"]:
        if row["bpw"] is None:
            lines.append(f"  {100 * row['goal']:.0f} % of full precision: not reached")
        else:
            lines.append(
                f"  {100 * row['goal']:.0f} % of full precision: {row['bpw']:.2f} bits per weight "
                f"at {row['widths']}, {number(row['score'])}" + certain_text(row)
            )
    return lines


def _pivot(
    rows: Sequence[Data], down: str, across: str, cell: Callable[[Data], str], corner: str
) -> list[str]:
    """Rows as a matrix: one line per value of ``down``, one column per value of ``across``."""
    lines, columns = (list(dict.fromkeys(row[key] for row in rows)) for key in (down, across))
    columns.sort()
    known = {(row[down], row[across]): cell(row) for row in rows}
    table = [[corner, *(f"{column:g}" for column in columns)]]
    table += [
        [str(line), *(known.get((line, column), "-") for column in columns)] for line in lines
    ]
    return grid_text(table)


def _dose_response(grid: Data) -> list[str]:
    rows = grid["dose_response"]
    if not rows:
        return []
    return [
        " one component at a time, difference to full precision by bits",
        *_pivot(rows, "factor", "bits", lambda row: number(row["difference"], sign=True), ""),
    ]


def _leave_one_full(grid: Data) -> list[str]:
    rows = grid["leave_one_full"]
    if not rows:
        return []

    def cell(row: Data) -> str:
        share = "" if row["share"] is None else f" ({100 * row['share']:.0f} %)"
        return number(row["recovered"], sign=True) + share

    return [
        " all at one width but one component at full precision: recovered (share of the loss)",
        *_pivot(rows, "spared", "bits", cell, ""),
    ]


def _importance(grid: Data, images: int) -> list[str]:
    lines = [" importance: shares of the variance of the cells, percent"]
    for part in grid["importance"]:
        if part["kind"] == "refused":
            lines.append(f"  {part['range']}: refused: {part['reason']}")
            continue
        noise = ""
        if part["noise"] is not None:
            noise = f", {100 * min(part['noise'], 1.0):.0f} % of it sampling noise"
        lines.append(
            f"  {part['range']}: {part['cells']} cells, mean {100 * part['mean']:.1f}, deviation "
            f"{100 * part['deviation']:.2f}{noise}; {spread_text(part, images)}"
        )
        if part["fixed"]:
            lines.append(f"    {', '.join(part['fixed'])} untouched: there the grid is complete")
        if part["kind"] == "regression":
            lines.append(f"    regression, R^2 {part['explained']:.3f}: {part['reason']}")
        rows = [[" x ".join(share["factors"]), percent(share)] for share in part["shares"]]
        rows += [[f"Shapley {share['factor']}", percent(share)] for share in part["shapley"]]
        lines += grid_text(rows, "    ")
    return lines


def _consensus(found: Data) -> list[str]:
    head = " consensus of forest attributions (arXiv 2601.15287), percent"
    if "refused" in found:
        return [head, f"  refused: {found['refused']}"]
    folds = found["fold_r2"]
    rows = [["", "impurity", "permutation", "SHAP", "consensus", f"{found['seeds'] + 1} seeds"]]
    rows += [
        [
            row["factor"],
            *(f"{row[key]:.1f}" for key in ("impurity", "permutation", "shap", "consensus")),
            f"{row['lowest']:.1f} to {row['highest']:.1f}",
        ]
        for row in found["factors"]
    ]
    return [
        head,
        *grid_text(rows),
        f"  R^2 {found['r2']:.3f} on {found['test_cells']} test cells, "
        f"{min(folds):.3f} to {max(folds):.3f} over {len(folds)} folds",
    ]


def _interactions(grid: Data) -> list[str]:
    lines = []
    for pair in grid["interactions"]:
        name = " x ".join(pair["factors"])
        if pair["mean"] is None:
            lines.append(f"  {name}: all {pair['near_floor']} cells are near the floor")
            continue
        tested = (
            f", significantly more than the sum in {pair['more_than_sum']}, less in "
            f"{pair['less_than_sum']}"
            if pair["tested"]
            else ", not tested"
        )
        lines.append(
            f"  {name}: {number(pair['mean'], sign=True)} over {len(pair['cells'])} cells{tested}; "
            f"{pair['near_floor']} cells near the floor left out"
        )
    head = " loss of both beyond the sum of each alone (away from the floor, mean over cells)"
    return [head, *lines] if lines else []


def _methods(target: Data) -> list[str]:
    if not target["methods"]:
        return []
    rows = [["A minus B on common cells", "from bits", "cells", "mean difference"]]
    rows += [
        [
            f"{row['a']} - {row['b']}",
            f"{row['at_least']:g}",
            str(row["cells"]),
            number(row, sign=True),
        ]
        for row in target["methods"]
    ]
    return ["", *grid_text(rows, "")]


def _bins(target: Data) -> list[str]:
    if not target["bins"]:
        return []
    rows = [
        [
            f"best per {target['size']}",
            "grid",
            "bits",
            "bpw",
            "score",
            "minus full",
            "minus best",
            "of runs",
        ]
    ]
    rows += [
        [
            f"{row['low']:g} to {row['high']:g}",
            row["grid"],
            row["widths"],
            f"{row['bpw']:.2f}",
            number(row["score"]),
            number(row["difference"], sign=True),
            number(row["behind"], sign=True),
            str(row["runs"]),
        ]
        for row in target["bins"]
    ]
    return ["", *grid_text(rows, "")]
