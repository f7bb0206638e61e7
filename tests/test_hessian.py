# SPDX-License-Identifier: Apache-2.0
"""The Hessian accumulator: convention, token weights, precision, refusals."""

import pytest
import torch
from problems import generator, layer

from mmq.errors import MmqError
from mmq.hessian import BLOCK_ROWS, BLOCK_TOKENS, Hessian, check_hessian, rescale_hessian, stats_of


def exact(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    lam = torch.ones(x.shape[0]) if weights is None else weights
    x, lam = x.double(), lam.double()
    return 2 * (x.T * lam) @ x / lam.sum()


def test_convention_is_twice_the_mean_outer_product():
    _, x = layer(1, 24, 300)
    assert torch.allclose(stats_of(x).hessian.double(), exact(x), rtol=1e-5, atol=1e-6)


def test_blocks_and_calls_do_not_matter():
    _, x = layer(1, 8, 2 * BLOCK_TOKENS + 37)
    parts = Hessian(8)
    for part in torch.split(x, 100):
        parts.add(part.reshape(1, -1, 8))
    shuffled = Hessian(8)
    shuffled.add(x[torch.randperm(x.shape[0], generator=generator(1))])
    assert parts.tokens == x.shape[0]
    for hessian in (parts, shuffled):
        assert torch.allclose(hessian.finish().double(), exact(x), rtol=1e-5, atol=1e-7)
    assert torch.allclose(parts.mean_abs(), x.abs().mean(dim=0), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 7, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 44])
def test_block_rows_give_every_entry_and_exact_symmetry(k):
    """|error| <= c u sum_t |x_ti x_tj| 2 / T with c = T + 2: any order of T fp32 additions."""
    tokens = 100
    x = torch.randn(tokens, k, generator=generator(k)) * torch.exp(
        2 * torch.randn(k, generator=generator(k + 1))
    )
    found = stats_of(x).hessian
    assert torch.equal(found, found.T)
    bound = (tokens + 2) * 2.0**-24 * exact(x.abs())

    def holds(hessian):
        return bool(((hessian.double() - exact(x)).abs() <= bound).all())

    assert holds(found)
    found[-1, 0] += 2 * float(bound[-1, 0]) + 1e-6 * float(found[-1, 0].abs())
    assert not holds(found)


def test_the_sum_over_blocks_keeps_small_contributions():
    """In fp32 sums a token of 1 would vanish beside 2^26; in float64 it does not."""
    hessian = Hessian(1)
    hessian.add(torch.full((BLOCK_TOKENS, 1), 2.0**13))
    for _ in range(64):
        hessian.add(torch.full((BLOCK_TOKENS, 1), 0.5))
    total = BLOCK_TOKENS * (2.0**26 + 64 * 0.25)
    assert float(hessian._sum) + BLOCK_TOKENS * 0.25 * len(hessian._pending) == total


def test_the_callers_memory_may_be_reused():
    x = torch.ones(3, 2)
    hessian = Hessian(2)
    hessian.add(x)
    x.zero_()
    assert torch.equal(hessian.finish(), torch.full((2, 2), 2.0))


def test_more_tokens_may_follow_a_finish():
    _, x = layer(1, 6, 50)
    hessian = Hessian(6)
    hessian.add(x[:20])
    hessian.finish()
    hessian.add(x[20:])
    assert torch.allclose(hessian.finish().double(), exact(x), rtol=1e-5, atol=1e-7)


def test_weight_one_is_unweighted_and_weight_two_duplicates():
    _, x = layer(1, 12, 40)
    ones, twos, duplicated = Hessian(12), Hessian(12), Hessian(12)
    ones.add(x, torch.ones(40))
    assert torch.allclose(ones.finish(), stats_of(x).hessian, rtol=1e-6)
    weights = torch.ones(40)
    weights[:10] = 2
    twos.add(x, weights)
    duplicated.add(torch.cat((x, x[:10])))
    assert torch.allclose(twos.finish(), duplicated.finish(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(twos.finish().double(), exact(x, weights), rtol=1e-4, atol=1e-6)


def test_masked_tokens_do_not_count():
    _, x = layer(1, 12, 40)
    padded = torch.cat((x, torch.full((5, 12), float("nan"))))
    weights = torch.cat((torch.ones(40), torch.zeros(5)))
    hessian = Hessian(12)
    hessian.add(padded, weights)
    assert hessian.tokens == 40
    assert torch.allclose(hessian.finish(), stats_of(x).hessian, rtol=1e-6)


def test_half_precision_inputs_are_widened():
    _, x = layer(1, 12, 40)
    half = x.half()
    assert torch.allclose(stats_of(half).hessian.double(), exact(half.double()), rtol=1e-5)


def test_no_token_is_an_error_that_names_the_module():
    hessian = Hessian(4, name="qformer.layer.1.crossattention")
    with pytest.raises(MmqError, match=r"qformer.*: expected at least 1 calibration token"):
        hessian.finish()
    hessian.add(torch.empty(0, 4))
    hessian.add(torch.ones(2, 4), torch.zeros(2))
    with pytest.raises(MmqError, match="expected at least 1 calibration token, got none"):
        hessian.stats()


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (torch.ones(2, 5), None, r"fc1: expected floating-point inputs \[\.\.\., 4\], got"),
        (torch.ones(2, 4).int(), None, "fc1: expected floating-point inputs"),
        (torch.tensor(1.0), None, "fc1: expected floating-point inputs"),
        (torch.full((1, 4), float("nan")), None, "fc1: expected finite inputs"),
        (torch.full((1, 4), float("inf")), None, "fc1: expected finite inputs"),
        (torch.ones(2, 4), torch.ones(3), r"token weights of shape \[2\], got \[3\]"),
        (torch.ones(2, 4), -torch.ones(2), "finite and not negative"),
        (torch.ones(2, 4), torch.tensor([1.0, float("nan")]), "finite and not negative"),
    ],
)
def test_bad_inputs_are_refused_by_name(x, weights, message):
    hessian = Hessian(4, name="fc1")
    with pytest.raises(MmqError, match=message):
        hessian.add(x, weights)
    assert hessian.tokens == 0


def test_a_sum_that_overflows_is_no_bad_input():
    """The sum of |x| tells what is not finite, and alone it can be wrong about that."""
    hessian = Hessian(2, name="fc1")
    hessian.add(torch.full((2, 2), 3e38))
    assert hessian.tokens == 2
    with pytest.raises(MmqError, match="fc1: expected finite inputs"):
        hessian.add(torch.tensor([[1.0, float("-inf")]]))
    assert hessian.tokens == 2


def test_refused_inputs_leave_the_sums_as_they_were():
    hessian = Hessian(2)
    hessian.add(torch.ones(3, 2))
    with pytest.raises(MmqError, match="expected finite inputs"):
        hessian.add(torch.tensor([[float("nan"), 5.0]]))
    assert hessian.mean_abs().tolist() == [1.0, 1.0]
    assert torch.equal(hessian.finish(), torch.full((2, 2), 2.0))


def test_overflow_is_refused():
    with pytest.raises(MmqError, match="squares fit fp32"):
        stats_of(torch.full((1, 4), 1e30))


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(4, 4), "expected a Hessian of at least 1 non-zero input"),
        (torch.ones(3, 3), r"\[4, 4\], got torch.float32 \[3, 3\]"),
        (torch.full((4, 4), float("nan")), "expected a finite Hessian"),
        (-torch.eye(4), "no negative diagonal"),
    ],
)
def test_unfit_hessians_are_refused(hessian, message):
    with pytest.raises(MmqError, match=message):
        check_hessian(hessian, 4, "fc1")


def test_rescaling_is_the_hessian_of_divided_inputs():
    _, x = layer(1, 16, 64)
    s = torch.logspace(-1, 1, 16)
    assert torch.allclose(
        rescale_hessian(stats_of(x).hessian, s), stats_of(x / s).hessian, rtol=1e-4, atol=1e-5
    )
