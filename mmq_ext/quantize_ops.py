# SPDX-License-Identifier: Apache-2.0
"""Operators that quantize: gptq_block, awq_errors, grid_search, hessian_update.

See :mod:`mmq_ext.ops`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mmq_ext import _C
from mmq_ext.checks import check, check_bits, choice, group_count, register, require

GRID_KINDS: Final = {"integer": 0, "float": 1, "symmetric": 2, "restricted": 3}
SCALE_TYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2}


# --- gptq_block -------------------------------------------------------------------------------


def gptq_block_out(
    w: Tensor,
    u: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    float_zero: bool,
    min_code: int,
) -> tuple[Tensor, Tensor]:
    op = "gptq_block"
    check_bits(op, bits)
    require(min_code in (0, 1), op, "a min_code of 0 or 1", min_code)
    check(op, "w", w, torch.float32, None, None)
    n, cols = w.shape
    check(op, "u", u, torch.float32, cols, cols)
    check(op, "scales", scales, torch.float32, n, None)
    check(op, "zeros", zeros, torch.float32, *scales.shape)
    check(op, "group_of", group_of, torch.int32, cols)
    return w.new_empty((n, cols), dtype=torch.uint8), w.new_empty((n, cols))


def _gptq_block_cpu(
    w: Tensor,
    u: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    float_zero: bool,
    min_code: int,
) -> tuple[Tensor, Tensor]:
    codes, errors = gptq_block_out(w, u, scales, zeros, group_of, bits, float_zero, min_code)
    w, u, scales, zeros = w.contiguous(), u.contiguous(), scales.contiguous(), zeros.contiguous()
    group_of = group_of.contiguous()
    _C.gptq_block(
        w.data_ptr(),
        u.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        group_of.data_ptr(),
        codes.data_ptr(),
        errors.data_ptr(),
        w.shape[0],
        w.shape[1],
        scales.shape[1],
        bits,
        float_zero,
        min_code,
    )
    return codes, errors


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
    """The column recursion of GPTQ inside one block (arXiv 2210.17323, algorithm 1).

    For each column i: q_i = grid(w_i), e_i = (w_i - dequantized(q_i)) / u_ii, and
    w_j -= e_i * u_ij for the later columns j.

    Args:
      w: float32 [n, cols], compensated weights of the block; not changed.
      u: float32 [cols, cols], upper triangular with H^-1 = U^T U; the lower part is not read.
      scales, zeros: float32 [n, groups]; zeros are integers, or minima if ``float_zero``.
      group_of: int32 [cols], the column of ``scales`` that each column uses.
      bits: 2..8.
      float_zero: the grid is w = q * scale + zero instead of (q - zero) * scale.
      min_code: 0, or 1 for the restricted symmetric grid, which leaves code 0 unused.

    Returns (codes uint8 [n, cols], errors float32 [n, cols]), bit-identical in all
    implementations. Rows do not influence each other; a row with a NaN gets code ``min_code`` and
    NaN errors from there on. Raises ValueError for a dtype or shape that does not fit, a group
    index that is out of range, or a diagonal of u that is not positive and finite.
    """
    return torch.ops.mmq.gptq_block(  # type: ignore[no-any-return]
        w, u, scales, zeros, group_of, bits, float_zero, min_code
    )


register(
    "gptq_block(Tensor w, Tensor u, Tensor scales, Tensor zeros, Tensor group_of, int bits, "
    "bool float_zero, int min_code) -> (Tensor, Tensor)",
    _gptq_block_cpu,
    gptq_block_out,
)


# --- awq_errors -------------------------------------------------------------------------------


def awq_errors_out(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
) -> Tensor:
    op = "awq_errors"
    check_bits(op, bits)
    check(op, "w", w, torch.float32, None, None)
    k = w.shape[1]
    check(op, "candidates", candidates, torch.float32, None, k)
    check(op, "factor", factor, torch.float32, None, k)
    require(group_size > 0, op, "a positive group size", group_size)
    choice(op, "kind", kind, GRID_KINDS)
    choice(op, "scale_dtype", scale_dtype, SCALE_TYPES)
    return w.new_empty((candidates.shape[0],), dtype=torch.float64)


def _awq_errors_cpu(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
) -> Tensor:
    errors = awq_errors_out(w, candidates, factor, bits, group_size, kind, scale_dtype)
    usable = bool((torch.isfinite(candidates) & (candidates > 0)).all())
    require(usable, "awq_errors", "positive, finite candidates", "others")
    w, candidates, factor = w.contiguous(), candidates.contiguous(), factor.contiguous()
    _C.awq_errors(
        w.data_ptr(),
        candidates.data_ptr(),
        factor.data_ptr(),
        errors.data_ptr(),
        w.shape[0],
        w.shape[1],
        factor.shape[0],
        candidates.shape[0],
        group_size,
        bits,
        GRID_KINDS[kind],
        SCALE_TYPES[scale_dtype],
    )
    return errors


def awq_errors(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
) -> Tensor:
    """||(W - Q(W s) / s) F^T||_F^2 for every candidate scale s (arXiv 2306.00978, eq. 4).

    Args:
      w: float32 [n, k]; linears that share an input are stacked along n.
      candidates: float32 [count, k], positive.
      factor: float32 [rows, k]: the inputs X [tokens, k], or L^T with H = L L^T.
      kind: "integer", "float", "symmetric" or "restricted"; the min-max grid of each group.
      scale_dtype: the storage type that scales are rounded to first.

    Returns float64 [count]; NaN where a weight is NaN or a scale overflows. The sums do not depend
    on the number of threads. Raises ValueError for a dtype or shape that does not fit and for
    candidates that are not positive and finite.
    """
    return torch.ops.mmq.awq_errors(  # type: ignore[no-any-return]
        w, candidates, factor, bits, group_size, kind, scale_dtype
    )


register(
    "awq_errors(Tensor w, Tensor candidates, Tensor factor, int bits, int group_size, str kind, "
    "str scale_dtype) -> Tensor",
    _awq_errors_cpu,
    awq_errors_out,
)


# --- grid_search ------------------------------------------------------------------------------


def grid_search_out(
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
    op = "grid_search"
    check_bits(op, bits)
    check(op, "w", w, torch.float32, None, None)
    n, k = w.shape
    if importance is not None:
        check(op, "importance", importance, torch.float32, k)
    require(group_size > 0, op, "a positive group size", group_size)
    choice(op, "kind", kind, GRID_KINDS)
    choice(op, "scale_dtype", scale_dtype, SCALE_TYPES)
    shape = (n, group_count(k, group_size))
    return w.new_empty(shape), w.new_empty(shape)


def _grid_search_cpu(
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
    scales, zeros = grid_search_out(
        w, importance, bits, group_size, kind, scale_dtype, steps, shrink, exponent
    )
    w = w.contiguous()
    importance = None if importance is None else importance.contiguous()
    _C.grid_search(
        w.data_ptr(),
        0 if importance is None else importance.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        w.shape[0],
        w.shape[1],
        group_size,
        bits,
        GRID_KINDS[kind],
        SCALE_TYPES[scale_dtype],
        steps,
        shrink,
        exponent,
    )
    return scales, zeros


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
    """Scale and zero of every row and group of w, float32 [n, k].

    ``steps=0`` takes the range from min and max. Otherwise the ranges p * [min, max] with
    p = 1, 1 - 1/steps, ... down to 1 - shrink are tried, and the one with the least
    sum importance * |w - w_hat| ** exponent is kept (importance: float32 [k], default ones).

    Returns (scales, zeros), float32 [n, G], rounded to ``scale_dtype``: zeros are integers
    (2**(bits-1) for symmetric kinds), or minima for kind "float". A group with a NaN gets a NaN
    scale; a scale or minimum beyond ``scale_dtype`` is infinite: callers refuse both.
    """
    return torch.ops.mmq.grid_search(  # type: ignore[no-any-return]
        w, importance, bits, group_size, kind, scale_dtype, steps, shrink, exponent
    )


register(
    "grid_search(Tensor w, Tensor? importance, int bits, int group_size, str kind, "
    "str scale_dtype, int steps, float shrink, float exponent) -> (Tensor, Tensor)",
    _grid_search_cpu,
    grid_search_out,
)


# --- hessian_update ---------------------------------------------------------------------------


def hessian_update_out(total: Tensor, x: Tensor) -> None:
    op = "hessian_update"
    check(op, "x", x, torch.float32, None, None)
    k = x.shape[1]
    check(op, "total", total, torch.float64, k, k)
    require(total.is_contiguous(), op, "a contiguous total", f"strides {list(total.stride())}")


def _hessian_update_cpu(total: Tensor, x: Tensor) -> None:
    hessian_update_out(total, x)
    x = x.contiguous()
    _C.hessian_update(total.data_ptr(), x.data_ptr(), x.shape[0], x.shape[1])


def hessian_update(total: Tensor, x: Tensor) -> None:
    """total += x^T x on and above the diagonal; below it nothing is read or written.

    Args:
      total: float64 [k, k], contiguous; changed in place.
      x: float32 [tokens, k].

    Products are summed in fp32 over some thousand tokens, those sums in float64. The result does
    not depend on the number of threads. Raises ValueError for a dtype or shape that does not fit.
    """
    torch.ops.mmq.hessian_update(total, x)


register(
    "hessian_update(Tensor(a!) total, Tensor x) -> ()", _hessian_update_cpu, hessian_update_out
)
