# SPDX-License-Identifier: Apache-2.0
"""Token weights and corrections beside the plain methods on the tiny LLaVA: score and KL, paired.

GPTQ and AWQ at 2 and 3 bits, one group per row. The KL divergence from full precision is measured
on samples that calibration has not seen, scores over the same items.

    python tests/bench/weights_table.py [--bits 2,3] [--settings none,modality,..]

Prints a Markdown table and the seconds of every quantization; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tiny_bench import Bench, head, show

import mmq

CALIBRATION = 32
# (method, options of gptq, calibration) by setting.
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gptq": ("gptq", {}, {}),
    "gptq, modality": ("gptq", {}, {"token_weights": "modality"}),
    "gptq, grad": ("gptq", {}, {"token_weights": "grad"}),
    "gptq, qig": ("gptq", {}, {"token_weights": "qig"}),
    "gptq, gptaq 0.25": ("gptq", {"correction": "gptaq"}, {}),
    "gptq, gptaq 1": ("gptq", {"correction": "gptaq", "alpha": 1.0}, {}),
    "gptq, retarget 0.25": ("gptq", {"correction": "retarget"}, {}),
    "gptq, retarget 1": ("gptq", {"correction": "retarget", "alpha": 1.0}, {}),
    "awq": ("awq", {}, {}),
    "awq, modality": ("awq", {}, {"token_weights": "modality"}),
    "awq, grad": ("awq", {}, {"token_weights": "grad"}),
    "awq, qig": ("awq", {}, {"token_weights": "qig"}),
}


def recipe_of(setting: str, bits: int) -> mmq.Recipe:
    """The recipe of one line."""
    method, options, calibration = SETTINGS[setting]
    layer: dict[str, Any] = {"method": method, "bits": bits, "group_size": -1}
    if options:
        layer["gptq"] = options
    return mmq.parse_recipe({"all": layer, "calibration": {"samples": CALIBRATION, **calibration}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--settings", help="semicolon-separated; default: all")
    parser.add_argument("--out", default="out/weights")
    args = parser.parse_args()
    wanted = list(SETTINGS) if args.settings is None else args.settings.split(";")
    bench = Bench("tiny-llava", Path(args.out), CALIBRATION)
    print(head())
    rows = []
    for bits in map(int, args.bits.split(",")):
        simple: dict[str, Any] = {}
        for setting in wanted:
            method = SETTINGS[setting][0]
            found = bench.run(recipe_of(setting, bits), f"{setting}-{bits}", simple.get(method))
            simple.setdefault(method, found)
            rows += show(bench.name, f"{bits} bits", setting, found)
            kept = [note for note in found["notes"] if ": correction " in note]
            verdicts = f", {sum('kept' in note for note in kept)} of {len(kept)} blocks corrected"
            print(f"<!-- {found['seconds']:.0f} s{verdicts if kept else ''} -->", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
