# SPDX-License-Identifier: Apache-2.0
"""pack and unpack on the interpreter: the bits of the CPU, no findings, their counts."""

import pytest
import torch
from budgets import assert_memory, budget
from simulated import asks_interpreter, cuda_kernels, needs_kernels, simulated_cuda

from mmq_ext import ops

pytestmark = needs_kernels
COLS = (1, 31, 32, 33, 100, 255, 256, 257, 1408)


def codes_of(rows: int, cols: int, bits: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(bits)
    return torch.randint(1 << bits, (rows, cols), dtype=torch.uint8, generator=g)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("cols", COLS)
def test_there_and_back(bits, cols):
    for rows in (1, 7):
        codes = codes_of(rows, cols, bits)
        want = ops.pack(codes, bits)
        with cuda_kernels():
            words = ops.pack(codes, bits)
            back = ops.unpack(want, bits, cols)
        assert torch.equal(words, want)
        assert torch.equal(back, codes)


@asks_interpreter
@pytest.mark.parametrize("bits", range(2, 9))
def test_counts(bits):
    codes = codes_of(4, 512, bits)
    with simulated_cuda() as simulator:
        ops.unpack(ops.pack(codes, bits), bits, 512)
        launches = simulator.launches()
    assert len(launches) == 2
    for launch in launches:
        assert_memory(launch, budget("pack"))
