# SPDX-License-Identifier: Apache-2.0
"""`mmq report`: from a table of results to a file that can be shown to anyone."""

from __future__ import annotations

import os
from pathlib import Path

from mmq_evals.errors import EvalError
from mmq_evals.study.analyze import Options, analyze_table, main_part, read
from mmq_evals.study.report.browser import samples_of
from mmq_evals.study.report.facts import facts_of
from mmq_evals.study.report.page import html_page
from mmq_evals.study.report.sections import is_agreement
from mmq_evals.study.table import grids

FORMATS = ("html", "markdown")
TITLE = "What quantization did"


def write_report(
    results: Path,
    out: Path,
    options: Options,
    *,
    kind: str = "html",
    title: str = TITLE,
    data: str | Path | None = "tiny",
    command: str = "",
    commit: str | None = None,
) -> Path:
    """Analyze a table and write its report.

    Args:
        results: a table or its folder.
        out: the HTML file, or the folder of ``report.md`` and its PNG charts.
        kind: "html", or "markdown" (its charts need matplotlib, which is in mmq[study]).
        data: where the samples' images come from: "tiny", a dataset folder, or None for none.
        command: as it was typed; it stands in the report.
        commit: of the code that made the runs, see `facts_of`.

    Returns:
        The file that was written.

    Raises:
        EvalError: an unknown kind, a place that cannot be written, or as `analyze`.
    """
    if kind not in FORMATS:
        raise EvalError(f"format: expected one of {', '.join(FORMATS)}, got {kind!r}")
    if kind == "markdown":
        from mmq_evals.study.report.plots import check_installed

        check_installed()
    if not out.absolute().parent.is_dir() or (kind == "html" and out.is_dir()):
        raise EvalError(f"out: expected a new file in a folder that exists, got {out}")
    table = read(results, options)
    found = analyze_table(table, options)
    members = grids(table, options.by)
    facts = facts_of(table, found, command, commit)
    if kind == "markdown":
        from mmq_evals.study.report.markdown import write_markdown

        return write_markdown(out, title, found, facts)
    samples = {
        (model["model"], target["target"]): samples_of(
            table.path.parent,
            [grid for grid in main_part(members) if grid.model == model["model"]],
            target["target"],
            data=data,
        )
        for model in found["models"]
        for target in model["targets"]
        if not is_agreement(target)
    }
    part = out.with_name(out.name + ".part")
    part.write_text(html_page(title, found, members, samples, facts), encoding="utf-8")
    os.replace(part, out)
    return out
