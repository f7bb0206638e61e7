# SPDX-License-Identifier: Apache-2.0
"""The charts of the Markdown report as PNG files. Needs matplotlib (`mmq[study]`)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError
from mmq_evals.study.report.charts import SHOWN_SHARE, front_of, main_grids, series_of

Data = Mapping[str, Any]

# Colours that colour-blind readers tell apart (Okabe and Ito), and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A8518A", "#B07F00", "#3D7EA6")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 110


def check_installed() -> None:
    """Raises EvalError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise EvalError("report: Markdown needs matplotlib for its charts: mmq[study]")


def _axes(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#ecedea", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def plot_target(target: Data, folder: Path, stem: str) -> dict[str, str]:
    """Writes the charts of a target; file names by kind, those that the target has."""
    written = {}
    for kind, plot in (("size", _size), ("dose", _dose), ("importance", _importance)):
        figure = plot(target)
        if figure is not None:
            name = f"{stem}-{kind}.png"
            figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
            written[kind] = name
    return written


def _size(target: Data) -> Any:
    series = series_of(target)
    if not target["points"]:
        return None
    figure, (axis,) = _axes(7.2, 3.8)
    for label, number in series.items():
        points = [point for point in target["points"] if point["grid"] == label]
        best = front_of(points)
        colour, marker = COLOURS[number % 6], MARKERS[number % 6]
        axis.scatter(
            [p["bpw"] for p in points],
            [100 * p["score"] for p in points],
            s=7,
            color=colour,
            alpha=0.35,
            linewidths=0,
        )
        axis.step(
            [p["bpw"] for p in best],
            [100 * p["score"] for p in best],
            where="post",
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            label=label,
        )
    if target["full"] is not None:
        axis.axhline(100 * target["full"]["value"], color="#1b1f24", linestyle="--", linewidth=0.9)
    axis.set_xscale("log", base=2)
    sizes = [point["bpw"] for point in target["points"]]
    shown = [tick for tick in (2, 3, 4, 5, 6, 8, 12, 16) if min(sizes) <= tick <= max(sizes)]
    axis.set_xticks(shown, [str(tick) for tick in shown])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(f"bits per weight ({target['size']})", fontsize=8)
    axis.set_ylabel(target["name"], fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _dose(target: Data) -> Any:
    series, grids = series_of(target), main_grids(target)
    names = dict.fromkeys(row["factor"] for grid in grids for row in grid["dose_response"])
    if not names:
        return None
    widths = sorted({row["bits"] for grid in grids for row in grid["dose_response"]})
    figure, axes = _axes(2.9 * len(names), 2.8, len(names))
    for axis, name in zip(axes, names, strict=True):
        for grid in grids:
            rows = [row for row in grid["dose_response"] if row["factor"] == name]
            rows.sort(key=lambda row: row["bits"])
            if not rows:
                continue
            number = series[grid["label"]]
            shift = (list(series).index(grid["label"]) - (len(series) - 1) / 2) * 0.09
            values = [100 * row["score"]["value"] for row in rows]
            errors = None
            if all(row["score"]["low"] is not None for row in rows):
                errors = [
                    [abs(100 * row["score"][end] - v) for row, v in zip(rows, values, strict=True)]
                    for end in ("low", "high")
                ]
            axis.errorbar(
                [widths.index(row["bits"]) + shift for row in rows],
                values,
                yerr=errors,
                color=COLOURS[number % 6],
                marker=MARKERS[number % 6],
                markersize=3.5,
                linewidth=1.1,
                elinewidth=0.8,
                label=grid["label"],
            )
        if target["full"] is not None:
            axis.axhline(100 * target["full"]["value"], color="#1b1f24", ls="--", linewidth=0.9)
        axis.set_xticks(range(len(widths)), [f"{width:g}" for width in widths])
        axis.set_xlabel(f"bits of {name}, the rest untouched", fontsize=8)
    axes[0].set_ylabel(target["name"], fontsize=8)
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def _importance(target: Data) -> Any:
    series = series_of(target)
    found: dict[str, list[tuple[str, Data]]] = {}
    for grid in main_grids(target):
        for part in grid["importance"]:
            if part["kind"] != "refused":
                found.setdefault(part["range"], []).append((grid["label"], part))
    if not found:
        return None
    shares = [s for members in found.values() for _, part in members for s in part["shares"]]
    rows = list(
        dict.fromkeys(
            " x ".join(s["factors"])
            for s in shares
            if len(s["factors"]) == 1 or s["value"] >= SHOWN_SHARE
        )
    )
    rows.sort(key=lambda row: row.count(" x "))
    figure, axes = _axes(2.9 * len(found) + 1.0, 0.9 + 0.42 * len(rows), len(found))
    for axis, (name, members) in zip(axes, found.items(), strict=True):
        for label, part in members:
            number = series[label]
            known = {" x ".join(s["factors"]): s for s in part["shares"]}
            shown = [(at, known[row]) for at, row in enumerate(rows) if row in known]
            offset = (list(series).index(label) - (len(series) - 1) / 2) * 0.16
            axis.hlines(
                [at + offset for at, s in shown if s["low"] is not None],
                [100 * s["low"] for _, s in shown if s["low"] is not None],
                [100 * s["high"] for _, s in shown if s["low"] is not None],
                color=COLOURS[number % 6],
                linewidth=1.0,
            )
            axis.plot(
                [100 * s["value"] for _, s in shown],
                [at + offset for at, _ in shown],
                linestyle="none",
                color=COLOURS[number % 6],
                marker=MARKERS[number % 6],
                markersize=4,
                label=label,
            )
        axis.set_xlim(-3, 103)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))
        axis.set_title(name if name.startswith(("all", "common")) else f"{name} bits", fontsize=9)
        axis.set_xlabel("share of variance, %", fontsize=8)
    axes[-1].legend(fontsize=8, frameon=False, loc="best")
    return figure
