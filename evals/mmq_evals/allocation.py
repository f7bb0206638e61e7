# SPDX-License-Identifier: Apache-2.0
"""Arguments and action of ``mmq allocate``; the command line loads the model and prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmq.errors import MmqError

if TYPE_CHECKING:
    from mmq.error_table import Objective
    from mmq.sensitivity import Bank
    from mmq_evals.tasks.build import Data

OBJECTIVES = ("relative", "output", "fisher", "kl", "mixed")


def add_allocate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mmq allocate``."""
    parser.add_argument("model", help="a folder or a built-in tiny model, dense")
    parser.add_argument(
        "--recipe", required=True, help="which linears, by which method; its widths do not matter"
    )
    parser.add_argument(
        "--bpw",
        type=float,
        required=True,
        help="budget: stored bits per weight of the recipe's linears, scales and zeros included",
    )
    parser.add_argument("--out", required=True, help="the recipe to write, .yaml")
    parser.add_argument("--bits", default="2,3,4,5,6,8", help="widths to choose from; 16 is dense")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="mixed",
        help="what is summed over linears: relative or absolute output errors; the KL divergence "
        "of predictions estimated by gradients (fisher), measured for each linear and width (kl, "
        "slow), or measured where errors are large and estimated elsewhere (mixed, the default)",
    )
    parser.add_argument(
        "--errors", help="table of errors, JSON: read, completed and written; a run goes on with it"
    )
    parser.add_argument(
        "--fix", action="append", default=[], metavar="GLOB=BITS", help="linears of given width"
    )
    parser.add_argument(
        "--min-bits", action="append", default=[], metavar="GLOB=BITS", help="least widths"
    )
    parser.add_argument(
        "--tie-inputs", action="store_true", help="one width for linears that read one input"
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="N",
        help="try N exchanges on the measured KL divergence of the whole model",
    )
    parser.add_argument(
        "--data", default="tiny", help="calibration data: tiny, or a dataset folder"
    )


def run_allocate(args: argparse.Namespace, model: Any, processor: Any, data: Data) -> str:
    """Measures, allocates, writes ``--out`` and returns a summary.

    Raises:
        MmqError: an argument, the recipe, the data or the budget is not as expected.
    """
    from mmq.allocate import Constraints, allocate, allocated_recipe, recipe_text, refine
    from mmq.plan import plan
    from mmq.recipe import load_recipe
    from mmq.sensitivity import measure_errors
    from mmq_evals.calibration import calibration_samples

    recipe, out = load_recipe(args.recipe), Path(args.out)
    if out.suffix not in (".yaml", ".yml") or not out.absolute().parent.is_dir():
        raise MmqError(f"out: expected a .yaml file in an existing folder, got {out}")
    if args.refine < 0:
        raise MmqError(f"refine: expected at least 0 exchanges, got {args.refine}")
    bits = [_width(part, f"--bits {args.bits}") for part in args.bits.split(",")]
    constraints = Constraints(
        tuple(_pair(text, "--fix") for text in args.fix),
        tuple(_pair(text, "--min-bits") for text in args.min_bits),
        args.tie_inputs,
    )
    objective: Objective = args.objective
    plan(recipe, model)  # Refuses a recipe that does not fit before any image is read.
    drawn = calibration_samples(
        model, processor, data=data, count=recipe.calibration.samples, seed=recipe.seed
    )
    samples = [sample.inputs for sample in drawn]
    bank: Bank | None = {} if args.refine else None
    table = measure_errors(
        model,
        recipe,
        samples,
        bits,
        objectives=(objective,),
        file=None if args.errors is None else Path(args.errors),
        bank=bank,
        progress=lambda path, done, total: print(f"[{done}/{total}] {path}", file=sys.stderr),
    )
    found = allocate(table, args.bpw, objective, constraints)
    if bank is not None:
        found = refine(
            model,
            recipe,
            samples,
            table,
            bank,
            found,
            args.bpw,
            constraints,
            evaluations=args.refine,
            progress=lambda tried, kl: print(f"[move {tried}] KL {kl:.6g}", file=sys.stderr),
        )
    allocated = allocated_recipe(recipe, found)
    out.write_text(recipe_text(allocated, found, args.bpw), encoding="utf-8")
    counts = {w: sum(b == w for b in found.bits.values()) for w in sorted(set(found.bits.values()))}
    widths = ", ".join(f"{count} of {width} bits" for width, count in counts.items())
    lines = [
        f"{len(found.bits)} linears: {widths}",
        f"{found.bits_per_weight:.4f} stored bits per weight of them, budget {args.bpw:g}",
        f"predicted {found.objective} error {found.error:.6g}",
    ]
    if found.divergence is not None:
        lines.append(f"KL {found.first_divergence:.6g}, refined {found.divergence:.6g}")
    return "\n".join([*lines, f"recipe: {out}"])


def _width(text: str, where: str) -> int:
    if not text.strip().isdigit():
        raise MmqError(f"{where}: expected a width in bits, got {text.strip()!r}")
    return int(text)


def _pair(text: str, where: str) -> tuple[str, int]:
    pattern, sign, width = text.rpartition("=")
    if not sign or not pattern:
        raise MmqError(f"{where}: expected GLOB=BITS, got {text!r}")
    return pattern, _width(width, f"{where} {pattern}")
