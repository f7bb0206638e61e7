# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and docs/speed.md, from what gemm_table.py found.

    python tests/bench/gemm_markdown.py out/bench/gemm.json [out/bench/avx2.json]

4 bits in groups of 128 at two shapes. One table per run: median ms of every library, in brackets
its fastest call. With a second run, README's table comes first: ms, times as fast as torch fp32,
times as fast as the best other library of the same kind, by fastest calls, for both runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TextIO

SHAPES = ((4096, 4096), (1408, 6144))
ROWS = (1, 8, 64, 512)
OURS = {"exact": "exact 4b", "int8": "int8 4b"}
PEERS = {
    "exact": {"OpenVINO 4b": "OpenVINO", "ORT exact 4b": "ONNX Runtime"},
    "int8": {"ORT int8 4b": "ONNX Runtime", "ggml Q4_0": "ggml", "ggml Q4_K": "ggml"},
}
COLUMNS = {
    "torch fp32": "torch fp32",
    "exact 4b": "exact",
    "OpenVINO 4b": "OpenVINO",
    "ORT exact 4b": "ONNX Runtime, exact",
    "int8 4b": "int8",
    "ORT int8 4b": "ONNX Runtime, int8",
    "ggml Q4_0": "ggml Q4_0",
    "ggml Q4_K": "ggml Q4_K",
}
Cell = dict[str, dict[str, Any]]  # by kernel


def cell(run: dict[str, Any], k: int, n: int, m: int) -> Cell:
    where = {"k": k, "n": n, "m": m, "group_size": 128}
    rows = [row for row in run["results"] if all(row[name] == where[name] for name in where)]
    return {row["kernel"]: row for row in rows}


def times(found: Cell, kernel: str) -> str:
    if kernel not in found:
        return "-"
    return f"{found[kernel]['median_ms']:.3g} ({found[kernel]['best_ms']:.3g})"


def beside_best(found: Cell, mode: str) -> str:
    best = {kernel: row["best_ms"] for kernel, row in found.items()}
    ours = best[OURS[mode]]
    peer = min((kernel for kernel in PEERS[mode] if kernel in best), key=best.__getitem__)
    by_torch = best["torch fp32"] / ours
    return f"{ours:.3g}, {by_torch:.3g}x, {best[peer] / ours:.2f}x {PEERS[mode][peer]}"


def write_table(out: TextIO, names: list[str], lines: list[list[str]]) -> None:
    out.write("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|\n")
    out.writelines("| " + " | ".join(line) + " |\n" for line in lines)
    out.write("\n")


def places() -> list[tuple[int, int, int, str]]:
    """Shapes and rows, with the text of the first column, which only a shape's first line has."""
    return [(k, n, m, f"{k} -> {n}" if m == ROWS[0] else "") for k, n in SHAPES for m in ROWS]


def write_short(out: TextIO, runs: list[dict[str, Any]]) -> None:
    lines = [
        [text, str(m)] + [beside_best(cell(run, k, n, m), mode) for run in runs for mode in OURS]
        for k, n, m, text in places()
    ]
    names = ["K -> N", "M", "exact", "int8 activations", "exact, AVX2", "int8, AVX2"]
    write_table(out, names, lines)


def write_run(out: TextIO, run: dict[str, Any]) -> None:
    lines = [
        [text, str(m)] + [times(cell(run, k, n, m), kernel) for kernel in COLUMNS]
        for k, n, m, text in places()
    ]
    write_table(out, ["K -> N", "M", *COLUMNS.values()], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="what gemm_table.py --json wrote")
    parser.add_argument("avx2", type=Path, nargs="?", help="the same under MMQ_CPU_ISA=avx2")
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in (args.run, args.avx2) if path is not None]
    if len(runs) == 2:
        write_short(sys.stdout, runs)
    for run in runs:
        write_run(sys.stdout, run)


if __name__ == "__main__":
    main()
