# SPDX-License-Identifier: Apache-2.0
"""gptq_block's CUDA kernel on the interpreter: bit by bit the CPU kernel, no findings, its counts.

tests/test_gptq_block.py runs all kinds of grids, widths and ties over this kernel too; here are the
lengths at which it changes its shape, and what only the interpreter can tell.
"""

import pytest
import torch
from budgets import assert_memory, budget
from simulated import asks_interpreter, cuda_kernels, needs_kernels, on_gpu, simulated_cuda
from test_gptq_block import KINDS, bits_of, problem

from mmq_ext import ops

pytestmark = needs_kernels
SMALL = ((8, 6), (8, 9), (12, 0))  # capabilities with 99 KiB of shared memory for a block


def assert_same_as_cpu(args: list, **settings: object) -> None:
    want_codes, want_errors = ops.gptq_block(*args)
    with cuda_kernels(**settings):
        codes, errors = ops.gptq_block(*args)
    assert torch.equal(codes, want_codes)
    # A NaN has other bits on the device.
    assert torch.equal(errors.isnan(), want_errors.isnan())
    assert torch.equal(bits_of(errors.nan_to_num(7.0)), bits_of(want_errors.nan_to_num(7.0)))


# Around the 32 columns of a register, and 1, 2, 4, 8 registers with and without a partial last one.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 100, 128, 129, 256])
@pytest.mark.parametrize("n", [1, 7, 33])
def test_lengths_and_rows(kind, cols, n):
    if on_gpu() and cols > 200 and torch.cuda.get_device_capability() in SMALL:
        pytest.skip("more shared memory than this device has")
    assert_same_as_cpu(problem(n, cols, 4, kind))


@pytest.mark.parametrize("cols", [33, 128])
def test_nan_rows(cols):
    args = problem(11, cols)
    args[0][2, 5] = torch.nan
    args[0][8, cols - 1] = torch.nan
    args[0][9] = torch.inf
    assert_same_as_cpu(args)


def test_scattered_groups():
    args = problem(9, 128, group=8)
    args[4] = args[4][torch.randperm(128, generator=torch.Generator().manual_seed(3))].contiguous()
    assert_same_as_cpu(args)


def test_a_warp_takes_several_rows():
    """One multiprocessor holds at most 8 blocks of 8 warps: 64 rows at a time."""
    assert_same_as_cpu(problem(150, 32), sm_count=1)


@pytest.mark.parametrize(("resident_blocks", "slice_"), [(1, 50), (3, 7), (8, 1000)])
def test_any_order_of_execution(resident_blocks, slice_):
    assert_same_as_cpu(problem(40, 64), resident_blocks=resident_blocks, slice=slice_)


def test_too_long_a_block():
    args = problem(2, 257)
    with cuda_kernels(), pytest.raises(ValueError, match="use shorter blocks"):
        ops.gptq_block(*args)


@asks_interpreter
def test_256_columns_need_more_shared_memory_than_sm_86_has():
    args = problem(2, 256)
    with simulated_cuda(capability=86), pytest.raises(ValueError, match="use shorter blocks"):
        ops.gptq_block(*args)
    assert_same_as_cpu(problem(2, 200), capability=86)


@asks_interpreter
def test_counts():
    """64 rows in two registers more than one, all columns of one group, aligned rows."""
    limits = budget("gptq_block")
    n, cols = 64, 128
    args = problem(n, cols, group=128)
    with simulated_cuda() as simulator:
        ops.gptq_block(*args)
        (launch,) = simulator.launches()
    assert_memory(launch, limits)
    warps = n  # one row each
    counts = launch["by_opcode"]
    barriers = sum(count for name, count in counts.items() if name.startswith("bar"))
    assert barriers == limits["barriers_per_warp"] * warps
    shuffles = sum(count for name, count in counts.items() if name.startswith("shfl"))
    assert shuffles == limits["shuffles_per_pivot"] * n * cols


@asks_interpreter
def test_instructions_per_pivot():
    """The difference of two row counts leaves out the staging, which a warp does once."""
    totals = []
    with simulated_cuda(sm_count=1) as simulator:
        for n in (64, 128):
            ops.gptq_block(*problem(n, 128, group=128))
        totals = [launch["total"]["instructions"] for launch in simulator.launches()]
    each = (totals[1] - totals[0]) / (64 * 128)
    assert each <= budget("gptq_block")["instructions_per_pivot"]
