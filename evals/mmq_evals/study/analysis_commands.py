# SPDX-License-Identifier: Apache-2.0
"""Arguments and actions of ``mmq analyze`` and ``mmq report``; the command line prints."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError


def add_analyze_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mmq analyze``."""
    parser.add_argument("results", help="a table (.jsonl, .csv, .tsv, .parquet) or its folder")
    add_table_arguments(parser)
    parser.add_argument(
        "--consensus",
        action="store_true",
        help="the forest consensus of arXiv 2601.15287, too (needs mmq[study])",
    )
    parser.add_argument("--out", help="write everything as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mmq report``."""
    from mmq_evals.study.report.build import FORMATS, TITLE

    parser.add_argument("results", help="a table (.jsonl, .csv, .tsv, .parquet) or its folder")
    parser.add_argument("--out", help="default: report.html beside the table; a folder of Markdown")
    parser.add_argument("--format", choices=FORMATS, default="html")
    parser.add_argument("--title", default=TITLE)
    parser.add_argument(
        "--data", default="tiny", help="images of samples: tiny, a dataset folder, or none"
    )
    parser.add_argument("--commit", help="of the code that made the runs; default: this one's")
    add_table_arguments(parser)


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how a table is to be read and divided."""
    parser.add_argument("--bits", metavar="A,B", help="columns of widths; default: found by name")
    parser.add_argument("--scores", metavar="X,Y", help="columns to judge by; default: by name")
    parser.add_argument(
        "--by", metavar="A,B", help="further columns that tell runs of equal widths apart"
    )
    parser.add_argument(
        "--range",
        action="append",
        metavar="RANGE",
        help="widths of importance: all, >=3, 3-8, or of one component language>=3; may be "
        "repeated; default: all, >=3, >=4",
    )
    parser.add_argument(
        "--incomplete",
        choices=("refuse", "regress"),
        default="refuse",
        help="of grids with missing cells: no shares (default), or those of a least-squares fit",
    )
    parser.add_argument(
        "--level-weights", metavar="2:0,3:1", help="of widths in importance; default: equal"
    )
    parser.add_argument(
        "--preset", help="sizes from a published model's widths, for tables that have none"
    )
    parser.add_argument("--resamples", type=int, default=1_000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def table_options(args: argparse.Namespace) -> Any:
    """The `Options` of parsed arguments.

    Raises:
        EvalError: a range or a weight is not in form.
    """
    from mmq_evals.study.analyze import Options
    from mmq_evals.study.importance import DEFAULT_RANGES, Range
    from mmq_evals.study.table import GROUPING

    if args.resamples < 1:
        raise EvalError(f"resamples: expected at least 1, got {args.resamples}")
    further = tuple(args.by.split(",")) if args.by else ()
    return Options(
        bits=args.bits.split(",") if args.bits else None,
        scores=args.scores.split(",") if args.scores else None,
        by=(*GROUPING, *(name for name in further if name not in GROUPING)),
        ranges=[Range.parse(text) for text in args.range] if args.range else DEFAULT_RANGES,
        incomplete=args.incomplete,
        weights=_level_weights(args.level_weights),
        with_consensus=getattr(args, "consensus", False),
        preset=args.preset,
        resamples=args.resamples,
        seed=args.seed,
    )


def _level_weights(text: str | None) -> dict[float, float] | None:
    if text is None:
        return None
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {float(width): float(weight) for width, weight in pairs}
    except ValueError:
        raise EvalError(f"level weights: expected 2:0,3:1 or the like, got {text!r}") from None


def run_analyze(args: argparse.Namespace) -> str:
    """Analyze what ``args`` say, write ``--out``, and return the text.

    Raises:
        EvalError: the table, a column or an option is not as expected.
    """
    from mmq_evals.study.analyze import analyze
    from mmq_evals.study.text import format_analysis

    options = table_options(args)
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise EvalError(f"out: expected an existing parent folder, got {args.out}")
    found = analyze(Path(args.results), options)
    content = json.dumps(found, indent=1)
    if args.out is not None:
        Path(args.out).write_text(content + "\n", encoding="ascii")
    return content if args.json else format_analysis(found)


def run_report(args: argparse.Namespace) -> str:
    """Write the report that ``args`` ask for; returns a line that names it.

    Raises:
        EvalError: as `run_analyze`, or a place that cannot be written.
    """
    from mmq_evals.study.readers import find_file
    from mmq_evals.study.report.build import write_report

    table = find_file(Path(args.results))
    default = table.parent / ("report.html" if args.format == "html" else "report")
    written = write_report(
        table,
        Path(args.out) if args.out is not None else default,
        table_options(args),
        kind=args.format,
        title=args.title,
        data={"tiny": "tiny", "none": None}.get(args.data, Path(args.data)),
        command=shlex.join(["mmq", *args.arguments]),
        commit=args.commit,
    )
    return f"wrote {written} ({written.stat().st_size:,} bytes)"
