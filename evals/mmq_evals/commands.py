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
