# SPDX-License-Identifier: Apache-2.0
"""Grids: round trips, ties, degenerate ranges, the clip search, refusals."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmq.errors import MmqError
from mmq.grid import dequantize, find_grid, quantize, spread
from mmq.spec import QuantSpec

KINDS = [
    {"zero": "integer"},
    {"zero": "float"},
    {"zero": "symmetric"},
    {"zero": "symmetric", "symmetric_range": "restricted"},
]


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "group_size"), [(48, -1), (48, 16), (50, 16), (7, 1), (1, -1)])
def test_round_trip_is_within_half_a_step(kind, bits, k, group_size):
    spec = QuantSpec(bits, group_size, scale_dtype="float32", **kind)
    w = weights(5, k)
    grid = find_grid(w, spec)
    codes = quantize(w, grid)
    error = (dequantize(codes, grid) - w).abs()
    step = spread(grid.scales, k, group_size).expand_as(w)
    edge = (codes == 0) | (codes == spec.max_code)
    assert bool((error[~edge] <= 0.5001 * step[~edge]).all())
    if spec.zero != "symmetric":  # The full symmetric grid clips +a by half a step and more.
        assert bool((error <= 0.51 * step + 1e-6).all())
    again = quantize(dequantize(codes, grid), grid)
    assert torch.equal(again, codes)


@pytest.mark.parametrize(("bits", "share"), [(2, 2 / 3), (3, 6 / 7)])
def test_full_symmetric_grid_clips_its_positive_end(bits, share):
    w = torch.tensor([[-1.0, 1.0]])
    grid = find_grid(w, QuantSpec(bits, zero="symmetric", scale_dtype="float32"))
    top = float(dequantize(torch.full((1, 2), (1 << bits) - 1, dtype=torch.uint8), grid)[0, 1])
    assert top == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("clip", ["none", "mse"])
def test_restricted_symmetric_grid_never_uses_code_0(clip):
    spec = QuantSpec(3, 8, "symmetric", symmetric_range="restricted", clip=clip)
    grid = find_grid(w := weights(9, 40), spec)
    codes = quantize(w, grid)
    assert bool((grid.scales > 0).all())
    assert int(codes.min()) == 1
    assert int(codes.max()) == 7


def test_ties_round_to_even():
    # Scale 1, zero 1 at 2 bits: the range [-1, 2].
    w = torch.tensor([[-1.0, -0.5, 0.5, 1.5, 2.0]])
    grid = find_grid(w, QuantSpec(2, scale_dtype="float32"))
    assert float(grid.scales) == 1.0
    assert quantize(w, grid).tolist() == [[0, 1, 1, 3, 3]]


def test_uniform_per_tensor_is_the_formula_of_the_study():
    w, top = weights(6, 20), 7
    spec = QuantSpec(3, zero="float", per_tensor=True, scale_dtype="float32")
    grid = find_grid(w, spec)
    low, high = w.min(), w.max()
    expected = (high - low) * torch.round(top * (w - low) / (high - low)) / top + low
    assert grid.scales.shape == (1, 1)
    assert torch.allclose(dequantize(quantize(w, grid), grid), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_zero_and_single_element_groups(kind, bits):
    # The full symmetric grid reaches 2/3 of +a at 2 bits; tiny numbers may become 0.
    reach = 0.34 if kind == {"zero": "symmetric"} and bits == 2 else 0.15
    values = (0.0, 0.75, -0.75, 1e-30)
    for value, clip, group_size in itertools.product(values, ("none", "mse"), (-1, 1, 3)):
        w = torch.full((2, 4), value)
        grid = find_grid(w, QuantSpec(bits, group_size, clip=clip, clip_steps=4, **kind))
        found = dequantize(quantize(w, grid), grid)
        assert bool(torch.isfinite(found).all())
        assert bool((grid.scales > 0).all())
        assert float((found - w).abs().max()) <= reach * abs(value) + 1e-4


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_codes_are_chosen_with_the_stored_scale(kind, scale_dtype):
    spec = QuantSpec(4, 16, scale_dtype=scale_dtype, **kind)
    grid = find_grid(weights(8, 64), spec)
    assert bool((grid.scales > 0).all())
    assert torch.equal(grid.scales, grid.scales.to(spec.torch_scale_dtype).float())
    assert torch.equal(grid.zeros, grid.zeros.to(spec.torch_scale_dtype).float())


def clip_error(w, grid, weight, exponent):
    return float((weight * (dequantize(quantize(w, grid), grid) - w).abs() ** exponent).sum())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
@pytest.mark.parametrize("weighted", [False, True])
def test_clip_search_never_raises_the_stated_error(kind, weighted):
    w = weights(4, 64) ** 3
    importance = torch.linspace(0.1, 5.0, 64) if weighted else None
    plain = QuantSpec(3, 16, scale_dtype="float32", **kind)
    clip = QuantSpec(3, 16, clip="mse", scale_dtype="float32", **kind)
    weight = torch.ones(64) if importance is None else importance
    exponent = 2.0 if weighted else 2.4
    before = clip_error(w, find_grid(w, plain), weight, exponent)
    after = clip_error(w, find_grid(w, clip, importance), weight, exponent)
    assert after < 0.97 * before


def test_importance_sets_the_exponent_to_2():
    w = weights(4, 64) ** 3
    weighted = find_grid(w, QuantSpec(3, 16, clip="mse"), torch.full((64,), 2.0))
    squared = find_grid(w, QuantSpec(3, 16, clip="mse", clip_exponent=2.0))
    other = find_grid(w, QuantSpec(3, 16, clip="mse"))
    assert torch.equal(weighted.scales, squared.scales)
    assert not torch.equal(weighted.scales, other.scales)


def test_clip_search_agrees_with_exhaustive_search():
    w = weights(3, 12)
    spec = QuantSpec(2, 6, clip="mse", clip_steps=10, clip_shrink=0.5, scale_dtype="float32")
    grid = find_grid(w, spec)
    for row, group in itertools.product(range(3), range(2)):
        part = w[row : row + 1, 6 * group : 6 * group + 6]
        low, high = min(float(part.min()), 0), max(float(part.max()), 0)
        errors = []
        for step in range(6):
            p = 1 - step / 10
            scale = p * (high - low) / 3
            zero = min(max(round(-p * low / scale), 0), 3)
            q = (part / scale).round().add(zero).clamp(0, 3)
            errors.append(float((((q - zero) * scale - part).abs() ** 2.4).sum()))
        found = quantize(part, one_cell(grid, row, group))
        value = dequantize(found, one_cell(grid, row, group))
        assert float(((value - part).abs() ** 2.4).sum()) == pytest.approx(min(errors), rel=1e-4)


def one_cell(grid, row, group):
    cell = (slice(row, row + 1), slice(group, group + 1))
    return dataclasses.replace(
        grid, scales=grid.scales[cell], zeros=grid.zeros[cell], group_size=-1
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(bad):
    w = weights(3, 4)
    w[1, 2] = bad
    with pytest.raises(MmqError, match=r"blocks\.3\.fc1: expected finite weights, got 1"):
        find_grid(w, QuantSpec(4), name="blocks.3.fc1")


@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
def test_overflowing_scale_names_the_remedy(zero):
    w = torch.tensor([[-1e6, 1e6]])
    with pytest.raises(MmqError, match="use scale_dtype bfloat16 or float32"):
        find_grid(w, QuantSpec(2, zero=zero))
    assert bool(
        torch.isfinite(find_grid(w, QuantSpec(2, zero=zero, scale_dtype="bfloat16")).scales)
    )


def test_tiny_scale_is_clamped_to_the_smallest_normal():
    grid = find_grid(torch.tensor([[0.0, 1e-7]]), QuantSpec(4))
    assert float(grid.scales) == torch.finfo(torch.float16).tiny


def test_bad_importance_is_refused():
    spec = QuantSpec(4, clip="mse")
    with pytest.raises(MmqError, match=r"importance of shape \[4\], got \[3\]"):
        find_grid(weights(2, 4), spec, torch.ones(3))
    with pytest.raises(MmqError, match="finite and not negative"):
        find_grid(weights(2, 4), spec, -torch.ones(4))


@pytest.mark.parametrize(
    "w", [torch.ones(2, 4, dtype=torch.int32), torch.ones(4), torch.ones(0, 4), torch.ones(4, 0)]
)
def test_what_is_no_matrix_is_refused(w):
    with pytest.raises(MmqError, match="floating-point matrix"):
        find_grid(w, QuantSpec(4))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([-1, 1, 3, 8]),
    st.sampled_from(KINDS),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
)
def test_any_finite_row_round_trips(bits, group_size, kind, row):
    w = torch.tensor([row])
    spec = QuantSpec(bits, group_size, scale_dtype="float32", **kind)
    grid = find_grid(w, spec)
    codes = quantize(w, grid)
    values = dequantize(codes, grid)
    assert bool(torch.isfinite(values).all())
    span = float(w.max() - w.min()) + float(w.abs().max())
    assert float((values - w).abs().max()) <= span / (1 << (bits - 1)) + 1e-30
