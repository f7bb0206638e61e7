# SPDX-License-Identifier: Apache-2.0
"""grid_search in torch's own calls, for CUDA tensors.

There is no native CUDA kernel, because there is nothing for it to win: a grid is searched once per
matrix, one step is a dozen elementwise passes and a reduction over the matrix, which torch runs at
the memory's rate, and even 81 shrink factors of a 4096 x 4096 matrix read and write it about a
thousand times, which is a fraction of a second beside seconds of GPTQ or AWQ for that matrix.

The grid arithmetic is float32, every operation rounded on its own, in the order of
csrc/cpu/grid.h: scales and zeros of the whole range equal those of the CPU kernels bit by bit. The
errors of shrunk ranges are float64, as on the CPU, and add in another order: of two ranges whose
errors agree to that rounding either may be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_ext.reference import codes_of, make_grid, shrink_factors, values_of


def grid_search(
    w: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
    steps: int,
    shrink: float,
    exponent: float,
) -> tuple[Tensor, Tensor]:
    """Scales and zeros, float32 [n, G]; arguments as :func:`mmq_ext.ops.grid_search`."""
    n, k = w.shape
    whole = k // group_size * group_size
    parts = []
    # The full groups at once, then the partial last one.
    for begin, end, size in ((0, whole, group_size), (whole, k, k - whole)):
        if begin == end:
            continue
        groups = w[:, begin:end].reshape(n, (end - begin) // size, size)
        weight = None if importance is None else importance[begin:end].view(-1, size)
        parts.append(
            _search(groups, weight, bits, kind, scale_dtype, steps, shrink, float(exponent))
        )
    if not parts:
        return w.new_empty((n, 0)), w.new_empty((n, 0))
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


def _search(
    groups: Tensor,
    importance: Tensor | None,
    bits: int,
    kind: str,
    scale_dtype: str,
    steps: int,
    shrink: float,
    exponent: float,
) -> tuple[Tensor, Tensor]:
    """The same for groups [n, G, size], importance [G, size]; ties go to the wider range."""
    if groups.numel() == 0:
        return groups.new_empty(groups.shape[:2]), groups.new_empty(groups.shape[:2])
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scales, zeros = make_grid(low, high, bits, kind, scale_dtype)
    if steps == 0:
        return scales, zeros
    is_float, lowest = kind == "float", 1 if kind == "restricted" else 0

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        codes = codes_of(groups, scale, zero, bits, is_float, lowest)
        miss = (groups - values_of(codes, scale, zero, is_float)).abs().double()
        term = miss * miss if exponent == 2.0 else miss.pow(exponent)
        if importance is not None:
            term = term * importance
        return term.sum(dim=-1)

    least = error(scales, zeros)
    for p in shrink_factors(steps, shrink)[1:].tolist():
        scale, zero = make_grid(p * low, p * high, bits, kind, scale_dtype)
        errors = error(scale, zero)
        better = errors < least
        least = torch.where(better, errors, least)
        scales = torch.where(better, scale, scales)
        zeros = torch.where(better, zero, zeros)
    return scales, zeros
