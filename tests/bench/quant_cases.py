# SPDX-License-Identifier: Apache-2.0
"""The quantization ops and what they replace, as callables on the same data, for the benchmarks.

What they replace is written as the original projects write it: one small torch call after another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmq_ext import ops

Pair = tuple[Callable[[], object], Callable[[], object]]
SHAPES = ((4096, 4096), (1408, 6144))  # k -> n
BLOCK = 128
GROUP = 128
BITS = 4


def gptq_pair(k: int, n: int) -> Pair:
    """One block of BLOCK columns of an [n, k] matrix; a layer has k / BLOCK of them."""
    del k
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, BLOCK, generator=g)
    x = torch.randn(4 * BLOCK, BLOCK, generator=g)
    u = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True).contiguous()
    scales, zeros = ops.grid_search(w, bits=BITS, group_size=GROUP)
    group_of = torch.zeros(BLOCK, dtype=torch.int32)
    top = (1 << BITS) - 1

    def torch_loop() -> tuple[Tensor, Tensor]:
        w1, codes, errors = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
        losses = torch.zeros_like(w)
        for i in range(BLOCK):
            column, d = w1[:, i], u[i, i]
            q = torch.clamp(torch.round(column.unsqueeze(1) / scales) + zeros, 0, top)
            value = (scales * (q - zeros)).flatten()
            codes[:, i] = q.flatten()
            losses[:, i] = (column - value) ** 2 / d**2
            error = (column - value) / d
            w1[:, i:] -= error.unsqueeze(1).matmul(u[i, i:].unsqueeze(0))
            errors[:, i] = error
        return codes, errors

    return (lambda: ops.gptq_block(w, u, scales, zeros, group_of, BITS)), torch_loop


def awq_pair(k: int, n: int, tokens: int = 2048, count: int = 2) -> Pair:
    """``count`` candidates, exactly; plain torch quantizes, multiplies and sums one at a time."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=g) * 0.05
    x = torch.randn(tokens, k, generator=g)
    candidates = torch.exp(0.5 * torch.randn(count, k, generator=g))
    top = (1 << BITS) - 1

    def plain_torch() -> Tensor:
        errors = []
        for s in candidates:
            scaled = (w * s).view(n, k // GROUP, GROUP)
            low = scaled.amin(dim=2, keepdim=True).clamp(max=0)
            high = scaled.amax(dim=2, keepdim=True).clamp(min=0)
            scale = ((high - low) / top).half().float().clamp(min=2.0**-14)
            zero = torch.round(-low / scale).clamp(0, top)
            codes = (torch.round(scaled / scale) + zero).clamp(0, top)
            d = w - ((codes - zero) * scale).view(n, k) / s
            errors.append((d @ x.T).square().sum())
        return torch.stack(errors)

    return (lambda: ops.awq_errors(w, candidates, x, bits=BITS, group_size=GROUP)), plain_torch


def search_pair(k: int, n: int, rows: int = 128, exponent: float = 2.4) -> Pair:
    """The clip search over 81 ranges on ``rows`` of the n rows; torch takes one range at a time."""
    del n
    w = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)) * 0.05
    top = (1 << BITS) - 1

    def torch_loop() -> Tensor:
        parts = w.view(-1, GROUP)
        low, high = parts.amin(dim=1).clamp(max=0), parts.amax(dim=1).clamp(min=0)
        best = torch.full_like(low, torch.inf)
        scales = torch.ones_like(low)
        for i in range(81):
            p = 1 - i / 100
            scale = (p * (high - low) / top).half().float().clamp(min=2.0**-14).unsqueeze(1)
            zero = torch.round(-p * low.unsqueeze(1) / scale)
            codes = (torch.round(parts / scale) + zero).clamp(0, top)
            error = (scale * (codes - zero) - parts).abs_().pow_(exponent).sum(dim=1)
            better = error < best
            best[better] = error[better]
            scales[better] = scale.squeeze(1)[better]
        return scales

    def native() -> object:
        return ops.grid_search(w, bits=BITS, group_size=GROUP, steps=100, exponent=exponent)

    return native, torch_loop


CASES: dict[str, Callable[[int, int], Pair]] = {
    "gptq_block": gptq_pair,
    "awq_errors": awq_pair,
    "grid_search": search_pair,
}
