# SPDX-License-Identifier: Apache-2.0
"""The quantization ops beside the torch loops they replace: python tests/bench/quant_table.py

Native and torch alternate, so that both see the same machine; times are medians, the spread is the
interquartile range over the median. ``--cpu-time`` uses one thread and counts its processor time,
for a machine that others use too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from quant_cases import CASES, SHAPES

import mmq_ext


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ops", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    args.threads = 1 if args.cpu_time else args.threads
    torch.set_num_threads(args.threads)
    machine = {
        "isa": mmq_ext.cpu_isa(),
        "threads": args.threads,
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "rounds": args.rounds,
        "clock": clock.__name__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'op':<12} {'k -> n':<14} {'native ms':>10} {'torch ms':>10} {'ratio':>7}  spread")
    rows = []
    for name in args.ops:
        for k, n in SHAPES:
            native, plain = CASES[name](k, n)
            native(), plain()
            pairs = [(seconds(native, clock), seconds(plain, clock)) for _ in range(args.rounds)]
            ours, theirs = ([pair[i] for pair in pairs] for i in (0, 1))
            row = {
                "op": name,
                "k": k,
                "n": n,
                "native_ms": 1e3 * statistics.median(ours),
                "torch_ms": 1e3 * statistics.median(theirs),
                "ratio": statistics.median(b / a for a, b in pairs),
                "spread": [spread(ours), spread(theirs)],
            }
            rows.append(row)
            print(
                f"{name:<12} {f'{k} -> {n}':<14} {row['native_ms']:>10.2f} {row['torch_ms']:>10.2f}"
                f" {row['ratio']:>6.1f}x  {spread(ours):.0%} {spread(theirs):.0%}",
                flush=True,
            )
    print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
