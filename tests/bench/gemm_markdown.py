# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and docs/speed.md, from what gemm_table.py found.

    python tests/bench/gemm_markdown.py out/bench/gemm.json [out/bench/avx2.json] [--second b.json]

4 bits in groups of 128 at two shapes. One table per run: median ms of every library, in brackets
its fastest call. With a second run, README's table comes first: ms, times as fast as torch fp32,
times as fast as the best other library of the same kind, by fastest calls, for both runs. With
``--second``, a repetition of the first run, all cells of both by mode, widths and rows come last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, TextIO

from gemm_report import Rows, class_of, paired, spread

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


def beside_onnx_runtime(run: dict[str, Any], verdicts: Rows) -> list[float]:
    """Times as fast as its fp32 mode, for each cell where that was timed."""
    found = []
    for v in verdicts:
        rows = [
            r for r in run["results"] if all(r[n] == v[n] for n in ("k", "n", "m", "group_size"))
        ]
        ms = {row["kernel"]: row["median_ms"] for row in rows}
        theirs = [ms[kernel] for kernel in ms if kernel.startswith("ORT exact")]
        found += [min(theirs) / ms[f"exact {v['bits']}b"]] if theirs else []
    return found


def write_both(out: TextIO, runs: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for pair in paired(runs[0]["verdicts"], runs[1]["verdicts"]):
        groups.setdefault(class_of(pair[0]), []).append(pair)
    lines = []
    for mode, widths, rows in sorted(groups, key=lambda group: (group[0], group[1] == "others")):
        pairs = groups[mode, widths, rows]
        sides: list[Rows] = [list(side) for side in zip(*pairs, strict=True)]
        apart = sorted(spread(a["ratio"], b["ratio"]) for a, b in pairs)
        met = [f"{sum(v['met'] for v in side)} of {len(side)}" for side in sides]
        ranges = []
        for side in sides:
            ratios = [v["ratio"] for v in side]
            middle = statistics.median(ratios)
            ranges.append(f"{middle:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
        most = apart[int(0.9 * (len(apart) - 1))]
        spreads = f"{100 * statistics.median(apart):.0f} %, {100 * most:.0f} %"
        name, goal = f"{mode}, {widths}", str(pairs[0][0]["goal"])
        lines.append([name, rows, goal, *met, *ranges, spreads])
        if (mode, rows) == ("exact", "9..64"):
            ratios_of = [beside_onnx_runtime(*each) for each in zip(runs, sides, strict=True)]
            met = [f"{sum(r >= 1.1 for r in ratios)} of {len(ratios)}" for ratios in ratios_of]
            least = [f"at least {min(ratios):.2f}" for ratios in ratios_of]
            lines.append(["the same, beside ONNX Runtime", rows, goal, *met, *least, ""])
    names = ["mode, bits", "M", "goal", "met, first run", "second run", "ratio, first run"]
    write_table(out, [*names, "ratio, second run", "spread"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="what gemm_table.py --json wrote")
    parser.add_argument("avx2", type=Path, nargs="?", help="the same under MMQ_CPU_ISA=avx2")
    parser.add_argument("--second", type=Path, help="a repetition of the first run")
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in (args.run, args.avx2) if path is not None]
    if len(runs) == 2:
        write_short(sys.stdout, runs)
    for run in runs:
        write_run(sys.stdout, run)
    if args.second is not None:
        write_both(sys.stdout, [runs[0], json.loads(args.second.read_text())])


if __name__ == "__main__":
    main()
