# SPDX-License-Identifier: Apache-2.0
"""Prints every op's largest error, as a share of its elementwise float64 bound.

    python tests/bench/error_table.py [--by-width] [--isas cuda]

One row per op, implementation and awkward shape: the worst of all widths, or with --by-width each
width of packed_gemm. "cuda" are the CUDA kernels on the PTX interpreter, where both are built, with
activations of float16 and of bfloat16. For packed_gemm `rounding` is the share of the rounding
bound around the same computation in float64, `total` the share of the whole bound around the exact
product (in int8 mode that includes the quantization of activations). Ops that must agree with the
reference bit by bit (packing, repacking, gptq_block, grid_search by min and max) count differing
numbers instead, in both columns. Exits with 1 if a share exceeds 1 or a number differs. The last
line is the table as one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compare import seeded, worst_share
from isas import BFLOAT16, CPU, CUDA, KNOWN, running
from shapes import BITS, Problem, problem
from simulated import missing

import mmq_ext
from mmq_ext import ops, reference

# (m, n, k, group_size)
SHAPES = (
    (0, 64, 1408, 128),
    (1, 2, 1408, 128),
    (32, 2, 1408, 128),
    (1, 64, 1408, 128),
    (64, 64, 1408, 128),
    (1, 64, 4304, 128),
    (64, 64, 4304, 128),
    (1, 64, 33, 33),
    (64, 64, 33, 7),
)
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def gemm_shares(p: Problem, mode: str, isa: str) -> tuple[float, float]:
    """Rounding and total error of one product."""
    with running(isa):
        y = p.run(mode)
    if isa == CUDA:
        share = worst_share(y, p.reference(mode), p.cuda_bound())
        return share, share
    rounding = worst_share(y, p.reference(mode), p.bound(mode, rounding_only=True))
    return rounding, worst_share(y, p.reference("exact"), p.bound(mode))


def gemm_rows(isas: list[str], by_width: bool) -> list[dict[str, object]]:
    rows = []
    widths = [(bits,) for bits in BITS] if by_width else [tuple(BITS)]
    kinds = [(kind, isa) for kind in ("exact", "int8") for isa in isas if isa in KNOWN]
    kinds += [("exact, bf16 x", isa) for isa in BFLOAT16 if isa in isas]
    kinds += [(kind, CUDA) for kind in HALVES if CUDA in isas]
    for kind, isa in kinds:
        for (m, n, k, group_size), some in itertools.product(SHAPES, widths):
            problems = [problem(m, n, k, group_size, bits, bias=True) for bits in some]
            if isa == CUDA:
                problems = [p.as_cuda(HALVES[kind]) for p in problems if p.has_cuda_groups]
            elif "bf16" in kind:
                problems = [p.as_bfloat16() for p in problems]
            shares = [gemm_shares(p, "int8" if kind == "int8" else "exact", isa) for p in problems]
            if not shares:
                continue  # this group size is refused there
            rounding, total = (max(column) for column in zip(*shares, strict=True))
            rows.append(
                {
                    "op": f"packed_gemm {kind}",
                    "isa": isa,
                    "shape": f"M={m} N={n} K={k} g={group_size}" + f" b={some[0]}" * by_width,
                    "rounding": rounding,
                    "total": total,
                }
            )
    return rows


def packing_rows(isas: list[str]) -> list[dict[str, object]]:
    rows = []
    devices = [CPU] * any(isa in KNOWN for isa in isas) + [CUDA] * (CUDA in isas)
    for isa in devices:
        for n, k in ((2, 1408), (64, 4304), (64, 33)):
            wrong = 0
            for bits in BITS:
                codes = problem(0, n, k, k, bits).codes
                with running(isa):
                    words = ops.pack(codes, bits)
                    tiles = ops.repack(words, bits, k)
                    wrong += int((ops.unrepack(tiles, bits, n, k) != words).sum())
                wrong += int((words != reference.pack(codes, bits)).sum())
                if isa == CPU:
                    wrong += int((tiles != reference.repack(words, bits, k)).sum())
            shape = f"N={n} K={k}"
            row = {"op": "pack, repack", "isa": isa, "shape": shape}
            rows.append(row | {"rounding": wrong, "total": wrong})
    return rows


def quantization_rows(isas: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def add(op: str, isa: str, shape: str, worst: float) -> None:
        rows.append({"op": op, "isa": isa, "shape": shape, "rounding": worst, "total": worst})

    for isa in isas:
        for n, cols in ((2, 128), (64, 33), (7, 200)):
            wrong = sum(gptq_differences(isa, n, cols, bits) for bits in BITS)
            add("gptq_block", isa, f"N={n} block={cols} g=32", wrong)
        for n, k in ((2, 1408), (2, 4304), (64, 33)):
            w = torch.randn(n, k, generator=seeded(k)) * 0.05
            candidates = torch.exp(0.7 * torch.randn(3, k, generator=seeded(1)))
            inputs = (w, candidates, torch.randn(17, k, generator=seeded(2)))
            share, wrong = 0.0, 0
            for bits in BITS:
                grid = {"bits": bits, "group_size": 128}
                want, bound = reference.awq_errors(*inputs, **grid)
                found = reference.grid_search(w, kind="integer", **grid)
                with running(isa):
                    share = max(share, worst_share(ops.awq_errors(*inputs, **grid), want, bound))
                    got = ops.grid_search(w, **grid)
                wrong += sum(int((a != b).sum()) for a, b in zip(got, found, strict=True))
            add("awq_errors", isa, f"N={n} K={k} g=128 T=17", share)
            add("grid_search", isa, f"N={n} K={k} g=128", wrong)
        for k in (33, 1408):
            total, x = torch.zeros(k, k, dtype=torch.float64), torch.randn(600, k)
            want, bound = reference.hessian_update(total, x)
            with running(isa):
                ops.hessian_update(total, x)
            upper = bound > 0
            share = worst_share(total[upper], want[upper], bound[upper])
            add("hessian_update", isa, f"K={k} T=600", share)
    return rows


def gptq_differences(isa: str, n: int, cols: int, bits: int) -> int:
    """How many codes and errors of a block differ from the reference recursion in fp32."""
    w = torch.randn(n, cols, generator=seeded(0))
    x = torch.randn(2 * cols, cols, generator=seeded(1)).double()
    u = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True).float()
    scales, zeros = reference.grid_search(w, bits=bits, group_size=32, kind="integer")
    group_of = (torch.arange(cols) // 32).to(torch.int32)
    arguments = (w, u, scales, zeros, group_of, bits, False)
    with running(isa):
        got = ops.gptq_block(*arguments)
    want = reference.gptq_block(*arguments)
    return sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--by-width", action="store_true", help="packed_gemm: a row per width")
    every = [*mmq_ext.cpu_isas(), *([] if missing() else [CUDA])]
    parser.add_argument("--isas", default=",".join(every), help="comma-separated; default: all")
    args = parser.parse_args()
    isas = args.isas.split(",")
    if unknown := set(isas) - set(every):
        raise SystemExit(f"--isas: expected some of {every}, got {sorted(unknown)} {missing()}")
    torch.manual_seed(0)
    rows = packing_rows(isas) + gemm_rows(isas, args.by_width) + quantization_rows(isas)
    out = sys.stdout
    out.write(f"{'op':<20} {'isa':<7} {'shape':<30} {'rounding':>9} {'total':>7}\n")
    for row in rows:
        out.write(
            f"{row['op']:<20} {row['isa']:<7} {row['shape']:<30} {row['rounding']:>9.4f} "
            f"{row['total']:>7.4f}\n"
        )
    out.write(json.dumps(rows) + "\n")
    bitwise = ("pack, repack", "gptq_block", "grid_search")
    limits = [0 if row["op"] in bitwise else 1 for row in rows]
    pairs = zip(rows, limits, strict=True)
    return int(any(row["rounding"] > limit or row["total"] > limit for row, limit in pairs))


if __name__ == "__main__":
    sys.exit(main())
