# SPDX-License-Identifier: Apache-2.0
"""Grids, gptq_block, awq_errors, grid_search and hessian_update in plain torch.

The grid arithmetic is float32 everywhere, in the order of operations of csrc/grid.h, because codes
and grids are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from mmq_ext.reference.packed import EPS, spread

SCALE_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# The longest fp32 sum of hessian_update: that of the torch calls; kHessianTokens is less.
HESSIAN_TOKENS: Final = 2048


# --- grids ------------------------------------------------------------------------------------


def make_grid(
    low: Tensor, high: Tensor, bits: int, kind: str, scale_dtype: str
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the ranges [low, high] (float32, any shape), as in csrc/grid.h.

    A range of width 0 gets scale 1; other scales are rounded to ``scale_dtype`` and raised to its
    smallest normal number. The zero is an integer code, 2**(bits-1) for the symmetric kinds, or the
    rounded minimum for kind "float". A NaN range gives a NaN scale.
    """
    dtype = SCALE_DTYPES[scale_dtype]
    top, middle = float((1 << bits) - 1), float(1 << (bits - 1))
    if kind == "integer":
        low, high = low.minimum(low.new_zeros(())), high.maximum(high.new_zeros(()))
    elif kind != "float":
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    if kind == "symmetric":
        scale = 2.0 * high / top
    elif kind == "restricted":
        scale = high / (middle - 1.0)
    else:
        scale = (high - low) / top
    scale = torch.clamp_min(scale.to(dtype).float(), torch.finfo(dtype).smallest_normal)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    if kind == "float":
        return scale, low.to(dtype).float() + 0.0
    if kind != "integer":
        return scale, torch.full_like(scale, middle)
    return scale, torch.nan_to_num(torch.round(-low / scale)).clamp(0.0, top) + 0.0


def codes_of(
    w: Tensor, scale: Tensor, zero: Tensor, bits: int, float_zero: bool, min_code: int = 0
) -> Tensor:
    """Codes of w as float32, round half to even; all tensors broadcast. NaN gets ``min_code``."""
    code = torch.round((w - zero) / scale) if float_zero else torch.round(w / scale) + zero
    return torch.nan_to_num(code, nan=float(min_code)).clamp(min_code, (1 << bits) - 1) + 0.0


def values_of(code: Tensor, scale: Tensor, zero: Tensor, float_zero: bool) -> Tensor:
    """Dequantized codes; all tensors broadcast."""
    return code * scale + zero if float_zero else (code - zero) * scale


def _min_code(kind: str) -> int:
    return 1 if kind == "restricted" else 0


def _per_group(w: Tensor, group_size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """[n, k] to [n, G]: ``reduce`` over each group of each row."""
    if w.shape[1] == 0:
        return w.new_empty((w.shape[0], 0))
    return torch.stack([reduce(part, dim=1) for part in torch.split(w, group_size, dim=1)], dim=1)


# --- gptq_block -------------------------------------------------------------------------------


def gptq_block(
    w: Tensor,
    u: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    float_zero: bool = False,
    min_code: int = 0,
) -> tuple[Tensor, Tensor]:
    """The column recursion of GPTQ (arXiv 2210.17323, algorithm 1), one torch call per step.

    Computes in the dtype of ``w``. In float32 every product and every difference is rounded on its
    own and a weight takes its updates in column order, so that codes and errors equal those of
    ``ops.gptq_block`` bit by bit. In float64 (all inputs) it is the exact recursion.

    Returns (codes uint8 [n, cols], errors [n, cols]).
    """
    w = w.clone()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    errors = torch.empty_like(w)
    for i in range(w.shape[1]):
        scale, zero = scales[:, group_of[i]], zeros[:, group_of[i]]
        code = codes_of(w[:, i], scale, zero, bits, float_zero, min_code)
        error = (w[:, i] - values_of(code, scale, zero, float_zero)) / u[i, i]
        codes[:, i] = code.to(torch.uint8)
        errors[:, i] = error
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return codes, errors


# --- awq_errors -------------------------------------------------------------------------------


def awq_errors(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
) -> tuple[Tensor, Tensor]:
    """||(W - Q(W s) / s) F^T||_F^2 for every candidate s, and how far a kernel may be from it.

    Scaled weights, grids and codes are float32 (a code is not a continuous function of its input);
    the difference D, the product y = D F^T and the squares are float64.

    The bound, with u = 2**-24 and What = Q(W s) / s: a kernel rounds three times on its way to D
    (value, division, difference: |dD| <= u (2 |What| + |D|), second order left to the factor below)
    and k times along the longest add chain of y, hence per element
    |dy| <= u (k |D| + 2 |What| + |D|) |F|^T, and |d sum y^2| <= sum (2 |y| |dy| + dy^2) plus one
    float64 rounding per term. The whole is widened by 1 % for the second-order terms. For the float
    zero the value takes two roundings, bounded with 2 q scale + |zero| instead of 2 |What| s.

    Returns (errors, bound), float64 [count] each.
    """
    k = w.shape[1]
    float_zero = kind == "float"
    errors, bounds = [], []
    factor64 = factor.double()
    for s in candidates:
        scaled = w * s
        low = _per_group(scaled, group_size, torch.amin)
        high = _per_group(scaled, group_size, torch.amax)
        scale, zero = (
            spread(part, group_size, k) for part in make_grid(low, high, bits, kind, scale_dtype)
        )
        code = codes_of(scaled, scale, zero, bits, float_zero, _min_code(kind)).double()
        value = values_of(code, scale.double(), zero.double(), float_zero) / s.double()
        d = w.double() - value
        size = (2 * code * scale.double() + zero.double().abs()) / s.double()
        rounding = (size if float_zero else 2 * value.abs()) + d.abs()
        y = d @ factor64.T
        dy = EPS * ((k * d.abs() + rounding) @ factor64.abs().T)
        errors.append(y.square().sum())
        bounds.append(
            1.01 * (2 * y.abs() * dy + dy.square()).sum() + 2.0**-52 * y.numel() * errors[-1]
        )
    if not errors:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    return torch.stack(errors), torch.stack(bounds)


# --- grid_search ------------------------------------------------------------------------------


def shrink_factors(steps: int, shrink: float) -> Tensor:
    """The range factors p = 1, 1 - 1/steps, ... not below 1 - shrink, float32; 1 if steps is 0."""
    if steps == 0:
        return torch.ones(1)
    count = 1 + int(shrink * steps + 1e-4)
    return 1.0 - torch.arange(count, dtype=torch.float32) / steps


def grid_errors(
    w: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
    importance: Tensor | None = None,
    steps: int = 0,
    shrink: float = 0.8,
    exponent: float = 2.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every shrunk grid of every row and group with its error, P = len(shrink_factors).

    Returns (errors float64, scales float32, zeros float32), [P, n, G] each; the errors are
    sum importance * |w - w_hat| ** exponent over the group.
    """
    k = w.shape[1]
    float_zero = kind == "float"
    low = _per_group(w, group_size, torch.amin)
    high = _per_group(w, group_size, torch.amax)
    weight = torch.ones(k, dtype=torch.float64) if importance is None else importance.double()
    errors, scales, zeros = [], [], []
    for p in shrink_factors(steps, shrink):
        scale, zero = make_grid(p * low, p * high, bits, kind, scale_dtype)
        wide_scale, wide_zero = spread(scale, group_size, k), spread(zero, group_size, k)
        code = codes_of(w, wide_scale, wide_zero, bits, float_zero, _min_code(kind))
        miss = (w - values_of(code, wide_scale, wide_zero, float_zero)).abs().double()
        term = weight * (miss * miss if exponent == 2.0 else miss**exponent)
        errors.append(_per_group(term, group_size, torch.sum))
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(errors), torch.stack(scales), torch.stack(zeros)


def grid_search(
    w: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
    importance: Tensor | None = None,
    steps: int = 0,
    shrink: float = 0.8,
    exponent: float = 2.4,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of every row and group: of the range, or of the best shrunk range.

    Ties go to the wider range. Returns (scales, zeros), float32 [n, G].
    """
    errors, scales, zeros = grid_errors(
        w,
        bits=bits,
        group_size=group_size,
        kind=kind,
        scale_dtype=scale_dtype,
        importance=importance,
        steps=steps,
        shrink=shrink,
        exponent=exponent,
    )
    # The first least error; the widest range if its own error is NaN.
    best = torch.zeros(errors.shape[1:], dtype=torch.int64)
    least = errors[0].clone()
    for i in range(1, errors.shape[0]):
        better = errors[i] < least
        best[better] = i
        least[better] = errors[i][better]
    pick = best.unsqueeze(0)
    return scales.gather(0, pick).squeeze(0), zeros.gather(0, pick).squeeze(0)


# --- hessian_update ---------------------------------------------------------------------------


def hessian_update(total: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """total + x^T x on and above the diagonal, and how far a kernel may be from it.

    With u = 2**-24: a chain of at most HESSIAN_TOKENS multiply-adds errs by its length times u of
    the sum of magnitudes; the 1 more and the part of total are for the float64 sums.

    Returns (sum, bound), float64 [k, k]; the bound is 0 below the diagonal.
    """
    x64 = x.double()
    chain = min(x.shape[0], HESSIAN_TOKENS)
    bound = (chain + 1) * EPS * (x64.abs().T @ x64.abs()) + 2.0**-50 * total.abs()
    return total + (x64.T @ x64).triu(), bound.triu()
