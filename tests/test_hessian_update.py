# SPDX-License-Identifier: Apache-2.0
"""hessian_update: every implementation against float64, within the derived bound."""

import pytest
import torch
from compare import assert_within, seeded
from simulated import cpu_functions
from torch import Tensor

import mmq_ext
from mmq_ext import hessian, ops, reference
from mmq_ext.checks import CUDA_FUNCTIONS

ISAS = mmq_ext.cpu_isas()
IMPLEMENTATIONS = [*ISAS, "torch"]  # torch: what CUDA tensors get, here on CPU tensors


def problem(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """A sum to add to, with values below the diagonal too, and inputs of unequal size."""
    g = seeded(1000 * tokens + k)
    total = torch.randn(k, k, generator=g, dtype=torch.float64)
    return total, torch.randn(tokens, k, generator=g) * torch.exp(torch.randn(k, generator=g))


def update(isa: str, total: Tensor, x: Tensor) -> Tensor:
    """The sum after an update of a copy."""
    total = total.clone()
    if isa == "torch":
        with cpu_functions({"hessian_update": CUDA_FUNCTIONS["hessian_update"]}):
            ops.hessian_update(total, x)
    else:
        with mmq_ext.use_isa(isa):
            ops.hessian_update(total, x)
    return total


def assert_close(isa: str, total: Tensor, x: Tensor) -> None:
    assert_within(update(isa, total, x), *reference.hessian_update(total, x))


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 23, 24, 25, 47, 48, 49, 65, 97, 160])
def test_columns(isa, k):
    assert_close(isa, *problem(20, k))


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 15, 17, 127, 129, 511, 513, 1100])
def test_tokens(isa, tokens):
    assert_close(isa, *problem(tokens, 50))


def test_block_rows_of_the_torch_calls():
    for k in (hessian.BLOCK_ROWS - 1, hessian.BLOCK_ROWS + 1, 2 * hessian.BLOCK_ROWS + 3):
        assert_close("torch", *problem(3, k))


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
def test_a_transposed_input_is_copied(isa):
    total, x = problem(30, 30)
    assert_close(isa, total, x.T)


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
def test_bound_can_fail(isa):
    """One input that is off by a thousandth takes its row out of the bound."""
    total, x = problem(40, 60)
    want, bound = reference.hessian_update(total, x)
    x[3, 5] *= 1.001
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_within(update(isa, total, x), want, bound)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_matter(isa):
    total, x = problem(600, 130)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(update(isa, total, x))
    finally:
        torch.set_num_threads(threads)
    assert results[0].any()
    assert not torch.equal(results[0], total)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck():
    torch.library.opcheck(torch.ops.mmq.hessian_update.default, problem(5, 9))


@pytest.mark.parametrize("isa", [ISAS[0], "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(9)}, r"x of shape \[\*, \*\]"),
        ({"x": torch.ones(2, 9, dtype=torch.float16)}, "x of torch.float32, got torch.float16"),
        ({"total": torch.zeros(9, 9)}, "total of torch.float64, got torch.float32"),
        ({"total": torch.zeros(9, 8, dtype=torch.float64)}, r"total of shape \[9, 9\], got"),
        ({"total": torch.zeros(9, 18, dtype=torch.float64)[:, ::2]}, "a contiguous total, got"),
    ],
)
def test_bad_input(isa, change, message):
    total, x = problem(2, 9)
    run = CUDA_FUNCTIONS["hessian_update"] if isa == "torch" else ops.hessian_update
    with pytest.raises(ValueError, match=f"hessian_update: expected {message}"):
        run(**{"total": total, "x": x, **change})
