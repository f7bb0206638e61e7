# SPDX-License-Identifier: Apache-2.0
"""Seeded layers with correlated, skewed inputs, which calibrated methods can use."""

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(n: int, k: int, tokens: int, seed: int = 0, skew: float = 1.0) -> tuple[Tensor, Tensor]:
    """W [n, k] and X [tokens, k]: half as many latent directions as channels, some noise, and
    channel sizes exp(skew * normal)."""
    g = generator(seed)
    w = torch.randn(n, k, generator=g) * 0.1
    mixing = torch.randn(max(k // 2, 1), k, generator=g)
    x = torch.randn(tokens, max(k // 2, 1), generator=g) @ mixing / k**0.5
    x = x + 0.1 * torch.randn(tokens, k, generator=g)
    return w, x * torch.exp(skew * torch.randn(k, generator=g))


def mean_error(difference: Tensor, x: Tensor) -> float:
    """Mean over tokens of |D x|^2, in float64."""
    return float((x.double() @ difference.double().T).square().sum(dim=1).mean())
