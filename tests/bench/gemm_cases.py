# SPDX-License-Identifier: Apache-2.0
"""What the packed_gemm benchmarks time: our modes, torch's fp32 linear, ATen's int4 kernel.

A case holds copies of its weights and takes the next one at every call, so that few rows of
activations read DRAM.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmq_ext import ops

# Twice a cache of 32 MB. Small weights are not copied more often than this: cases that are
# timed in turn push each other's out of the cache.
BEYOND_CACHE_BYTES = 64 * 2**20
MOST_COPIES = 12


@dataclass(frozen=True)
class Case:
    """One kernel on one shape; `weight_bytes` are codes, scales and zeros as the kernel reads."""

    name: str
    run: Callable[[], Tensor]
    weight_bytes: int


# What makes a case of (m, k, n). Equal makers make equal cases.
Maker = functools.partial[Case]


def same_case(maker: Maker) -> tuple[object, ...]:
    """A key under which equal makers are one."""
    return (maker.func, *maker.args, *sorted(maker.keywords.items()))


def copies_beyond_cache(weight_bytes: int, m: int, most: int = MOST_COPIES) -> int:
    """Copies beyond the caches for few rows; weights of many rows are reused anyway."""
    return 1 + (min(BEYOND_CACHE_BYTES // weight_bytes, most) if m <= 64 else 0)


def _rotating(
    make: Callable[[], tuple[Tensor, ...]], m: int, most: int = MOST_COPIES
) -> tuple[Callable[[], tuple[Tensor, ...]], int]:
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    copies = [first] + [make() for _ in range(copies_beyond_cache(size, m, most) - 1)]
    turn = itertools.cycle(copies)
    return lambda: next(turn), size


def torch_fp32(m: int, k: int, n: int) -> Case:
    x = torch.randn(m, k)
    weights, size = _rotating(lambda: (torch.randn(n, k),), m)
    return Case("torch fp32", lambda: torch.nn.functional.linear(x, *weights()), size)


def torch_bf16(m: int, k: int, n: int) -> Case:
    x = torch.randn(m, k).bfloat16()
    weights, size = _rotating(lambda: (torch.randn(n, k).bfloat16(),), m)
    return Case("torch bf16", lambda: torch.nn.functional.linear(x, *weights()), size)


def aten_int4(m: int, k: int, n: int, *, group_size: int) -> Case:
    """bf16 activations, groups of 32, 64, 128 or 256 only."""
    x = torch.randn(m, k).bfloat16()

    def make() -> tuple[Tensor, ...]:
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.rand(k // group_size, n, 2).bfloat16()

    weights, size = _rotating(make, m)

    def run() -> Tensor:
        packed, affine = weights()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, affine)

    return Case("ATen int4", run, size)


def ours(
    m: int,
    k: int,
    n: int,
    *,
    group_size: int,
    bits: int,
    mode: str,
    most_copies: int = MOST_COPIES,
) -> Case:
    """packed_gemm; ``most_copies`` for a case that is timed alone."""
    x = torch.randn(m, k)
    groups = ops.group_count(k, group_size)

    def make() -> tuple[Tensor, ...]:
        words = torch.randint(-(2**31), 2**31, (n, ops.row_words(k, bits)), dtype=torch.int32)
        scales = torch.rand(n, groups).half()
        affine = ops.repack_affine(scales, None, bits, float_zero=False)
        return ops.repack(words, bits, k), affine

    weights, size = _rotating(make, m, most_copies)

    def run() -> Tensor:
        tiles, affine = weights()
        return ops.packed_gemm(x, tiles, affine, n=n, bits=bits, group_size=group_size, mode=mode)

    return Case(f"{mode} {bits}b", run, size)
