# SPDX-License-Identifier: Apache-2.0
"""The command line: the roof of the house, the one module that may import everything.

Exit codes: 0 done, 1 a sweep with failed runs, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mmq.quantize import Progress
    from mmq.recipe import Recipe

METHODS = ("uniform", "rtn", "gptq", "awq")


def _model_folder(name: str) -> Path:
    """The folder of a model: a path, or the name of a built-in tiny model.

    Raises MmqError if it is neither.
    """
    from mmq.errors import MmqError
    from mmq_evals import tiny

    if name in tiny.MODELS:
        return tiny.path(name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise MmqError(
            f"model: expected a folder with a config.json or one of {', '.join(tiny.MODELS)}, "
            f"got {name!r}"
        )
    return folder


def _load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    import torch

    from mmq.checkpoint import load, load_processor
    from mmq.errors import MmqError

    folder = _model_folder(args.model)
    processor = load_processor(folder)
    if processor is None:
        raise MmqError(f"{folder}: expected a processor beside the model, got none")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return load(folder, dtype, device=args.device), processor


def _inspect(args: argparse.Namespace) -> None:
    from mmq.inspect import format_inspection, inspect_model
    from mmq.presets import PRESETS

    target = args.model if args.model in PRESETS else _model_folder(args.model)
    inspection = inspect_model(target)
    print(json.dumps(inspection, indent=2) if args.json else format_inspection(inspection))


def progress_printer(stream: Any = sys.stderr) -> Progress:
    """Prints one line per finished linear: component, block, path, error, time left."""

    def show(event: Any) -> None:
        error = "" if event.error is None else f" error {event.error:.3e}"
        print(
            f"[{event.done}/{event.total}] {event.path} {event.method} {event.bits} bit{error}"
            f" elapsed {event.elapsed:.0f} s, left {event.eta:.0f} s",
            file=stream,
        )

    return show


def _recipe(args: argparse.Namespace) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that was asked for in one of three ways, and the notes of an import."""
    from mmq.errors import MmqError
    from mmq.formats.study import load_study_config
    from mmq.recipe import Recipe, load_recipe

    simple = args.method is not None or args.bits is not None
    if sum((args.recipe is not None, args.study_config is not None, simple)) != 1:
        raise MmqError("recipe: expected one of --recipe, --study-config, or --method with --bits")
    if args.recipe is not None:
        return load_recipe(args.recipe), ()
    if args.study_config is not None:
        imported = load_study_config(args.study_config, args.semantics)
        return imported.recipe, imported.notes
    if args.method is None or args.bits is None:
        raise MmqError("recipe: expected --method and --bits together, got one of them")
    return Recipe.simple(args.method, args.bits, group_size=args.group_size), ()


def _quantize(args: argparse.Namespace) -> None:
    import mmq
    from mmq.errors import MmqError
    from mmq.plan import plan
    from mmq_evals.calibration import calibration_samples

    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise MmqError(f"out: expected a new folder (or --overwrite), got {out}")
    if not out.absolute().parent.is_dir():
        raise MmqError(f"out: expected an existing parent folder, got {out}")
    recipe, notes = _recipe(args)
    model, processor = _load(args)
    plan(recipe, model)  # Refuses a recipe that does not fit before any image is read.
    samples = calibration_samples(
        model, processor, data=_data(args), count=recipe.calibration.samples, seed=recipe.seed
    )
    manifest = mmq.quantize(
        model,
        recipe,
        [sample.inputs for sample in samples],
        sample_ids=[sample.id for sample in samples],
        progress=None if args.quiet else progress_printer(),
    )
    manifest = dataclasses.replace(manifest, notes=[*manifest.notes, *notes])
    mmq.save(model, out, processor=processor, manifest=manifest, overwrite=args.overwrite)
    print(manifest.summary())
    print(f"saved to {out}")


def _allocate(args: argparse.Namespace) -> None:
    from mmq_evals.allocation import run_allocate

    print(run_allocate(args, *_load(args), _data(args)))


def _data(args: argparse.Namespace) -> Any:
    return "tiny" if args.data == "tiny" else Path(args.data)


def _eval(args: argparse.Namespace) -> None:
    from mmq_evals.rows import Shard, forget_rows
    from mmq_evals.run import evaluate, format_result, predict_shard
    from mmq_evals.workers import progress_lines, run_workers, shard_of_environment

    shard = shard_of_environment() if args.shard is None else Shard.parse(args.shard)
    if args.overwrite and shard is None:
        forget_rows(Path(args.out))
    if args.workers != 1 and shard is None:
        # Of an option that is given twice the later counts.
        run_workers([*args.arguments, "--workers", "1"], args.workers)
    if shard is not None and args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    model, processor = _load(args)
    tasks = None if args.tasks is None else args.tasks.split(",")
    settings: dict[str, Any] = {
        "out_dir": Path(args.out),
        "data": _data(args),
        "limit": args.limit,
        "batch_size": args.batch_size,
        "features": None if args.features is None else Path(args.features),
        "progress": progress_lines(),
    }
    if args.reference is not None:
        settings["reference"] = Path(args.reference)
        settings["reference_model"] = _reference_model(args)
    if shard is not None:
        scores = args.shard is None and shard.rank == 0  # as torchrun's first process
        predict_shard(model, processor, tasks, shard, wait=scores, **settings)
        if not scores:
            print(f"shard {shard.rank} of {shard.count} is done; mmq eval without --shard scores")
            return
    result = evaluate(
        model,
        processor,
        tasks,
        announce=lambda line: print(line, file=sys.stderr),
        **settings,
    )
    print(format_result(result))


def _reference_model(args: argparse.Namespace) -> Any | None:
    """The model of the reference run, if it is still where it was: for the KL of the logits."""
    import torch

    from mmq.checkpoint import load
    from mmq_evals.results import read_result

    folder = Path(read_result(Path(args.reference))["model"]["name"])
    if not (folder / "config.json").is_file():
        print(f"the KL of logits is left out: no model in {folder}", file=sys.stderr)
        return None
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return load(folder, dtype, device=args.device)


def _demo(args: argparse.Namespace) -> None:
    from mmq_evals.demo import run_demo

    started = time.monotonic()
    report = run_demo(Path(args.out), limit=args.limit, progress=print)
    print(report.table)
    print(f"report: {report.path} ({time.monotonic() - started:.0f} s)")


def _compare(args: argparse.Namespace) -> None:
    from mmq_evals.compare import compare, format_comparison

    found = compare(Path(args.a), Path(args.b), force=args.force)
    print(json.dumps(found, indent=1) if args.json else format_comparison(found, args.samples))


def _score(args: argparse.Namespace) -> None:
    from mmq_evals.commands import run_score

    print(run_score(args))


def _analyze(args: argparse.Namespace) -> None:
    from mmq_evals.study.analysis_commands import run_analyze

    print(run_analyze(args))


def _report(args: argparse.Namespace) -> None:
    from mmq_evals.study.analysis_commands import run_report

    print(run_report(args))


def _data_folder(args: argparse.Namespace) -> None:
    from mmq_evals.commands import run_data

    print(run_data(args))


def _sweep(args: argparse.Namespace) -> int:
    from mmq_evals.study.commands import run_sweep

    text, code = run_sweep(args)
    print(text)
    return code


def _doctor(args: argparse.Namespace) -> None:
    from mmq.doctor import diagnose, format_diagnosis

    diagnosis = diagnose()
    print(json.dumps(diagnosis, indent=2) if args.json else format_diagnosis(diagnosis))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmq", description="Quantize vision-language models part by part and measure the cost."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Any:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    inspect = command("inspect", _inspect, "Show the parts of a model and what can be quantized.")
    inspect.add_argument("model", help="a folder, a built-in tiny model, or a published preset")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    quantize = command("quantize", _quantize, "Quantize a model and save it packed.")
    quantize.add_argument("model", help="a folder or a built-in tiny model")
    quantize.add_argument("--out", required=True, help="the folder to write")
    quantize.add_argument("--recipe", help="a recipe file, YAML or JSON")
    quantize.add_argument("--study-config", help="a configuration file of arXiv 2601.15287")
    quantize.add_argument(
        "--semantics",
        choices=("corrected", "as-executed"),
        default="corrected",
        help="what a study configuration says, or what the study's code did with it",
    )
    quantize.add_argument("--method", choices=METHODS, help="one method for every component")
    quantize.add_argument("--bits", type=int, help="2 to 8, for every component")
    quantize.add_argument("--group-size", type=int, default=None, help="-1: one group per row")
    quantize.add_argument(
        "--data", default="tiny", help="calibration data: tiny, or a captioning dataset folder"
    )
    quantize.add_argument("--overwrite", action="store_true", help="replace the output folder")
    quantize.add_argument("--quiet", action="store_true", help="no progress lines")

    from mmq_evals.allocation import add_allocate_arguments
    from mmq_evals.commands import add_data_arguments, add_score_arguments

    text = "Choose a width per linear under a budget of bits; writes a recipe."
    allocate = command("allocate", _allocate, text)
    add_allocate_arguments(allocate)

    evaluate = command("eval", _eval, "Evaluate a model, dense or packed.")
    evaluate.add_argument("model", help="a folder or a built-in tiny model")
    evaluate.add_argument("--tasks", help="comma-separated; default: all that fit the model")
    evaluate.add_argument("--data", default="tiny", help="tiny, or a dataset folder")
    evaluate.add_argument("--out", default="out/eval", help="where rows and results are written")
    evaluate.add_argument("--limit", type=int, help="evaluate the first N items only")
    evaluate.add_argument("--batch-size", type=int, default=32)
    evaluate.add_argument("--workers", type=int, default=1, help="processes on this machine")
    evaluate.add_argument(
        "--features", help="keep retrieval's image features here, for runs with the same images"
    )
    evaluate.add_argument(
        "--shard", metavar="RANK/COUNT", help="predict this share only; a run without it scores"
    )
    evaluate.add_argument(
        "--overwrite", action="store_true", help="forget an unfinished run instead of going on"
    )
    evaluate.add_argument("--reference", help="a full-precision result to compare with, paired")

    compare = command("compare", _compare, "Compare two evaluations sample by sample.")
    compare.add_argument("a", help="a folder of mmq eval, such as full precision")
    compare.add_argument("b", help="another, over the same samples")
    compare.add_argument("--force", action="store_true", help="under different protocols, too")
    compare.add_argument("--samples", type=int, default=10, help="changed samples to show")
    compare.add_argument("--json", action="store_true", help="print JSON with all of them")

    for runs in (quantize, allocate, evaluate):
        runs.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
        runs.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            help="compute in this type; default: as saved. Packed layers on CUDA need 16 bits",
        )

    demo = command("demo", _demo, "Quantize and evaluate the built-in tiny models; print a table.")
    demo.add_argument("--out", default="out/demo", help="where the report is written")
    demo.add_argument("--limit", type=int, help="evaluate the first N items of each task only")

    text = "Score predictions from files, or those of an evaluation anew, without a model."
    add_score_arguments(command("score", _score, text))
    text = "Count, hash and check local datasets in their published layouts."
    add_data_arguments(command("data", _data_folder, text))

    from mmq_evals.study.commands import add_sweep_arguments

    text = "Quantize and evaluate every setting of a grid, once; goes on where it was killed."
    add_sweep_arguments(command("sweep", _sweep, text))

    from mmq_evals.study.analysis_commands import add_analyze_arguments, add_report_arguments

    text = "Say what a table of results shows: effects, importance, interactions, sizes."
    add_analyze_arguments(command("analyze", _analyze, text))
    text = "Write a report of a table of results: one HTML file, or Markdown with PNG charts."
    add_report_arguments(command("report", _report, text))

    doctor = command("doctor", _doctor, "Say which kernels, instruction sets and extras are here.")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    args.arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from mmq.errors import MmqError

    try:
        return args.run(args) or 0
    except (MmqError, ValueError) as error:
        print(f"mmq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmq: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
