# SPDX-License-Identifier: Apache-2.0
"""The sections of the HTML report, from the plain data of an analysis. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmq_evals.study.repeat_tables import repeat_tables
from mmq_evals.study.report import charts
from mmq_evals.study.report.browser import Sample
from mmq_evals.study.report.cards import sample_browser
from mmq_evals.study.report.heat import heat_of_components, heat_of_parts
from mmq_evals.study.report.markup import MINUS, TIMES, estimate, signed, table
from mmq_evals.study.report.svg import Panel
from mmq_evals.study.report.verdict import verdict
from mmq_evals.study.text import percent, spread_text

Data = Mapping[str, Any]

# Best runs are tabled up to this size.
MAX_BIN = 8.0
# Of a smaller loss (share of full precision) the recovered share is mostly noise.
CLEAR_LOSS = 0.02


def legend(series: charts.Series) -> str:
    """The marks of the series by name."""
    items = []
    for label, index in series.items():
        panel = Panel("", label, width=14, height=14)
        panel.mark((7.0, 7.0), index, size=4.6)
        mark = f'<svg viewBox="0 0 14 14" aria-hidden="true">{panel.parts[0]}</svg>'
        items.append(f"<li>{mark}{escape(label)}")
    return f'<ul class="legend">{"".join(items)}</ul>'


def verdict_cards(found: Data, anchors: Mapping[tuple[str, str], str]) -> str:
    """One card a target."""
    cards = []
    for model in found["models"]:
        for target in model["targets"]:
            anchor = anchors[model["model"], target["target"]]
            title = title_of(model["model"], target)
            said = "".join(
                f"<dt>{escape(head)}</dt><dd>{signed(text)}</dd>" for head, text in verdict(target)
            )
            cards.append(
                f'<div class="card"><h3><a href="#{anchor}">{escape(title)}</a></h3>'
                f"<dl>{said}</dl></div>"
            )
    return f'<div class="cards verdicts">{"".join(cards)}</div>'


def title_of(model: str, target: Data) -> str:
    """Model and task; the metric stands in the line below."""
    task = target["name"].split(" ")[0] + (" agreement" if is_agreement(target) else "")
    return f"{model} \N{MIDDLE DOT} {task}" if model else task


def is_agreement(target: Data) -> bool:
    """Whether a target compares answers with those of full precision instead of judging them."""
    return bool(target["target"].startswith("agreement."))


def target_section(model: str, target: Data, samples: Sequence[Sample], anchor: str) -> str:
    """Everything about one target of one model."""
    series = charts.series_of(target)
    title = title_of(model, target)
    full = target["full"]
    metric = (target["name"].partition(" ")[2] or target["name"]).replace("_", " ")
    brief = is_agreement(target)
    basis = (
        f"Intervals are 95 %, over {target['images']} resampled images, the same for all runs: "
        "differences are paired."
        if target["images"]
        else f"Derived figures have no interval: {target['why_no_samples']}."
    )
    parts = [f'<h2 id="{anchor}">{escape(title)}</h2>']
    if brief:
        parts.append(
            f'<p class="lead">{escape(metric)}: how far a run answers, or ranks, as full precision '
            f"does, right or wrong; 100 is full agreement. {escape(basis)}</p>"
        )
    elif full is not None:
        whole = f"full precision {estimate(full)}"
        parts.append(f'<p class="lead">{escape(metric)}: {whole}. {escape(basis)}</p>')
    else:
        parts.append(f'<p class="lead">{escape(metric)}. {escape(basis)}</p>')
    warnings = dict.fromkeys(
        f"{grid['label']}: {warning}" for grid in target["grids"] for warning in grid["warnings"]
    )
    parts += [f'<p class="warn">{escape(warning)}</p>' for warning in warnings]
    blocks = (
        (
            "Score against size",
            "Points are runs; the line joins those that no smaller run beats, dashes are full "
            "precision. The best of many runs is the luckiest, too: read fronts with the intervals "
            "of the table below.",
            _charts(charts.pareto(target, series, fronts_only=brief), series)
            + ("" if brief else _bins(target)),
        ),
        (
            "One component at a time",
            "The component on top of each chart has the width below it, all others are untouched.",
            _charts(charts.dose_response(target, series), series) + heat_of_components(target),
        ),
        (
            "Thirds and layer types",
            "Difference to full precision where only a part of a component is quantized.",
            heat_of_parts(target),
        ),
        (
            "All at one width, one component spared",
            "What giving one component back to full precision recovers, and its share of the loss.",
            "" if brief else _spared(target),
        ),
        (
            "Importance by range of widths",
            _spread_note(target),
            _charts(charts.importance(target, series), series) + _importance(target),
        ),
        (
            "Interactions",
            "Loss of two components together beyond the sum of each alone, averaged over the "
            "cells in which all three scores exceed half of full precision.",
            _charts(charts.interactions(target, series), series) + _interactions(target),
        ),
        (
            "Methods at equal widths",
            "Mean difference of scores over the cells that both methods have.",
            _methods(target),
        ),
        ("Samples", _SAMPLES_NOTE, sample_browser(samples)),
    )
    for heading, text, content in blocks:
        if content:
            note = f'<p class="note">{escape(text)}</p>' if text else ""
            parts.append(f"<h3>{heading}</h3>{note}{content}")
    return "<section>" + "".join(parts) + "</section>"


_SAMPLES_NOTE = (
    "Those whose answers changed most come first: a selection of what went wrong, not a sample of "
    "what is typical. Below every answer stand the runs that gave it, beside it its score times "
    "100; answers unlike that of full precision are coloured."
)


def _charts(panels: Sequence[str], series: charts.Series) -> str:
    if not panels:
        return ""
    return legend(series) + f'<div class="charts">{"".join(panels)}</div>'


def _bins(target: Data) -> str:
    """Equal sizes: a row for each bin, the best run of every grid in it."""
    shown = [row for row in target["bins"] if row["low"] < MAX_BIN]
    if not shown:
        return ""
    labels = [label for label in charts.series_of(target) if any(r["grid"] == label for r in shown)]
    bins: dict[float, dict[str, Data]] = {}
    for row in shown:
        bins.setdefault(row["low"], {})[row["grid"]] = row
    rows = []
    for low, members in bins.items():
        cells = [f"{low:g} to {low + 0.5:g}"]
        for label in labels:
            member = members.get(label)
            if member is None:
                cells.append("")
                continue
            behind = member["behind"]
            marked = " class=best" if behind is None else ""
            if behind is not None and behind["high"] is not None and behind["high"] >= 0.0:
                marked = " class=tie"
            cells.append(
                f"<td{marked}>{estimate(member['score'])}<br><small>"
                f"{escape(member['widths'])} at {member['bpw']:.2f}</small>"
            )
        rows.append(cells)
    caption = (
        f"The best run of every method by bits per weight, up to {MAX_BIN:g}, with its widths "
        f"({', '.join(target['grids'][0]['factors'])}) and size. The best of a row is marked, and "
        "lightly those that a paired interval does not tell from it; within a row larger runs have "
        "an advantage."
    )
    return table(["bits", *labels], rows, caption=caption)


def _spared(target: Data) -> str:
    """Rows whose loss is clear: what each component gives back."""
    grids = [grid for grid in charts.main_grids(target) if grid["leave_one_full"]]
    if not grids or target["full"] is None:
        return ""
    names = list(dict.fromkeys(row["spared"] for grid in grids for row in grid["leave_one_full"]))
    enough = (1.0 - CLEAR_LOSS) * target["full"]["value"]
    rows = []
    for grid in grids:
        by_width: dict[float, dict[str, Data]] = {}
        for row in grid["leave_one_full"]:
            if row["together"]["value"] < enough:
                by_width.setdefault(row["bits"], {})[row["spared"]] = row
        for width, members in by_width.items():
            first = next(iter(members.values()))
            cells = [f"{escape(grid['label'])}, {width:g} bits", estimate(first["together"])]
            for name in names:
                member = members.get(name)
                if member is None:
                    cells.append("")
                    continue
                gain = estimate(member["recovered"], sign=True)
                if member["share"] is not None:
                    share = signed(f"{100 * member['share']:.0f} % of the loss")
                    gain += f"<br><small>{share}</small>"
                cells.append(gain)
            rows.append(cells)
    caption = f"Rows that lose more than {100 * CLEAR_LOSS:.0f} % of full precision."
    head = ["all at", "score", *(f"{name} spared" for name in names)]
    return table(head, rows, caption=caption) if rows else ""


def _spread_note(target: Data) -> str:
    parts = [p for g in target["grids"] for p in g["importance"] if p["kind"] == "exact"]
    note = (
        "Exact functional ANOVA of the complete grid: shares of the variance of its cells, which "
        "sum to 100. They belong to the range of widths above each chart"
    )
    if not parts:
        return note + "."
    return f"{note}; {spread_text(parts[0], target['images'])}."


def _importance(target: Data) -> str:
    rows = []
    for grid in charts.main_grids(target):
        for part in grid["importance"]:
            head = f"{escape(grid['label'])}, {escape(part['range'])}"
            if part["kind"] == "refused":
                rows.append([head, f"<td class=l colspan=6>refused: {signed(part['reason'])}"])
                continue
            shares = ", ".join(
                f"{f' {TIMES} '.join(share['factors'])} {percent(share)}"
                for share in part["shares"]
                if len(share["factors"]) == 1 or share["value"] >= charts.SHOWN_SHARE
            )
            shapley = ", ".join(f"{s['factor']} {100 * s['value']:.1f}" for s in part["shapley"])
            noise = "" if part["noise"] is None else f"{100 * min(part['noise'], 1.0):.0f} %"
            kind = (
                part["kind"] if part["kind"] == "exact" else f"fit, R\xb2 {part['explained']:.2f}"
            )
            if part["fixed"]:
                kind += f"; {', '.join(part['fixed'])} untouched"
            rows.append(
                [
                    head,
                    f"{part['cells']}",
                    f"{100 * part['deviation']:.1f}",
                    noise,
                    f"<td class=l>{signed(shares)}",
                    f"<td class=l>{signed(shapley)}",
                    f"<td class=l>{escape(kind)}",
                ]
            )
    if not rows:
        return ""
    heads = ["grid, range", "cells", "deviation", "noise", "shares, %", "Shapley, %", "how"]
    inner = table(heads, rows)
    # Where nothing could be drawn the table is all there is.
    drawn = any(part["kind"] != "refused" for g in target["grids"] for part in g["importance"])
    return f"<details{'' if drawn else ' open'}><summary>All shares</summary>{inner}</details>"


def _interactions(target: Data) -> str:
    rows: list[list[str]] = []
    for grid in charts.main_grids(target):
        for pair in grid["interactions"]:
            name = escape(f"{grid['label']}, {f' {TIMES} '.join(pair['factors'])}")
            tested = (
                f"{pair['more_than_sum']} more, {pair['less_than_sum']} less"
                if pair["tested"]
                else "not tested"
            )
            mean = estimate(pair["mean"], sign=True) if pair["mean"] else "\N{EN DASH}"
            rows.append([name, mean, str(len(pair["cells"])), tested, str(pair["near_floor"])])
    if not rows:
        return ""
    head = ["pair", "mean excess", "cells", "significant after Holm", "near the floor, left out"]
    return f"<details><summary>All pairs</summary>{table(head, rows)}</details>"


def _methods(target: Data) -> str:
    """Pairs of methods by the smallest width that counts."""
    coarse = {tuple(grid["factors"]) for grid in charts.main_grids(target)}
    known: dict[tuple[str, str], dict[float, Data]] = {}
    for row in target["methods"]:
        if tuple(row["factors"]) in coarse:
            known.setdefault((row["a"], row["b"]), {}).setdefault(row["at_least"], row)
    if not known:
        return ""
    spans = sorted({span for by_span in known.values() for span in by_span})
    rows = []
    for (a, b), by_span in known.items():
        cells = [f"{escape(a)} {MINUS} {escape(b)}"]
        for span in spans:
            found = by_span.get(span)
            cells.append(
                ""
                if found is None
                else f"{estimate(found, sign=True)}<br><small>{found['cells']} cells</small>"
            )
        rows.append(cells)
    heads = ["all widths" if span == 0 else f"{span:g} bits and more" for span in spans]
    return table(["", *heads], rows)


def repeats_section(model: Data, anchor: str) -> str:
    """Calibration seeds and options of one model, empty where the table has neither."""
    parts = []
    for name, note, head, rows in repeat_tables(model):
        heading = "Options of the methods" if name == "options" else name.capitalize()
        cells = [[_said_cell(text) for text in row] for row in rows]
        parts.append(f"<h3>{heading}</h3>{table(head, cells, caption=note)}")
    if not parts:
        return ""
    title = escape(f"{model['model']} \N{MIDDLE DOT} seeds and options".strip(" \N{MIDDLE DOT}"))
    return f'<section><h2 id="{anchor}">{title}</h2>{"".join(parts)}</section>'


def _said_cell(text: str) -> str:
    """A cell with what follows its number in small print; significant ones stand out."""
    head, space, rest = text.partition(" ")
    if not space or not head.lstrip("+-").replace(".", "").isdigit():
        return signed(text) if space or not head[:1].isalpha() else f"<td class=l>{escape(text)}"
    marked = "<td class=best>" if "]*" in rest else "<td>"
    return f"{marked}{signed(head)} <small>{signed(rest)}</small>"
