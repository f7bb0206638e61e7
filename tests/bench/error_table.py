# SPDX-License-Identifier: Apache-2.0
"""Prints packed_gemm's largest error, as a share of its elementwise float64 bound.

    python tests/bench/error_table.py

One row per mode, instruction set and awkward shape, the worst of all widths: `rounding` is the
share of the rounding bound around the same computation in float64, `total` the share of the whole
bound around the exact product (in int8 mode that includes the quantization of activations). Packing
and repacking are bitwise; their row counts differing words. Exits with 1 if a share exceeds 1. The
last line is the table as one JSON document.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from compare import worst_share
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


def main() -> int:
    torch.manual_seed(0)
    rows = packing_rows() + gemm_rows()
    out = sys.stdout
    out.write(f"{'op':<18} {'isa':<7} {'shape':<26} {'rounding':>9} {'total':>7}\n")
    for row in rows:
        out.write(
            f"{row['op']:<18} {row['isa']:<7} {row['shape']:<26} {row['rounding']:>9.4f} "
            f"{row['total']:>7.4f}\n"
        )
    out.write(json.dumps(rows) + "\n")
    return int(any(row["rounding"] > 1 or row["total"] > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
