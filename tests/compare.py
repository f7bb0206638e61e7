# SPDX-License-Identifier: Apache-2.0
"""The one comparison of floating-point results: elementwise, against a bound for every element."""

import torch
from torch import Tensor


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, what: str = "") -> None:
    """Fails unless |actual - expected| <= bound holds for every element.

    Where `expected` is NaN, `actual` must be NaN too; infinities must be equal. The message counts
    the mismatches and lists the first ones with index, values and bound.
    """
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    actual, expected = actual.double(), expected.double()
    bound = bound.double().expand_as(expected)
    error = (actual - expected).abs()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~(same | (error <= bound))
    if not wrong.any():
        return
    lines = [f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are out of bounds"]
    for index in wrong.nonzero()[:5].tolist():
        at = tuple(index)
        lines.append(
            f"  {index}: got {float(actual[at])!r}, expected {float(expected[at])!r}, "
            f"error {float(error[at]):.3g} > bound {float(bound[at]):.3g}"
        )
    raise AssertionError("\n".join(lines))


def worst_share(actual: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest |actual - expected| / bound; 0 for empty results."""
    if actual.numel() == 0:
        return 0.0
    return float(((actual.double() - expected).abs() / bound).max())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
