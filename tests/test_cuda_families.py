# SPDX-License-Identifier: Apache-2.0
"""PTX of every family that ships, from which all machine code is assembled (cmake/cuda.cmake).

The interpreter takes, as a driver does, the newest PTX that its capability can run. Every kernel
runs from each family's PTX: integers and GPTQ's fp32 agree bit by bit, products within their bound.
"""

import re
from collections.abc import Callable

import pytest
import torch
from compare import assert_within
from isas import needs_cuda
from shapes import BITS, problem
from simulated import on_gpu, simulated_cuda
from test_gptq_block import problem as gptq_problem
from torch import Tensor

import mmq_ext
from mmq_ext import ops, reference

FAMILIES = (80, 90, 100)

pytestmark = [
    needs_cuda,
    pytest.mark.skipif(on_gpu(), reason="a GPU runs machine code"),
]


def in_every_family(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The results from the PTX of each family."""
    results = []
    for capability in FAMILIES:
        with simulated_cuda(capability=capability, sm_count=8) as simulator:
            found = call()
            assert simulator.launches()
        results.append(found if isinstance(found, tuple) else (found,))
    return results


def assert_equal_in_all(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    first, *others = in_every_family(call)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_the_ptx_of_all_machine_code_is_there(isa: str) -> None:
    """Each architecture's family; where all six are built, these are all families."""
    with simulated_cuda():
        built = str(mmq_ext.cuda_status()["architectures"])
    architectures = [int(word) for word in re.findall(r"(?<!\S)\d+", built)]
    needed = {max(family for family in FAMILIES if family <= a) for a in architectures}
    assert {int(word) for word in re.findall(r"\+ptx(\d+)", built)} == needed
    if len(architectures) < 6:
        pytest.skip(f"built for {built} (MMQ_CUDA_ARCHS)")
    assert needed == set(FAMILIES)


def test_families_differ(isa: str) -> None:
    """Each capability is served its own text: the same product executes other instructions."""
    counts = set()
    for capability in FAMILIES:
        with simulated_cuda(capability=capability, sm_count=8) as simulator:
            problem(64, 70, 300, 64, 4).as_cuda(torch.float16).run("exact")
            counts.add(simulator.launches()[-1]["total"]["instructions"])
    assert len(counts) == len(FAMILIES)


@pytest.mark.parametrize("bits", BITS)
def test_packing(isa: str, bits: int) -> None:
    p = problem(0, 70, 300, 128, bits)

    def call() -> tuple[Tensor, ...]:
        words = ops.pack(p.codes, bits)
        tiles = ops.repack(words, bits, 300)
        back = ops.unrepack(tiles, bits, 70, 300)
        assert torch.equal(back, words)
        assert torch.equal(ops.unpack(words, bits, 300), p.codes)
        return words, tiles

    assert_equal_in_all(call)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 13, 40])
def test_packed_gemm(isa: str, bits: int, m: int) -> None:
    dtype = torch.bfloat16 if bits % 2 else torch.float16
    group_size = 48 if bits % 3 else 64
    p = problem(m, 70, 300, group_size, bits, bias=True, perm=True, in_scale=True).as_cuda(dtype)
    for (y,) in in_every_family(lambda: p.run("exact")):
        assert_within(y, p.reference("exact"), p.cuda_bound())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_block(isa: str, bits: int) -> None:
    assert_equal_in_all(lambda: ops.gptq_block(*gptq_problem(9, 64, bits=bits)))


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_errors(isa: str, bits: int) -> None:
    g = torch.Generator().manual_seed(bits)
    w = torch.randn(33, 96, generator=g)
    candidates = torch.rand(3, 96, generator=g) + 0.5
    factor = torch.randn(20, 96, generator=g)
    settings = {"bits": bits, "group_size": 32}
    want, bound = reference.awq_errors(w, candidates, factor, **settings)
    for (found,) in in_every_family(lambda: ops.awq_errors(w, candidates, factor, **settings)):
        assert_within(found, want, bound)
