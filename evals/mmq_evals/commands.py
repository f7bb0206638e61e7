# SPDX-License-Identifier: Apache-2.0
"""Arguments and actions of ``mmq score`` and ``mmq data``; the command line prints the rest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmq_evals.errors import EvalError


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mmq score``."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    captions = kinds.add_parser("captions", help="CIDEr-D, BLEU, ROUGE-L, METEOR, SPICE")
    captions.add_argument("--predictions", required=True, help="JSON: captions by image id")
    captions.add_argument(
        "--references", help="JSON: references by image id, COCO or Karpathy file; default: rows"
    )
    captions.add_argument("--split", default="test", help="of a Karpathy file")
    captions.add_argument("--metrics", help="comma-separated; default: cider,bleu,rouge_l")
    captions.add_argument("--tokenizer", default="py", help="py (default), ptb, simple or none")
    captions.add_argument("--df", default="corpus", help="corpus (default) or table:FILE")
    captions.add_argument(
        "--subset", action="store_true", help="references may hold more images than predicted"
    )
    for kind, source in (("vqa", "--annotations"), ("gqa", "--questions")):
        answers = kinds.add_parser(kind, help=f"{kind.upper()} accuracy under every protocol")
        answers.add_argument("--predictions", required=True, help="JSON: answers by question id")
        answers.add_argument(source, dest="questions", help="the published file; default: rows")
        answers.add_argument("--protocols", help="comma-separated; default: all")
    result = kinds.add_parser("result", help="every task of a folder that mmq eval wrote")
    result.add_argument("folder")
    for parser in kinds.choices.values():
        parser.add_argument("--out", help="write scores, groups and scores per sample as JSON")
        parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def run_score(args: argparse.Namespace) -> str:
    """Score what ``args`` say, write ``--out``, and return the table.

    Raises:
        EvalError: a file or an argument is not as expected.
    """
    from mmq_evals import score

    reports: dict[str, dict[str, Any]]
    if args.kind == "result":
        reports = score.score_result(Path(args.folder), seed=args.seed)
    else:
        reports = {args.kind: _score_files(args)}
    if args.out is not None:
        content = reports if args.kind == "result" else reports[args.kind]
        try:
            Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="ascii")
        except OSError as error:
            raise EvalError(f"out: cannot write {args.out}: {error.strerror}") from None
    return "\n".join(score.format_scores(report) for report in reports.values())


def _score_files(args: argparse.Namespace) -> dict[str, Any]:
    from mmq_evals import score
    from mmq_evals.predictions import read_predictions, read_questions, read_references

    given = Path(args.predictions)
    predictions = read_predictions(given)
    if args.kind == "captions":
        return score.score_captions(
            read_references(Path(args.references or given), args.split),
            predictions,
            metrics=_names(args.metrics) or score.DEFAULT_CAPTION_METRICS,
            tokenizer=args.tokenizer,
            df=args.df,
            subset=args.subset,
            seed=args.seed,
        )
    questions = read_questions(Path(args.questions or given))
    names = _names(args.protocols)
    function = score.score_gqa if args.kind == "gqa" else score.score_vqa
    if names is None:
        return function(questions, predictions, seed=args.seed)
    return function(questions, predictions, protocols=names, seed=args.seed)


def _names(text: str | None) -> Sequence[str] | None:
    return None if text is None else [name for name in text.split(",") if name]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mmq data``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "prepare": "count and hash a local dataset folder; write mmq-data.json and df tables",
        "verify": "compare a folder with the published counts and with mmq-data.json",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=f"{text}. Nothing is fetched.")
        action.add_argument("folder", help="a dataset in its published layout")
        action.add_argument("--dataset", help="default: all that are found in the folder")
        action.add_argument("--split", help="default: the one of published results; all: every")
        action.add_argument("--decode", action="store_true", help="decode every image, too")
        action.add_argument(
            "--partial", action="store_true", help="accept other counts than published"
        )


def run_data(args: argparse.Namespace) -> str:
    """Prepare or verify a dataset folder; returns what it holds.

    Raises:
        EvalError: a piece is missing or differs; every piece on its own, with where it is
            published.
    """
    from mmq_evals.data import check

    root = Path(args.folder)
    reports = check.inspect_folder(
        root,
        dataset=args.dataset,
        split=args.split,
        decode=args.decode,
        partial=args.partial,
    )
    problems = [problem for report in reports for problem in report["problems"]]
    if args.action == "verify":
        problems += check.differences(root, reports)
    if problems:
        raise EvalError(f"data: {len(problems)} problem(s): {'; '.join(problems)}")
    text = check.format_reports(reports)
    return text if args.action == "verify" else f"{text}\nwrote {check.prepare(root, reports)}"
