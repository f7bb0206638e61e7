# SPDX-License-Identifier: Apache-2.0
"""Times packed_gemm beside torch's fp32 linear and ATen's int4 kernel, and prints a table.

    python tests/bench/gemm_table.py [--bits 4] [--rows 1,8,64,512] [--shapes 4096x4096,1408x6144]

The kernels of a cell run in turn, round after round, so that a busy machine slows all of them
alike: quote the ratios of one run. `x fp32` is the median over rounds of torch's time / the
kernel's time of the same round; `x best` is the ratio of the fastest rounds, which other processes
disturb least. GB/s and GFLOP/s belong to the median. `--cpu-time` takes one
thread's processor time instead of wall time, for machines where other processes hold the cores. The
last line is the table as one JSON document.
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

import torch
from gemm_cases import ROWS, SHAPES, Case, aten_int4, ours, torch_fp32

import mmq_ext


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def time_in_turn(cases: list[Case], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of every round, per case; the first round warms up and does not count."""
    seconds: list[list[float]] = [[] for _ in cases]
    for round_ in range(rounds + 1):
        for case, mine in zip(cases, seconds, strict=True):
            start = clock()
            case.run()
            if round_:
                mine.append(clock() - start)
    return seconds


def cell(
    cases: list[Case], m: int, k: int, n: int, rounds: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    rows = []
    seconds = time_in_turn(cases, rounds, clock)
    for case, mine in zip(cases, seconds, strict=True):
        median = statistics.median(mine)
        quartiles = statistics.quantiles(mine, n=4)
        best = min(mine)
        ratios = [dense / own for dense, own in zip(seconds[0], mine, strict=True)]
        rows.append(
            {
                "k": k,
                "n": n,
                "m": m,
                "kernel": case.name,
                "median_ms": median * 1e3,
                "iqr_ms": (quartiles[2] - quartiles[0]) * 1e3,
                "best_ms": best * 1e3,
                "gb_per_s": case.weight_bytes / median / 1e9,
                "gflop_per_s": 2 * m * n * k / median / 1e9,
                "x_torch_fp32": statistics.median(ratios),
                "x_torch_fp32_best": min(seconds[0]) / best,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", default="4", help="widths of ours, comma-separated")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES), help="KxN")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
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
        "group_size": args.group_size,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
    }
    out = sys.stdout
    out.write(" ".join(f"{name}={value}" for name, value in machine.items()) + "\n")
    header = f"{'K->N':>12} {'M':>4} {'kernel':>10} {'ms':>9} {'+-iqr':>8} {'best':>9} "
    out.write(header + f"{'GB/s':>6} {'GFLOP/s':>8} {'x fp32':>7} {'x best':>7}\n")
    results = []
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for m in map(int, args.rows.split(",")):
            cases = [torch_fp32(m, k, n), aten_int4(m, k, n, args.group_size)]
            for bits in map(int, args.bits.split(",")):
                cases += [ours(m, k, n, args.group_size, bits, mode) for mode in ("exact", "int8")]
            rounds = args.rounds if m <= 64 else max(5, args.rounds // 3)
            for row in cell(cases, m, k, n, rounds, clock):
                results.append(row)
                out.write(
                    f"{f'{k}->{n}':>12} {m:>4} {row['kernel']:>10} {row['median_ms']:>9.3f} "
                    f"{row['iqr_ms']:>8.3f} {row['best_ms']:>9.3f} {row['gb_per_s']:>6.1f} "
                    f"{row['gflop_per_s']:>8.0f} {row['x_torch_fp32']:>7.2f} "
                    f"{row['x_torch_fp32_best']:>7.2f}\n"
                )
                out.flush()
    out.write(json.dumps({"machine": machine, "results": results}) + "\n")


if __name__ == "__main__":
    main()
