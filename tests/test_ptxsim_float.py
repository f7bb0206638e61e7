# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's floating-point arithmetic, bit by bit, against exact fractions."""

from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from exact_floats import BF16, F16, F32, F64, FORMATS, Array, Format, canonical, to_double
from simulator import Simulator, assert_bits, lanes, needs_simulator

pytestmark = needs_simulator

COUNT = 2500
OPERANDS = {"add": 2, "sub": 2, "mul": 2, "fma": 3}


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def special(name: str, values: list[float]) -> float:
    """The result where an operand is infinite or NaN: double arithmetic has the same rules."""
    with np.errstate(all="ignore"):
        a, b, *rest = (np.float64(value) for value in values)
        if name == "fma":
            return float(a * b + rest[0])
        return float({"add": a + b, "sub": a - b, "mul": a * b}[name])


def arithmetic(name: str, form: Format, patterns: list[Array], mode: str = "rn") -> Array:
    """Correctly rounded results as patterns; a NaN is form.nan."""
    results = []
    for row in zip(*patterns, strict=True):
        operands = [int(pattern) for pattern in row]
        if any(form.is_nan(p) or form.is_infinite(p) for p in operands):
            doubles = [float(to_double(np.array([p], dtype=form.pattern), form)[0]) for p in row]
            # Finite doubles cannot overflow here: only their signs and zeros matter.
            doubles = [d if not np.isfinite(d) else float(np.sign(d)) for d in doubles]
            value = special(name, doubles)
            pattern = form.nan if np.isnan(value) else form.infinity
            results.append(pattern | (form.sign if value < 0 else 0))
            continue
        a, b, *rest = (form.value(p) for p in operands)
        if name == "sub":
            b, operands[1] = -b, operands[1] ^ form.sign
        product_sign = bool((operands[0] ^ operands[1]) & form.sign)
        if name == "mul":
            exact, negative_zero = a * b, product_sign
        elif name == "fma":
            exact = a * b + rest[0]
            negative_zero = product_sign and bool(operands[2] & form.sign)
        else:
            exact = a + b
            negative_zero = bool(operands[0] & operands[1] & form.sign)
        results.append(form.round(exact, mode, negative_zero=negative_zero))
    return np.array(results, dtype=form.pattern)


def target_of(instruction: str) -> str:
    """bfloat16 has only fma before sm_90."""
    return (
        "sm_90" if "bf16" in instruction and instruction[:3] in ("add", "sub", "mul") else "sm_80"
    )


def run(sim: Simulator, instruction: str, patterns: list[Array], form: Format) -> Array:
    operands = ", ".join(["%d", "%a", "%b", "%c"][: len(patterns) + 1])
    # f32 and f64 live in registers of their own type.
    typed = [p.view(f"f{form.bits // 8}") if form.bits > 16 else p for p in patterns]
    dtype = np.dtype(f"f{form.bits // 8}") if form.bits > 16 else np.dtype(np.uint16)
    got = lanes(sim, f"{instruction} {operands};", typed, dtype, target=target_of(instruction))
    return canonical(got.view(form.pattern), form)


@pytest.mark.parametrize("name", list(OPERANDS))
@pytest.mark.parametrize("form", [F16, BF16, F32, F64], ids=lambda form: form.name)
def test_arithmetic_rounds_once(sim: Simulator, form: Format, name: str) -> None:
    patterns = [form.samples(COUNT, seed) for seed in range(OPERANDS[name])]
    got = run(sim, f"{name}.rn.{form.name}", patterns, form)
    assert_bits(got, arithmetic(name, form, patterns), f"{name}.rn.{form.name}")


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", list(OPERANDS))
def test_directed_rounding(sim: Simulator, name: str, mode: str) -> None:
    patterns = [F32.samples(COUNT, seed) for seed in range(OPERANDS[name])]
    instruction = f"{name}.{mode}.f32"
    got, want = (
        run(sim, instruction, patterns, F32),
        arithmetic(name, F32, patterns, mode),
    )
    if mode == "rm":  # an exact sum of zero is -0 when rounding down
        got, want = (np.where(x == F32.sign, np.uint32(0), x) for x in (got, want))
    assert_bits(got, want, instruction)


@pytest.mark.parametrize("form", [F32, F64], ids=lambda form: form.name)
def test_without_a_mode_add_and_mul_round_to_nearest(sim: Simulator, form: Format) -> None:
    patterns = [form.samples(COUNT, seed + 7) for seed in range(2)]
    for name in ("add", "sub", "mul"):
        got = run(sim, f"{name}.{form.name}", patterns, form)
        assert_bits(got, arithmetic(name, form, patterns), f"{name}.{form.name}")


def test_flush_to_zero_is_ignored(sim: Simulator) -> None:
    """Stated in the report's header: results that are subnormal stay so."""
    patterns = [F32.samples(COUNT, seed) for seed in range(2)]
    assert_bits(run(sim, "mul.ftz.f32", patterns, F32), arithmetic("mul", F32, patterns), "ftz")


def test_fma_cancels_exactly(sim: Simulator) -> None:
    """a * b - round(a * b) is the rounding error, which is zero if the product was rounded."""
    a, b = (F32.samples(COUNT, seed).view(np.float32) for seed in (3, 4))
    with np.errstate(all="ignore"):
        usable = np.isfinite(a * b) & (np.abs(a * b) > 1e-20)
    a, b = a[usable], b[usable]
    got = lanes(
        sim,
        "mul.rn.f32 %f0, %a, %b; neg.f32 %f0, %f0; fma.rn.f32 %d, %a, %b, %f0;",
        [a, b],
        np.float32,
    )
    want = (a.astype(np.float64) * b - (a * b).astype(np.float64)).astype(np.float32)
    assert_bits(got, want, "fma")
    assert np.count_nonzero(got) > len(got) // 2


def test_mul_and_add_are_not_fused(sim: Simulator) -> None:
    a, b, c = (F32.samples(COUNT, seed).view(np.float32) for seed in (3, 4, 5))
    got = lanes(sim, "mul.f32 %f0, %a, %b; add.f32 %d, %f0, %c;", [a, b, c], np.float32)
    with np.errstate(all="ignore"):
        assert_bits(got, a * b + c, "mul, add")


def test_saturation_clamps_to_zero_and_one(sim: Simulator) -> None:
    a, b = (F32.samples(COUNT, seed).view(np.float32) for seed in (1, 2))
    with np.errstate(all="ignore"):
        want = np.clip(a + b, np.float32(0), np.float32(1))
    want = np.where(np.isnan(want) | (want == 0), np.float32(0), want)
    got = lanes(sim, "add.sat.f32 %d, %a, %b;", [a, b], np.float32)
    assert_bits(np.where(got == 0, np.float32(0), got), want, "add.sat")


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("name", list(OPERANDS))
def test_packed_halves(sim: Simulator, kind: str, name: str) -> None:
    """Both halves of a register, independently: the low half is the first element."""
    form = FORMATS[kind[:-2]]
    count = OPERANDS[name]
    low = [form.samples(COUNT, seed) for seed in range(count)]
    high = [form.samples(COUNT, seed + 10) for seed in range(count)]
    pairs = [
        a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16)
        for a, b in zip(low, high, strict=True)
    ]
    operands = ", ".join(["%d", "%a", "%b", "%c"][: count + 1])
    instruction = f"{name}.rn.{kind}"
    got = lanes(sim, f"{instruction} {operands};", pairs, np.uint32, target=target_of(instruction))
    halves = got.view(np.uint16).reshape(-1, 2)
    for index, patterns in enumerate((low, high)):
        half = canonical(np.ascontiguousarray(halves[:, index]), form)
        assert_bits(half, arithmetic(name, form, patterns), f"{name}.{kind} half {index}")


@pytest.mark.parametrize("form", [F16, BF16, F32, F64], ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max(sim: Simulator, form: Format, name: str) -> None:
    """A NaN loses against a number, -0 is less than +0; with .NaN a NaN wins."""
    patterns = [form.samples(COUNT, seed) for seed in range(2)]
    patterns[0][:4] = [form.nan, form.nan, 0, form.sign]
    patterns[1][:4] = [form.nan, 0, form.sign, 0]

    def order(pattern: int) -> tuple[Fraction, int]:
        sign = -1 if pattern & form.sign else 1
        if form.is_infinite(pattern):
            return Fraction(2) ** 2000 * sign, sign
        return form.value(pattern), sign

    def choose(a: int, b: int) -> int:
        if form.is_nan(a) or form.is_nan(b):
            rest = [p for p in (a, b) if not form.is_nan(p)]
            return rest[0] if rest else form.nan
        return {"min": min, "max": max}[name]((a, b), key=order)

    rows = [(int(a), int(b)) for a, b in zip(*patterns, strict=True)]
    want = np.array([choose(*row) for row in rows], dtype=form.pattern)
    assert_bits(run(sim, f"{name}.{form.name}", patterns, form), want, f"{name}.{form.name}")
    if form is F64:
        return
    wins = [form.nan if form.is_nan(a) or form.is_nan(b) else choose(a, b) for a, b in rows]
    got = run(sim, f"{name}.NaN.{form.name}", patterns, form)
    assert_bits(got, np.array(wins, dtype=form.pattern), f"{name}.NaN.{form.name}")


@pytest.mark.parametrize("form", [F16, BF16, F32, F64], ids=lambda form: form.name)
def test_neg_and_abs_change_only_the_sign(sim: Simulator, form: Format) -> None:
    patterns = form.samples(COUNT)
    flipped = patterns ^ form.pattern(form.sign)
    cleared = patterns & form.pattern(form.sign - 1)
    assert_bits(run(sim, f"neg.{form.name}", [patterns], form), canonical(flipped, form), "neg")
    assert_bits(run(sim, f"abs.{form.name}", [patterns], form), canonical(cleared, form), "abs")


def test_copysign_takes_the_sign_of_the_first_operand(sim: Simulator) -> None:
    a, b = (F32.samples(COUNT, seed) for seed in range(2))
    want = b & np.uint32(0x7FFFFFFF) | a & np.uint32(0x80000000)
    assert_bits(run(sim, "copysign.f32", [a, b], F32), canonical(want, F32), "copysign")


@pytest.mark.parametrize("form", [F32, F64], ids=lambda form: form.name)
def test_exact_division_and_square_root(sim: Simulator, form: Format) -> None:
    dtype = np.dtype(f"f{form.bits // 8}")
    a, b = (form.samples(COUNT, seed).view(dtype) for seed in range(2))
    with np.errstate(all="ignore"):  # numpy's division and square root are IEEE 754's
        assert_bits(lanes(sim, f"div.rn.{form.name} %d, %a, %b;", [a, b], dtype), a / b, "div.rn")
        assert_bits(lanes(sim, f"sqrt.rn.{form.name} %d, %a;", [a], dtype), np.sqrt(a), "sqrt.rn")
        one = dtype.type(1)
        assert_bits(lanes(sim, f"rcp.rn.{form.name} %d, %a;", [a], dtype), one / a, "rcp.rn")


# The bounds are those of the PTX ISA for the hardware, in relative error, which libm keeps easily.
APPROXIMATE: dict[str, tuple[Callable[[Array], Array], float, tuple[float, float]]] = {
    "ex2.approx.f32": (np.exp2, 2.0**-21, (-120, 120)),
    "rcp.approx.f32": (lambda x: 1 / x, 2.0**-22, (1e-30, 1e30)),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2.0**-21, (1e-30, 1e30)),
    "sqrt.approx.f32": (np.sqrt, 2.0**-21, (1e-30, 1e30)),
    "lg2.approx.f32": (np.log2, 2.0**-20, (2.0, 1e30)),
    "sin.approx.f32": (np.sin, 2.0**-20, (0.1, 3.0)),
    "cos.approx.f32": (np.cos, 2.0**-20, (0.1, 1.5)),
    "tanh.approx.f32": (np.tanh, 2.0**-10, (-8, 8)),
}


@pytest.mark.parametrize("name", list(APPROXIMATE))
def test_approximate_functions(sim: Simulator, name: str) -> None:
    function, bound, (low, high) = APPROXIMATE[name]
    rng = np.random.default_rng(0)
    if low > 0:
        inputs = np.exp(rng.uniform(np.log(low), np.log(high), COUNT)).astype(np.float32)
    else:
        inputs = rng.uniform(low, high, COUNT).astype(np.float32)
    got = lanes(sim, f"{name} %d, %a;", [inputs], np.float32).astype(np.float64)
    want = function(inputs.astype(np.float64))
    assert np.max(np.abs(got / want - 1)) <= bound
    if name.startswith("tanh"):  # has no .ftz
        return
    ftz = name.replace("approx.", "approx.ftz.")
    assert_bits(
        lanes(sim, f"{ftz} %d, %a;", [inputs], np.float32), got.astype(np.float32), "same with ftz"
    )


@pytest.mark.parametrize(
    ("name", "inputs", "want"),
    [
        ("ex2.approx.f32", [-np.inf, np.inf, np.nan, 0.0, 1.0], [0.0, np.inf, np.nan, 1.0, 2.0]),
        ("rcp.approx.f32", [0.0, -0.0, np.inf, np.nan, 2.0], [np.inf, -np.inf, 0.0, np.nan, 0.5]),
        ("rsqrt.approx.f32", [0.0, np.inf, -1.0, np.nan, 4.0], [np.inf, 0.0, np.nan, np.nan, 0.5]),
        ("lg2.approx.f32", [0.0, np.inf, -1.0, 1.0, 8.0], [-np.inf, np.inf, np.nan, 0.0, 3.0]),
    ],
)
def test_approximate_functions_at_their_corners(
    sim: Simulator, name: str, inputs: list[float], want: list[float]
) -> None:
    got = lanes(sim, f"{name} %d, %a;", [np.array(inputs, dtype=np.float32)], np.float32)
    assert_bits(got, np.array(want, dtype=np.float32), name)


@pytest.mark.parametrize("name", ["div.approx.f32", "div.full.f32"])
def test_approximate_division(sim: Simulator, name: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.01, 100, COUNT).astype(np.float32) for _ in range(2))
    got = lanes(sim, f"{name} %d, %a, %b;", [a, b], np.float32).astype(np.float64)
    assert np.max(np.abs(got * b / a - 1)) <= 2.0**-21


ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("form", [F16, F32, F64], ids=lambda form: form.name)
def test_compare_with_nans(sim: Simulator, form: Format) -> None:
    """The plain compares are false for a NaN (ne too), those with u are true; num and nan ask."""
    dtype = np.dtype(f"f{form.bits // 8}")
    patterns = [form.samples(1000, seed) for seed in range(2)]
    patterns[1][::3] = patterns[0][::3]
    patterns[0][:4] = [form.nan, form.nan, 0, form.sign]
    patterns[1][:4] = [form.nan, 0, form.sign, 0]
    a, b = (p.view(dtype) for p in patterns)
    typed = [a, b] if form.bits > 16 else patterns
    unordered = np.isnan(a) | np.isnan(b)
    cases = dict(ORDERED)
    for name, compare in ORDERED.items():
        cases[name + "u"] = lambda a, b, compare=compare: compare(a, b) | unordered
    cases["num"], cases["nan"] = (lambda a, b: ~unordered), (lambda a, b: unordered)
    for name, compare in cases.items():
        body = f"setp.{name}.{form.name} %p0, %a, %b; selp.u32 %d, 1, 0, %p0;"
        got = lanes(sim, body, typed, np.uint32)
        assert_bits(got, compare(a, b).astype(np.uint32), f"setp.{name}.{form.name}")


def test_packed_compare_gives_a_predicate_per_half(sim: Simulator) -> None:
    patterns = [F16.samples(2000, seed).reshape(-1, 2) for seed in range(2)]
    pairs = [np.ascontiguousarray(p).view(np.uint32).ravel() for p in patterns]
    a, b = (p.view(np.float16) for p in patterns)
    body = """
        setp.lt.f16x2 %p0|%p1, %a, %b; selp.u32 %d, 1, 0, %p0; selp.u32 %d1, 1, 0, %p1;
    """
    got = lanes(sim, body, pairs, [np.uint32, np.uint32])
    for half in range(2):
        assert_bits(got[half], (a[:, half] < b[:, half]).astype(np.uint32), f"half {half}")


def test_selp_of_floats(sim: Simulator) -> None:
    a, b = (F32.samples(512, seed).view(np.float32) for seed in range(2))
    got = lanes(sim, "setp.gt.f32 %p0, %a, %b; selp.f32 %d, %a, %b, %p0;", [a, b], np.float32)
    assert_bits(got, np.where(a > b, a, b), "selp.f32")
