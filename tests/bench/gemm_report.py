# SPDX-License-Identifier: Apache-2.0
"""What gemm_table.py found, as text: rows, verdicts per cell, a summary, and two runs compared.

    python tests/bench/gemm_report.py out/bench/gemm.json              # the tables of a run
    python tests/bench/gemm_report.py out/bench/a.json out/bench/b.json    # and the spread of two

The spread of two runs: by how many per cent the ratios to the best peer differ, per mode, widths
and M, and the cells that are short in one run or in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from gemm_cells import row_class

Rows = list[dict[str, Any]]


def write_head(out: TextIO) -> None:
    out.write(f"{'K->N, group':>17} {'M':>4} {'kernel':>14} {'ms':>9} {'+-iqr':>8} {'best':>9} ")
    out.write(f"{'GB/s':>6} {'GFLOP/s':>8} {'x fp32':>7} {'x best':>7}\n")


def write_rows(out: TextIO, rows: Rows, verdicts: Rows) -> None:
    """One cell: its kernels and what is to be said of ours."""
    for row in rows:
        where = f"{row['k']}->{row['n']} g{row['group_size']}"
        out.write(
            f"{where:>17} {row['m']:>4} {row['kernel']:>14} {row['median_ms']:>9.3f} "
            f"{row['iqr_ms']:>8.3f} {row['best_ms']:>9.3f} {row['gb_per_s']:>6.1f} "
            f"{row['gflop_per_s']:>8.0f} {row['x_torch_fp32']:>7.2f} "
            f"{row['x_torch_fp32_best']:>7.2f}\n"
        )
    for v in verdicts:
        out.write(
            f"{v['mode'] + ' ' + str(v['bits']) + 'b':>37}: {v['ratio']:.2f}x {v['peer']} (fastest "
            f"calls {v['ratio_best']:.2f}x), goal {v['goal']}: {'met' if v['met'] else 'short'}\n"
        )
    out.flush()


def class_of(v: dict[str, Any]) -> tuple[str, str, str]:
    widths = "all" if v["mode"] == "exact" else "4" if v["bits"] == 4 else "others"
    return v["mode"], widths, row_class(v["m"])


def summary(verdicts: Rows) -> Rows:
    """Met and short per mode, widths and class of rows, with the range of the ratios."""
    groups: dict[tuple[str, str, str], Rows] = {}
    for v in verdicts:
        groups.setdefault(class_of(v), []).append(v)
    return [
        {
            "mode": mode,
            "bits": widths,
            "rows": rows,
            "cells": len(part),
            "met": sum(v["met"] for v in part),
            "goal": part[0]["goal"],
            "lowest": min(v["ratio"] for v in part),
            "median": statistics.median(v["ratio"] for v in part),
            "highest": max(v["ratio"] for v in part),
        }
        for (mode, widths, rows), part in sorted(groups.items())
    ]


def write_summary(out: TextIO, verdicts: Rows) -> None:
    out.write(
        f"\n{'mode':>6} {'bits':>7} {'M':>9} {'goal':>5} {'met':>10}  ratio to the best peer\n"
    )
    for p in summary(verdicts):
        out.write(
            f"{p['mode']:>6} {p['bits']:>7} {p['rows']:>9} {p['goal']:>5} "
            f"{p['met']:>3} of {p['cells']:>3}  {p['median']:.2f} "
            f"[{p['lowest']:.2f}, {p['highest']:.2f}]\n"
        )


def write_cells(out: TextIO, verdicts: Rows) -> None:
    """Every cell's ratio to the best peer, one line per mode, shape, width and group size."""
    columns = sorted({v["m"] for v in verdicts})
    lines: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for v in verdicts:
        key = (v["mode"], f"{v['k']}->{v['n']}", v["bits"], v["group_size"])
        lines.setdefault(key, {})[v["m"]] = v
    out.write(f"\n{'times the best peer; * short':>31}")
    out.write("".join(f"{f'M = {m}':>19}" for m in columns) + "\n")
    for (mode, shape, bits, group_size), cells in lines.items():
        out.write(f"{mode:>6} {shape:>12} {bits:>2}b {'g' + str(group_size):>5}   ")
        for m in columns:
            v = cells.get(m)
            ratio = "" if v is None else f"{v['ratio']:.2f}" + (" " if v["met"] else "*")
            peer = "" if v is None else v["peer"].replace("exact ", "").replace("int8 ", "")
            out.write(f" {ratio:>6} {peer:<11}")
        out.write("\n")


def spread(a: float, b: float) -> float:
    return abs(a - b) / min(a, b)


def paired(first: Rows, second: Rows) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The verdicts of two runs on each cell that both have."""

    def by_cell(verdicts: Rows) -> dict[tuple[Any, ...], dict[str, Any]]:
        names = ("mode", "k", "n", "m", "bits", "group_size")
        return {tuple(v[name] for name in names): v for v in verdicts}

    theirs = by_cell(second)
    return [(v, theirs[cell]) for cell, v in by_cell(first).items() if cell in theirs]


def write_spread(out: TextIO, first: dict[str, Any], second: dict[str, Any]) -> None:
    """How much two runs differ, over the cells that both have."""

    pairs = paired(first["verdicts"], second["verdicts"])
    out.write(
        f"\n{len(pairs)} cells in both runs; ratios differ by\n{'mode':>6} {'bits':>7} {'M':>9} "
        f"{'median':>7} {'9 of 10':>8} {'most':>6} {'met in both':>12} {'in one':>7} {'none':>5}\n"
    )
    groups: dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for a, b in pairs:
        groups.setdefault(class_of(a), []).append((a, b))
    for (mode, widths, rows), part in sorted(groups.items()):
        spreads = sorted(spread(a["ratio"], b["ratio"]) for a, b in part)
        met = [a["met"] + b["met"] for a, b in part]
        out.write(
            f"{mode:>6} {widths:>7} {rows:>9} {statistics.median(spreads):>7.0%} "
            f"{spreads[int(0.9 * (len(spreads) - 1))]:>8.0%} {spreads[-1]:>6.0%} "
            f"{met.count(2):>12} {met.count(1):>7} {met.count(0):>5}\n"
        )
    for a, b in pairs:
        if not (a["met"] and b["met"]):
            out.write(
                f"{a['mode']:>6} {a['k']}->{a['n']} M={a['m']} {a['bits']}b g{a['group_size']}: "
                f"{a['ratio']:.2f}x {a['peer']}, {b['ratio']:.2f}x {b['peer']}, goal {a['goal']}, "
                f"{'met once' if a['met'] or b['met'] else 'short'}\n"
            )


def write_run(out: TextIO, run: dict[str, Any]) -> None:
    out.write(" ".join(f"{name}={value}" for name, value in run["machine"].items()) + "\n")
    write_cells(out, run["verdicts"])
    write_summary(out, run["verdicts"])


def main(paths: Iterable[Path]) -> None:
    runs = [json.loads(path.read_text()) for path in paths]
    for run in runs:
        write_run(sys.stdout, run)
    if len(runs) == 2:
        write_spread(sys.stdout, *runs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="what gemm_table.py --json wrote")
    parser.add_argument("second", type=Path, nargs="?", help="another run of the same cells")
    args = parser.parse_args()
    main([args.run] if args.second is None else [args.run, args.second])
