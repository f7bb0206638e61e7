# SPDX-License-Identifier: Apache-2.0
"""Draws what gemm_table.py --json kept: speed with the machine's ceilings, ratios, linear cost.

    python tests/bench/gemm_plot.py out/bench/gemm.json out/bench

writes roofline.png (GFLOP/s of our modes and the peers against M, under what the measured read
bandwidth allows), peers.png (how many times as fast as the best peer each cell is, with the goals)
and cost.png (time against K * N over the shapes, and against M, with fitted lines). Needs
matplotlib, of `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from gemm_cells import ROWS, TYPICAL
from linear_cost import fit

OURS = {"exact": "#0072b2", "int8": "#d55e00"}
PEERS = ("#999999", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#5d5d5d", "#8c6bb1", "#a6761d")
BITS, GROUP_SIZE = 4, 128


def roofline(data: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(TYPICAL), figsize=(12, 5), sharey=True)
    bandwidth = data["machine"]["read_gb_per_s"]
    colours: dict[str, str] = {}
    for axis, (k, n) in zip(axes, TYPICAL, strict=True):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in data["results"]:
            if (row["k"], row["n"], row["bits"], row["group_size"]) == (k, n, BITS, GROUP_SIZE):
                flops = 2 * row["m"] * k * n / row["median_ms"] / 1e6
                lines[row["kernel"]].append((row["m"], flops))
        for name, points in lines.items():
            own = name.split()[0] if name.split()[0] in OURS else None
            if own is None and name not in colours:
                colours[name] = PEERS[len(colours) % len(PEERS)]
            points.sort()
            axis.plot(
                [m for m, _ in points],
                [y for _, y in points],
                marker="o",
                markersize=4 if own else 3,
                linewidth=2.4 if own else 1.1,
                color=OURS[own] if own else colours[name],
                label=name,
            )
        rows = sorted({m for points in lines.values() for m, _ in points})
        few = [m for m in rows if m <= 64]
        # Every weight read once: 4 bits and a 16-bit scale per group, 2 M operations a weight.
        weight_bytes = BITS / 8 + 2 / GROUP_SIZE
        axis.plot(
            few,
            [2 * m / weight_bytes * bandwidth for m in few],
            "k:",
            label=f"reads at {bandwidth:.0f} GB/s",
        )
        axis.set(xscale="log", yscale="log", xlabel="rows of activations M", title=f"{k} -> {n}")
        axis.set_xticks(rows, [str(m) for m in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GFLOP/s (2 M N K / median time)")
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[-1].legend(
        handles.values(), handles.keys(), fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left"
    )
    figure.suptitle(_title(data))
    _save(figure, path)


def peers(data: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, mode in zip(axes, OURS, strict=True):
        cells = [v for v in data["verdicts"] if v["mode"] == mode]
        rows = sorted({v["m"] for v in cells})
        for position, m in enumerate(rows):
            part = sorted((v["ratio"], v["bits"], v["goal"]) for v in cells if v["m"] == m)
            for place, (ratio, bits, _) in enumerate(part):
                x = position + 0.7 * ((place + 0.5) / len(part) - 0.5)
                four = bits == BITS
                axis.plot(x, ratio, "o" if four else "x", color=OURS[mode], markersize=4)
            for wanted in {goal for *_, goal in part}:
                axis.hlines(wanted, position - 0.4, position + 0.4, color="black", linewidth=1)
        axis.axhline(1, color="grey", linewidth=0.6)
        axis.set_xticks(range(len(rows)), [str(m) for m in rows])
        axis.set(title=f"{mode} (dots: 4 bits, crosses: other widths; bars: goals)")
        axis.set(xlabel="rows of activations M", yscale="log")
        ticks = [0.5, 0.7, 1, 1.5, 2, 3, 5]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("times as fast as the best peer")
    figure.suptitle(_title(data))
    _save(figure, path)


def cost(data: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    at_rows: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    at_shape: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in data["results"]:
        mode = row["kernel"].split()[0]
        if mode not in OURS or (row["bits"], row["group_size"]) != (BITS, GROUP_SIZE):
            continue
        if row["m"] in ROWS:
            size = row["k"] * row["n"] / 1e6
            at_rows[mode, row["m"]].append((size, row["median_ms"]))
        if (row["k"], row["n"]) in TYPICAL and row["m"] >= 32:
            shape = f"{row['k']} -> {row['n']}"
            at_shape[mode, shape].append((row["m"], row["median_ms"]))
    for axis, series, label in ((axes[0], at_rows, "M = {}"), (axes[1], at_shape, "{}")):
        names = list(dict.fromkeys(name for _, name in series))
        for (mode, name), points in series.items():
            if len(points) < 3:
                continue
            sizes, times = (list(part) for part in zip(*sorted(points), strict=True))
            a, b, worst = fit(sizes, times)
            marker = "osD^"[names.index(name) % 4]
            text = f"{mode}, {label.format(name)}: at most {worst:.0%} off"
            axis.plot(sizes, times, marker, color=OURS[mode], markersize=5, label=text)
            axis.plot(sizes, [a + b * size for size in sizes], color=OURS[mode], linewidth=1)
        axis.set(xscale="log", yscale="log", ylabel="ms")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    axes[0].set_xlabel("K N / 1e6, ten shapes; lines a + b K N")
    axes[1].set_xlabel("M; lines a + b M")
    figure.suptitle(_title(data))
    _save(figure, path)


def _title(data: dict[str, Any]) -> str:
    machine = data["machine"]
    return f"packed_gemm, {machine['device']}, {machine['threads']} threads, {machine['isa']}"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, help="what gemm_table.py --json wrote")
    parser.add_argument("folder", type=Path, help="where the pictures are put")
    args = parser.parse_args()
    data = json.loads(args.json.read_text())
    roofline(data, args.folder / "roofline.png")
    peers(data, args.folder / "peers.png")
    cost(data, args.folder / "cost.png")


if __name__ == "__main__":
    main()
