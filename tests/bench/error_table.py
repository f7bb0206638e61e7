# SPDX-License-Identifier: Apache-2.0
"""Prints every op's largest error, as a share of its elementwise float64 bound.

    python tests/bench/error_table.py

One row per op, instruction set and awkward shape, the worst of all widths. For packed_gemm
`rounding` is the share of the rounding bound around the same computation in float64, `total` the
share of the whole bound around the exact product (in int8 mode that includes the quantization of
activations). Ops that must agree with the reference bit by bit (packing, repacking, gptq_block,
grid_search by min and max) count differing numbers instead, in both columns. Exits with 1 if a
share exceeds 1 or a number differs. The last line is the table as one JSON document.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compare import seeded, worst_share
from shapes import BITS, problem

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


def gemm_rows() -> list[dict[str, object]]:
    rows = []
    for mode in ("exact", "int8"):
        for isa in mmq_ext.cpu_isas():
            for m, n, k, group_size in SHAPES:
                rounding = total = 0.0
                for bits in BITS:
                    p = problem(m, n, k, group_size, bits, bias=True)
                    with mmq_ext.use_isa(isa):
                        y = p.run(mode)
                    bound = p.bound(mode, rounding_only=True)
                    rounding = max(rounding, worst_share(y, p.reference(mode), bound))
                    total = max(total, worst_share(y, p.reference("exact"), p.bound(mode)))
                shape = f"M={m} N={n} K={k} g={group_size}"
                rows.append(
                    {
                        "op": f"packed_gemm {mode}",
                        "isa": isa,
                        "shape": shape,
                        "rounding": rounding,
                        "total": total,
                    }
                )
    return rows


def packing_rows() -> list[dict[str, object]]:
    rows = []
    for n, k in ((2, 1408), (64, 4304), (64, 33)):
        wrong = 0
        for bits in BITS:
            codes = problem(0, n, k, k, bits).codes
            words = ops.pack(codes, bits)
            tiles = ops.repack(words, bits, k)
            wrong += int((words != reference.pack(codes, bits)).sum())
            wrong += int((tiles != reference.repack(words, bits, k)).sum())
            wrong += int((ops.unrepack(tiles, bits, n, k) != words).sum())
        shape = f"N={n} K={k}"
        rows.append(
            {"op": "pack, repack", "isa": "all", "shape": shape, "rounding": wrong, "total": wrong}
        )
    return rows


def quantization_rows() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def add(op: str, isa: str, shape: str, worst: float) -> None:
        rows.append({"op": op, "isa": isa, "shape": shape, "rounding": worst, "total": worst})

    for isa in mmq_ext.cpu_isas():
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
                with mmq_ext.use_isa(isa):
                    share = max(share, worst_share(ops.awq_errors(*inputs, **grid), want, bound))
                    got = ops.grid_search(w, **grid)
                wrong += sum(int((a != b).sum()) for a, b in zip(got, found, strict=True))
            add("awq_errors", isa, f"N={n} K={k} g=128 T=17", share)
            add("grid_search", isa, f"N={n} K={k} g=128", wrong)
    return rows


def gptq_differences(isa: str, n: int, cols: int, bits: int) -> int:
    """How many codes and errors of a block differ from the reference recursion in fp32."""
    w = torch.randn(n, cols, generator=seeded(0))
    x = torch.randn(2 * cols, cols, generator=seeded(1)).double()
    u = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True).float()
    scales, zeros = reference.grid_search(w, bits=bits, group_size=32, kind="integer")
    group_of = (torch.arange(cols) // 32).to(torch.int32)
    arguments = (w, u, scales, zeros, group_of, bits, False)
    with mmq_ext.use_isa(isa):
        got = ops.gptq_block(*arguments)
    want = reference.gptq_block(*arguments)
    return sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))


def main() -> int:
    torch.manual_seed(0)
    rows = packing_rows() + gemm_rows() + quantization_rows()
    out = sys.stdout
    out.write(f"{'op':<18} {'isa':<7} {'shape':<26} {'rounding':>9} {'total':>7}\n")
    for row in rows:
        out.write(
            f"{row['op']:<18} {row['isa']:<7} {row['shape']:<26} {row['rounding']:>9.4f} "
            f"{row['total']:>7.4f}\n"
        )
    out.write(json.dumps(rows) + "\n")
    bitwise = ("pack, repack", "gptq_block", "grid_search")
    limits = [0 if row["op"] in bitwise else 1 for row in rows]
    pairs = zip(rows, limits, strict=True)
    return int(any(row["rounding"] > limit or row["total"] > limit for row, limit in pairs))


if __name__ == "__main__":
    sys.exit(main())
