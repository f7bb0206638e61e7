# SPDX-License-Identifier: Apache-2.0
"""The one comparison of floating-point results: elementwise, against a stated bound."""

from torch import Tensor


def assert_within(got: Tensor, reference: Tensor, bound: Tensor) -> None:
    """|got - reference| <= bound for every element; NaN never is. Shows the worst elements."""
    assert got.shape == reference.shape, f"shape {list(got.shape)}, want {list(reference.shape)}"
    miss = (got.double() - reference.double()).abs()
    bad = ~(miss <= bound.double())
    if not bool(bad.any()):
        return
    lines = [
        f"  at {tuple(index.tolist())}: got {got[tuple(index)]:.9g}, "
        f"want {reference[tuple(index)]:.9g}, off by {miss[tuple(index)]:.3g}"
        for index in bad.nonzero()[:5]
    ]
    raise AssertionError(f"{int(bad.sum())} of {bad.numel()} beyond the bound\n" + "\n".join(lines))
