# SPDX-License-Identifier: Apache-2.0
"""awq_errors' CUDA kernels on the interpreter: the bound, determinism, no findings, their counts.

tests/test_awq_errors.py runs all kinds of grids, widths and groups over these kernels too; here are
the sizes around their tiles (64 rows of w, 256 of the factor, 16 columns), and the counts.
"""

import pytest
import torch
from budgets import assert_memory, budget
from compare import assert_within
from simulated import asks_interpreter, cuda_kernels, needs_kernels, simulated_cuda
from test_awq_errors import problem

from mmq_ext import ops, reference

pytestmark = needs_kernels
GRID = {"bits": 4, "group_size": 16}


@pytest.mark.parametrize("n", [1, 63, 64, 65])
@pytest.mark.parametrize("tokens", [1, 255, 256, 257])
@pytest.mark.parametrize("k", [15, 33])
def test_around_the_tiles(n, tokens, k):
    inputs = problem(n, k, tokens, count=2)
    want, bound = reference.awq_errors(*inputs, **GRID)
    with cuda_kernels():
        got = ops.awq_errors(*inputs, **GRID)
    assert_within(got, want, bound)


def test_longer_than_one_chain():
    """Sums of more than 256 columns are added in two levels."""
    inputs = problem(3, 530, 4, count=1)
    want, bound = reference.awq_errors(*inputs, **GRID)
    with cuda_kernels():
        got = ops.awq_errors(*inputs, **GRID)
    assert_within(got, want, bound)


def test_any_order_gives_the_same_bits():
    inputs = problem(130, 20, 300, count=2)
    results = []
    for resident_blocks, slice_ in ((1, 2000), (3, 100), (8, 333)):
        with cuda_kernels(resident_blocks=resident_blocks, slice=slice_):
            results.append(ops.awq_errors(*inputs, **GRID))
    assert bool((results[0] > 0).all())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_intermediate_of_the_size_of_the_weight():
    """The workspace: a scale and a zero per group, a double per tile."""
    from mmq_ext import _C

    n, k, rows, count, group_size = 4096, 4096, 4096, 20, 128
    size = _C.cuda_awq_errors_workspace(n, k, rows, count, group_size, 4, 0, 1)
    assert size == count * n * (k // group_size) * 8 + count * (n // 64) * (rows // 256) * 8


@asks_interpreter
def test_counts():
    """Steady state: the difference of two lengths, for full tiles."""
    limits = budget("awq_errors")
    found = []
    with simulated_cuda() as simulator:
        for k in (64, 128):
            ops.awq_errors(*problem(64, k, 256, count=1), bits=4, group_size=32)
        launches = simulator.launches()
    for launch in launches:
        assert_memory(launch, limits)
    found = [launch["total"] for launch in launches if "awq_products" in launch["kernel"]]
    assert len(found) == 2
    multiply_adds = 64 * 256 * 64 / 32  # of a warp
    for name, key in (
        ("instructions_per_multiply_add", "instructions"),
        ("shared_wavefronts_per_multiply_add", "shared_wavefronts"),
    ):
        each = (found[1][key] - found[0][key]) / multiply_adds
        assert each <= limits[name], f"{name}: {each}"
