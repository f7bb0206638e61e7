# SPDX-License-Identifier: Apache-2.0
"""Synthetic tables of results with a known answer, with rows per sample where asked for.

A sample is answered if its difficulty is below the model's capacity, so that a run's score is
nearly its capacity, all runs share the difficulties, and differences are paired.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

LEVELS = (2, 3, 4, 5, 6, 8, 16)
LOSS = {2: 1.0, 3: 0.3, 4: 0.1, 5: 0.03, 6: 0.01, 8: 0.003, 16: 0.0}
PARAMETERS = {"vision": 300_000, "connector": 200_000, "language": 500_000}
METHOD_SCALE = {"rtn": 1.0, "gptq": 0.6, "awq": 0.7}

Bits = Mapping[str, float]


def additive(sensitivity: Mapping[str, float], base: float = 0.9) -> Callable[[Bits], float]:
    """Losses by component add up."""
    return lambda bits: base - sum(sensitivity[name] * LOSS[int(w)] for name, w in bits.items())


def record(method: str, bits: Bits, score: float, **more: Any) -> dict[str, Any]:
    """A row as `mmq sweep` writes it, with one score of a task "vqa"."""
    method = "none" if all(width == 16 for width in bits.values()) else method
    total = sum(PARAMETERS[name] for name in bits)
    stored = sum(PARAMETERS[name] * (w + (0.5 if w < 16 else 0.0)) for name, w in bits.items())
    return {
        "run_id": f"{method}-" + "-".join(f"{width:g}" for width in bits.values()),
        "status": "done",
        "model": "tiny",
        "method": method,
        "group_size": None if method == "none" else 64,
        **{f"bits.{name}": width for name, width in bits.items()},
        "bpw_linears": stored / total,
        "bpw_model": stored / total + 0.4,
        "bytes": round(stored / 8),
        "score.vqa.accuracy_always": score,
        **more,
    }


def factorial(
    score: Callable[[Bits], float],
    *,
    method: str = "gptq",
    names: Sequence[str] = ("vision", "language"),
    levels: Sequence[float] | Mapping[str, Sequence[float]] = LEVELS,
) -> list[dict[str, Any]]:
    """All combinations of levels, with exact scores."""
    axes = [levels[name] if isinstance(levels, Mapping) else levels for name in names]
    grid = [dict(zip(names, widths, strict=True)) for widths in product(*axes)]
    return [record(method, bits, score(bits)) for bits in grid]


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="ascii")
    return path


def with_samples(
    folder: Path, records: Sequence[Mapping[str, Any]], images: int = 60, per_image: int = 2
) -> Path:
    """Write a table and rows per sample whose means replace the scores."""
    rng = random.Random(0)
    items = [(f"i{i}", f"q{i}-{j}", rng.random()) for i in range(images) for j in range(per_image)]
    written = []
    for row in records:
        capacity = row["score.vqa.accuracy_always"]
        rows = [
            {
                "id": key,
                "cluster": image,
                "question": f"what is {key}?",
                "answers": ["red"],
                "prediction": "red" if difficulty < capacity else "blue",
                "scores": {"accuracy_always": float(difficulty < capacity)},
            }
            for image, key, difficulty in items
        ]
        place = folder / "runs" / row["run_id"]
        place.mkdir(parents=True, exist_ok=True)
        write_jsonl(place / "vqa.jsonl", rows)
        mean = sum(r["scores"]["accuracy_always"] for r in rows) / len(rows)
        written.append({**row, "score.vqa.accuracy_always": mean, "rows": f"runs/{row['run_id']}"})
    return write_jsonl(folder / "results.jsonl", written)
