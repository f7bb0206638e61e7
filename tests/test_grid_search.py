# SPDX-License-Identifier: Apache-2.0
"""grid_search: every implementation against the torch reference; rounding of scales; clip."""

import pytest
import torch
from simulated import cpu_functions
from torch import Tensor

import mmq_ext
from mmq_ext import ops, reference
from mmq_ext.checks import CUDA_FUNCTIONS

ISAS = mmq_ext.cpu_isas()
IMPLEMENTATIONS = [*ISAS, "torch"]  # torch: what CUDA tensors get, here on CPU tensors
KINDS = ["integer", "float", "symmetric", "restricted"]
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# A kernel's power of |miss| is accurate to 1e-6, so two errors that it confuses differ by 2e-6.
TIE = 2e-6


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    """Normal weights with a few large ones, so that shrinking the range pays."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.1
    return torch.where(torch.rand(n, k, generator=g) < 0.03, 6 * w, w)


def search(isa: str, w: Tensor, **options) -> tuple[Tensor, Tensor]:
    if isa == "torch":
        with cpu_functions({"grid_search": CUDA_FUNCTIONS["grid_search"]}):
            return ops.grid_search(w, **options)
    with mmq_ext.use_isa(isa):
        return ops.grid_search(w, **options)


def assert_equal(isa: str, w: Tensor, **options) -> None:
    scales, zeros = search(isa, w, **options)
    want_scales, want_zeros = reference.grid_search(w, **options)
    assert torch.equal(scales, want_scales)
    assert torch.equal(zeros, want_zeros)


def assert_least(isa: str, w: Tensor, **options) -> None:
    """The grid found is one of the candidates and no other is better beyond a tie."""
    scales, zeros = search(isa, w, **options)
    errors, all_scales, all_zeros = reference.grid_errors(w, **options)
    same = (all_scales == scales) & (all_zeros == zeros)
    assert bool(same.any(dim=0).all())
    chosen = torch.where(same, errors, torch.inf).amin(dim=0)
    assert bool((chosen <= errors.amin(dim=0) * (1 + TIE)).all())


# --- min-max ----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_min_max(isa, kind, scale_dtype):
    for bits in range(2, 9):
        assert_equal(
            isa, weights(5, 70), bits=bits, group_size=32, kind=kind, scale_dtype=scale_dtype
        )


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 33), (7, 1408), (3, 8), (3, 15), (0, 8), (3, 0)])
@pytest.mark.parametrize("group_size", [1, 7, 32, 128, 2000])
def test_min_max_shapes(isa, n, k, group_size):
    assert_equal(isa, weights(n, k), bits=4, group_size=group_size)


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
def test_position_of_the_extremes_does_not_matter(isa):
    want = search(isa, torch.tensor([[-2.0, 5.0] + [0.0] * 29]), bits=8, group_size=31)
    assert float(want[0]) == pytest.approx(7 / 255, rel=1e-3)
    for i in range(31):
        w = torch.zeros(1, 31)
        w[0, i], w[0, (i + 11) % 31] = -2.0, 5.0
        got = search(isa, w, bits=8, group_size=31)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def rounding_cases(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit type, the midpoints to the next one, and their neighbours."""
    every = torch.arange(0, 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)]
    middle = ((every[1:].double() + every[:-1].double()) / 2).float()
    up, down = torch.full_like(middle, torch.inf), torch.zeros_like(middle)
    past = torch.tensor([65519.996, 65520.0, 65536.0, 1e5, 3.4e38])
    positive = torch.cat([every, middle, middle.nextafter(up), middle.nextafter(down), past])
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_rounding_to_16_bits_is_torchs(isa, scale_dtype):
    """Through the minimum of a float-zero grid (any value) and the scale of a ternary one (> 0)."""
    dtype = SCALE_DTYPES[scale_dtype]
    values = rounding_cases(dtype).unsqueeze(1)
    grid = {"group_size": 1, "scale_dtype": scale_dtype}
    scales, minima = search(isa, values, bits=4, kind="float", **grid)
    assert torch.equal(minima, values.to(dtype).float())
    assert bool((scales == 1).all())
    scales, _ = search(isa, values, bits=2, kind="restricted", **grid)
    want = values.abs().to(dtype).float().clamp_min(torch.finfo(dtype).smallest_normal)
    assert torch.equal(scales, torch.where(values == 0, torch.ones(()), want))


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
def test_scale_beyond_fp16_is_infinite(isa):
    scales, _ = search(isa, torch.tensor([[1e6, -1e6]]), bits=2, group_size=2)
    assert bool(scales.isinf().all())


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_groups(isa, kind, bits):
    """One constant per row, last groups of one element: finite grids, and zeros stay exact."""
    w = torch.tensor([0.0, -0.0, 0.37, -0.37, 1e-30]).unsqueeze(1).repeat(1, 9)
    for steps in (0, 20):
        options = {"bits": bits, "group_size": 4, "kind": kind, "steps": steps, "exponent": 2.0}
        assert_equal(isa, w, **options)
        scales, zeros = search(isa, w, **options)
        assert bool((scales > 0).all())
        assert bool((scales.isfinite() & zeros.isfinite()).all())
        assert bool((scales[:2] == 1).all())
        # No negative zeros, which would differ as bytes.
        assert not bool(torch.signbit(zeros[:2]).any())


def test_zero_is_representable_in_integer_grids():
    w = weights(4, 32).abs() + 1.0
    assert not bool(ops.grid_search(w, bits=4, group_size=32)[1].any())
    assert bool((ops.grid_search(-w, bits=4, group_size=32)[1] == 15).all())


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 10])
def test_nan_marks_its_group(isa, kind, steps):
    for position in range(16):
        w = weights(3, 32)
        w[1, position] = torch.nan
        scales, _ = search(isa, w, bits=4, group_size=16, kind=kind, steps=steps)
        assert bool(scales[1, 0].isnan())
        scales[1, 0] = 1.0
        assert bool(scales.isfinite().all())


# --- search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("exponent", [1.0, 2.0, 2.4])
def test_search_finds_the_least_error(isa, kind, bits, exponent):
    options = {"bits": bits, "group_size": 48, "kind": kind, "steps": 30, "exponent": exponent}
    assert_least(isa, weights(6, 80), **options)


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_search_with_importance(isa, kind):
    w = weights(6, 80)
    importance = torch.rand(80, generator=torch.Generator().manual_seed(1)) ** 4
    options = {"bits": 3, "group_size": 32, "kind": kind, "steps": 100, "importance": importance}
    assert_least(isa, w, exponent=2.0, **options)
    assert_least(isa, w, exponent=2.4, **options)
    plain = {**options, "importance": None}
    assert not torch.equal(search(isa, w, **options)[0], search(isa, w, **plain)[0])


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(1, 1, 1), (2, 33, 7), (7, 65, 1), (3, 99, 99)])
def test_search_shapes(isa, n, k, group_size):
    assert_least(isa, weights(n, k), bits=3, group_size=group_size, steps=100)


@pytest.mark.parametrize("kind", KINDS)
def test_squares_give_the_same_choice_everywhere(kind):
    """With exponent 2 all implementations add the same numbers in the same order."""
    w = weights(40, 128)
    options = {"bits": 3, "group_size": 64, "kind": kind, "steps": 100, "exponent": 2.0}
    first = search(ISAS[0], w, **options)
    assert bool((first[0] > 0).all())
    for isa in ISAS[1:]:
        other = search(isa, w, **options)
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_never_raises_the_error_and_can_lower_it(isa, kind):
    w = weights(8, 128)
    options = {"bits": 3, "group_size": 128, "kind": kind, "exponent": 2.4}

    def error(scales: Tensor, zeros: Tensor) -> Tensor:
        float_zero = kind == "float"
        codes = reference.codes_of(w, scales, zeros, 3, float_zero, int(kind == "restricted"))
        miss = w - reference.values_of(codes, scales, zeros, float_zero)
        return miss.abs().double().pow(2.4).sum(dim=1)

    plain, clipped = error(*search(isa, w, **options)), error(*search(isa, w, steps=100, **options))
    assert bool((clipped <= plain * (1 + TIE)).all())
    assert float(clipped.sum()) < 0.9 * float(plain.sum())


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
def test_restricted_search_leaves_code_0_unused(isa):
    """At 2 bits the restricted grid is ternary: its error counts codes 1..3 only."""
    w = torch.tensor([[-1.0, -0.3, 0.3, 1.0, -0.3, 0.3, -0.3, 0.3]])
    options = {"bits": 2, "group_size": 8, "kind": "restricted", "steps": 100, "exponent": 2.0}
    assert_equal(isa, w, **options)
    assert_equal(isa, -w, **options)
    assert torch.equal(search(isa, w, **options)[0], search(isa, -w, **options)[0])


@pytest.mark.parametrize(("steps", "shrink", "count"), [(0, 0.8, 1), (100, 0.8, 81), (20, 0.5, 11)])
def test_shrink_factors(steps, shrink, count):
    factors = reference.shrink_factors(steps, shrink)
    assert len(factors) == count
    assert factors[0] == 1
    assert float(factors[-1]) == pytest.approx(1 - shrink if steps else 1, abs=1e-6)


@pytest.mark.parametrize("isa", IMPLEMENTATIONS)
def test_last_shrink_factor_is_tried(isa):
    """One huge weight among many small ones: the narrowest range is the best one."""
    w = torch.cat([torch.tensor([[1.0]]), weights(1, 255) * 0.1], dim=1)
    options = {"bits": 8, "group_size": 256, "steps": 10, "shrink": 0.5, "exponent": 0.5}
    scales, _ = search(isa, w, **options)
    every = reference.grid_errors(w, **options)[1]
    assert float(scales) == float(every[-1])


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_matter(isa):
    w = weights(90, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(search(isa, w, bits=3, group_size=16, steps=50))
    finally:
        torch.set_num_threads(threads)
    assert bool((results[0][0] > 0).all())
    for scales, zeros in results[1:]:
        assert torch.equal(scales, results[0][0])
        assert torch.equal(zeros, results[0][1])


def test_opcheck():
    torch.library.opcheck(
        torch.ops.mmq.grid_search.default,
        (weights(3, 9), torch.rand(9), 4, 8, "integer", "float16", 5, 0.5, 2.4),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(9)}, r"w of shape \[\*, \*\]"),
        ({"importance": torch.ones(8)}, r"importance of shape \[9\]"),
        ({"bits": 9}, "bits from 2 to 8, got 9"),
        ({"group_size": -1}, "a positive group size, got -1"),
        ({"kind": "none"}, "kind as one of integer, float, symmetric, restricted, got 'none'"),
        ({"steps": -1}, "0 or more steps, got -1"),
        ({"shrink": 1.0}, "a shrink from 0 to below 1, got 1"),
        ({"exponent": 0.0}, "a positive exponent, got 0"),
    ],
)
@pytest.mark.parametrize("isa", [ISAS[0], "torch"])
def test_bad_input(isa, change, message):
    good = {"w": weights(3, 9), "bits": 4, "group_size": 8, "steps": 5}
    with pytest.raises(ValueError, match=f"grid_search: expected {message}"):
        search(isa, **{**good, **change})
