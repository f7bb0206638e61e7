# SPDX-License-Identifier: Apache-2.0
"""Whole steps of quantizing one linear beside the papers' loops in torch.

    python tests/bench/layer_table.py [--steps hessian gptq awq]

``hessian``: T tokens into the accumulator, beside one product x^T x over the same tokens; the rate
is that of half its work. ``gptq``: ``mmq.gptq`` on a Hessian at hand, without and with its report
(which measures the size of the outputs by a product), beside algorithm 1; tr(D H D^T) / 2 of both.
``awq``: the search over 20 exponents, all exact or ranked, beside 20 evaluations in torch;
statistics at hand.
Both sides alternate; times are medians, the spread is (max - min) / median, ratios are medians over
rounds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from layer_cases import gptq_loop, half_of_blas
from quant_cases import awq_pair
from torch import Tensor

import mmq
import mmq_ext
from mmq.awq import awq_scales, error_factor
from mmq.hessian import Hessian, stats_of
from mmq.options import AwqOptions, GptqOptions
from mmq.report import make_report, output_error

SHAPES = ((4096, 4096), (1408, 6144))  # k -> n
BITS, GROUP = 4, 128
EXPONENTS = 20
Row = dict[str, object]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(step: str, shape: str, sides: dict[str, Callable[[], object]], rounds: int) -> Row:
    """Times the sides in turn; the last one is the loop that the others are compared with."""
    for run in sides.values():
        run()
    times = [[seconds(run) for run in sides.values()] for _ in range(rounds)]
    row: Row = {"step": step, "shape": shape}
    for i, name in enumerate(sides):
        mine = [round_[i] for round_ in times]
        middle = statistics.median(mine)
        row[name] = {
            "ms": 1e3 * middle,
            "spread": (max(mine) - min(mine)) / middle,
            "ratio": statistics.median(round_[-1] / round_[i] for round_ in times),
        }
        sys.stdout.write(
            f"{step:<8} {shape:<13} {name:<22} {1e3 * middle:>9.1f} ms "
            f"+-{row[name]['spread']:>4.0%} {row[name]['ratio']:>6.2f}x\n"  # type: ignore[index]
        )
        sys.stdout.flush()
    return row


def inputs(k: int, tokens: int) -> Tensor:
    """Correlated channels of unequal size."""
    g = torch.Generator().manual_seed(0)
    mix = torch.eye(k) + 0.3 * torch.randn(k, k, generator=g) / k**0.5
    return (torch.randn(tokens, k, generator=g) * torch.exp(torch.randn(k, generator=g))) @ mix


def hessian_row(k: int, n: int, rounds: int) -> Row:
    del n
    x, out = inputs(k, 8192), torch.empty(k, k)

    def ours() -> Tensor:
        hessian = Hessian(k)
        hessian.add(x)
        return hessian.finish()

    row = compare(
        "hessian", str(k), {"Hessian": ours, "x^T x": lambda: half_of_blas(x, out)}, rounds
    )
    rate = row["Hessian"]["ratio"] / 2  # type: ignore[index]
    sys.stdout.write(f"{'':<22} rate of half the work: {rate:.2f}\n")
    return row | {"rate_of_half": rate}


def gptq_row(k: int, n: int, rounds: int) -> Row:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    h, spec = stats_of(inputs(k, 5120)).hessian, mmq.QuantSpec(BITS, GROUP)
    plain = GptqOptions(order="none")
    packed, reports, mean = {}, {}, float(h.diagonal().mean())

    def quantize(name: str, options: GptqOptions) -> None:
        packed[name], reports[name] = mmq.gptq(w, h, spec, options)

    def report() -> None:
        details = reports["group"].gptq
        make_report("w", w, packed["group"], h, gptq=details, ridge=details.damp * mean)

    sides: dict[str, Callable[[], object]] = {
        "mmq.gptq": lambda: quantize("group", GptqOptions()),
        "mmq.gptq order none": lambda: quantize("none", plain),
        "its report alone": report,
        "algorithm 1": lambda: gptq_loop(w, h, BITS, GROUP),
    }
    row = compare("gptq", f"{k} -> {n}", sides, rounds)
    results = {name: found.dequantize() for name, found in packed.items()}
    results["loop"] = gptq_loop(w, h, BITS, GROUP)
    errors = {name: output_error(result - w, h) for name, result in results.items()}
    told = ", ".join(f"{name} {value:.3f}" for name, value in errors.items())
    without = row["mmq.gptq"]["ms"] - row["its report alone"]["ms"]  # type: ignore[index]
    ratio = row["algorithm 1"]["ms"] / without  # type: ignore[index]
    sys.stdout.write(f"{'':<22} without the report {without:.0f} ms, {ratio:.2f}x; errors {told}\n")
    return row | {"errors": errors, "ratio_without_report": ratio}


def awq_row(k: int, n: int, rounds: int) -> Row:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02
    x, spec = inputs(k, 2048), mmq.QuantSpec(BITS, GROUP)
    mean_abs = x.abs().mean(dim=0)
    found = {}

    def search(how: str) -> None:
        chosen = AwqOptions(steps=EXPONENTS - 1, search=how)  # type: ignore[arg-type]
        found[how] = awq_scales([w], mean_abs, error_factor(x), spec, chosen)

    sides: dict[str, Callable[[], object]] = {
        "ranked": lambda: search("ranked"),
        "exhaustive": lambda: search("exhaustive"),
        "torch": awq_pair(k, n, tokens=2048, count=EXPONENTS)[1],
    }
    row = compare("awq", f"{k} -> {n}", sides, rounds)
    least = min(found["exhaustive"].errors)
    at = round(found["ranked"].alpha * (EXPONENTS - 1))
    regret = found["exhaustive"].errors[at] / least - 1
    sys.stdout.write(f"{'':<22} ranked's choice is {regret:.4%} above the least error\n")
    return row | {"regret": regret}


ROWS = {"hessian": hessian_row, "gptq": gptq_row, "awq": awq_row}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--shape", type=int, default=None, help="0 or 1: one shape only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = {"isa": mmq_ext.cpu_isa(), "threads": args.threads, "torch": torch.__version__}
    sys.stdout.write(f"{machine} rounds {args.rounds}\n")
    shapes = SHAPES if args.shape is None else [SHAPES[args.shape]]
    rows = [ROWS[step](k, n, args.rounds) for step in args.steps for k, n in shapes]
    sys.stdout.write(json.dumps({"machine": machine, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
