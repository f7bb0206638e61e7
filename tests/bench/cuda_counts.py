# SPDX-License-Identifier: Apache-2.0
"""Prints what the PTX interpreter counts of packed_gemm's CUDA kernels, per mma of the main loop.

    python tests/bench/cuda_counts.py [--bits 4] [--rows 16,64]

Steady state: the difference of K = 4096 and K = 1024, at N = 256, groups of 128, symmetric. Counts
are no times.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from shapes import problem
from simulated import missing, simulated_cuda

LONG, SHORT = 4096, 1024


def launch(m: int, k: int, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """The counts of one product."""
    p = problem(m, 256, k, 128, bits, symmetric=True).as_cuda(dtype)
    with simulated_cuda(sm_count=1) as simulator:
        p.run("exact")
        found: dict[str, Any] = simulator.launches()[-1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", default="4")
    parser.add_argument("--rows", default="16,64")
    args = parser.parse_args()
    if missing():
        raise SystemExit(missing())
    print("bits   M  activations  instr/mma  wavefronts/mma (ideal)  bytes requested  distinct")
    for bits in map(int, args.bits.split(",")):
        for m in map(int, args.rows.split(",")):
            for dtype in (torch.float16, torch.bfloat16):
                long, short = (launch(m, k, bits, dtype) for k in (LONG, SHORT))
                mma = long["by_opcode"]["mma.m16n8k16"] - short["by_opcode"]["mma.m16n8k16"]
                total = {n: long["total"][n] - short["total"][n] for n in long["total"]}
                read = [total[f"read_bytes_{kind}"] for kind in ("requested", "distinct")]
                print(
                    f"{bits:>4} {m:>3}  {str(dtype)[6:]:<11}  {total['instructions'] / mma:>9.2f}  "
                    f"{total['shared_wavefronts'] / mma:>14.2f} ({total['shared_ideal'] / mma:.2f})"
                    f"  {read[0]:>15,}  {read[1]:>8,}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
