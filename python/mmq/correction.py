# SPDX-License-Identifier: Apache-2.0
"""Correcting for inputs that are already wrong: GPTQ towards the full-precision model's outputs.

A linear behind quantized blocks reads X where the full-precision model has X~ = X + dX. Instead of
|W_hat X - W X|^2 the objective is |W_hat X - W X~|^2, which needs one more moment,
D = 2 / sum(lambda) * sum_t lambda_t dx_t x_t^T [k, k], in the convention of ``mmq.hessian``.

- ``gptaq`` (Li et al., arXiv 2504.02692): P = alpha triu(D U^T, 1) U; row i of it is the least
  squares solution of w_i dx_i = sum_(j > i) w_j x_j, and w_j += w_i P_ij in the loop.
- ``retarget``: W' = W + alpha W D H^-1, the least squares solution, and plain GPTQ on W'.

On a block's held-out inputs the corrected result must be better than the plain one, else the plain
one stays (``mmq.quantize``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmq.calibrate import Call, hooked, run_block, token_rows
from mmq.errors import MmqError
from mmq.grid import Grid
from mmq.hessian import BLOCK_TOKENS, Hessian, InputStats
from mmq.models import LinearUnit
from mmq.plan import LayerPlan
from mmq_ext.reference import codes_of, values_of


class Asymmetry:
    """Accumulates D of one input: products in fp32, their sums in float64."""

    def __init__(self, k: int, *, name: str = "input", device: torch.device | None = None) -> None:
        self.name = name
        self._sum = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._weight_sum = 0.0

    def add(self, full: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
          full: what the full-precision model has, [..., k].
          x: what the quantized model has, [..., k], token by token.
          weights: lambda_t >= 0, [...]; None is 1 everywhere.

        Raises MmqError, naming the module, for inputs that do not pair up or are not finite.
        """
        if full.shape != x.shape:
            raise MmqError(
                f"{self.name}: expected full-precision inputs of shape {list(x.shape)}, got "
                f"{list(full.shape)}"
            )
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        delta = full.detach().reshape(-1, x.shape[-1]).float() - rows
        if not bool(torch.isfinite(delta).all()):
            raise MmqError(f"{self.name}: expected finite inputs, got NaN or infinity")
        if weights is None:
            self._weight_sum += len(rows)
        else:
            lam = weights.detach().reshape(-1, 1).float()
            self._weight_sum += float(lam.sum(dtype=torch.float64))
            rows = rows * lam
        for begin in range(0, len(rows), BLOCK_TOKENS):
            part = slice(begin, begin + BLOCK_TOKENS)
            self._sum += delta[part].T @ rows[part]

    def finish(self) -> Tensor:
        """D, float32 [k, k]. Raises MmqError when no token was added."""
        if not self._weight_sum > 0:
            raise MmqError(f"{self.name}: expected at least 1 calibration token, got none")
        return (self._sum * (2.0 / self._weight_sum)).float()


def paired_inputs(
    block: nn.Module,
    twin: nn.Module,
    prefix: str,
    units: Sequence[LinearUnit],
    calls: Sequence[Call],
    full: Sequence[Call],
    max_tokens: int | None = None,
    weights: Sequence[Tensor] | None = None,
) -> dict[str, tuple[InputStats, Tensor]]:
    """Statistics and D by input group.

    Args:
      block: partly quantized, called with ``calls``.
      twin: its copy in full precision, called with ``full``; the calls pair up.
      prefix: the block's path in the model.
      units: linears of the block; the first of each input group is observed.
      max_tokens, weights: as for :func:`mmq.calibrate.gather`.

    Memory: what the observed linears read in one call of the twin.
    """
    groups: dict[str, LinearUnit] = {}
    for unit in units:
        groups.setdefault(unit.input_group, unit)
    paths = {group: unit.path.removeprefix(f"{prefix}.") for group, unit in groups.items()}
    observed = {block.get_submodule(path): group for group, path in paths.items()}
    twins = {twin.get_submodule(path): group for group, path in paths.items()}
    device = calls[0].hidden.device
    hessians = {g: Hessian(u.k, name=u.path, device=device) for g, u in groups.items()}
    crosses = {g: Asymmetry(u.k, name=u.path, device=device) for g, u in groups.items()}
    seen: dict[str, Tensor] = {}
    current: Tensor | None = None

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[twins[module]] = token_rows(args, kwargs, max_tokens)[0]

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        group = observed[module]
        x, lam = token_rows(args, kwargs, max_tokens, current)
        hessians[group].add(x, lam)
        crosses[group].add(seen[group], x, lam)

    with hooked(list(twins), keep), hooked(list(observed), add):
        for index, (call, other) in enumerate(zip(calls, full, strict=True)):
            current = None if weights is None else weights[index]
            seen.clear()
            run_block(twin, other)
            run_block(block, call)
    return {group: (hessians[group].stats(), crosses[group].finish()) for group in groups}


def gptaq_matrix(asymmetry: Tensor, r: Tensor, alpha: float) -> Tensor:
    """P [k, k], strictly upper triangular: alpha triu(D U^T, 1) U, columns in walking order.

    U = R^-1, and only the upper triangle of ``r`` is read.
    """
    return alpha * _times_u(torch.triu(_times_u_transposed(asymmetry, r), 1), r)


def retargeted(w: Tensor, asymmetry: Tensor, r: Tensor, alpha: float) -> Tensor:
    """W + alpha W D H^-1 with H = R R^T, [n, k]; only the upper triangle of ``r`` is read."""
    return w + alpha * _times_u(_times_u_transposed(w @ asymmetry, r), r)


def _times_u(x: Tensor, r: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(r, x, upper=True, left=False)
    return found


def _times_u_transposed(x: Tensor, r: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(r.T, x, upper=False, left=False)
    return found


def gptaq_block(
    w: Tensor, u: Tensor, p: Tensor, grid: Grid, group_of: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The column recursion of ``ops.gptq_block`` with w_j += w_i P_ij beside w_j -= e_i U_ij.

    One torch call per step; with P = 0 codes and errors are those of the op bit by bit.

    Args:
      w: [n, cols], not changed.
      u, p: the block's part of U and P, [cols, cols].
      grid: its scales and zeros have n rows.
      group_of: int [cols], the group of each column.

    Returns codes uint8 [n, cols], errors [n, cols], and the compensated values before rounding,
    which the trailing update takes, [n, cols].
    """
    w = w.clone()
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    errors, values = torch.empty_like(w), torch.empty_like(w)
    for i in range(w.shape[1]):
        scale, zero = grid.scales[:, group_of[i]], grid.zeros[:, group_of[i]]
        column = w[:, i].clone()
        code = codes_of(column, scale, zero, grid.bits, grid.float_zero, grid.min_code)
        error = (column - values_of(code, scale, zero, grid.float_zero)) / u[i, i]
        codes[:, i], errors[:, i], values[:, i] = code.to(torch.uint8), error, column
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
        w[:, i + 1 :] += column[:, None] * p[i, i + 1 :]
    return codes, errors, values


def without_correction(layer: LayerPlan) -> LayerPlan:
    """The same with plain GPTQ."""
    return replace(layer, gptq=replace(layer.gptq, correction="none"))


def corrects(members: Iterable[tuple[LinearUnit, LayerPlan]]) -> bool:
    """Whether a correction was asked for, for one of these linears."""
    return any(
        layer.method == "gptq" and layer.gptq.correction != "none"
        for unit, layer in members
        if layer.spec is not None and unit.block is not None
    )
