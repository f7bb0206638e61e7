# SPDX-License-Identifier: Apache-2.0
"""Times packed_gemm beside torch, ATen and other libraries, and says of every cell: met or short.

    python tests/bench/gemm_table.py                     # the standard cells of gemm_cells.py
    python tests/bench/gemm_table.py --bits 4 --rows 1,8 --shapes 4096x4096 --group-sizes 32,128

A cell is a shape, a number of rows, a width and a group size. Its kernels run in turn, round after
round, so that a busy machine slows all of them alike: quote the ratios of one run. The other
libraries are those of peers.py; one without the width takes part with the next wider one it has.
`x fp32` is the median over rounds of torch's time / the kernel's of the same round; `x best` is the
ratio of the fastest rounds, which other processes disturb least. GB/s, of weights with their
scales, and GFLOP/s belong to the median. `--cpu-time` takes one thread's processor time instead of
wall time, for machines where other processes hold the cores. `--json` keeps everything, for
gemm_plot.py; the last line is the summary as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from gemm_cases import Case, aten_int4, ours, torch_bf16, torch_fp32
from gemm_cells import Cell, goal, grid, row_class, standard
from peers import exact_peers, int8_peers, missing

import mmq_ext

SLEEP_SECONDS = 0.01
CALLS_PER_TURN = 3
MODES = ("exact", "int8")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def read_bandwidth() -> float:
    """GB/s at which torch sums an array far larger than the caches; the best of some calls."""
    x = torch.ones(2**28, dtype=torch.int8).view(torch.float32)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds) / 1e9


def time_in_turn(
    cases: list[Case], rounds: int, calls: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of every call, per case; the first round warms up and does not count.

    Every library keeps threads of its own, which spin for a while after a call. So before a case
    has its turn the others' threads fall asleep, and its own wake up in a call that is not timed.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for round_ in range(rounds + 1):
        for case, mine in zip(cases, seconds, strict=True):
            time.sleep(SLEEP_SECONDS)
            case.run()
            for _ in range(calls if round_ else 0):
                start = clock()
                case.run()
                mine.append(clock() - start)
    return seconds


def run_cell(
    cell: Cell, rounds: int, clock: Callable[[], float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a cell, one per kernel, and a verdict per mode."""
    m, k, n = cell.m, cell.k, cell.n
    own = {mode: ours(m, k, n, cell.group_size, cell.bits, mode) for mode in MODES}
    peers: dict[str, list[Case]] = {
        "exact": [make(m, k, n) for make in exact_peers(cell.bits, cell.group_size, k)],
        "int8": [make(m, k, n) for make in int8_peers(cell.bits, cell.group_size, k)],
    }
    dense = torch_fp32(m, k, n)
    cases = [dense, *own.values(), *peers["exact"], *peers["int8"]]
    if cell.bits == 4 and cell.group_size in (32, 64, 128, 256):
        cases.append(aten_int4(m, k, n, cell.group_size))
        cases.append(torch_bf16(m, k, n))
    few = m <= 64
    seconds = time_in_turn(
        cases, rounds if few else max(3, rounds // 2), CALLS_PER_TURN if few else 1, clock
    )
    by_name = {case.name: mine for case, mine in zip(cases, seconds, strict=True)}
    rows = [_row(cell, case, by_name[case.name], by_name[dense.name]) for case in cases]
    verdicts = []
    for mode in MODES:
        # From many rows on the exact mode is to keep up with dense fp32.
        rivals = [dense] if mode == "exact" and m > 64 else peers[mode]
        if rivals:
            best = min(rivals, key=lambda case: statistics.median(by_name[case.name])).name
            verdicts.append(_verdict(cell, mode, best, by_name[own[mode].name], by_name[best]))
    return rows, verdicts


def _row(cell: Cell, case: Case, seconds: list[float], dense: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    ratios = [base / own for base, own in zip(dense, seconds, strict=True)]
    return {
        **cell._asdict(),
        "kernel": case.name,
        "median_ms": median * 1e3,
        "iqr_ms": (quartiles[2] - quartiles[0]) * 1e3,
        "best_ms": min(seconds) * 1e3,
        "gb_per_s": case.weight_bytes / median / 1e9,
        "gflop_per_s": 2 * cell.m * cell.n * cell.k / median / 1e9,
        "x_torch_fp32": statistics.median(ratios),
        "x_torch_fp32_best": min(dense) / min(seconds),
    }


def _verdict(
    cell: Cell, mode: str, peer: str, own: list[float], other: list[float]
) -> dict[str, Any]:
    ratios = [p / o for p, o in zip(other, own, strict=True)]
    ratio, wanted = statistics.median(ratios), goal(mode, cell.bits, cell.m)
    found = {"mode": mode, "peer": peer, "ratio": ratio, "ratio_best": min(other) / min(own)}
    return {**cell._asdict(), **found, "goal": wanted, "met": ratio >= wanted}


def write_rows(out: TextIO, rows: list[dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
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


def summary(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Met and short per mode, widths and class of rows, with the range of the ratios."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for v in verdicts:
        widths = "all" if v["mode"] == "exact" else ("4" if v["bits"] == 4 else "others")
        groups.setdefault((v["mode"], widths, row_class(v["m"])), []).append(v)
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


def write_summary(out: TextIO, parts: list[dict[str, Any]]) -> None:
    out.write(
        f"\n{'mode':>6} {'bits':>7} {'M':>9} {'goal':>5} {'met':>9}  ratio to the best peer\n"
    )
    for p in parts:
        out.write(
            f"{p['mode']:>6} {p['bits']:>7} {p['rows']:>9} {p['goal']:>5} "
            f"{p['met']:>3} of {p['cells']:>2}  {p['median']:.2f} "
            f"[{p['lowest']:.2f}, {p['highest']:.2f}]\n"
        )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=_numbers, help="widths of ours, comma-separated")
    parser.add_argument("--rows", type=_numbers)
    parser.add_argument("--shapes", help="KxN, comma-separated")
    parser.add_argument("--group-sizes", type=_numbers)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
    parser.add_argument("--json", type=Path, help="keep all figures in this file")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = {
        "device": processor(),
        "threads": args.threads,
        "clock": clock.__name__,
        "isa": mmq_ext.cpu_isa(),
        "threading": mmq_ext.threading_backend(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
        "read_gb_per_s": round(read_bandwidth(), 1),
    }
    shapes = None
    if args.shapes is not None:
        shapes = [(int(k), int(n)) for k, n in (s.split("x") for s in args.shapes.split(","))]
    given = (shapes, args.rows, args.bits, args.group_sizes)
    cells = standard() if all(part is None for part in given) else grid(*given)
    out = sys.stdout
    if missing():
        out.write(f"not installed, left out: {', '.join(missing())}\n")
    out.write(" ".join(f"{name}={value}" for name, value in machine.items()) + "\n")
    out.write(f"{'K->N, group':>17} {'M':>4} {'kernel':>14} {'ms':>9} {'+-iqr':>8} {'best':>9} ")
    out.write(f"{'GB/s':>6} {'GFLOP/s':>8} {'x fp32':>7} {'x best':>7}\n")
    results: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for cell in cells:
        rows, judged = run_cell(cell, args.rounds, clock)
        write_rows(out, rows, judged)
        results += rows
        verdicts += judged
    parts = summary(verdicts)
    write_summary(out, parts)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": machine, "results": results, "verdicts": verdicts}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    out.write(json.dumps({"machine": machine, "summary": parts}) + "\n")


if __name__ == "__main__":
    main()
