# SPDX-License-Identifier: Apache-2.0
"""Times packed_gemm beside torch's fp32 linear and other libraries, and prints a table.

    python tests/bench/gemm_table.py [--bits 4] [--rows 1,8,64,512] [--shapes 4096x4096,1408x6144]

The other libraries are those of `pip install -e .[bench]` (peers.py) and ATen's int4 kernel. Below
every cell stands how many times as fast as the best of them of the same kind (fp32 or int8
activations) each of our modes is, in the same rounds, and whether that meets the goal.

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
from typing import Any, TextIO

import torch
from gemm_cases import ROWS, SHAPES, Case, aten_int4, ours, torch_fp32
from peers import exact_peers, int8_peers, missing

import mmq_ext


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


SLEEP_SECONDS = 0.01
CALLS_PER_TURN = 3

# Times as fast as the best peer, by the most rows of activations: the goals of the project.
GOALS = {
    "int8": ((1, 1.1), (8, 1.3), (64, 1.4), (1 << 30, 1.5)),
    "exact": ((1, 1.1), (8, 1.1), (64, 1.1), (1 << 30, 0.95)),
}


def goal(mode: str, m: int) -> float:
    return next(value for most, value in GOALS[mode] if m <= most)


def verdict(
    mode: str, m: int, own: list[float], peers: dict[str, list[float]]
) -> dict[str, object]:
    """Our rounds against the best peer's: the median ratio, the goal, and whether it is met. From
    many rows on the exact mode's peer is torch's fp32 linear."""
    best = min(peers, key=lambda name: statistics.median(peers[name]))
    ratio = statistics.median(p / o for p, o in zip(peers[best], own, strict=True))
    wanted = goal(mode, m)
    return {"mode": mode, "peer": best, "ratio": ratio, "goal": wanted, "met": ratio >= wanted}


def time_in_turn(cases: list[Case], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of every round, per case; the first round warms up and does not count.

    Every library keeps threads of its own, which spin for a while after a call. So before a case
    has its turn the others' threads fall asleep, and its own wake up in a call that is not timed.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for round_ in range(rounds + 1):
        for case, mine in zip(cases, seconds, strict=True):
            time.sleep(SLEEP_SECONDS)
            case.run()
            for _ in range(CALLS_PER_TURN):
                start = clock()
                case.run()
                if round_:
                    mine.append(clock() - start)
    return seconds


def cell(
    cases: list[Case], m: int, k: int, n: int, rounds: int, clock: Callable[[], float]
) -> tuple[list[dict[str, object]], list[list[float]]]:
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
    return rows, seconds


def judge(
    m: int, bits: int, names: list[str], seconds: list[list[float]], kinds: dict[str, str]
) -> list[dict[str, object]]:
    """The verdicts of one cell; `kinds` says of a peer's name whether it is exact or int8."""
    by_name = dict(zip(names, seconds, strict=True))
    found = []
    for mode in ("exact", "int8"):
        peers = {name: by_name[name] for name, kind in kinds.items() if kind == mode}
        if mode == "exact" and m > 64:
            peers = {"torch fp32": by_name["torch fp32"]}
        if peers:
            found.append({"bits": bits} | verdict(mode, m, by_name[f"{mode} {bits}b"], peers))
    return found


def write_row(out: TextIO, row: dict[str, Any]) -> None:
    shape = f"{row['k']}->{row['n']}"
    out.write(
        f"{shape:>12} {row['m']:>4} {row['kernel']:>14} {row['median_ms']:>9.3f} "
        f"{row['iqr_ms']:>8.3f} {row['best_ms']:>9.3f} {row['gb_per_s']:>6.1f} "
        f"{row['gflop_per_s']:>8.0f} {row['x_torch_fp32']:>7.2f} {row['x_torch_fp32_best']:>7.2f}\n"
    )


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
    if missing():
        out.write(f"not installed, left out: {', '.join(missing())} (pip install -e .[bench])\n")
    out.write(" ".join(f"{name}={value}" for name, value in machine.items()) + "\n")
    header = f"{'K->N':>12} {'M':>4} {'kernel':>14} {'ms':>9} {'+-iqr':>8} {'best':>9} "
    out.write(header + f"{'GB/s':>6} {'GFLOP/s':>8} {'x fp32':>7} {'x best':>7}\n")
    results: list[dict[str, object]] = []
    judged: list[dict[str, object]] = []
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        for m in map(int, args.rows.split(",")):
            rounds = args.rounds if m <= 64 else max(5, args.rounds // 3)
            for bits in map(int, args.bits.split(",")):
                cases = [torch_fp32(m, k, n)]
                if bits == 4 and args.group_size in (32, 64, 128, 256):
                    cases.append(aten_int4(m, k, n, args.group_size))
                cases += [ours(m, k, n, args.group_size, bits, mode) for mode in ("exact", "int8")]
                kinds = {}
                for kind, makers in (
                    ("exact", exact_peers(bits, args.group_size, k)),
                    ("int8", int8_peers(bits, args.group_size)),
                ):
                    for make in makers.values():
                        cases.append(make(m, k, n, args.group_size, bits))
                        kinds[cases[-1].name] = kind
                found, seconds = cell(cases, m, k, n, rounds, clock)
                verdicts = judge(m, bits, [case.name for case in cases], seconds, kinds)
                results += found
                judged += [{"k": k, "n": n, "m": m} | v for v in verdicts]
                for row in found:
                    write_row(out, row)
                for v in verdicts:
                    out.write(
                        f"{'':>17} {v['mode']:>14}: {v['ratio']:.2f}x {v['peer']}, "
                        f"goal {v['goal']}: {'met' if v['met'] else 'short'}\n"
                    )
                out.flush()
    out.write(json.dumps({"machine": machine, "results": results, "verdicts": judged}) + "\n")


if __name__ == "__main__":
    main()
