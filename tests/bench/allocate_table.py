# SPDX-License-Identifier: Apache-2.0
"""Allocated widths beside uniform ones at equal bytes, on the tiny models: score and KL, paired.

Per model four budgets, in stored bits per weight of the packed linears: those of 3 and of 4 bits
everywhere, and of 2 and 3 and of 3 and 4 bits in the order of the blocks (the first half of the
weights gets the larger width). The allocation gets the bytes that the simpler recipe really takes,
or fewer. Both are quantized by the
same method on the same samples; tasks are evaluated over the same items; the KL divergence from
full precision is measured on samples that neither calibration nor allocation has seen.

    python tests/bench/allocate_table.py [--models M,..] [--objectives fisher,kl,..] [--method gptq]

Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mmq
from mmq.allocate import Allocation, allocate, allocated_recipe, refine
from mmq.calibrate import calibrating
from mmq.models import architecture_of
from mmq.outputs import OutputDivergence
from mmq.plan import plan
from mmq.samples import micro_batches, split_samples
from mmq.sensitivity import Bank, ErrorTable, measure_errors
from mmq_evals import tiny
from mmq_evals.calibration import calibration_samples
from mmq_evals.run import evaluate
from mmq_evals.stats import paired_difference

TASKS = {
    "tiny-blip2-caption": ("captioning",),
    "tiny-blip2-retrieval": ("retrieval",),
    "tiny-llava": ("vqa", "widths"),
}
WIDTHS = (2, 3, 4, 5, 6, 8)
CALIBRATION = 64
HELD_OUT = 128
COLUMNS = (
    "model",
    "budget",
    "widths",
    "true bpw",
    "KL, 1e-3 nats",
    "minus simple [95 %], p",
    "task",
    "score",
    "minus simple [95 %], p",
)


def mixed_widths(model: Any, recipe: mmq.Recipe, low: int, high: int) -> mmq.Recipe:
    """``high`` bits for the first half of the weights in the order of calibration, else ``low``."""
    units = [unit for unit, _ in plan(recipe, model).quantized()]
    overrides, done, total = [], 0, sum(unit.weights for unit in units)
    for unit in units:
        overrides.append({"match": unit.path, "bits": high if 2 * done < total else low})
        done += unit.weights
    return mmq.parse_recipe({**recipe.to_dict(), "overrides": overrides})


class Bench:
    """One tiny model with its samples, table and results."""

    def __init__(self, name: str, method: str, group_size: int, out: Path) -> None:
        self.name = name
        self.out = out / name
        self.out.mkdir(parents=True, exist_ok=True)
        self.processor = mmq.load_processor(tiny.path(name))
        drawn = calibration_samples(self.fresh(), self.processor, count=CALIBRATION + HELD_OUT)
        self.samples = [sample.inputs for sample in drawn[:CALIBRATION]]
        encoder_decoder = False
        rows = split_samples(
            [sample.inputs for sample in drawn[CALIBRATION:]], encoder_decoder=encoder_decoder
        )
        # Retrieval's contrastive predictions need other texts beside the own one.
        self.held_out = micro_batches(rows, 8 if "retrieval" in name else 1)
        self.base = mmq.parse_recipe(
            {
                "all": {"method": method, "bits": 3, "group_size": group_size},
                "calibration": {"samples": CALIBRATION},
            }
        )
        self.bank: Bank = {}
        self.seconds = 0.0

    def fresh(self) -> Any:
        return mmq.load(tiny.path(self.name))

    def measure(self, objectives: Sequence[str], with_bank: bool) -> ErrorTable:
        started = time.monotonic()
        table = measure_errors(
            self.fresh(),
            self.base,
            self.samples,
            WIDTHS,
            fisher="fisher" in objectives,
            kl="kl" in objectives,
            file=self.out / "errors.json",
            bank=self.bank if with_bank else None,
        )
        self.seconds = time.monotonic() - started
        return table

    def run(
        self, recipe: mmq.Recipe, label: str, simple: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Quantizes and evaluates: true bits per weight, KL by held-out batch, scores; paired
        differences to ``simple``, which an earlier call returned."""
        model = self.fresh()
        with calibrating(model):
            divergence = OutputDivergence(model, architecture_of(model), self.held_out)
        manifest = mmq.quantize(model, recipe, self.samples)
        with calibrating(model):
            kl = divergence.per_batch()
        found: dict[str, Any] = {
            "bytes": manifest.packed_bytes,
            "bpw": manifest.bits_per_weight,
            "kl": {str(i): total / rows for i, (total, rows) in enumerate(kl)},
            "folder": self.out / label,
            "tasks": {},
        }
        if simple is not None:
            found["kl_difference"] = asdict(paired_difference(found["kl"], simple["kl"]))
        for task in TASKS[self.name]:
            reference = None if simple is None else simple["folder"] / task
            entry = evaluate(
                model,
                self.processor,
                [task],
                out_dir=self.out / label / task,
                reference=reference,
            )["tasks"][task]
            metric = entry["primary"]
            differences = entry.get("against_reference", {}).get("differences", {})
            found["tasks"][task] = {
                "metric": metric,
                "score": 100 * entry["scores"][metric]["value"],
                "difference": differences.get(metric),
            }
        return found


def settings(
    bench: Bench, objectives: Sequence[str], refinements: int
) -> Callable[[ErrorTable, float], dict[str, Allocation]]:
    def allocations(table: ErrorTable, budget: float) -> dict[str, Allocation]:
        found = {objective: allocate(table, budget, objective) for objective in objectives}
        if refinements:
            first = found[objectives[-1]]
            found[f"{objectives[-1]}, refined"] = refine(
                bench.fresh(),
                bench.base,
                bench.samples,
                table,
                bench.bank,
                first,
                budget,
                evaluations=refinements,
            )
        return found

    return allocations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny-blip2-caption,tiny-llava")
    parser.add_argument("--objectives", default="fisher")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--refine", type=int, default=0, help="moves after the last objective")
    parser.add_argument("--out", default="out/allocate")
    args = parser.parse_args()
    objectives = args.objectives.split(",")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = []
    for name in args.models.split(","):
        bench = Bench(
            name, args.method, args.group_size, Path(args.out) / f"{args.method}-g{args.group_size}"
        )
        table = bench.measure(objectives, args.refine > 0)
        allocations = settings(bench, objectives, args.refine)
        model = bench.fresh()
        for low, high in ((2, 3), (3, 3), (3, 4), (4, 4)):
            label = str(low) if low == high else f"{low} and {high} in block order"
            recipe = mixed_widths(model, bench.base, low, high)
            simple = bench.run(recipe, f"simple-{label}")
            rows += show(name, simple["bpw"], label, simple)
            for kind, chosen in allocations(table, simple["bpw"]).items():
                allocated = allocated_recipe(bench.base, chosen)
                found = bench.run(allocated, f"{kind}-{label}", simple)
                assert found["bytes"] <= simple["bytes"], "an allocation exceeds its budget"
                rows += show(name, simple["bpw"], f"allocated, {kind}", found)
        print(f"<!-- {name}: errors measured in {bench.seconds:.0f} s -->", flush=True)
    print(json.dumps(rows))


def show(name: str, budget: float, label: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints a line per task; returns them as data."""
    kl = 1e3 * sum(found["kl"].values()) / len(found["kl"])
    rows = []
    for task, entry in found["tasks"].items():
        row = {
            "model": name,
            "budget": budget,
            "widths": label,
            "bpw": found["bpw"],
            "kl": kl,
            "kl_difference": _difference(found.get("kl_difference"), 1e3),
            "task": f"{task}, {entry['metric']}",
            "score": entry["score"],
            "difference": _difference(entry["difference"], 100.0),
        }
        rows.append(row)
        print(
            f"| {name} | {budget:.3f} | {label} | {row['bpw']:.3f} | {kl:.3g} | "
            f"{_text(row['kl_difference'], '.3g')} | {row['task']} | {entry['score']:.2f} | "
            f"{_text(row['difference'], '.2f')} |",
            flush=True,
        )
    return rows


def _difference(found: dict[str, float] | None, factor: float) -> list[float] | None:
    if found is None:
        return None
    return [*(factor * found[name] for name in ("value", "low", "high")), found["p_value"]]


def _text(values: list[float] | None, form: str) -> str:
    if values is None:
        return "-"
    value, low, high, p = values
    return f"{value:+{form}} [{low:+{form}}, {high:+{form}}], {p:.4f}"


if __name__ == "__main__":
    main()
