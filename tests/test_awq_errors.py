# SPDX-License-Identifier: Apache-2.0
"""awq_errors: every implementation against float64, within the derived bound."""

import pytest
import torch
from compare import assert_within
from isas import cpu_isa, every_isa, running

from mmq_ext import ops, reference

KINDS = ["integer", "float", "symmetric", "restricted"]


def problem(n: int, k: int, tokens: int, count: int = 3, seed: int = 0):
    """w [n, k], candidates [count, k] of skewed sizes, the identity first, factor [tokens, k]."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.05
    candidates = torch.exp(0.7 * torch.randn(count, k, generator=g))
    candidates[0] = 1.0
    return w, candidates, torch.randn(tokens, k, generator=g)


def assert_close(isa: str, inputs, **grid) -> None:
    want, bound = reference.awq_errors(*inputs, **grid)
    with running(isa):
        got = ops.awq_errors(*inputs, **grid)
    assert_within(got, want, bound)


@every_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_widths_and_kinds(isa, kind, bits):
    assert_close(isa, problem(7, 70, 19), bits=bits, group_size=32, kind=kind)


@every_isa
@pytest.mark.parametrize("n", [1, 2, 7, 96, 97, 200])
@pytest.mark.parametrize("tokens", [1, 15, 17])
def test_rows_and_tokens(isa, n, tokens):
    assert_close(isa, problem(n, 33, tokens), bits=4, group_size=16)


@every_isa
@pytest.mark.parametrize("k", [1, 7, 255, 256, 257, 1408])
def test_columns_and_groups(isa, k):
    for group_size in (1, 7, 32, 128, 2000):
        assert_close(isa, problem(2, k, 5), bits=3, group_size=group_size)


@every_isa
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scale_dtypes(isa, scale_dtype):
    inputs = problem(9, 64, 8)
    assert_close(isa, inputs, bits=4, group_size=32, scale_dtype=scale_dtype)


@every_isa
def test_more_tokens_than_one_block_of_the_factor(isa):
    assert_close(isa, problem(3, 24, 2100, count=2), bits=4, group_size=8)


@every_isa
def test_triangular_factor(isa):
    """H = L L^T: the factor L^T, whose zeros a kernel may skip, gives what X itself gives."""
    w, candidates, x = problem(10, 300, 700)
    lower = torch.linalg.cholesky((x.T @ x).double())
    grid = {"bits": 4, "group_size": 64}
    assert_close(isa, (w, candidates, lower.T.float()), **grid)
    want, _ = reference.awq_errors(w, candidates, x, **grid)
    with running(isa):
        got = ops.awq_errors(w, candidates, lower.T.float(), **grid)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


@every_isa
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_weights(isa, bits):
    w, candidates, factor = problem(3, 20, 4)
    grid = {"bits": bits, "group_size": 8}
    assert_close(isa, (torch.full_like(w, 0.5), candidates, factor), **grid)
    with running(isa):
        assert not bool(ops.awq_errors(0 * w, candidates, factor, **grid).any())


@every_isa
def test_nan_gives_nan(isa):
    w, candidates, factor = problem(3, 20, 4)
    w[1, 2] = torch.nan
    with running(isa):
        assert bool(ops.awq_errors(w, candidates, factor, bits=4, group_size=8).isnan().all())


@every_isa
@pytest.mark.parametrize("which", [0, 1, 2])
def test_bound_can_fail(isa, which):
    """One changed number takes the result out of the bound."""
    inputs = list(problem(4, 64, 6))
    want, bound = reference.awq_errors(*inputs, bits=3, group_size=32)
    changed = inputs[which].clone()
    changed[0, 3] = changed[0, 3] * 1.2 + 0.1
    inputs[which] = changed
    with running(isa):
        got = ops.awq_errors(*inputs, bits=3, group_size=32)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_within(got, want, bound)


@cpu_isa
def test_threads_do_not_matter(isa):
    inputs = problem(230, 80, 50)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with running(isa):
                results.append(ops.awq_errors(*inputs, bits=4, group_size=16))
    finally:
        torch.set_num_threads(threads)
    assert results[0].any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_isa
@pytest.mark.parametrize(("n", "k", "tokens", "count"), [(0, 8, 2, 2), (2, 8, 0, 2), (2, 8, 2, 0)])
def test_empty(isa, n, k, tokens, count):
    w, candidates, factor = torch.ones(n, k), torch.ones(count, k), torch.ones(tokens, k)
    with running(isa):
        errors = ops.awq_errors(w, candidates, factor, bits=4, group_size=4)
    assert torch.equal(errors, torch.zeros(count, dtype=torch.float64))


def test_opcheck():
    inputs = problem(3, 9, 4)
    torch.library.opcheck(torch.ops.mmq.awq_errors.default, (*inputs, 4, 8, "integer", "float16"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(3, 9, dtype=torch.float16)}, "w of torch.float32"),
        ({"candidates": torch.ones(2, 8)}, r"candidates of shape \[\*, 9\]"),
        ({"candidates": torch.zeros(2, 9)}, "positive, finite candidates"),
        ({"candidates": torch.full((2, 9), torch.inf)}, "positive, finite candidates"),
        ({"factor": torch.ones(4, 8)}, r"factor of shape \[\*, 9\]"),
        ({"bits": 1}, "bits from 2 to 8, got 1"),
        ({"group_size": 0}, "a positive group size, got 0"),
        ({"kind": "float8"}, "kind as one of integer, float, symmetric, restricted, got 'float8'"),
        ({"scale_dtype": "float64"}, "scale_dtype as one of float32, float16, bfloat16"),
    ],
)
def test_bad_input(change, message):
    w, candidates, factor = problem(3, 9, 4)
    good = {"w": w, "candidates": candidates, "factor": factor, "bits": 4, "group_size": 8}
    with pytest.raises(ValueError, match=f"awq_errors: expected {message}"):
        ops.awq_errors(**{**good, **change})
