# SPDX-License-Identifier: Apache-2.0
"""Whole steps of quantizing one linear as the papers write them, in torch, for the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_loop(w: Tensor, h: Tensor, bits: int, group_size: int, block: int = 128) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with its damping and groups: W_hat [n, k].

    Cholesky of H, its inverse, the upper Cholesky factor of that; then a loop over columns.
    """
    w = w.clone()
    n, k = w.shape
    damped = h.clone()
    damped.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    u = torch.linalg.cholesky(inverse, upper=True)
    top = (1 << bits) - 1
    w_hat = torch.empty_like(w)
    for a in range(0, k, block):
        b = min(a + block, k)
        part, errors = w[:, a:b].clone(), torch.empty(n, b - a)
        triangle = u[a:b, a:b]
        for i in range(b - a):
            if (a + i) % group_size == 0:
                # Columns of this group that the block has not updated yet stand in the block.
                group = torch.cat([part[:, i:], w[:, b:]], dim=1)[:, :group_size]
                low = group.amin(dim=1).clamp(max=0)
                high = group.amax(dim=1).clamp(min=0)
                scale = ((high - low) / top).half().float().clamp(min=2.0**-14)
                zero = torch.round(-low / scale)
            column = part[:, i]
            q = torch.clamp(torch.round(column / scale) + zero, 0, top)
            value = scale * (q - zero)
            w_hat[:, a + i] = value
            error = (column - value) / triangle[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(triangle[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, b:] -= errors.matmul(u[a:b, b:])
    return w_hat


def half_of_blas(x: Tensor, out: Tensor) -> None:
    """x^T x by one product, which does twice the work of a symmetric one."""
    torch.mm(x.T, x, out=out)
