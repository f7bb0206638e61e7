# SPDX-License-Identifier: Apache-2.0
"""Awkward and typical sizes, and packed problems made of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmq_ext import ops, reference

BITS = range(2, 9)
# formats section 5: around the block of 32 and the word, and widths of real models.
PACK_COLS = (1, 31, 32, 33, 127, 128, 129, 1408, 4304)
PACK_ROWS = (1, 2, 7, 64)

# (m, n, k, group_size): no rows, a head with 2 outputs, one column, every group kind (below a quad,
# odd, of a block, of several, the whole row, with a partial last one), and row counts on both sides
# of every kernel's own limits.
GEMM_SHAPES = (
    (0, 8, 32, 32),
    (1, 2, 1408, 128),
    (1, 9, 1, 1),
    (1, 16, 4304, 128),
    (2, 2, 33, 33),
    (3, 7, 33, 7),
    (4, 24, 96, 32),
    (5, 17, 130, 32),
    (6, 16, 64, 64),
    (7, 40, 100, 1),
    (11, 8, 300, 128),
    (12, 10, 260, 100),
    (13, 33, 129, 129),
    (25, 2, 1408, 128),
)


@dataclass(frozen=True)
class Problem:
    """A packed weight, activations, and what packed_gemm takes besides."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    minima: Tensor
    bits: int
    group_size: int
    extra: dict[str, Any]

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    def tiles(self) -> Tensor:
        return ops.repack(ops.pack(self.codes, self.bits), self.bits, self.codes.shape[1])

    def run(self, mode: str, tiles: Tensor | None = None) -> Tensor:
        return ops.packed_gemm(
            self.x,
            self.tiles() if tiles is None else tiles,
            ops.repack_affine(self.scales, self.minima, self.bits, float_zero=True),
            n=self.n,
            bits=self.bits,
            group_size=self.group_size,
            mode=mode,
            **self.extra,
        )

    def reference(self, mode: str) -> Tensor:
        return reference.packed_gemm(
            self.x,
            self.codes,
            self.scales,
            self.minima,
            group_size=self.group_size,
            mode=mode,
            **self.extra,
        )

    def bound(self, mode: str, rounding_only: bool = False) -> Tensor:
        return reference.packed_gemm_bound(
            self.x,
            self.codes,
            self.scales,
            self.minima,
            group_size=self.group_size,
            mode=mode,
            rounding_only=rounding_only,
            **self.extra,
        )


def problem(
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    *,
    seed: int = 0,
    float_zero: bool = False,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    perm: bool = False,
    in_scale: bool = False,
) -> Problem:
    """Random codes, fp16 scales, integer zeros (or float minima) and normal activations."""
    g = torch.Generator().manual_seed(seed)
    groups = ops.group_count(k, group_size)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=g)
    scales = (torch.rand(n, groups, generator=g) * 0.1 + 0.01).half().float()
    if float_zero:
        minima = torch.randn(n, groups, generator=g).half().float()
    else:
        minima = -scales * torch.randint(0, 1 << bits, (n, groups), generator=g)
    extra: dict[str, Any] = {}
    if bias:
        extra["bias"] = torch.randn(n, generator=g)
    if perm:
        extra["perm"] = torch.randperm(k, generator=g).int()
    if in_scale:
        extra["in_scale"] = (torch.rand(k, generator=g) + 0.5).half()
    x = torch.randn(m, k, generator=g).to(dtype)
    return Problem(x, codes, scales, minima, bits, group_size, extra)
