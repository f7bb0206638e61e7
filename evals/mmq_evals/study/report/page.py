# SPDX-License-Identifier: Apache-2.0
"""The HTML file: head with a strict content policy, style and script inline, sections in order."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from mmq_evals.study.report.browser import Sample
from mmq_evals.study.report.facts import Facts
from mmq_evals.study.report.markup import estimate, table
from mmq_evals.study.report.sections import repeats_section, target_section, verdict_cards
from mmq_evals.study.table import SEED, Grid, Run, has, target_text

Data = Mapping[str, Any]
Samples = Mapping[tuple[str, str], Sequence[Sample]]


def html_page(
    title: str, found: Data, grids: Sequence[Grid], samples: Samples, facts: Facts
) -> str:
    """The whole report. It loads nothing: images are data URIs, the script is named by its hash."""
    style, script = (_asset(name) for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    anchors = {
        (model["model"], target["target"]): f"t{index}-{number}"
        for index, model in enumerate(found["models"])
        for number, target in enumerate(model["targets"])
    }
    # A task that one model alone has needs no model's name.
    shared = len({target for _, target in anchors}) < len(anchors)
    links = "".join(
        f'<a href="#{anchor}">{escape(_short(model, target, shared))}</a>'
        for (model, target), anchor in anchors.items()
    )
    repeats = {
        f"r{index}": (model["model"], section)
        for index, model in enumerate(found["models"])
        if (section := repeats_section(model, f"r{index}"))
    }
    links += "".join(
        f'<a href="#{anchor}">{escape(f"{model} seeds, options".strip())}</a>'
        for anchor, (model, _) in repeats.items()
    )
    sections = "".join(
        target_section(
            model["model"],
            target,
            samples.get((model["model"], target["target"]), ()),
            anchors[model["model"], target["target"]],
        )
        for model in found["models"]
        for target in model["targets"]
    ) + "".join(section for _, section in repeats.values())
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in facts.notes)
    models = ", ".join(model["model"] for model in found["models"] if model["model"])
    lead = f"{found['table']['runs']:,} runs" + (f" of {models}" if models else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>"
        # An empty icon: browsers would ask for one.
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body>'
        f'<header class="top"><h1>{escape(title)}</h1><p class="lead">{escape(lead)}. Scores are '
        "times 100; sizes are stored bits, scales and zeros included, unless a chart says "
        "otherwise.</p></header>"
        f'<nav aria-label="sections"><div><a href="#verdict">Verdict</a>{links}'
        '<a href="#runs">Runs</a><a href="#cost">Cost</a><a href="#how">How</a></div>'
        '<button id="theme" type="button" hidden>light / dark</button></nav><main>'
        f'<h2 id="verdict">Verdict</h2>{notes}{verdict_cards(found, anchors)}{sections}'
        f'<h2 id="runs">Runs</h2>{_runs(found, grids)}'
        f'<h2 id="cost">Cost</h2>{_cost(facts)}</main>'
        f'<footer><h2 id="how">How this was made</h2>{_how(facts)}</footer>'
        f"<script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (files(__package__ or "") / name).read_text(encoding="utf-8")


def _short(model: str, target: str, with_model: bool) -> str:
    name = target_text(target).split(" ")[0]
    if target.startswith("agreement."):
        name += " agreement"
    return f"{model} {name}" if with_model else name


def _runs(found: Data, grids: Sequence[Grid]) -> str:
    """A table of all runs for each model."""
    parts = []
    for model in found["models"]:
        targets = [target["target"] for target in model["targets"]]
        size = next((t["size"] for t in model["targets"] if t["size"]), None)
        rows, seen = [], set()
        for grid in (grid for grid in grids if grid.model == model["model"]):
            again = [(bits, run) for bits, runs in grid.repetitions.items() for run in runs[1:]]
            for bits, run in (*grid.cells.items(), *again):
                if run.id not in seen:
                    seen.add(run.id)
                    rows.append(_run(grid, bits, run, size, targets))
        head = ["method", "widths", "bits per weight", "bytes", "layer error"]
        for target in targets:
            head.append(target_text(target).replace("_", " "))
            if not target.startswith("agreement."):
                head.append("minus full")
        caption = (
            f"widths of {', '.join(next(g.names for g in grids if g.model == model['model']))}"
        )
        inner = table(head, rows, caption=caption, sortable=True, tall=True)
        title = escape(f"{model['model'] or 'all'}: {len(rows)} runs")
        parts.append(f"<details><summary>{title}</summary>{inner}</details>")
    return '<p class="note">Click on a head to sort.</p>' + "".join(parts)


def _run(
    grid: Grid, bits: tuple[float, ...], run: Run, size: str | None, targets: Sequence[str]
) -> list[str]:
    bpw = None if size is None else run.number(size)
    stored, error = run.number("bytes"), run.number("layer_error")
    label = "full precision" if run is grid.full else grid.label
    if run.number(SEED):
        label += f", seed {run.number(SEED):.0f}"
    cells = [
        escape(label),
        escape(grid.widths(bits)),
        "" if bpw is None else f"{bpw:.2f}",
        "" if stored is None else f"{stored:,.0f}",
        "" if error is None else f"{error:.4f}",
    ]
    for target in targets:
        suffix = target.removeprefix("score.")
        agreement = target.startswith("agreement.")
        if not has(run, target):
            cells += [""] if agreement else ["", ""]
            continue
        value = {"value": run.number(target), "low": run.number(f"low.{suffix}")}
        value["high"] = run.number(f"high.{suffix}")
        cells.append(estimate(value))
        if agreement:
            continue
        change = {"value": run.number(f"diff.{suffix}"), "low": run.number(f"diff_low.{suffix}")}
        change["high"] = run.number(f"diff_high.{suffix}")
        cells.append("" if change["value"] is None else estimate(change, sign=True))
    return cells


def _cost(facts: Facts) -> str:
    if not facts.cost:
        return '<p class="note">The table has no times.</p>'
    rows = [
        [
            escape(f"{row.model}, {row.method}" if row.model else row.method),
            f"{row.runs:,}",
            f"{row.quantize:,.0f}",
            f"{row.evaluate:,.0f}",
            f"{row.median:.1f}",
        ]
        for row in facts.cost
    ]
    head = ["model, method", "runs", "s quantizing", "s evaluating", "s a run, median"]
    hours = sum(row.quantize + row.evaluate for row in facts.cost) / 3600
    caption = f"{hours:.1f} hours of one process in all, as the runs were timed."
    return table(head, rows, caption=caption)


def _how(facts: Facts) -> str:
    items = []
    for name, value, plain in facts.made:
        text = escape(value) if plain else f"<code>{escape(value)}</code>"
        items.append(f"<dt>{escape(name)}</dt><dd>{text}</dd>")
    return f"<dl>{''.join(items)}</dl>"
