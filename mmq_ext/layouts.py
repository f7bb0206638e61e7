# SPDX-License-Identifier: Apache-2.0
"""Sizes of the packed layouts that the kernels of each device read, and the order of scales.

Codes are laid out natively (csrc/cpu/layout.h, csrc/cuda/tiles.h); the sizes are here again for
fakes, which may not call native code, and tests compare them. Shapes as in :mod:`mmq_ext.ops`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmq_ext.checks import check, require

TILE_ROWS: Final = 8  # CPU: output rows that are interleaved
BLOCK_COLS: Final = 32  # CPU: in-features of a block; a block of width b takes 32 * b bytes
CUDA_BLOCK: Final = 64  # CUDA: out-features and in-features of a block


def tiles_bytes(n: int, k: int, bits: int, *, cuda: bool = False) -> int:
    """Bytes of the kernels' layout of [n, k] codes, padded to whole tiles or blocks."""
    if cuda:
        return cuda_padded(n) * cuda_padded(k) * bits // 8
    return -(-n // TILE_ROWS) * -(-k // BLOCK_COLS) * BLOCK_COLS * bits


def affine_floats(n: int, groups: int) -> int:
    """Number of float32 values in the CPU's layout of [n, groups] scales and minima."""
    return -(-n // TILE_ROWS) * TILE_ROWS * groups * 2


def cuda_padded(n: int) -> int:
    """``n`` rounded up to whole CUDA blocks."""
    return -(-n // CUDA_BLOCK) * CUDA_BLOCK


def _minima(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """Minima of float32 ``scales``. -zero * scale is exact for scales from 16 bits."""
    if zeros is None:
        return -float(1 << (bits - 1)) * scales
    return zeros.float() if float_zero else -zeros.float() * scales


def cpu_affine(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """float32 [:func:`affine_floats`], ordered [tile][group][scale, minimum][8 rows].

    Rows beyond n are zero.
    """
    n, groups = scales.shape
    scales = scales.float()
    both = torch.stack((scales, _minima(scales, zeros, bits, float_zero)), dim=1)
    both = pad(both, (0, 0, 0, 0, 0, -n % TILE_ROWS))
    return both.view(-1, TILE_ROWS, 2, groups).permute(0, 3, 2, 1).reshape(-1)


def cpu_unaffine(affine: Tensor, n: int, groups: int) -> tuple[Tensor, Tensor]:
    """The scales and minima of :func:`cpu_affine`."""
    both = affine.view(-1, groups, 2, TILE_ROWS).permute(2, 0, 3, 1).reshape(2, -1, groups)
    return both[0, :n].contiguous(), both[1, :n].contiguous()


def cuda_affine(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """One of the three forms of AffineKind in csrc/cuda/launchers.h, N = :func:`cuda_padded` (n).

    - 16-bit scales, symmetric: [G, N] in the scales' type.
    - 16-bit scales, integer zeros: [G, N, 2] in the scales' type, scale and zero; every zero up to
      255 is exact in both types.
    - otherwise: float32 [G, N, 2], scale and minimum.

    Columns beyond n are zero.
    """
    if scales.dtype == torch.float32 or float_zero:
        scales = scales.float()
        parts = [scales, _minima(scales, zeros, bits, float_zero)]
    elif zeros is not None:
        parts = [scales, zeros.to(scales.dtype)]
    else:
        parts = [scales]
    n = scales.shape[0]
    padded = [pad(part.T, (0, cuda_padded(n) - n)) for part in parts]
    return padded[0].contiguous() if len(padded) == 1 else torch.stack(padded, dim=-1)


def cuda_unaffine(affine: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
    """The scales and the zeros or minima of :func:`cuda_affine`."""
    parts = [
        part[:, :n].T.contiguous() for part in affine.reshape(*affine.shape[:2], -1).unbind(-1)
    ]
    return parts[0], parts[1] if len(parts) == 2 else None


def cuda_affine_kind(affine: Tensor) -> int:
    """The number of ``affine``'s form, an AffineKind."""
    if affine.dtype == torch.float32:
        return 2
    return affine.dim() - 2


def check_cuda_affine(op: str, affine: Tensor, n: int, groups: int) -> None:
    """Refuses what :func:`cuda_affine` cannot have made of [n, groups] scales."""
    half = affine.dtype in (torch.float16, torch.bfloat16)
    require(
        half or affine.dtype == torch.float32,
        op,
        "affine of float32, float16 or bfloat16",
        affine.dtype,
    )
    shape = (groups, cuda_padded(n))
    last = () if half and affine.dim() == 2 else (2,)
    check(op, "affine", affine, affine.dtype, *shape, *last)
