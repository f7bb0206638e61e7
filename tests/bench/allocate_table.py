# SPDX-License-Identifier: Apache-2.0
"""Allocated widths beside uniform ones at equal bytes, on the tiny models: score and KL, paired.

Per model five budgets, in stored bits per weight of the packed linears: those of 3 and of 4 bits
everywhere, and of two widths in the order of the blocks (the first weights get the larger width:
3 and 2 bits, half and three quarters; 4 and 3 bits, half). The allocation gets the bytes that the
simpler recipe really takes, or fewer. Both are quantized by the same method on the same samples;
tasks are evaluated over the same items; the KL divergence from full precision is measured on
samples that neither calibration nor allocation has seen.

    python tests/bench/allocate_table.py [--models M,..] [--objectives kl,..] [--method M]

Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tiny_bench import Bench, head, show

import mmq
from mmq.allocate import Allocation, allocate, allocated_recipe, refine
from mmq.error_table import Objective
from mmq.plan import plan
from mmq.sensitivity import Bank, measure_errors

WIDTHS = (2, 3, 4, 5, 6, 8)
CALIBRATION = 64


# Label, narrower and wider width, share of the weights, counted from the first block, that get it.
SIMPLE = (
    ("3, then 2 (1/2)", 2, 3, 0.5),
    ("3, then 2 (3/4)", 2, 3, 0.75),
    ("3", 3, 3, 1.0),
    ("4, then 3 (1/2)", 3, 4, 0.5),
    ("4", 4, 4, 1.0),
)


def simple_widths(model: Any, base: mmq.Recipe, low: int, high: int, share: float) -> mmq.Recipe:
    """``high`` bits for this share of the weights in the order of calibration, else ``low``."""
    units = [unit for unit, _ in plan(base, model).quantized()]
    overrides, done, total = [], 0, sum(unit.weights for unit in units)
    for unit in units:
        overrides.append({"match": unit.path, "bits": high if done < share * total else low})
        done += unit.weights
    return mmq.parse_recipe({**base.to_dict(), "overrides": overrides})


def table(
    bench: Bench, base: mmq.Recipe, objectives: list[Objective], moves: int
) -> list[dict[str, Any]]:
    """The rows of one model; ``moves`` exchanges after the last objective."""
    bank: Bank | None = {} if moves else None
    started = time.monotonic()
    errors = measure_errors(
        bench.fresh(),
        base,
        bench.samples,
        WIDTHS,
        objectives=objectives,
        file=bench.out / "errors.json",
        bank=bank,
    )
    print(f"<!-- {bench.name}: errors in {time.monotonic() - started:.0f} s -->", flush=True)
    rows = []
    for label, low, high, share in SIMPLE:
        key = f"{low}-{high}-{share:g}"
        recipe = simple_widths(bench.fresh(), base, low, high, share)
        simple = bench.run(recipe, f"simple-{key}")
        budget = simple["bpw"]
        rows += show(bench.name, f"{budget:.3f}", label, simple)
        found: dict[str, Allocation] = {name: allocate(errors, budget, name) for name in objectives}
        if bank is not None:
            found[f"{objectives[-1]}, refined"] = refine(
                bench.fresh(),
                base,
                bench.samples,
                errors,
                bank,
                found[objectives[-1]],
                budget,
                evaluations=moves,
            )
        for name, chosen in found.items():
            allocated = bench.run(allocated_recipe(base, chosen), f"{name}-{key}", simple)
            assert allocated["bytes"] <= simple["bytes"], "an allocation exceeds its budget"
            rows += show(bench.name, f"{budget:.3f}", f"allocated, {name}", allocated)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny-blip2-caption,tiny-llava")
    parser.add_argument("--objectives", default="relative,fisher,mixed,kl")
    parser.add_argument("--method", default="uniform")
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--refine", type=int, default=0, help="moves after the last objective")
    parser.add_argument("--out", default="out/allocate")
    args = parser.parse_args()
    base = mmq.parse_recipe(
        {
            "all": {"method": args.method, "bits": 3, "group_size": args.group_size},
            "calibration": {"samples": CALIBRATION},
        }
    )
    out = Path(args.out) / f"{args.method}-g{args.group_size}"
    print(head())
    rows = [
        row
        for name in args.models.split(",")
        for row in table(
            Bench(name, out, CALIBRATION), base, args.objectives.split(","), args.refine
        )
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
