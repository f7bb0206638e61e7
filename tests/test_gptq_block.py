# SPDX-License-Identifier: Apache-2.0
"""gptq_block: every implementation against the torch recursion, bit by bit."""

import pytest
import torch
from isas import cpu_isa, every_isa, running
from torch import Tensor

from mmq_ext import ops, reference

KINDS = ["integer", "float", "symmetric", "restricted"]
OTHER_BITS = [2, 3, 5, 6, 7, 8]


def problem(n: int, cols: int, bits: int = 4, kind: str = "integer", group: int = 32):
    """Arguments of gptq_block: weights, a factor with strong coupling, grids, group of columns."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, cols, generator=g)
    x = torch.randn(4 * cols, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    h = (x.T @ x).double()
    h += 0.01 * h.diagonal().mean() * torch.eye(cols)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    scales, zeros = reference.grid_search(w, bits=bits, group_size=group, kind=kind)
    group_of = (torch.arange(cols) // group).to(torch.int32)
    return [w, u, scales, zeros, group_of, bits, kind == "float", int(kind == "restricted")]


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def assert_same(isa: str, args: list) -> None:
    want_codes, want_errors = reference.gptq_block(*args)
    with running(isa):
        codes, errors = ops.gptq_block(*args)
    assert torch.equal(codes, want_codes)
    assert torch.equal(bits_of(errors), bits_of(want_errors))


@every_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, *OTHER_BITS])
def test_widths_and_kinds(isa, kind, bits):
    assert_same(isa, problem(19, 40, bits, kind))


@every_isa
@pytest.mark.parametrize("cols", [1, 7, 8, 33, 128])
def test_rows_and_columns(isa, cols):
    for n in (1, 2, 7, 8, 31, 33, 65):
        assert_same(isa, problem(n, cols))


@every_isa
@pytest.mark.parametrize(("cols", "group"), [(200, 1), (200, 7), (200, 128), (200, 200), (130, 32)])
def test_groups_and_long_blocks(isa, cols, group):
    assert_same(isa, problem(5, cols, 3, "float", group))


@every_isa
def test_scattered_groups(isa):
    """After act-order, neighbouring columns belong to any group."""
    args = problem(9, 96, group=8)
    args[4] = args[4][torch.randperm(96, generator=torch.Generator().manual_seed(3))].contiguous()
    assert_same(isa, args)


@every_isa
@pytest.mark.parametrize("kind", KINDS)
def test_ties_round_to_even(isa, kind):
    w = torch.arange(-9, 10).repeat(3, 1) / 2
    one = torch.ones(3, 1)
    zeros = one * (-4 if kind == "float" else 4)
    args = [w, torch.eye(19), one, zeros, torch.zeros(19, dtype=torch.int32), 4, kind == "float"]
    assert_same(isa, args)
    with running(isa):
        codes, _ = ops.gptq_block(*args)
    assert codes[0, 9:14].tolist() == [4, 4, 5, 6, 6]  # 0, 0.5, 1, 1.5, 2


@every_isa
@pytest.mark.parametrize("kind", KINDS)
def test_constant_rows(isa, kind):
    for bits in range(2, 9):
        args = problem(3, 9, bits, kind)
        args[0] = torch.tensor([0.0, -0.0, 0.75]).unsqueeze(1).repeat(1, 9)
        args[2], args[3] = reference.grid_search(args[0], bits=bits, group_size=32, kind=kind)
        assert_same(isa, args)


@every_isa
def test_restricted_grid_never_uses_code_0(isa):
    args = problem(9, 40, 2, "restricted")
    args[0] = 3 * args[0]  # Compensation may push weights far beyond the grid.
    with running(isa):
        assert int(ops.gptq_block(*args)[0].min()) == 1
        assert int(ops.gptq_block(*args[:-1], 0)[0].min()) == 0


@every_isa
def test_nan_stays_in_its_row(isa):
    args = problem(12, 40)
    with running(isa):
        clean_codes, clean_errors = ops.gptq_block(*args)
        args[0][5, 3] = torch.nan
        codes, errors = ops.gptq_block(*args)
    others = torch.arange(12) != 5
    assert torch.equal(codes[others], clean_codes[others])
    assert torch.equal(errors[others], clean_errors[others])
    assert torch.equal(errors[5, :3], clean_errors[5, :3])
    assert bool(errors[5, 3:].isnan().all())
    assert not bool(codes[5, 3:].any())


def test_float32_follows_the_exact_recursion():
    args = problem(64, 96, 4)
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    want, errors = reference.gptq_block(*exact)
    got, got_errors = ops.gptq_block(*args)
    assert float((got == want).double().mean()) > 0.99
    assert float(got_errors.double().square().sum()) == pytest.approx(
        float(errors.square().sum()), rel=1e-2
    )


@every_isa
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_every_input_matters(isa, which):
    """The comparison can fail: one changed number changes the result."""
    args = problem(6, 33)
    with running(isa):
        before = ops.gptq_block(*args)
        changed = args[which].clone()
        spot = (0, 5) if which < 2 else (0, 0)
        changed[spot] = changed[spot] * 1.5 + 0.25
        args[which] = changed
        after = ops.gptq_block(*args)
    assert not torch.equal(before[1], after[1])


@cpu_isa
def test_threads_do_not_matter(isa):
    args = problem(200, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with running(isa):
                results.append(ops.gptq_block(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(part.any() for part in results[0])
    for codes, errors in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(bits_of(errors), bits_of(results[0][1]))


@every_isa
@pytest.mark.parametrize(("n", "cols"), [(0, 8), (3, 0), (0, 0)])
def test_empty(isa, n, cols):
    groups = torch.zeros(cols, dtype=torch.int32)
    with running(isa):
        codes, errors = ops.gptq_block(
            torch.empty(n, cols), torch.eye(cols), torch.ones(n, 1), torch.zeros(n, 1), groups, 4
        )
    assert codes.shape == errors.shape == (n, cols)


@every_isa
def test_weights_are_not_changed_and_strides_do_not_matter(isa):
    args = problem(12, 40)
    before = args[0].clone()
    with running(isa):
        want = ops.gptq_block(*args)
        assert torch.equal(args[0], before)
        args[0] = args[0].T.contiguous().T
        args[1] = args[1].T.contiguous().T
        got = ops.gptq_block(*args)
    assert all(part.any() for part in want)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_opcheck():
    torch.library.opcheck(torch.ops.mmq.gptq_block.default, tuple(problem(3, 9)))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(6, 33, dtype=torch.float64), "w of torch.float32"),
        (1, torch.eye(32), r"u of shape \[33, 33\]"),
        (1, -torch.eye(33), "positive, finite diagonal"),
        (1, torch.full((33, 33), torch.nan), "positive, finite diagonal"),
        (2, torch.ones(5, 2), r"scales of shape \[6, \*\]"),
        (3, torch.ones(6, 1), r"zeros of shape \[6, 2\]"),
        (4, torch.zeros(33, dtype=torch.int64), "group_of of torch.int32"),
        (4, torch.full((33,), 2, dtype=torch.int32), "group indices below the group count"),
        (4, torch.full((33,), -1, dtype=torch.int32), "group indices below the group count"),
        (5, 9, "bits from 2 to 8, got 9"),
        (7, 2, "min_code of 0 or 1, got 2"),
    ],
)
@every_isa
def test_bad_input(isa, position, value, message):
    args = problem(6, 33)
    args[position] = value
    with running(isa), pytest.raises(ValueError, match=f"gptq_block: expected .*{message}"):
        ops.gptq_block(*args)
