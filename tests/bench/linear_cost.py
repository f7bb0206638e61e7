# SPDX-License-Identifier: Apache-2.0
"""Whether packed_gemm's time grows linearly with K * N and with M: a fit and a plot.

    python tests/bench/linear_cost.py [--png cost.png]

Times are medians of 4-bit products, weights rotated so that few rows read them from memory. Each
series is fitted by t = a + b * size (least squares on relative residuals); printed are a, b and the
largest relative distance of a measurement from its fit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gemm_cases import BEYOND_CACHE_BYTES, MOST_COPIES, ours

import mmq_ext

BITS, GROUP = 4, 128
WIDTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192)  # k = n
ROWS = (32, 64, 128, 256, 384, 512)


def median_ms(m: int, k: int, n: int, mode: str, rounds: int) -> float:
    # Timed alone: small weights too must come from memory, or the line has a knee at the cache.
    copies = BEYOND_CACHE_BYTES if m == 1 else MOST_COPIES
    case = ours(m, k, n, group_size=GROUP, bits=BITS, mode=mode, most_copies=copies)
    times = []
    for round_ in range(rounds + 2):
        started = time.perf_counter()
        case.run()
        if round_ >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def fit(sizes: list[float], times: list[float]) -> tuple[float, float, float]:
    """a, b of t = a + b * size and the largest relative residual."""
    weights = 1 / np.array(times)
    matrix = np.stack([weights, np.array(sizes) * weights], axis=1)
    (a, b), *_ = np.linalg.lstsq(matrix, np.ones(len(times)), rcond=None)
    worst = max(abs((a + b * s) / t - 1) for s, t in zip(sizes, times, strict=True))
    return float(a), float(b), float(worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--png", type=Path, default=None, help="needs matplotlib")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.stdout.write(f"{mmq_ext.cpu_isa()}, {args.threads} threads, {BITS} bits\n")
    series: list[dict[str, object]] = []
    for mode in ("exact", "int8"):
        for m in (1, 64):
            sizes = [float(w * w) / 1e6 for w in WIDTHS]
            times = [median_ms(m, w, w, mode, args.rounds) for w in WIDTHS]
            series.append({"mode": mode, "over": f"K N / 1e6, M = {m}", "x": sizes, "ms": times})
        times = [median_ms(m, 2048, 2048, mode, args.rounds) for m in ROWS]
        over = "M, K = N = 2048"
        series.append({"mode": mode, "over": over, "x": [float(m) for m in ROWS], "ms": times})
    for row in series:
        a, b, worst = fit(row["x"], row["ms"])  # type: ignore[arg-type]
        row |= {"a_ms": a, "b_ms": b, "worst": worst}
        sys.stdout.write(
            f"{row['mode']:<6} {row['over']:<22} {a:8.4f} ms + {b:.5f} ms * size, "
            f"at most {worst:.0%} off\n"
        )
    if args.png is not None:
        plot(series, args.png)
    sys.stdout.write(json.dumps({"isa": mmq_ext.cpu_isa(), "series": series}) + "\n")


def plot(series: list[dict[str, object]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    names = list(dict.fromkeys(row["over"] for row in series))
    for row in series:
        axis = axes[names.index(row["over"])]
        x = np.array(row["x"])
        points = axis.plot(x, row["ms"], "o", label=f"{row['mode']}")[0]
        axis.plot(x, row["a_ms"] + row["b_ms"] * x, color=points.get_color())
        axis.set_xlabel(str(row["over"]))
        axis.set_ylabel("ms")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
