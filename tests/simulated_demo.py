# SPDX-License-Identifier: Apache-2.0
"""Quantizes and evaluates the tiny models with the CUDA kernels on the PTX interpreter.

    python tests/simulated_demo.py [--models tiny-llava] [--methods gptq,awq] [--items 8]

For each model and method the command line runs twice, `mmq quantize` and then `mmq eval` of the
packed folder: on the CPU kernels, and on the shipped libmmq_cuda.so through the interpreter. The
table says whether codes and predictions agree, what the interpreter executed and the wall time of
emulation, which is no statement about any GPU. Exits with 1 if a run failed or codes differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from simulated import missing, simulated_cuda
from simulator import Simulator

import mmq
from mmq.cli import main as mmq_command
from mmq.linear import QuantLinear

# Neither float16 in the Q-Former (transformers keeps it in float32) nor float32 (refused on CUDA).
DTYPE = "bfloat16"


@contextlib.contextmanager
def kernels(device: str) -> Iterator[Simulator | None]:
    """The CPU's, or CUDA's on the interpreter."""
    if device == "cpu":
        yield None
        return
    with simulated_cuda() as simulator:
        yield simulator


def codes_of(folder: Path) -> dict[str, torch.Tensor]:
    model = mmq.load(folder)
    return {
        path: layer.packed.codes()
        for path, layer in model.named_modules()
        if isinstance(layer, QuantLinear)
    }


def predictions_of(folder: Path) -> list[Any]:
    """Texts; of a retrieval query, whose prediction is numbers, what it scored."""
    rows = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [
        row["prediction"] if isinstance(row["prediction"], str) else row["scores"] for row in rows
    ]


def run(device: str, model: str, recipe: Path, items: int, out: Path) -> dict[str, Any]:
    """Both commands on one device: codes, predictions, launches, instructions and seconds."""
    packed, rows = out / "packed", out / "rows"
    started = time.monotonic()
    with kernels(device) as simulator:
        for command in (
            ["quantize", model, "--recipe", str(recipe), "--out", str(packed), "--quiet"],
            ["eval", str(packed), "--out", str(rows), "--limit", str(items)],
        ):
            with contextlib.redirect_stdout(sys.stderr):
                status = mmq_command([*command, "--dtype", DTYPE])
            if status:
                raise SystemExit(f"mmq {command[0]} on {device}: exit code {status}")
        seconds = time.monotonic() - started
        launches = simulator.launches() if simulator else []
    return {
        "codes": codes_of(packed),
        "predictions": predictions_of(rows),
        "launches": len(launches),
        "instructions": sum(launch["total"]["instructions"] for launch in launches),
        "seconds": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="tiny-blip2-caption,tiny-blip2-retrieval,tiny-llava")
    parser.add_argument("--methods", default="gptq,awq")
    parser.add_argument("--samples", type=int, default=2, help="of calibration")
    parser.add_argument("--items", type=int, default=2, help="of each task")
    args = parser.parse_args()
    if missing():
        raise SystemExit(missing())
    header = ("model", "method", "equal codes", "equal predictions", "launches", "M instr.", "s")
    print("{:<22}{:<8}{:>12}{:>19}{:>10}{:>10}{:>7}".format(*header))
    worst = 1.0
    for model in args.models.split(","):
        for method in args.methods.split(","):
            with tempfile.TemporaryDirectory() as folder:
                recipe = Path(folder) / "recipe.json"
                settings: dict[str, Any] = {"method": method, "bits": 4, "group_size": 64}
                if method == "awq":
                    settings["awq"] = {"steps": 4}
                calibration = {"samples": args.samples, "upstream": "full"}
                recipe.write_text(json.dumps({"all": settings, "calibration": calibration}))
                found = {}
                for device in ("cpu", "cuda"):
                    (Path(folder) / device).mkdir()
                    out = Path(folder) / device
                    found[device] = run(device, model, recipe, args.items, out)
            cpu, cuda = found["cpu"], found["cuda"]
            total = sum(codes.numel() for codes in cpu["codes"].values())
            equal = sum(int((c == cuda["codes"][p]).sum()) for p, c in cpu["codes"].items())
            pairs = list(zip(cpu["predictions"], cuda["predictions"], strict=True))
            same = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
            print(
                f"{model:<22}{method:<8}{equal / total:>12.6f}{same:>19}{cuda['launches']:>10}"
                f"{cuda['instructions'] / 1e6:>10.1f}{cuda['seconds']:>7.0f}",
                flush=True,
            )
            worst = min(worst, equal / total)
    return int(worst < 1)


if __name__ == "__main__":
    sys.exit(main())
