# SPDX-License-Identifier: Apache-2.0
"""What the packed_gemm benchmarks time: our modes, torch's fp32 linear, ATen's int4 kernel.

A case holds enough copies of its weights to exceed the caches and takes the next one at every
call, so that few rows of activations read DRAM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmq_ext import ops

BEYOND_CACHE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Case:
    """One kernel on one shape; `weight_bytes` are codes, scales and zeros as the kernel reads."""

    name: str
    run: Callable[[], Tensor]
    weight_bytes: int


def _rotating(
    make: Callable[[], tuple[Tensor, ...]],
) -> tuple[Callable[[], tuple[Tensor, ...]], int]:
    first = make()
    size = sum(tensor.numel() * tensor.element_size() for tensor in first)
    copies = [first] + [make() for _ in range(BEYOND_CACHE_BYTES // size)]
    turn = itertools.cycle(copies)
    return lambda: next(turn), size


def torch_fp32(m: int, k: int, n: int) -> Case:
    x = torch.randn(m, k)
    weights, size = _rotating(lambda: (torch.randn(n, k),))
    return Case("torch fp32", lambda: torch.nn.functional.linear(x, *weights()), size)


def torch_bf16(m: int, k: int, n: int) -> Case:
    x = torch.randn(m, k).bfloat16()
    weights, size = _rotating(lambda: (torch.randn(n, k).bfloat16(),))
    return Case("torch bf16", lambda: torch.nn.functional.linear(x, *weights()), size)


def aten_int4(m: int, k: int, n: int, group_size: int) -> Case:
    """bf16 activations, groups of 32, 64, 128 or 256 only."""
    x = torch.randn(m, k).bfloat16()

    def make() -> tuple[Tensor, ...]:
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed, torch.rand(k // group_size, n, 2).bfloat16()

    weights, size = _rotating(make)

    def run() -> Tensor:
        packed, affine = weights()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, affine)

    return Case("ATen int4", run, size)


def ours(m: int, k: int, n: int, group_size: int, bits: int, mode: str) -> Case:
    x = torch.randn(m, k)
    groups = ops.group_count(k, group_size)

    def make() -> tuple[Tensor, ...]:
        words = torch.randint(-(2**31), 2**31, (n, ops.row_words(k, bits)), dtype=torch.int32)
        scales = torch.rand(n, groups).half()
        affine = ops.repack_affine(scales, None, bits, float_zero=False)
        return ops.repack(words, bits, k), affine

    weights, size = _rotating(make)

    def run() -> Tensor:
        tiles, affine = weights()
        return ops.packed_gemm(x, tiles, affine, n=n, bits=bits, group_size=group_size, mode=mode)

    return Case(f"{mode} {bits}b", run, size)
