# SPDX-License-Identifier: Apache-2.0
"""Awkward and typical sizes, and packed problems made of them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmq_ext import ops, reference

BITS = range(2, 9)
# formats section 5: around the block of 32 and the word, and widths of real models.
PACK_COLS = (1, 31, 32, 33, 127, 128, 129, 1408, 4304)
PACK_ROWS = (1, 2, 7, 17, 64)

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
    zeros: Tensor | None  # integers; None with float minima
    bits: int
    group_size: int
    extra: dict[str, Any]

    @property
    def n(self) -> int:
        return int(self.codes.shape[0])

    def tiles(self) -> Tensor:
        return ops.repack(ops.pack(self.codes, self.bits), self.bits, self.codes.shape[1])

    def as_cuda(self, dtype: torch.dtype = torch.float16) -> "Problem":
        """The same with activations of 16 bits, and a bias that has them exactly."""
        dtype = dtype if self.x.dtype == torch.float32 else self.x.dtype
        extra = dict(self.extra)
        if "bias" in extra:
            extra["bias"] = extra["bias"].to(dtype).float()
        return replace(self, x=self.x.to(dtype), extra=extra)

    def as_bfloat16(self) -> "Problem":
        """The same with bfloat16 activations."""
        return replace(self, x=self.x.bfloat16())

    @property
    def has_cuda_groups(self) -> bool:
        """Whether the CUDA kernel has this group size: multiples of 16, or one group per row."""
        return self.group_size % 16 == 0 or self.group_size >= self.codes.shape[1]

    def affine(self) -> Tensor:
        """From 16-bit scales and zeros where there are any; zeros all 2^(b-1) are symmetric."""
        if self.zeros is None:
            return ops.repack_affine(self.scales, self.minima, self.bits, float_zero=True)
        symmetric = bool((self.zeros == 1 << (self.bits - 1)).all())
        zeros = None if symmetric else self.zeros
        return ops.repack_affine(self.scales.half(), zeros, self.bits, float_zero=False)

    def run(self, mode: str, tiles: Tensor | None = None) -> Tensor:
        return ops.packed_gemm(
            self.x,
            self.tiles() if tiles is None else tiles,
            self.affine(),
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

    def cuda_bound(self) -> Tensor:
        """Elementwise bound of the CUDA kernel's error, float64 [m, n].

        It adds s * sum x (q - mid) and m' * sum x in fp32, with m' = minimum + mid * s and sums
        over at most 64 columns: an addend passes 64 additions in a sum, then one fused step per 16
        columns or more for each of the two parts, and 8 for m', scale, bias and the joining of
        partial sums. Tensor cores may truncate where fp32 rounds, hence 2^-23 for each. A divided
        activation is rounded to its type, as is the result.
        """
        k = self.codes.shape[1]
        middle = 1 << (self.bits - 1)
        scales, minima = (
            part.double().repeat_interleave(self.group_size, dim=1)[:, :k]
            for part in (self.scales, self.minima)
        )
        codes = self.codes.double()
        apart = (codes - middle).abs() * scales + (minima + middle * scales).abs()
        apart += 2.0**-23 * (middle * scales + minima.abs())  # m' cancels
        used = reference.used_activations(
            self.x, self.extra.get("perm"), self.extra.get("in_scale"), torch.float64
        ).abs()
        relative, absolute = reference.OUTPUT_EPS[self.x.dtype]
        bias = self.extra.get("bias")
        size = used @ apart.T + (0.0 if bias is None else bias.double().abs())
        bound = 2.0**-23 * (64 + 2 * -(-k // 16) + 8) * size
        if "in_scale" in self.extra:
            bound += used @ (relative * (codes * scales + minima).abs()).T
            bound += absolute * apart.sum(dim=1)
        return bound + relative * (self.reference("exact").abs() + bound) + absolute


def problem(
    m: int,
    n: int,
    k: int,
    group_size: int,
    bits: int,
    *,
    seed: int = 0,
    float_zero: bool = False,
    symmetric: bool = False,
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
    zeros = None
    if float_zero:
        minima = torch.randn(n, groups, generator=g).half().float()
    else:
        zeros = torch.randint(0, 1 << bits, (n, groups), generator=g)
        if symmetric:
            zeros.fill_(1 << (bits - 1))
        minima = -scales * zeros
    extra: dict[str, Any] = {}
    if bias:
        extra["bias"] = torch.randn(n, generator=g)
    if perm:
        extra["perm"] = torch.randperm(k, generator=g).int()
    if in_scale:
        extra["in_scale"] = (torch.rand(k, generator=g) + 0.5).half()
    x = torch.randn(m, k, generator=g).to(dtype)
    return Problem(x, codes, scales, minima, zeros, bits, group_size, extra)
