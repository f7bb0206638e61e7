# SPDX-License-Identifier: Apache-2.0
"""The charts of a report, from the plain data of an analysis. Scores are times 100."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmq_evals.study.report.svg import (
    Panel,
    Point,
    linear,
    logarithmic,
    padded,
    short,
    ticks,
)

Data = Mapping[str, Any]
Series = Mapping[str, int]

SIZE_TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 32)
# Rows of importance whose share is below this everywhere are left to the table.
SHOWN_SHARE = 0.01
# A second chart of the fronts begins at this share of full precision.
ZOOM = 0.9
ROW, STEP = 30.0, 7.0


def main_grids(target: Data) -> list[Data]:
    """The grids of whole components; those of their parts have a heat map of their own."""
    return [grid for grid in target["grids"] if not any("." in name for name in grid["factors"])]


def series_of(target: Data) -> dict[str, int]:
    """Every grid's number, which is its colour and shape: the same in all targets."""
    own = {grid["label"] for grid in target["grids"]}
    return {label: number for number, label in enumerate(target["series"]) if label in own}


def pareto(target: Data, series: Series, *, fronts_only: bool = False) -> list[str]:
    """Score against size: the fronts of all methods, then every method's runs."""
    points = [point for point in target["points"] if point["grid"] in series]
    if not points:
        return []
    whole = [target["points"][index] for index in target["front"]]
    low_x, high_x = min(p["bpw"] for p in points), max(p["bpw"] for p in target["points"])
    full = target["full"]
    shown = [100 * point["score"] for point in points] + ([100 * full["value"]] if full else [])
    low, high = padded(shown)
    size = (low_x * 0.97, high_x * 1.03)
    fronts = {label: front_of([p for p in points if p["grid"] == label]) for label in series}
    drawn = [_fronts_panel("Fronts", target, size, (low, high), fronts, series)]
    if full is not None and low < ZOOM * 100 * full["value"]:
        near = (ZOOM * 100 * full["value"], high)
        title = f"Fronts above {100 * ZOOM:.0f} % of full precision"
        drawn.append(_fronts_panel(title, target, size, near, fronts, series))
    if fronts_only:
        return drawn
    for label, number in series.items():
        panel, at = _pareto_panel(label, target, size, (low, high))
        panel.dots([at(p) for p in points if p["grid"] != label], "other")
        panel.line(_stairs([at(p) for p in whole]), "front")
        panel.dots([at(p) for p in points if p["grid"] == label], f"s{number % 6}")
        for point in fronts[label]:
            panel.mark(at(point), number, _hint(point))
        drawn.append(panel.svg())
    return drawn


def _fronts_panel(
    title: str,
    target: Data,
    size: tuple[float, float],
    score: tuple[float, float],
    fronts: Mapping[str, Sequence[Data]],
    series: Series,
) -> str:
    """The fronts of all methods; what lies below the panel is left out."""
    panel, at = _pareto_panel(title, target, size, score)
    for label, number in series.items():
        inside = [point for point in fronts[label] if 100 * point["score"] >= score[0]]
        panel.line(_stairs([at(point) for point in inside]), f"line s{number % 6}")
        for point in inside:
            panel.mark(at(point), number, _hint(point), 3.0)
    return panel.svg()


def _pareto_panel(
    title: str, target: Data, size: tuple[float, float], score: tuple[float, float]
) -> tuple[Panel, Callable[[Data], Point]]:
    panel = Panel(title, f"{target['name']}: score against size, {title}")
    x, y = logarithmic(*size, *panel.x_span), linear(*score, *panel.y_span)
    panel.y_axis(y, ticks(*score))
    marks = [tick for tick in SIZE_TICKS if size[0] <= tick <= size[1]]
    panel.x_axis([x(tick) for tick in marks], [short(t) for t in marks], _size_name(target))
    full = target["full"]
    if full is not None:
        _full_line(panel, y, full)
    return panel, lambda point: (x(point["bpw"]), y(100 * point["score"]))


def _size_name(target: Data) -> str:
    names = {
        "bpw_model": "stored bits per parameter, whole model",
        "bpw_linears": "stored bits per weight, packed linears",
        "bpw_nominal": "nominal bits per weight",
    }
    return names.get(target["size"], "bits per weight")


def _full_line(panel: Panel, y: Callable[[float], float], full: Data) -> None:
    if full["low"] is not None:
        low, high = (
            min(max(y(100 * full[end]), panel.top), panel.height - panel.bottom)
            for end in ("low", "high")
        )
        panel.band(low, high, "fullband")
    panel.line([(x, y(100 * full["value"])) for x in panel.x_span], "full")


def front_of(points: Sequence[Data]) -> list[Data]:
    """The points that none of the others beats in size and score, by size."""
    kept: list[Data] = []
    for point in sorted(points, key=lambda p: (p["bpw"], -p["score"])):
        if not kept or point["score"] > kept[-1]["score"]:
            kept.append(point)
    return kept


def _stairs(points: Sequence[Point]) -> list[Point]:
    """A front as steps: no size between two of its runs gives more than the smaller one."""
    drawn: list[Point] = []
    for x, y in points:
        if drawn:
            drawn.append((x, drawn[-1][1]))
        drawn.append((x, y))
    return drawn


def _hint(point: Data) -> str:
    return (
        f"{point['grid']} {point['widths']}: {100 * point['score']:.1f} at {point['bpw']:.2f} bits"
    )


def dose_response(target: Data, series: Series) -> list[str]:
    """Score by width of one component, the others untouched: a panel for each component."""
    grids = main_grids(target)
    rows = [(grid, row) for grid in grids for row in grid["dose_response"]]
    full = target["full"]
    if not rows or full is None:
        return []
    shown = [100 * full["value"]]
    for _, row in rows:
        ends = (row["score"]["low"], row["score"]["high"], row["score"]["value"])
        shown += [100 * end for end in ends if end is not None]
    low, high = padded(shown)
    widths = sorted({row["bits"] for _, row in rows})
    panels = []
    for name in dict.fromkeys(row["factor"] for _, row in rows):
        panel = Panel(name, f"{target['name']}: score by bits of {name}, others untouched")
        y = linear(low, high, *panel.y_span)
        place = linear(-0.4, len(widths) - 0.6, *panel.x_span)
        panel.y_axis(y, ticks(low, high))
        panel.x_axis(
            [place(n) for n in range(len(widths))],
            [short(width) for width in widths],
            f"bits of {name}, the rest untouched",
        )
        _full_line(panel, y, full)
        for grid in grids:
            mine = [row for row in grid["dose_response"] if row["factor"] == name]
            number = series[grid["label"]]
            shift = (list(series).index(grid["label"]) - (len(series) - 1) / 2) * 0.09
            drawn = []
            for row in sorted(mine, key=lambda row: row["bits"]):
                score = row["score"]
                x = place(widths.index(row["bits"]) + shift)
                drawn.append((x, y(100 * score["value"])))
                if score["low"] is not None:
                    bottom, top = y(100 * score["low"]), y(100 * score["high"])
                    panel.whisker((x, bottom), (x, top), number)
            panel.line(drawn, f"line s{number % 6}")
            for at, row in zip(drawn, sorted(mine, key=lambda row: row["bits"]), strict=True):
                hint = f"{grid['label']}, {row['bits']:g} bits: {100 * row['score']['value']:.1f}"
                panel.mark(at, number, hint)
        panels.append(panel.svg())
    return panels


def importance(target: Data, series: Series) -> list[str]:
    """Shares of variance: a panel for each range, a row for each component and pair."""
    found: dict[str, list[tuple[str, Data]]] = {}
    for grid in main_grids(target):
        for part in grid["importance"]:
            if part["kind"] != "refused":
                found.setdefault(part["range"], []).append((grid["label"], part))
    names: dict[str, float] = {}
    for members in found.values():
        for _, part in members:
            for share in part["shares"]:
                name = part_name(share["factors"])
                names[name] = max(names.get(name, 0.0), share["value"])
    single = {share for grid in main_grids(target) for share in grid["factors"]}
    shown = [name for name, most in names.items() if most >= SHOWN_SHARE or name in single]
    return [_importance_panel(target, name, part, shown, series) for name, part in found.items()]


def part_name(factors: Sequence[str]) -> str:
    """The label of a set of factors, short enough to stand beside a chart."""
    if len(factors) > 2:
        return f"{len(factors)} together" if len(factors) > 3 else "three together"
    return " \N{MULTIPLICATION SIGN} ".join(factors)


def _importance_panel(
    target: Data,
    name: str,
    members: Sequence[tuple[str, Data]],
    shown: Sequence[str],
    series: Series,
) -> str:
    rows: dict[str, list[tuple[int, Data, str]]] = {row: [] for row in shown}
    for label, part in members:
        for share in part["shares"]:
            row = part_name(share["factors"])
            if row in rows:
                hint = f"{label}, {row}: {100 * share['value']:.1f} %"
                rows[row].append((series[label], share, hint))
    title = {"all": "all widths", "common levels": "widths that all have"}.get(name, f"{name} bits")
    title = title.replace(">=3 bits", "3 bits and more").replace(">=4 bits", "4 bits and more")
    panel = Panel(title, f"{target['name']}: shares of variance, {title}")
    return _rows_panel(panel, rows, (0.0, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0], "share of variance, %")


def interactions(target: Data, series: Series) -> list[str]:
    """Loss of two components together beyond the sum of each alone, by pair and method."""
    rows: dict[str, list[tuple[int, Data, str]]] = {}
    for grid in main_grids(target):
        for pair in grid["interactions"]:
            if pair["mean"] is not None:
                name = part_name(pair["factors"])
                hint = f"{grid['label']}, {name}: {100 * pair['mean']['value']:+.2f}"
                rows.setdefault(name, []).append((series[grid["label"]], pair["mean"], hint))
    if not rows:
        return []
    values = [0.0]
    for members in rows.values():
        for _, mean, _ in members:
            values += [v for v in (mean["value"], mean["low"], mean["high"]) if v is not None]
    span = padded([*values, -0.001, 0.001])
    panel = Panel("Loss of both beyond the sum", f"{target['name']}: interactions of pairs")
    marks = [tick / 100 for tick in ticks(100 * span[0], 100 * span[1], 4)]
    return [_rows_panel(panel, rows, span, marks, "points (right of 0: more than the sum)")]


def _rows_panel(
    panel: Panel,
    rows: Mapping[str, Sequence[tuple[int, Data, str]]],
    span: tuple[float, float],
    marks: Sequence[float],
    name: str,
) -> str:
    """Named rows of estimates with whiskers, the series below each other within a row."""
    panel.left = 12.0 + 6.2 * min(max(map(len, rows)), 20)
    most = max((len(members) for members in rows.values()), default=1)
    height = max(ROW, STEP * most + 12)
    panel.height = panel.top + panel.bottom + height * len(rows)
    x = linear(*span, *panel.x_span)
    panel.x_axis([x(mark) for mark in marks], [short(100 * m) for m in marks], name, grid=True)
    if span[0] < 0.0 < span[1]:
        panel.line([(x(0.0), end) for end in panel.y_span], "zero")
    for index, (row, members) in enumerate(rows.items()):
        middle = panel.top + height * (index + 0.5)
        panel.text((panel.left - 8, middle + 3.5), row, "row", "end")
        if index:
            panel.line([(10, middle - height / 2), (panel.width - 12, middle - height / 2)], "grid")
        for position, (number, value, hint) in enumerate(members):
            y = middle + (position - (len(members) - 1) / 2) * STEP
            if value["low"] is not None:
                panel.whisker(
                    (x(max(value["low"], span[0])), y), (x(min(value["high"], span[1])), y), number
                )
            panel.mark((x(value["value"]), y), number, hint, 3.2)
    return panel.svg()
