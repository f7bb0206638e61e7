# SPDX-License-Identifier: Apache-2.0
"""Second moments of a linear's inputs, the only thing that GPTQ and AWQ know about the data.

Convention, used by all printed losses: H = 2 / sum(lambda) * sum_t lambda_t x_t x_t^T over real
tokens, so that tr(D H D^T) / 2 is the (weighted) mean over tokens of |D x|^2. Weights lambda have
no absolute meaning: doubling all of them changes nothing, doubling one duplicates its token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mmq.errors import MmqError
from mmq.finite import all_finite
from mmq_ext import ops

BLOCK_TOKENS: Final = 2048  # Fewer tokens wait for more: an update moves all of the sum.
BLOCK_ROWS: Final = 256  # Rows of H that are mirrored at once.
ABS_TOKENS: Final = 256  # Tokens per fp32 sum of |x|.


@dataclass(frozen=True, eq=False)
class InputStats:
    """What was accumulated: ``hessian`` float32 [k, k], ``mean_abs`` float32 [k] (unweighted mean
    of |x| over the tokens of positive weight), and the number of those tokens."""

    hessian: Tensor
    mean_abs: Tensor
    tokens: int


class Hessian:
    """Accumulates the inputs of one linear (or of several that read the same tensor).

    Products are fp32 over at most BLOCK_TOKENS tokens, their sums float64: 8 k^2 bytes, of which
    only the upper triangle is used (:func:`mmq_ext.ops.hessian_update`). So H is exactly symmetric.
    Only real tokens may be added: mask padding before, or give it weight 0.
    """

    def __init__(self, k: int, *, name: str = "input", device: torch.device | None = None) -> None:
        if k < 1:
            raise MmqError(f"{name}: expected at least 1 in-feature, got {k}")
        self.k = k
        self.name = name
        self.tokens = 0
        self._sum = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(k, dtype=torch.float64, device=device)
        self._weight_sum = 0.0
        self._pending: list[Tensor] = []
        self._pending_tokens = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
          x: floating point [..., k].
          weights: lambda_t >= 0, of shape x.shape[:-1]; None is 1 everywhere. Tokens of weight 0
            are not counted.

        Raises MmqError, naming the module, for another width, NaN or infinity, bad weights.
        """
        if x.dim() < 1 or x.shape[-1] != self.k or not x.is_floating_point():
            raise MmqError(
                f"{self.name}: expected floating-point inputs [..., {self.k}], got {x.dtype} "
                f"{list(x.shape)}"
            )
        rows = x.detach().reshape(-1, self.k).float()
        if weights is not None:
            lam = self._checked_weights(weights, x.shape[:-1])
            kept = lam > 0
            rows, lam = rows[kept], lam[kept]
        abs_sum = torch.zeros_like(self._abs_sum)
        for block in torch.split(rows, ABS_TOKENS):
            abs_sum += block.abs().sum(dim=0)
        # What is not finite shows in its column's sum; a sum can also overflow.
        if not all_finite(abs_sum) and not all_finite(rows):
            raise MmqError(f"{self.name}: expected finite inputs, got NaN or infinity")
        if rows.shape[0] == 0:
            return
        self.tokens += rows.shape[0]
        self._abs_sum += abs_sum
        if weights is None:
            self._weight_sum += rows.shape[0]
        else:
            self._weight_sum += float(lam.sum(dtype=torch.float64))
            rows = rows * lam.sqrt()[:, None]
        if self._pending_tokens + rows.shape[0] > BLOCK_TOKENS:
            self._flush()
        if rows.shape[0] >= BLOCK_TOKENS:
            ops.hessian_update(self._sum, rows)
        else:
            # A copy: the caller may reuse the memory of x before the block is full.
            self._pending.append(rows.clone())
            self._pending_tokens += rows.shape[0]

    def _checked_weights(self, weights: Tensor, shape: torch.Size) -> Tensor:
        if weights.shape != shape:
            raise MmqError(
                f"{self.name}: expected token weights of shape {list(shape)}, got "
                f"{list(weights.shape)}"
            )
        lam = weights.detach().reshape(-1).float()
        if not bool((torch.isfinite(lam) & (lam >= 0)).all()):
            raise MmqError(f"{self.name}: expected token weights that are finite and not negative")
        return lam

    def _flush(self) -> None:
        if self._pending:
            ops.hessian_update(self._sum, torch.cat(self._pending))
            self._pending.clear()
            self._pending_tokens = 0

    def finish(self) -> Tensor:
        """H, float32 [k, k]; more tokens may be added afterwards.

        Raises MmqError, naming the module, when it saw no token or H overflows fp32.
        """
        if self.tokens == 0:
            raise MmqError(f"{self.name}: expected at least 1 calibration token, got none")
        self._flush()
        hessian = torch.empty_like(self._sum, dtype=torch.float32)
        for a in range(0, self.k, BLOCK_ROWS):
            b = min(a + BLOCK_ROWS, self.k)
            upper = (self._sum[a:b, a:] * (2.0 / self._weight_sum)).float()
            square = upper[:, : b - a]
            square.copy_(square.triu() + square.triu(1).T)
            hessian[a:b, a:] = upper
            hessian[b:, a:b] = upper[:, b - a :].T
        if not all_finite(hessian):
            raise MmqError(f"{self.name}: expected inputs whose squares fit fp32, got an overflow")
        return hessian

    def mean_abs(self) -> Tensor:
        """Mean of |x| per in-feature over the counted tokens, float32 [k]; errors as `finish`."""
        if self.tokens == 0:
            raise MmqError(f"{self.name}: expected at least 1 calibration token, got none")
        return (self._abs_sum / self.tokens).float()

    def stats(self) -> InputStats:
        """H, mean |x| and the token count together; errors as :meth:`finish`."""
        return InputStats(self.finish(), self.mean_abs(), self.tokens)


def stats_of(x: Tensor, *, name: str = "input") -> InputStats:
    """The statistics of inputs [..., k] that are at hand; errors as :class:`Hessian`."""
    hessian = Hessian(x.shape[-1] if x.dim() else 0, name=name, device=x.device)
    hessian.add(x)
    return hessian.stats()


def check_hessian(hessian: Tensor, k: int, name: str) -> None:
    """Refuses what cannot be the H of ``k`` in-features, or is empty (all zero).

    Raises MmqError that names the module.
    """
    if hessian.shape != (k, k) or not hessian.is_floating_point():
        raise MmqError(
            f"{name}: expected a floating-point Hessian [{k}, {k}], got {hessian.dtype} "
            f"{list(hessian.shape)}"
        )
    if not all_finite(hessian):
        raise MmqError(f"{name}: expected a finite Hessian, got NaN or infinity")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise MmqError(f"{name}: expected a Hessian with no negative diagonal entry")
    if not bool((diagonal > 0).any()):
        raise MmqError(f"{name}: expected a Hessian of at least 1 non-zero input, got all zeros")


def rescale_hessian(hessian: Tensor, scale: Tensor) -> Tensor:
    """The H of the inputs x / scale, [k, k]: H_ij / (s_i s_j). For GPTQ after AWQ's scaling."""
    return hessian / scale[:, None] / scale[None, :]
