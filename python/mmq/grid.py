# SPDX-License-Identifier: Apache-2.0
"""The grid of one weight matrix: scales and zeros per row and group, and rounding onto it.

The arithmetic is fp32, round half to even, in the order the kernels use, so that codes chosen here
and codes chosen by the kernels are bitwise equal, and dequantized values are what the packed layer
multiplies with. Shapes: W is [n, k]; G groups of ``group_size`` in-features per row, the last one
may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmq.errors import MmqError
from mmq.finite import all_finite
from mmq.spec import QuantSpec
from mmq_ext import ops

WEIGHTED_CLIP_EXPONENT = 2.0  # With importance = diag(H), sum h |w - w_hat|^2 bounds the output.


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales and zeros of the groups of a matrix.

    - ``scales``: float32 [n, G], positive, already rounded to the storage type; [1, 1] if one scale
      serves the whole matrix.
    - ``zeros``: float32, same shape: integers in [0, 2**bits - 1], or minima if ``float_zero``.
    - ``group_size``: in-features per group, -1 for one group per row.

    - ``min_code``: the smallest code that rounding may choose; 1 for the restricted symmetric grid.

    A code q stands for (q - zero) * scale, or q * scale + zero if ``float_zero``.
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    float_zero: bool
    min_code: int = 0

    def group_of(self, k: int) -> Tensor:
        """The column of ``scales`` that each of ``k`` in-features uses, int64 [k]."""
        columns = torch.arange(k, device=self.scales.device)
        return columns * 0 if self.group_size == -1 else columns // self.group_size

    def rows(self, n: int) -> Grid:
        """The same grid with [n, G] scales and zeros, where one of the matrix was broadcast."""
        if self.scales.shape[0] == n:
            return self
        shape = (n, self.scales.shape[1])
        return replace(
            self,
            scales=self.scales.expand(shape).contiguous(),
            zeros=self.zeros.expand(shape).contiguous(),
        )


def check_weight(w: Tensor, name: str = "weight") -> None:
    """Refuses what is no matrix of finite floating-point numbers, or an empty one.

    Raises MmqError that names ``name``.
    """
    if w.dim() != 2 or w.numel() == 0 or not w.is_floating_point():
        raise MmqError(
            f"{name}: expected a floating-point matrix [n, k] with n, k >= 1, got {w.dtype} "
            f"{list(w.shape)}"
        )
    if not all_finite(w):
        bad = int((~torch.isfinite(w)).sum())
        raise MmqError(f"{name}: expected finite weights, got {bad} that are NaN or infinite")


def find_grid(
    w: Tensor, spec: QuantSpec, importance: Tensor | None = None, *, name: str = "weight"
) -> Grid:
    """The grid of ``w`` [n, k] under ``spec``: from min and max, or the best shrunk range.

    With ``spec.clip == "mse"`` the range p * [min, max] with the least
    sum |w - w_hat| ** spec.clip_exponent of each group is kept. ``importance`` (float [k], not
    negative, for example the diagonal of the Hessian) weights that sum and sets the exponent to 2.

    Raises MmqError, naming ``name``, for non-finite weights and for scales or minima that
    overflow their storage type.
    """
    check_weight(w, name)
    n, k = w.shape
    values = w.detach().float()
    group_size = spec.row_group_size(k)
    if spec.per_tensor:
        values = values.reshape(1, n * k)
        group_size = n * k
    exponent = spec.clip_exponent
    if importance is not None:
        _check_importance(importance, k, name)
        exponent = WEIGHTED_CLIP_EXPONENT
        importance = importance.float()
        if spec.per_tensor:
            importance = importance.repeat(n)
    scales, zeros = ops.grid_search(
        values,
        bits=spec.bits,
        group_size=group_size,
        kind=spec.kind,
        scale_dtype=spec.scale_dtype,
        importance=importance,
        steps=0 if spec.clip == "none" else spec.clip_steps,
        shrink=spec.clip_shrink,
        exponent=exponent,
    )
    for what, tensor in (("scales", scales), ("minima", zeros)):
        if not bool(torch.isfinite(tensor).all()):
            raise MmqError(
                f"{name}: expected {what} that fit {spec.scale_dtype}, got weights up to "
                f"{float(values.abs().max()):.3g}; use scale_dtype bfloat16 or float32"
            )
    return Grid(
        scales,
        zeros,
        spec.bits,
        spec.group_size,
        float_zero=spec.zero == "float",
        min_code=1 if spec.kind == "restricted" else 0,
    )


def _check_importance(importance: Tensor, k: int, name: str) -> None:
    if importance.shape != (k,):
        raise MmqError(f"{name}: expected importance of shape [{k}], got {list(importance.shape)}")
    if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise MmqError(f"{name}: expected importance that is finite and not negative")


def spread(values: Tensor, k: int, group_size: int) -> Tensor:
    """Per-group values [n, G] as per-column values, [n, k] or (one group) [n, 1]."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(group_size, dim=1)[:, :k]


def by_group(values: Tensor, grid: Grid) -> list[tuple[Tensor, Tensor, Tensor]]:
    """``values`` [n, k] as views with the scales and zeros that broadcast over them: the whole
    groups, [n, G', group_size], and a shorter last one; nothing is copied."""
    k = values.shape[1]
    if grid.scales.shape[1] == 1:
        return [(values, grid.scales, grid.zeros)]
    whole = k // grid.group_size
    parts = []
    if whole:
        view = values[:, : whole * grid.group_size].view(-1, whole, grid.group_size)
        parts.append((view, grid.scales[:, :whole, None], grid.zeros[:, :whole, None]))
    if k % grid.group_size:
        tail = values[:, whole * grid.group_size :]
        parts.append((tail, grid.scales[:, whole:], grid.zeros[:, whole:]))
    return parts


def quantize(w: Tensor, grid: Grid) -> Tensor:
    """The codes of ``w`` [n, k] on ``grid``: uint8 [n, k], clamped to the grid's."""
    values = w.to(torch.float32, copy=True)
    for part, scales, zeros in by_group(values, grid):
        if grid.float_zero:
            part.sub_(zeros).div_(scales).round_()
        else:
            part.div_(scales).round_().add_(zeros)
    return values.clamp_(grid.min_code, (1 << grid.bits) - 1).to(torch.uint8)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The values of ``codes`` uint8 [n, k]: float32 [n, k], exactly what the kernels use."""
    values = codes.to(torch.float32, copy=True)
    for part, scales, zeros in by_group(values, grid):
        if grid.float_zero:
            part.mul_(scales).add_(zeros)
        else:
            part.sub_(zeros).mul_(scales)
    return values
