# SPDX-License-Identifier: Apache-2.0
"""What bounds the CUDA kernels: arithmetic from counts, sizes and data sheets. Nothing is timed.

    python tests/bench/cuda_arithmetic.py build/dev/cuda

First table, occupancy: registers (ptxas reports in that folder) and shared memory limit the thread
blocks that fit a multiprocessor. Second table, packed_gemm at 4 bits, groups of 128, symmetric:
the compulsory bytes of each product, and how long tensor cores and instruction issue would need at
their peak rates, as multiples of what memory needs at its own: the largest of 1 and the two bounds
the product. Warp instructions are those of the budgets (tests/ptxsim/budgets.json), of PTX.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from budgets import budget
from cuda_ptxas import usage_of

THREADS = 256  # of every kernel's block
REGISTERS = 65536  # of a multiprocessor
SCHEDULERS = 4  # warp instructions a cycle of a multiprocessor


@dataclass(frozen=True)
class Gpu:
    """Peak rates of NVIDIA's data sheets: memory, dense f16 products into f32, boost clock."""

    name: str
    arch: str
    memory: float  # bytes/s
    tensor: float  # FLOP/s
    multiprocessors: int
    clock: float  # Hz
    shared: int  # bytes of a multiprocessor
    threads: int  # of a multiprocessor

    @property
    def issue(self) -> float:
        return self.multiprocessors * SCHEDULERS * self.clock


GPUS = (
    Gpu("A100 40 GB", "sm_80", 1555e9, 312e12, 108, 1.41e9, 164 << 10, 2048),
    Gpu("RTX 3090", "sm_86", 936e9, 71e12, 82, 1.695e9, 100 << 10, 1536),
    Gpu("H100 SXM", "sm_90", 3350e9, 989e12, 132, 1.83e9, 228 << 10, 2048),
)
# LLaVA-1.5-7B's language part, and BLIP-2's ViT-g and OPT-2.7B.
SHAPES = (
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (1408, 6144),
    (6144, 1408),
    (2560, 10240),
)
ROWS = (1, 16, 64, 512)
# Dynamic shared memory at 4 bits and its own shapes: see csrc/cuda/gemm.h and gptq_block.cu.
DYNAMIC_SHARED = {"packed_gemm_mma": 98304, "packed_gemv": 32768, "gptq_block_kernel": 33024}


def occupancy(folder: Path) -> list[str]:
    lines = ["| kernel | registers | blocks per multiprocessor | warps of those possible |"]
    lines.append("|---|---|---|---|")
    for kernel, row in sorted(usage_of(folder).items()):
        cells: list[list[str]] = [[], [], []]
        for gpu in GPUS:
            if gpu.arch not in row:
                continue
            usage = row[gpu.arch]
            granted = -(-usage.registers // 8) * 8
            shared = usage.shared_bytes + DYNAMIC_SHARED.get(kernel, 0) + 1024
            blocks = min(REGISTERS // (granted * THREADS), gpu.shared // shared)
            blocks = min(blocks, gpu.threads // THREADS)
            cells[0].append(str(usage.registers))
            cells[1].append(str(blocks))
            cells[2].append(f"{blocks * THREADS / gpu.threads:.0%}")
        lines.append("| `" + kernel + "` | " + " | ".join(" / ".join(c) for c in cells) + " |")
    return lines


def product(m: int, n: int, k: int) -> tuple[int, int, float]:
    """Compulsory bytes, operations on the tensor cores, and warp instructions."""
    limits = budget("packed_gemm")["4"]
    blocks = math.ceil(n / 64) * math.ceil(k / 64)
    moved = blocks * 64 * 64 // 2 + 2 * math.ceil(n / 64) * 64 * math.ceil(k / 128)
    moved += 2 * m * (k + n)
    path = "gemv" if m <= 8 else "16" if m <= 16 else "64"
    tile = {"gemv": 8, "16": 16, "64": 64}[path]
    mma = blocks * 16 * math.ceil(m / tile) * tile // 8
    return moved, mma * 2 * 16 * 16 * 8, mma * limits["instructions_per_mma"][path]


def bounds() -> list[str]:
    lines = ["| K -> N | M | MB | FLOP per byte | " + " | ".join(g.name for g in GPUS) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(GPUS))
    for k, n in SHAPES:
        for m in ROWS:
            moved, operations, instructions = product(m, n, k)
            cells = []
            for gpu in GPUS:
                memory = moved / gpu.memory
                tensor = operations / gpu.tensor / memory
                issue = instructions / gpu.issue / memory
                worst = max((1.0, "memory"), (tensor, "tensor cores"), (issue, "issue"))[1]
                cells.append(f"{tensor:.2f}, {issue:.2f}: {worst}")
            head = f"{k} -> {n}" if m == ROWS[0] else ""
            useful = 2 * m * n * k / moved
            lines.append(
                f"| {head} | {m} | {moved / 1e6:.2f} | {useful:.0f} | " + " | ".join(cells) + " |"
            )
    return lines


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write(__doc__ or "")
        return 2
    print("Arithmetic, not timing.", *occupancy(Path(sys.argv[1])), "", *bounds(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
