# SPDX-License-Identifier: Apache-2.0
"""One recipe on a tiny model beside a simpler one: score and KL, paired. For the tables here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mmq
from mmq.calibrate import calibrating
from mmq.models import architecture_of
from mmq.outputs import OutputDivergence
from mmq.samples import micro_batches, split_samples
from mmq_evals import tiny
from mmq_evals.calibration import calibration_samples
from mmq_evals.run import evaluate
from mmq_evals.stats import paired_difference

TASKS = {
    "tiny-blip2-caption": ("captioning",),
    "tiny-blip2-retrieval": ("retrieval",),
    "tiny-llava": ("vqa", "widths"),
}
HELD_OUT = 128
COLUMNS = (
    "model",
    "budget",
    "setting",
    "true bpw",
    "KL, 1e-3 nats",
    "minus simple [95 %], p",
    "task",
    "score",
    "minus simple [95 %], p",
)


class Bench:
    """A tiny model, ``count`` calibration samples, and HELD_OUT others on which KL is measured."""

    def __init__(self, name: str, out: Path, count: int) -> None:
        self.name = name
        self.out = out / name
        self.out.mkdir(parents=True, exist_ok=True)
        self.processor = mmq.load_processor(tiny.path(name))
        drawn = calibration_samples(self.fresh(), self.processor, count=count + HELD_OUT)
        self.samples = [sample.inputs for sample in drawn[:count]]
        rows = split_samples([sample.inputs for sample in drawn[count:]])
        # Retrieval's contrastive predictions need other texts beside the own one.
        self.held_out = micro_batches(rows, 8 if "retrieval" in name else 1)

    def fresh(self) -> Any:
        """The model in full precision."""
        return mmq.load(tiny.path(self.name))

    def run(
        self, recipe: mmq.Recipe, label: str, simple: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Quantizes and evaluates: true bits per weight, KL by held-out batch, scores; paired
        differences to ``simple``, which an earlier call returned."""
        model = self.fresh()
        with calibrating(model):
            divergence = OutputDivergence(model, architecture_of(model), self.held_out)
        started = time.monotonic()
        manifest = mmq.quantize(model, recipe, self.samples)
        seconds = time.monotonic() - started
        with calibrating(model):
            kl = divergence.per_batch()
        found: dict[str, Any] = {
            "bytes": manifest.packed_bytes,
            "bpw": manifest.bits_per_weight,
            "kl": {str(i): total / rows for i, (total, rows) in enumerate(kl)},
            "folder": self.out / label,
            "seconds": seconds,
            "notes": manifest.notes,
            "tasks": {},
        }
        if simple is not None:
            found["kl_difference"] = asdict(paired_difference(found["kl"], simple["kl"]))
        for task in TASKS[self.name]:
            reference = None if simple is None else simple["folder"] / task
            folder = self.out / label / task
            entry = evaluate(model, self.processor, [task], out_dir=folder, reference=reference)
            entry = entry["tasks"][task]
            metric = entry["primary"]
            differences = entry.get("against_reference", {}).get("differences", {})
            found["tasks"][task] = {
                "metric": metric,
                "score": 100 * entry["scores"][metric]["value"],
                "difference": differences.get(metric),
            }
        return found


def head() -> str:
    """The first two lines of a Markdown table."""
    return "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def show(name: str, budget: str, setting: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints a line per task; returns them as data."""
    kl = 1e3 * sum(found["kl"].values()) / len(found["kl"])
    rows = []
    for task, entry in found["tasks"].items():
        row = {
            "model": name,
            "budget": budget,
            "setting": setting,
            "bpw": found["bpw"],
            "kl": kl,
            "kl_difference": _scaled(found.get("kl_difference"), 1e3),
            "task": f"{task}, {entry['metric']}",
            "score": entry["score"],
            "difference": _scaled(entry["difference"], 100.0),
            "seconds": found["seconds"],
        }
        rows.append(row)
        print(
            f"| {name} | {budget} | {setting} | {row['bpw']:.3f} | {kl:.3g} | "
            f"{_text(row['kl_difference'], '.3g')} | {row['task']} | {entry['score']:.2f} | "
            f"{_text(row['difference'], '.2f')} |",
            flush=True,
        )
    return rows


def _scaled(found: dict[str, float] | None, factor: float) -> Sequence[float] | None:
    if found is None:
        return None
    return [*(factor * found[name] for name in ("value", "low", "high")), found["p_value"]]


def _text(values: Sequence[float] | None, form: str) -> str:
    if values is None:
        return "-"
    value, low, high, p = values
    return f"{value:+{form}} [{low:+{form}}, {high:+{form}}], {p:.4f}"
