# SPDX-License-Identifier: Apache-2.0
"""Folding an AWQ scale: the producer's output is divided by s, the consumer's columns multiplied.

Where a fold preserves the function is data in :mod:`mmq.architectures`; here is only the
arithmetic. Fold first, then quantize: a producer may itself be quantized afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmq.errors import MmqError


def producer_scale(scale: Tensor, source_rows: Tensor, channels: int) -> Tensor:
    """The consumer's ``scale`` [k] as one number per producer channel, [channels].

    Raises MmqError where in-features of one channel have different scales.
    """
    found = scale.new_ones(channels)
    found[source_rows] = scale
    if not torch.equal(found[source_rows], scale):
        raise MmqError("expected one AWQ scale per producer channel, got several for one")
    return found


@torch.no_grad()
def fold_into_norm(norm: nn.Module, s: Tensor) -> None:
    """Divides the output of a LayerNorm or RMSNorm by ``s`` [k]: its weight, and bias if any.

    Raises MmqError for a norm without a weight of that size.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != s.shape:
        got = list(weight.shape) if isinstance(weight, Tensor) else None
        raise MmqError(f"fold: expected a norm with weight {list(s.shape)}, got {got}")
    weight.div_(s.to(weight.dtype))
    if isinstance(bias, Tensor):
        bias.div_(s.to(bias.dtype))


@torch.no_grad()
def fold_into_linear(linear: nn.Linear, s: Tensor, rows: slice | None = None) -> None:
    """Divides out-features ``rows`` (None: all) of ``linear`` by ``s``: weight rows and bias.

    Preserves the function if what lies between commutes with a positive scale per channel:
    nothing, attention's weighted mean (value rows), ReLU, or a product with another branch.
    Raises MmqError for rows that do not fit ``s``.
    """
    rows = slice(None) if rows is None else rows
    weight = linear.weight[rows]
    if weight.shape[:1] != s.shape:
        raise MmqError(f"fold: expected {weight.shape[0]} scales, got {list(s.shape)}")
    weight.div_(s.to(weight.dtype)[:, None])
    if linear.bias is not None:
        linear.bias[rows].div_(s.to(linear.bias.dtype))


@torch.no_grad()
def scale_inputs(linear: nn.Linear, s: Tensor) -> None:
    """W becomes W diag(s), ``s`` [k]: the consumer's half of a fold."""
    if s.shape != (linear.in_features,):
        raise MmqError(f"fold: expected {linear.in_features} scales, got {list(s.shape)}")
    linear.weight.mul_(s.to(linear.weight.dtype))
