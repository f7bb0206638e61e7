# SPDX-License-Identifier: Apache-2.0
"""AWQ's second search: the range of each group by its output error (arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from mmq.errors import MmqError
from mmq.grid import Grid, check_weight, dequantize, find_grid, quantize, spread
from mmq.hessian import check_hessian
from mmq.spec import QuantSpec

CLIP_STEPS: Final = 20  # Ranges of 1 - i/20 ...
CLIP_TRIES: Final = 10  # ... for i = 0..9.


@dataclass(frozen=True, eq=False)
class AwqClip:
    """The clipped grid, and the share of each group's range that was kept, float32 [n, G]."""

    grid: Grid
    shrink: Tensor


def awq_clip(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    rows: Tensor | None = None,
    name: str = "weight",
) -> AwqClip:
    """Searches each group's range: p = 1 - i/20, i = 0..9, by the least output error of the group.

    The error of group g is d_g H_gg d_g^T with d = w_hat - w, exact over all tokens.

    Args:
      weight: W diag(s), floating point [n, k].
      hessian: of the *scaled* inputs x / s, float32 [k, k].
      spec: the grid.
      rows: bool [n], which rows to clip (not those of queries and keys); None is all.
      name: for messages.

    Ties go to the larger range. Raises MmqError as :func:`mmq.grid.find_grid`.
    """
    check_weight(weight, name)
    n, k = weight.shape
    check_hessian(hessian, k, name)
    if spec.per_tensor:
        raise MmqError(f"{name}: expected a scale per channel or group to clip, got per_tensor")
    w = weight.detach().float()
    plain = min_max(spec)
    best = find_grid(w, plain, name=name)
    scales, zeros = best.scales.clone(), best.zeros.clone()
    shrink = torch.ones_like(scales)
    least = group_errors(w, best, hessian, spec)
    group_size = spec.row_group_size(k)
    starts = range(0, k, group_size)
    high = torch.stack([w[:, a : a + group_size].amax(dim=1) for a in starts], dim=1)
    low = torch.stack([w[:, a : a + group_size].amin(dim=1) for a in starts], dim=1)
    allowed = torch.ones(n, dtype=torch.bool) if rows is None else rows
    allowed = allowed.to(w.device)
    for i in range(1, CLIP_TRIES):
        p = 1 - i / CLIP_STEPS
        clamped = w.clamp(spread(p * low, k, group_size), spread(p * high, k, group_size))
        grid = find_grid(clamped, plain, name=name)
        errors = group_errors(w, grid, hessian, spec)
        better = (errors < least) & allowed[:, None]
        least = torch.where(better, errors, least)
        scales = torch.where(better, grid.scales, scales)
        zeros = torch.where(better, grid.zeros, zeros)
        shrink[better] = p
    return AwqClip(replace(best, scales=scales, zeros=zeros), shrink)


def min_max(spec: QuantSpec) -> QuantSpec:
    """``spec`` with ranges from min to max."""
    return QuantSpec(
        spec.bits,
        spec.group_size,
        spec.zero,
        per_tensor=spec.per_tensor,
        symmetric_range=spec.symmetric_range,
        scale_dtype=spec.scale_dtype,
    )


def group_errors(w: Tensor, grid: Grid, hessian: Tensor, spec: QuantSpec) -> Tensor:
    """d_g H_gg d_g^T of every row and group, float32 [n, G], with d = w_hat - w."""
    d = dequantize(quantize(w, grid), grid) - w
    k = w.shape[1]
    group_size = spec.row_group_size(k)
    columns = []
    for a in range(0, k, group_size):
        part = d[:, a : a + group_size]
        block = hessian[a : a + group_size, a : a + group_size].float()
        columns.append(((part @ block) * part).sum(dim=1))
    return torch.stack(columns, dim=1)
