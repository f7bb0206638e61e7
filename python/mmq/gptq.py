# SPDX-License-Identifier: Apache-2.0
"""GPTQ: rounding column by column, each column's error compensated by the columns not yet rounded.

Frantar et al., arXiv 2210.17323, algorithm 1, with its symbols: W [n, k], H = 2 E[x x^T], U upper
triangular with H^-1 = U^T U, e_i = (w_i - w_hat_i) / U_ii, W[:, i..] -= e_i U[i, i..].

Between blocks R = U^-1 serves instead, H = R R^T, a Cholesky factor that is inverted whole only for
matrices of many rows, where that is the lesser work.
With D the target minus W_hat, E = D R; so a block B of columns behind others (<) has the weights
W_B - E_< U_<B = W_B + D_< (R_<B U_BB), in which only U_BB = R_BB^-1 is an inverse. The recursion
inside takes E_B U_BB off them, and what is left is W_hat.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from mmq.correction import gptaq_block, gptaq_matrix, retargeted
from mmq.errors import MmqError
from mmq.finite import all_finite
from mmq.grid import Grid, check_weight, find_grid, quantize
from mmq.hessian import check_hessian
from mmq.options import GptqOptions, Order
from mmq.packed import PackedWeight
from mmq.report import GptqDetails, Report, make_report, squares
from mmq.spec import QuantSpec
from mmq_ext import ops

LOGGER: Final = logging.getLogger(__name__)
MANY_DEAD: Final = 0.01  # Share of dead columns above which the report warns.
LARGEST_DAMP: Final = 1.0
FIRST_DAMP: Final = 0.01  # The step after an undamped attempt.
# From here on the condition number of R, at most sqrt(k / damp), lets its rounded errors add up to
# the output error within 1e-3 (the largest seen was 4e-4).
EXACT_DAMP: Final = 0.001
GATHER_ROWS: Final = 256  # Rows of H that are permuted at once, in cache.
FACTOR_BLOCK: Final = 256  # Columns of a step of the factorization: enough for BLAS's rate.


@dataclass(frozen=True, eq=False)
class Factor:
    """R [k, k] float32 of :func:`upper_factor`: R R^T = H + damp * mean I."""

    r: Tensor
    damp: float
    dtype: torch.dtype


def upper_factor(h: Tensor) -> bool:
    """Replaces the upper triangle of ``h`` [k, k] by R, with h = R R^T; whether that succeeds.

    R is upper triangular with a positive diagonal. Then h^-1 = U^T U for U = R^-1, the factor of
    algorithm 1. Below the diagonal ``h`` stays, so that its upper triangle can be had again.

    A Cholesky factorization from the last block of columns to the first: the block takes the
    products of the columns behind it, a corner is factorized (with the indices reversed, as
    J h J = L L^T), and the inverse of the corner's factor turns the rows above into those of R.
    """
    k = h.shape[0]
    good = torch.ones((), dtype=torch.bool, device=h.device)
    for a, b in reversed(list(blocks(k, FACTOR_BLOCK, None))):
        behind = h[a:b, b:]
        corner = h[a:b, a:b] - behind @ behind.T
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        r = lower.flip(0, 1)
        good &= (info == 0) & (r.diagonal() > 0).all()
        above = torch.addmm(h[:a, a:b], h[:a, b:], behind.T, alpha=-1)
        torch.mm(above, inverse(r).T, out=h[:a, a:b])
        h[a:b, a:b] = r.triu_() + h[a:b, a:b].tril(-1)
    return bool(good) and all_finite(h)


def inverse(r: Tensor) -> Tensor:
    """R^-1 for the upper triangle of ``r`` [c, c], by halves: c^3 / 3 multiply-adds in products."""
    c = r.shape[0]
    if c <= FACTOR_BLOCK:
        identity = torch.eye(c, dtype=r.dtype, device=r.device)
        return torch.linalg.solve_triangular(r, identity, upper=True)  # type: ignore[no-any-return]
    half = c // 2
    found = torch.zeros_like(r)
    upper, lower = inverse(r[:half, :half]), inverse(r[half:, half:])
    found[:half, :half], found[half:, half:] = upper, lower
    torch.mm(upper @ r[:half, half:], lower, out=found[:half, half:]).neg_()
    return found


def damps(first: float) -> list[float]:
    """The damping shares that are tried: ``first``, then ten times more, up to 1."""
    found = [first]
    while found[-1] < LARGEST_DAMP:
        found.append(min(found[-1] * 10, LARGEST_DAMP) if found[-1] > 0 else FIRST_DAMP)
    return found


def damped_factor(h: Tensor, damp: float, mean: float) -> Factor | None:
    """The factor of h + delta * mean * I with the least delta that works, fp32 first, then fp64.

    ``h`` float32 [k, k] is overwritten. None if nothing works.
    """
    diagonal = h.diagonal().clone()
    for dtype in (torch.float32, torch.float64):
        for delta in damps(damp):
            attempt = h.to(dtype)  # No copy in fp32.
            attempt.diagonal().copy_(diagonal.to(dtype) + delta * mean)
            if upper_factor(attempt):
                r = attempt.float()
                if dtype == torch.float32 or (all_finite(r) and bool((r.diagonal() > 0).all())):
                    return Factor(r, delta, dtype)
            if dtype == torch.float32:
                lower = h.tril(-1)
                h.copy_(lower + lower.T)
    return None


def column_order(order: Order, diagonal: Tensor, group_size: int) -> Tensor:
    """perm int64 [k]: the column that is walked at each step.

    ``"act"``: by the diagonal of H, descending, stable. ``"group"``: columns inside each group
    likewise, and groups by their largest entry; no column leaves its group.
    """
    k = diagonal.shape[0]
    if order == "none":
        return torch.arange(k, device=diagonal.device)
    if order == "act":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = [
        torch.arange(a, min(a + group_size, k), device=diagonal.device)
        for a in range(0, k, group_size)
    ]
    largest = torch.stack([diagonal[columns].max() for columns in groups])
    return torch.cat(
        [
            groups[g][torch.argsort(diagonal[groups[g]], descending=True, stable=True)]
            for g in torch.argsort(largest, descending=True, stable=True).tolist()
        ]
    )


def permuted(h: Tensor, perm: Tensor) -> Tensor:
    """A float32 copy of ``h`` [k, k] with rows and columns in the order ``perm``."""
    found = torch.empty_like(h, dtype=torch.float32)
    for a, b in blocks(h.shape[0], GATHER_ROWS, None):
        found[a:b] = h[perm[a:b]].index_select(1, perm)
    return found


def blocks(k: int, block: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """[begin, end) of the blocks of at most ``block`` columns.

    With ``group_size`` (dynamic group parameters) a block also ends where a group ends, so that at
    the start of a group every earlier update has reached all of its columns.
    """
    begin = 0
    while begin < k:
        end = min(begin + block, k)
        if group_size is not None:
            end = min(end, (begin // group_size + 1) * group_size)
        yield begin, end
        begin = end


@dataclass(frozen=True, eq=False)
class Walk:
    """The loop's result, in walking order: codes uint8 [n, k], the grid they lie on, sum e^2."""

    codes: Tensor
    grid: Grid
    squared_errors: float


def walk(
    w: Tensor,
    r: Tensor,
    spec: QuantSpec,
    block: int,
    live: Tensor | None,
    *,
    static: tuple[Grid, Tensor] | None = None,
    importance: Tensor | None = None,
    p: Tensor | None = None,
    name: str = "weight",
) -> Walk | None:
    """Algorithm 1 over all columns of ``w`` float32 [n, k], which is overwritten.

    ``r`` [k, k]: R in its upper triangle. ``static`` holds the parameters of all groups and the
    group of each column, int32 [k]. None takes each group's from the compensated weights at its
    first column, the columns standing in their original order; ``importance`` [k] then weights the
    clip search. ``live`` [k] float32 is 1 for columns that count in the loss, else 0; None is all
    1. ``p`` [k, k] is that of :func:`mmq.correction.gptaq_matrix`, None without it. Returns None if
    a number overflows.
    """
    n, k = w.shape
    kernel_grid = None if static is None else static[0].rows(n)
    codes = w.new_empty((n, k), dtype=torch.uint8)
    squared_errors = 0.0
    group_size = spec.row_group_size(k)
    dynamic: list[Grid] = []
    # A span is a block, or as many whole groups where their parameters are found on the way. Of a
    # matrix of many rows it is all columns: to invert R is less work there than to find D.
    span = block if static is not None else group_size * max(block // group_size, 1)
    if k * k <= 3 * n * block:
        span = k
    for first, last in blocks(k, span, None):
        # Behind the span w holds D, in it and ahead the target.
        u = inverse(r[first:last, first:last])
        target, from_d = w[:, first:last], r[:first, first:last] @ u
        if last < k:
            rest = torch.addmm(target, w[:, :first], from_d)
            target -= rest
        else:
            rest = target.addmm_(w[:, :first], from_d)
        for a, b in blocks(last - first, block, group_size if static is None else None):
            here = slice(first + a, first + b)
            if static is not None and kernel_grid is not None:
                grid, group_of = kernel_grid, static[1][here]
            else:
                if a % group_size == 0:
                    group, at = rest[:, a : a + group_size], first + a
                    if not all_finite(group):
                        return None
                    part = None if importance is None else importance[at : at + group_size]
                    dynamic.append(find_grid(group, spec, part, name=name))
                grid, group_of = dynamic[-1], w.new_zeros(b - a, dtype=torch.int32)
            block_w, block_u = rest[:, a:b].contiguous(), u[a:b, a:b].contiguous()
            if p is None:
                codes[:, here], e = ops.gptq_block(
                    block_w,
                    block_u,
                    grid.scales,
                    grid.zeros,
                    group_of,
                    spec.bits,
                    grid.float_zero,
                    grid.min_code,
                )
            else:
                codes[:, here], e, values = gptaq_block(
                    block_w, block_u, p[here, here], grid.rows(n), group_of
                )
                rest[:, b:].addmm_(values, p[here, here.stop : last])
                w[:, last:].addmm_(values, p[here, last:])
            rest[:, b:].addmm_(e, u[a:b, b:], alpha=-1)
            if last < k:
                target[:, a:].addmm_(e, u[a:b, a:])
            squared_errors += squares(e if live is None else e * live[here])
            if not math.isfinite(squared_errors):
                return None
    if static is not None:
        return Walk(codes, static[0], squared_errors)
    scales = torch.cat([grid.scales for grid in dynamic], dim=1)
    zeros = torch.cat([grid.zeros for grid in dynamic], dim=1)
    grid = replace(dynamic[0], scales=scales, zeros=zeros, group_size=spec.group_size)
    return Walk(codes, grid, squared_errors)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    options: GptqOptions | None = None,
    *,
    importance: Tensor | None = None,
    in_scale: Tensor | None = None,
    asymmetry: Tensor | None = None,
    method: str = "gptq",
    name: str = "weight",
) -> tuple[PackedWeight, Report]:
    """Quantizes ``weight`` so that the outputs on the calibration inputs change little.

    Args:
      weight: floating point [n, k]; not changed.
      hessian: floating point [k, k], see :class:`mmq.hessian.Hessian`; not changed. Linears that
        read the same input share it.
      spec: the grid.
      options: order, damping, block size, group parameters, dead columns.
      importance: float [k], weights of the clip search, such as diag(H); None is unweighted.
      in_scale: [k], stored as the run-time divisor of the input. ``weight`` and ``hessian`` are
        then those of the scaled problem, W diag(s) and H / (s s^T).
      asymmetry: float32 [k, k], D of :mod:`mmq.correction`; without it nothing is corrected,
        whatever ``options.correction`` says.
      method: the name that is recorded.
      name: of the module, for messages and the report.

    Returns the packed weight and a report. The codes are those of the loop, on each group's own
    parameters. If H cannot be factorized even with the largest damping, in fp64, the weight is
    rounded to nearest; the packed weight and the report say so, and a warning is logged.

    Raises MmqError, naming the module, for a weight or Hessian that is not finite, does not fit,
    or (Hessian) is all zero.
    """
    options = GptqOptions() if options is None else options
    check_weight(weight, name)
    k = weight.shape[1]
    check_hessian(hessian, k, name)
    if in_scale is not None and in_scale.shape != (k,):
        raise MmqError(f"{name}: expected in_scale of shape [{k}], got {list(in_scale.shape)}")
    order = options.resolve_order(spec, k)
    one_group = spec.groups(k) == 1
    is_static = options.resolve_static_groups(spec, k) or one_group

    # Step 2. Dead columns: an input that was always zero. H_ii = 1 there, and no compensation.
    diagonal = hessian.diagonal().float()
    dead = diagonal == 0
    notes = _dead_notes(int(dead.sum()), k, options, name)
    w = weight.detach().float()
    if options.dead == "zero" and bool(dead.any()):
        w = w.masked_fill(dead, 0.0)

    # Step 3. Order; the dead columns come last, their diagonal being 0.
    perm = column_order(order, diagonal, spec.row_group_size(k))
    h = permuted(hessian, perm)
    h.diagonal()[dead[perm]] = 1.0

    # Steps 4 and 5. The mean is over live columns, so that it keeps the inputs' units.
    mean = float(diagonal[~dead].mean(dtype=torch.float64))
    factor = damped_factor(h, options.damp, mean)
    del h
    result = ridge = None
    if factor is not None:
        if factor.damp != options.damp or factor.dtype != torch.float32:
            notes += (f"damping raised from {options.damp:g} to {factor.damp:g} ({factor.dtype})",)
        p = None
        if asymmetry is None or options.correction == "none":
            ridge = factor.damp * mean if factor.damp >= EXACT_DAMP else None
        else:
            d = permuted(asymmetry, perm)
            notes += (f"{options.correction}, alpha {options.alpha:g}",)
            if options.correction == "gptaq":
                p = gptaq_matrix(d, factor.r, options.alpha)
            else:
                w = w.index_copy(1, perm, retargeted(w[:, perm], d, factor.r, options.alpha))
        # Steps 6 and 7.
        columns = w.gather(1, perm.expand_as(w))  # A copy, which the walk overwrites.
        live = (~dead[perm]).float() if bool(dead.any()) else None
        static = _group_parameters(w, spec, order, perm, importance, name) if is_static else None
        result = walk(
            columns,
            factor.r,
            spec,
            options.block,
            live,
            static=static,
            importance=importance,
            p=p,
            name=name,
        )
    details = GptqDetails(
        order=order,
        static_groups=is_static,
        damp=None if factor is None else factor.damp,
        dead_columns=int(dead.sum()),
        loss=None if result is None else result.squared_errors / 2,
    )
    if result is None:
        why = "no factorization of H" if factor is None else "overflow in the column updates"
        LOGGER.warning("%s: %s; rounded to nearest instead", name, why)
        grid = find_grid(w, spec, importance, name=name)
        packed = PackedWeight.from_codes(
            quantize(w, grid), grid, spec, None, in_scale, method=method, fallback=f"rtn: {why}"
        )
        notes += (f"{why}; rounded to nearest",)
    else:
        codes, stored_perm = result.codes, None
        if order == "act" and not one_group:
            stored_perm = perm
        elif order != "none":
            codes = codes.gather(1, torch.argsort(perm).expand_as(codes))
        packed = PackedWeight.from_codes(
            codes, result.grid, spec, stored_perm, in_scale, method=method
        )
    report = make_report(
        name, weight, packed, hessian.float(), notes=notes, gptq=details, ridge=ridge
    )
    return packed, report


def _dead_notes(dead: int, k: int, options: GptqOptions, name: str) -> tuple[str, ...]:
    if dead == 0:
        return ()
    what = "rounded to nearest" if options.dead == "keep" else "set to zero"
    note = f"{dead} of {k} input columns were always zero; {what}"
    if dead > MANY_DEAD * k:
        LOGGER.warning("%s: %s", name, note)
    return (note,)


def _group_parameters(
    w: Tensor, spec: QuantSpec, order: Order, perm: Tensor, importance: Tensor | None, name: str
) -> tuple[Grid, Tensor]:
    """Step 6, static: the grid of the original weights, and the group of each walked column.

    With ``"act"`` groups are runs of the permuted columns, because that is how they are stored.
    """
    positions = torch.arange(w.shape[1], device=w.device)
    if order == "act":
        w = w[:, perm]
        importance = None if importance is None else importance[perm]
    else:
        positions = perm
    grid = find_grid(w, spec, importance, name=name)
    return grid, (positions // spec.row_group_size(w.shape[1])).to(torch.int32)
