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

from mmq_ext.checks import FLOATS, check, require

TILE_ROWS: Final = 16  # CPU: output rows that are interleaved
BLOCK_COLS: Final = 32  # CPU: in-features of a block; a block of width b takes 64 * b bytes
CUDA_BLOCK: Final = 64  # CUDA: out-features and in-features of a block


def tiles_bytes(n: int, k: int, bits: int, *, cuda: bool = False) -> int:
    """Bytes of the kernels' layout of [n, k] codes, padded to whole tiles or blocks."""
    if cuda:
        return cuda_padded(n) * cuda_padded(k) * bits // 8
    return -(-n // TILE_ROWS) * TILE_ROWS * -(-k // BLOCK_COLS) * BLOCK_COLS * bits // 8


def affine_floats(n: int, groups: int) -> int:
    """How many numbers the CPU's layout of [n, groups] scales, with zeros or minima, has."""
    return -(-n // TILE_ROWS) * TILE_ROWS * groups * 2


def cuda_padded(n: int) -> int:
    """``n`` rounded up to whole CUDA blocks."""
    return -(-n // CUDA_BLOCK) * CUDA_BLOCK


def _minima(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """Minima of float32 ``scales``. -zero * scale is exact for scales from 16 bits."""
    if zeros is None:
        return -float(1 << (bits - 1)) * scales
    return zeros.float() if float_zero else -zeros.float() * scales


def _affine_parts(
    scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool
) -> tuple[Tensor, ...]:
    """What kernels read of a group, [n, G] each: one of the three forms of AffineKind in
    csrc/quant_types.h.

    - 16-bit scales, symmetric: scales.
    - 16-bit scales, integer zeros: scales and zeros in the scales' type; every zero up to 255 is
      exact in both types.
    - otherwise: float32 scales and minima.
    """
    if scales.dtype == torch.float32 or float_zero:
        scales = scales.float()
        return scales, _minima(scales, zeros, bits, float_zero)
    return (scales,) if zeros is None else (scales, zeros.to(scales.dtype))


def cpu_affine(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """The parts of AffineKind, ordered [tile][group][part][16 rows] and flat.

    :func:`affine_floats` numbers, half of them without zeros. Rows beyond n are zero.
    """
    n, groups = scales.shape
    tiles = [
        pad(part, (0, 0, 0, -n % TILE_ROWS)).view(-1, TILE_ROWS, groups)
        for part in _affine_parts(scales, zeros, bits, float_zero)
    ]
    return torch.cat(tiles, dim=1).transpose(1, 2).reshape(-1)


def cpu_unaffine(affine: Tensor, n: int, groups: int) -> tuple[Tensor, Tensor | None]:
    """The scales and the zeros or minima of :func:`cpu_affine`."""
    count = 1 if cpu_affine_kind(affine, n, groups) == 0 else 2
    parts = affine.view(-1, groups, count, TILE_ROWS).permute(2, 0, 3, 1).reshape(count, -1, groups)
    return parts[0, :n].contiguous(), parts[1, :n].contiguous() if count == 2 else None


def cpu_affine_kind(affine: Tensor, n: int, groups: int) -> int:
    """The number of ``affine``'s form, an AffineKind."""
    if affine.dtype == torch.float32:
        return 2
    return 1 if affine.numel() == affine_floats(n, groups) else 0


def check_cpu_affine(op: str, affine: Tensor, n: int, groups: int) -> None:
    """Refuses what :func:`cpu_affine` cannot have made of [n, groups] scales."""
    dtype, size = affine.dtype, affine_floats(n, groups)
    if affine.shape == (size,) and dtype in FLOATS:
        return
    _check_affine_dtype(op, dtype)
    check(op, "affine", affine, dtype, size if dtype == torch.float32 else size // 2)


def cuda_affine(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """The parts of AffineKind, [G, N] if there is one, else [G, N, 2], N = :func:`cuda_padded` (n).

    Columns beyond n are zero.
    """
    parts = _affine_parts(scales, zeros, bits, float_zero)
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


def _check_affine_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        require(False, op, "affine of float32, float16 or bfloat16", dtype)


def check_cuda_affine(op: str, affine: Tensor, n: int, groups: int) -> None:
    """Refuses what :func:`cuda_affine` cannot have made of [n, groups] scales."""
    _check_affine_dtype(op, affine.dtype)
    half = affine.dtype != torch.float32
    shape = (groups, cuda_padded(n))
    last = () if half and affine.dim() == 2 else (2,)
    check(op, "affine", affine, affine.dtype, *shape, *last)
