# SPDX-License-Identifier: Apache-2.0
"""Exact shares of variance: grids with a known answer, ranges, weights, incomplete grids."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmq_evals.errors import EvalError
from mmq_evals.study.anova import complete_grid, decompose, regress, subsets


def product_parts(factors: list[np.ndarray]) -> dict[tuple[int, ...], float]:
    """Parts of y = a_i b_j c_k ...: variances of the axes of a set, squared means of the others."""
    return {
        subset: float(
            np.prod(
                [f.var() if axis in subset else f.mean() ** 2 for axis, f in enumerate(factors)]
            )
        )
        for subset in subsets(len(factors))
    }


@pytest.mark.parametrize("shape", [(7,), (3, 4), (7, 7, 7), (2, 3, 2, 4)])
def test_shares_sum_to_one(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape) + 1e6
    found = decompose(values, len(shape))
    assert sum(found.shares().values()) == pytest.approx(1.0, abs=1e-9)
    assert sum(found.shapley()) == pytest.approx(1.0, abs=1e-9)
    assert float(found.variance) == pytest.approx(values.var(), rel=1e-9)
    assert float(found.mean) == pytest.approx(values.mean())


def test_an_additive_grid_has_no_interaction_and_a_changed_cell_shows() -> None:
    a, b = np.array([0.0, 1.0, 5.0]), np.array([2.0, 2.5, 7.0, 9.0])
    values = a[:, None] + b[None, :]
    found = decompose(values, 2)
    assert found.parts[0,] == pytest.approx(a.var())
    assert found.parts[1,] == pytest.approx(b.var())
    assert found.parts[0, 1] == pytest.approx(0.0, abs=1e-25)
    values[1, 2] += 0.1
    assert float(decompose(values, 2).parts[0, 1]) > 1e-5


def test_a_product_grid_has_the_known_parts() -> None:
    rng = np.random.default_rng(1)
    factors = [rng.normal(1.0, 0.5, size=length) for length in (3, 4, 5)]
    values = factors[0][:, None, None] * factors[1][None, :, None] * factors[2]
    found = decompose(values, 3)
    for subset, part in product_parts(factors).items():
        assert float(found.parts[subset]) == pytest.approx(part, rel=1e-9), subset
    expected = sum(
        part / len(subset) for subset, part in product_parts(factors).items() if 1 in subset
    )
    assert float(found.shapley()[1]) == pytest.approx(expected / values.var(), rel=1e-9)


def test_effects_are_those_of_the_definition() -> None:
    """Brute force for two axes: deviations of row and column means, and what is left."""
    values = np.random.default_rng(2).normal(size=(4, 6))
    rows, columns = values.mean(1) - values.mean(), values.mean(0) - values.mean()
    rest = values - values.mean() - rows[:, None] - columns
    found = decompose(values, 2)
    assert float(found.parts[0,]) == pytest.approx((rows**2).mean())
    assert float(found.parts[1,]) == pytest.approx((columns**2).mean())
    assert float(found.parts[0, 1]) == pytest.approx((rest**2).mean())


def test_a_batch_is_many_grids_and_weight_zero_leaves_a_level_out() -> None:
    values = np.random.default_rng(3).normal(size=(5, 3, 4))
    together = decompose(values, 2)
    for index, grid in enumerate(values):
        alone = decompose(grid, 2)
        for subset, part in alone.parts.items():
            assert float(together.parts[subset][index]) == pytest.approx(float(part))
    weighted = decompose(values[0], 2, [np.array([0.0, 1.0, 1.0]), np.ones(4)])
    cut = decompose(values[0][1:], 2)
    for subset, part in cut.shares().items():
        assert float(weighted.shares()[subset]) == pytest.approx(float(part))
    # Twice the weight is a level that stands there twice.
    doubled = decompose(values[0], 2, [np.array([2.0, 1.0, 1.0]), np.ones(4)])
    repeated = decompose(values[0][[0, 0, 1, 2]], 2)
    assert float(doubled.shares()[0, 1]) == pytest.approx(float(repeated.shares()[0, 1]))


def test_equal_cells_have_no_shares() -> None:
    found = decompose(np.full((3, 3), 0.1 + 0.2), 2)
    assert float(found.variance) == 0.0
    assert np.isnan(found.shares()[0,])


def test_bad_grids_are_refused() -> None:
    with pytest.raises(EvalError, match="expected finite scores"):
        decompose(np.array([[1.0, np.nan], [0.0, 1.0]]), 2)
    with pytest.raises(EvalError, match="1 to 10 factors, got 3"):
        decompose(np.zeros((2, 2)), 3)
    with pytest.raises(EvalError, match="expected 2 weights of factor 0, none negative"):
        decompose(np.zeros((2, 2)), 2, [np.array([-1.0, 2.0]), np.ones(2)])
    with pytest.raises(EvalError, match="weights for 2 factors, got 1"):
        decompose(np.zeros((2, 2)), 2, [np.ones(2)])
    cells = {(2.0, 3.0): 0.1, (3.0, 2.0): 0.2, (2.0, 2.0): 0.3}
    with pytest.raises(EvalError, match="1 of 4 cells are missing, the first 3/3"):
        complete_grid(cells, [[2.0, 3.0], [2.0, 3.0]])


def test_regression_equals_the_exact_shares_on_a_complete_grid() -> None:
    values = np.random.default_rng(4).normal(size=(3, 4))
    cells = {(float(i), float(j)): values[i, j] for i in range(3) for j in range(4)}
    fit, exact = regress(cells), decompose(values, 2)
    assert fit.explained == pytest.approx(1.0)
    for subset, share in exact.shares().items():
        assert fit.parts[subset] == pytest.approx(float(share))
    assert fit.shapley == pytest.approx([float(share) for share in exact.shapley()])


def test_regression_of_an_incomplete_additive_grid_explains_it() -> None:
    levels = range(5)
    cells = {
        (float(i), float(j), float(k)): 3.0 * i + j**2 - 0.5 * k
        for i, j, k in itertools.product(levels, levels, levels)
        if (i + 2 * j + 3 * k) % 4
    }
    fit = regress(cells)
    assert fit.explained == pytest.approx(1.0)
    assert sum(fit.shapley) == pytest.approx(1.0)
    assert fit.shapley[1] > fit.shapley[0] > fit.shapley[2]
    with pytest.raises(EvalError, match="all cells have the same score"):
        regress(dict.fromkeys(cells, 0.3))
    with pytest.raises(EvalError, match="at most 6 factors, got 7"):
        regress({(0.0,) * 7: 1.0, (1.0,) * 7: 2.0})
