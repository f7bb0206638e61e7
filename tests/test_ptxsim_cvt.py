# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's conversions: halves exhaustively, all rounding modes, saturation."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from exact_floats import BF16, F16, F32, F64, FORMATS, Array, Format, canonical, to_double
from simulator import Simulator, assert_bits, lanes, needs_simulator

pytestmark = needs_simulator

ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)
INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def typed(patterns: Array, form: Format) -> Array:
    return patterns.view(f"f{form.bits // 8}") if form.bits > 16 else patterns


def convert(sim: Simulator, instruction: str, values: Array, form: Format) -> Array:
    dtype = np.dtype(f"f{form.bits // 8}") if form.bits > 16 else np.dtype(np.uint16)
    got = lanes(sim, f"{instruction} %d, %a;", [values], dtype)
    return canonical(got.view(form.pattern), form)


def rounded(patterns: Array, source: Format, target: Format, mode: str) -> Array:
    """Every finite pattern of `source` rounded to `target`."""
    results = []
    for pattern in patterns.tolist():
        sign = target.sign if pattern & source.sign else 0
        if source.is_nan(pattern):
            results.append(target.nan)
        elif source.is_infinite(pattern):
            results.append(target.infinity | sign)
        else:
            exact = source.value(pattern)
            results.append(target.round(exact, mode, negative_zero=bool(sign)))
    return np.array(results, dtype=target.pattern)


@pytest.mark.parametrize("target", [F32, F64], ids=lambda form: form.name)
def test_f16_widens_exactly(sim: Simulator, target: Format) -> None:
    want = ALL_HALVES.view(np.float16).astype(f"f{target.bits // 8}").view(target.pattern)
    got = convert(sim, f"cvt.{target.name}.f16", ALL_HALVES, target)
    assert_bits(got, canonical(want, target), f"cvt.{target.name}.f16")


def test_bf16_widens_exactly(sim: Simulator) -> None:
    want = canonical(ALL_HALVES.astype(np.uint32) << np.uint32(16), F32)
    assert_bits(convert(sim, "cvt.f32.bf16", ALL_HALVES, F32), want, "cvt.f32.bf16")
    body = "mov.u16 %h0, 0; mov.b32 %d, {%h0, %a};"
    shifted = lanes(sim, body, [ALL_HALVES], np.uint32)
    assert_bits(canonical(shifted, F32), want, "mov")


def near_halves(form: Format, source: Format, seed: int) -> Array:
    """Values around every half: the half itself, the midpoint to the next one and its neighbours
    on both sides, in the wider format."""
    rng = np.random.default_rng(seed)
    halves = ALL_HALVES[(ALL_HALVES & (form.sign - 1)) < form.infinity]
    here = to_double(halves, form)
    there = to_double((halves + 1).astype(np.uint16), form)
    middle = np.where(np.isfinite(there), (here + there) / 2, here)
    dtype = np.dtype(f"f{source.bits // 8}")
    with np.errstate(all="ignore"):
        center = middle.astype(dtype)
        values = np.concatenate(
            [
                here.astype(dtype),
                center,
                np.nextafter(center, np.inf),
                np.nextafter(center, -np.inf),
            ]
        )
    picked = rng.choice(values, 6000, replace=False)
    return np.concatenate([picked.view(source.pattern), source.samples(2000, seed)])


@pytest.mark.parametrize("form", [F16, BF16], ids=lambda form: form.name)
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f32_to_half(sim: Simulator, form: Format, mode: str) -> None:
    if form is BF16 and mode in ("rm", "rp"):
        pytest.skip("PTX has no such conversion on sm_80")
    patterns = near_halves(form, F32, 0)
    instruction = f"cvt.{mode}.{form.name}.f32"
    got = convert(sim, instruction, typed(patterns, F32), form)
    assert_bits(got, rounded(patterns, F32, form, mode), instruction, {"a": typed(patterns, F32)})


def test_f32_to_f16_rounds_every_half_back(sim: Simulator) -> None:
    values = ALL_HALVES.view(np.float16).astype(np.float32)
    got = convert(sim, "cvt.rn.f16.f32", values, F16)
    assert_bits(got, canonical(ALL_HALVES, F16), "round trip")


def test_f64_to_f16_rounds_once(sim: Simulator) -> None:
    """A double just above a midpoint, which would round to it as a float and then to even."""
    patterns = near_halves(F16, F64, 0)
    got = convert(sim, "cvt.rn.f16.f64", typed(patterns, F64), F16)
    assert_bits(got, rounded(patterns, F64, F16, "rn"), "cvt.rn.f16.f64")


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_two_floats_to_packed_halves(sim: Simulator, kind: str, mode: str) -> None:
    """The first operand becomes the upper half."""
    form = FORMATS[kind[:-2]]
    a, b = near_halves(form, F32, 0), near_halves(form, F32, 1)
    inputs = [typed(a, F32), typed(b, F32)]
    got = lanes(sim, f"cvt.{mode}.{kind}.f32 %d, %a, %b;", inputs, np.uint32)
    halves = got.view(np.uint16).reshape(-1, 2)
    for index, patterns in enumerate((b, a)):
        half = canonical(np.ascontiguousarray(halves[:, index]), form)
        assert_bits(half, rounded(patterns, F32, form, mode), f"cvt.{mode}.{kind} half {index}")


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f64_to_f32_and_back(sim: Simulator, mode: str) -> None:
    patterns = F64.samples(3000)
    # Half of them around the range of f32.
    floats = F32.samples(3000, 1).view(np.float32)
    with np.errstate(all="ignore"):
        near = np.nextafter(floats.astype(np.float64), 0) * (1 + 2.0**-25)
    patterns = np.concatenate([patterns, near.view(np.uint64)])
    got = convert(sim, f"cvt.{mode}.f32.f64", typed(patterns, F64), F32)
    assert_bits(got, rounded(patterns, F64, F32, mode), f"cvt.{mode}.f32.f64")
    widened = convert(sim, "cvt.f64.f32", floats, F64)
    with np.errstate(invalid="ignore"):
        want = canonical(floats.astype(np.float64).view(np.uint64), F64)
    assert_bits(widened, want, "cvt.f64.f32")


TO_INTEGER = {"rni": None, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def integral(exact: Fraction, mode: str) -> int:
    function = TO_INTEGER[mode]
    return round(exact) if function is None else function(exact)  # round() ties to even


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def register_dtype(kind: str) -> np.dtype:
    """Bytes convert into 32-bit registers, extended by sign or zeros."""
    bits = int(kind[1:])
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{max(bits, 32) // 8 if bits != 16 else 2}")


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("source", [F16, F32, F64], ids=lambda form: form.name)
def test_float_to_integer_clamps(sim: Simulator, source: Format, kind: str) -> None:
    low, high = limits(kind)
    dtype = np.dtype(f"f{source.bits // 8}")
    rng = np.random.default_rng(0)
    edges = [float(edge) for edge in (low, high, low - 1, high + 1)]
    halves = [i + step for i in range(-6, 7) for step in (0.25, 0.5, 0.75)]
    values = np.concatenate(
        [edges, halves, rng.uniform(-300, 300, 400), rng.normal(size=99) * 1e10]
    )
    with np.errstate(all="ignore"):
        narrow = values.astype(dtype)
        nearby = np.concatenate([np.nextafter(narrow, -np.inf), np.nextafter(narrow, np.inf)])
    patterns = np.concatenate([narrow, nearby]).view(source.pattern)
    patterns = np.concatenate([patterns, source.samples(400)])
    for mode in TO_INTEGER:
        want = []
        for pattern in patterns.tolist():
            if source.is_nan(pattern):
                # Zero, unless one side has 64 bits: then the top bit alone.
                bits = int(kind[1:])
                wide = source is F64 or bits == 64
                value = 1 << (bits - 1) if wide else 0
                value = value - (1 << bits) if wide and kind[0] == "s" else value
            elif source.is_infinite(pattern):
                value = low if pattern & source.sign else high
            else:
                value = min(max(integral(source.value(pattern), mode), low), high)
            want.append(value)
        instruction = f"cvt.{mode}.{kind}.{source.name}"
        inputs = typed(patterns, source)
        got = lanes(sim, f"{instruction} %d, %a;", [inputs], register_dtype(kind))
        known = np.array(
            [not (source.is_nan(p) and kind in ("u8", "s8")) for p in patterns.tolist()]
        )
        expected = np.array(want, dtype=object).astype(register_dtype(kind))
        assert_bits(got[known], expected[known], instruction, {"a": inputs[known]})


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("target", [F16, F32, F64], ids=lambda form: form.name)
def test_integer_to_float(sim: Simulator, target: Format, kind: str) -> None:
    low, high = limits(kind)
    bits = int(kind[1:])
    rng = np.random.default_rng(0)
    values = [low, high, low + 1, high - 1, 0, 1, 2049, 2051, 16777217, 16777219, 65519, 65520]
    values += [int(rng.integers(0, 1 << 63)) >> int(rng.integers(0, 63)) for _ in range(600)]
    values = [min(max(value, low), high) for value in values]
    values += [-value for value in values if low <= -value <= high]
    # A byte comes in a 16-bit register whose high bits must not matter.
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{max(bits, 16) // 8}")
    inputs = np.array(values, dtype=object).astype(dtype)
    if bits == 8:
        inputs = (inputs.astype(np.uint16) & 0xFF | 0xA500).view(dtype)
    for mode in ("rn", "rz", "rm", "rp"):
        want = np.array([target.round(Fraction(v), mode) for v in values], dtype=target.pattern)
        got = convert(sim, f"cvt.{mode}.{target.name}.{kind}", inputs, target)
        assert_bits(got, want, f"cvt.{mode}.{target.name}.{kind}", {"a": inputs})


@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_integer(sim: Simulator, source: str) -> None:
    bits = int(source[1:])
    low, high = limits(source)
    rng = np.random.default_rng(0)
    values = [low, high, 0, 1, min(127, high), min(128, high)]
    values += [int(rng.integers(0, 1 << 63)) >> int(rng.integers(0, 63)) for _ in range(200)]
    values = [min(max(value, low), high) for value in values]
    values += [-value for value in values if low <= -value <= high]
    dtype = np.dtype(f"{'i' if source[0] == 's' else 'u'}{max(bits, 16) // 8}")
    inputs = np.array(values, dtype=object).astype(dtype)
    for target in INTEGERS:
        if target == source:
            continue
        target_bits = int(target[1:])
        least, most = limits(target)
        # ptxas refuses .sat where nothing can overflow.
        overflows = low < least or high > most
        for suffix in ("", ".sat") if overflows else ("",):
            want = []
            for value in values:
                if suffix:
                    value = min(max(value, least), most)
                value &= (1 << target_bits) - 1
                if target[0] == "s" and value >> (target_bits - 1):
                    value -= 1 << target_bits
                want.append(value)
            instruction = f"cvt{suffix}.{target}.{source}"
            got = lanes(sim, f"{instruction} %d, %a;", [inputs], register_dtype(target))
            expected = np.array(want, dtype=object).astype(register_dtype(target))
            assert_bits(got, expected, instruction, {"a": inputs})


@pytest.mark.parametrize("form", [F16, F32, F64], ids=lambda form: form.name)
@pytest.mark.parametrize("mode", list(TO_INTEGER))
def test_rounding_to_integral_floats(sim: Simulator, form: Format, mode: str) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-9, 9, 400), np.arange(-20, 20) / 2]).astype(
        f"f{form.bits // 8}"
    )
    patterns = np.concatenate([values.view(form.pattern), form.samples(400)])
    want = []
    for pattern in patterns.tolist():
        if form.is_nan(pattern) or form.is_infinite(pattern):
            want.append(pattern)
            continue
        value = Fraction(integral(form.value(pattern), mode))
        want.append(form.round(value, negative_zero=bool(pattern & form.sign)))
    got = convert(sim, f"cvt.{mode}.{form.name}.{form.name}", typed(patterns, form), form)
    assert_bits(got, canonical(np.array(want, dtype=form.pattern), form), f"cvt.{mode}")


def test_saturating_to_zero_and_one(sim: Simulator) -> None:
    values = F32.samples(2000).view(np.float32)
    want = np.where(np.isnan(values), np.float32(0), np.clip(values, 0, 1)).astype(np.float32)
    got = lanes(sim, "cvt.sat.f32.f32 %d, %a;", [values], np.float32)
    assert_bits(np.abs(got), np.abs(want), "cvt.sat.f32.f32")
