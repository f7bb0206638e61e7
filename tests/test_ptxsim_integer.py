# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's integer instructions against Python's integers, which do not overflow."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from simulator import Simulator, assert_bits, lanes, needs_simulator

pytestmark = needs_simulator

DTYPES = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "u64": np.uint64,
    "s64": np.int64,
}
INTEGERS = list(DTYPES)
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def bits_of(kind: str) -> int:
    return int(kind[1:])


def wrap(value: int, kind: str) -> int:
    """The value's low bits, read as the type."""
    value &= (1 << bits_of(kind)) - 1
    return (
        value - (1 << bits_of(kind)) if kind[0] == "s" and value >> (bits_of(kind) - 1) else value
    )


def samples(kind: str, count: int = 300, seed: int = 0) -> list[int]:
    """The type's corners, powers of two and random values of all magnitudes."""
    bits = bits_of(kind)
    rng = np.random.default_rng(seed)
    values = [0, 1, 2, 3, 7, -1, -2, -7, 1 << (bits - 1), (1 << (bits - 1)) - 1, 0x5A5A5A5A]
    values += [1 << i for i in range(bits)]
    while len(values) < count:
        values.append(int(rng.integers(0, 1 << 63)) >> int(rng.integers(0, 63)))
        values.append(-values[-1])
    return [wrap(value, kind) for value in values[:count]]


def corners(kind: str) -> list[int]:
    return samples(kind, 11)


def tuples(kinds: list[str]) -> list[tuple[int, ...]]:
    """All pairs (triples) of corners, and random tuples."""
    grids = np.meshgrid(*[np.arange(11)] * len(kinds), indexing="ij")
    rows = [
        tuple(corners(kind)[i] for kind, i in zip(kinds, at, strict=True))
        for at in zip(*[grid.ravel() for grid in grids], strict=True)
    ]
    columns = [samples(kind, 400, seed) for seed, kind in enumerate(kinds)]
    for seed, column in enumerate(columns):
        np.random.default_rng(seed).shuffle(column)
    return rows + list(zip(*columns, strict=True))


def array(values: list[int], kind: str) -> np.ndarray:
    return np.array([wrap(value, kind) for value in values], dtype=DTYPES[kind])


def check(
    sim: Simulator,
    instruction: str,
    kinds: list[str],
    result: str,
    expected: Callable[..., int],
    rows: list[tuple[int, ...]] | None = None,
) -> None:
    """Runs `instruction d, a, b, c;` on tuples of inputs."""
    rows = tuples(kinds) if rows is None else rows
    inputs = [array([row[i] for row in rows], kind) for i, kind in enumerate(kinds)]
    operands = ", ".join(["%d", "%a", "%b", "%c"][: len(kinds) + 1])
    got = lanes(sim, f"{instruction} {operands};", inputs, DTYPES[result])
    want = array([expected(*row) for row in rows], result)
    assert_bits(got, want, instruction, dict(zip("abc", inputs, strict=False)))


@pytest.mark.parametrize("kind", INTEGERS)
def test_add_sub_mul(sim: Simulator, kind: str) -> None:
    check(sim, f"add.{kind}", [kind] * 2, kind, lambda a, b: a + b)
    check(sim, f"sub.{kind}", [kind] * 2, kind, lambda a, b: a - b)
    check(sim, f"mul.lo.{kind}", [kind] * 2, kind, lambda a, b: a * b)
    check(sim, f"mul.hi.{kind}", [kind] * 2, kind, lambda a, b: (a * b) >> bits_of(kind))
    check(sim, f"mad.lo.{kind}", [kind] * 3, kind, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_mad_hi_adds_to_the_high_half(sim: Simulator, kind: str) -> None:
    check(sim, f"mad.hi.{kind}", [kind] * 3, kind, lambda a, b, c: ((a * b) >> 32) + c)


@pytest.mark.parametrize("kind", list(WIDE))
def test_mul_wide_and_mad_wide(sim: Simulator, kind: str) -> None:
    wide = WIDE[kind]
    check(sim, f"mul.wide.{kind}", [kind] * 2, wide, lambda a, b: a * b)
    check(sim, f"mad.wide.{kind}", [kind, kind, wide], wide, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", INTEGERS)
def test_div_and_rem_truncate(sim: Simulator, kind: str) -> None:
    """Division by zero is machine-specific in PTX, so it is not asked here."""
    lowest = wrap(1 << (bits_of(kind) - 1), kind)

    def defined(a: int, b: int) -> bool:
        return b != 0 and not (kind[0] == "s" and a == lowest and b == -1)

    rows = [row for row in tuples([kind] * 2) if defined(*row)]

    def quotient(a: int, b: int) -> int:
        sign = -1 if (a < 0) != (b < 0) else 1
        return sign * (abs(a) // abs(b))

    check(sim, f"div.{kind}", [kind] * 2, kind, quotient, rows)
    check(sim, f"rem.{kind}", [kind] * 2, kind, lambda a, b: a - quotient(a, b) * b, rows)


@pytest.mark.parametrize("kind", INTEGERS)
def test_division_by_zero_does_not_stop_the_launch(sim: Simulator, kind: str) -> None:
    zeros = np.zeros(32, dtype=DTYPES[kind])
    lanes(sim, f"div.{kind} %d, %a, %b;", [array(samples(kind, 32), kind), zeros], DTYPES[kind])
    lowest = np.full(32, wrap(1 << (bits_of(kind) - 1), kind), dtype=DTYPES[kind])
    ones = array([-1] * 32, kind)
    for instruction in ("div", "rem"):
        lanes(sim, f"{instruction}.{kind} %d, %a, %b;", [lowest, ones], DTYPES[kind])


@pytest.mark.parametrize("kind", INTEGERS)
def test_min_max(sim: Simulator, kind: str) -> None:
    check(sim, f"min.{kind}", [kind] * 2, kind, min)
    check(sim, f"max.{kind}", [kind] * 2, kind, max)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_neg_and_abs_of_the_lowest_number_wrap(sim: Simulator, kind: str) -> None:
    rows = [(value,) for value in samples(kind)]
    check(sim, f"neg.{kind}", [kind], kind, lambda a: -a, rows)
    check(sim, f"abs.{kind}", [kind], kind, abs, rows)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise(sim: Simulator, bits: int) -> None:
    kind = f"u{bits}"
    check(sim, f"and.b{bits}", [kind] * 2, kind, lambda a, b: a & b)
    check(sim, f"or.b{bits}", [kind] * 2, kind, lambda a, b: a | b)
    check(sim, f"xor.b{bits}", [kind] * 2, kind, lambda a, b: a ^ b)
    rows = [(value,) for value in samples(kind)]
    check(sim, f"not.b{bits}", [kind], kind, lambda a: ~a, rows)
    check(sim, f"mov.b{bits}", [kind], kind, lambda a: a, rows)


AMOUNTS = [0, 1, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 1 << 31, (1 << 32) - 1]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_clamp_their_amount(sim: Simulator, bits: int) -> None:
    """An amount of the width or more gives zero, or the sign in every bit; never amount % width."""
    unsigned, signed = f"u{bits}", f"s{bits}"
    for kind, name in ((unsigned, f"shl.b{bits}"), (unsigned, f"shr.u{bits}"), (signed, "shr.s")):
        rows = [(value, amount) for value in samples(kind, 80) for amount in AMOUNTS]
        if name.startswith("shl"):
            check(sim, name, [kind, "u32"], kind, lambda a, n: a << min(n, 64), rows)
        else:
            full = name if name != "shr.s" else f"shr.s{bits}"
            check(sim, full, [kind, "u32"], kind, lambda a, n: a >> min(n, 64), rows)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("direction", ["l", "r"])
def test_funnel_shifts(sim: Simulator, direction: str, mode: str) -> None:
    def shift(low: int, high: int, amount: int) -> int:
        n = amount % 32 if mode == "wrap" else min(amount, 32)
        pair = high << 32 | low
        return (pair << n) >> 32 if direction == "l" else pair >> n

    values = samples("u32", 12)
    rows = [(a, b, n) for a in values for b in values for n in AMOUNTS]
    check(sim, f"shf.{direction}.{mode}.b32", ["u32"] * 3, "u32", shift, rows)


def test_lop3_all_tables(sim: Simulator) -> None:
    """The table is f(0xF0, 0xCC, 0xAA): bit 4a + 2b + c of it is the result for bits a, b, c. Four
    instructions of 64 tables each keep the kernels short."""
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 1 << 32, 128, dtype=np.uint32) for _ in range(3)]
    for first in range(0, 256, 64):
        body = "\n".join(f"lop3.b32 %d{i}, %a, %b, %c, {first + i};" for i in range(64))
        got = lanes(sim, body, inputs, (np.uint32, 64))
        for i in range(64):
            want = np.zeros(128, dtype=np.uint32)
            for bit in range(8):
                if (first + i) >> bit & 1:
                    terms = [
                        values if bit >> (2 - j) & 1 else ~values for j, values in enumerate(inputs)
                    ]
                    want |= terms[0] & terms[1] & terms[2]
            assert_bits(np.ascontiguousarray(got[:, i]), want, f"lop3 table {first + i}")


def test_prmt_all_selectors(sim: Simulator) -> None:
    """All 65,536 selectors: nibble i picks byte i of the pair; its top bit spreads the sign."""
    selectors = np.arange(1 << 16, dtype=np.uint32)
    a = np.full(1 << 16, 0x8F70E1D2, dtype=np.uint32)
    b = np.full(1 << 16, 0x36C5B4A9, dtype=np.uint32)
    got = lanes(sim, "prmt.b32 %d, %a, %b, %c;", [a, b, selectors], np.uint32)
    table = np.array([0xD2, 0xE1, 0x70, 0x8F, 0xA9, 0xB4, 0xC5, 0x36], dtype=np.uint32)
    want = np.zeros(1 << 16, dtype=np.uint32)
    for i in range(4):
        nibble = selectors >> (4 * i) & 0xF
        byte = table[nibble & 7]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0).astype(np.uint32), byte)
        want |= byte << np.uint32(8 * i)
    assert_bits(got, want, "prmt", {"selector": selectors})


def test_prmt_ignores_the_selectors_high_bits(sim: Simulator) -> None:
    a, b = array([0x03020100] * 32, "u32"), array([0x07060504] * 32, "u32")
    high = np.full(32, 0xABCD5410, dtype=np.uint32)
    got = lanes(sim, "prmt.b32 %d, %a, %b, %c;", [a, b, high], np.uint32)
    assert_bits(got, np.full(32, 0x05040100, dtype=np.uint32), "prmt")


FIELDS = [0, 1, 2, 4, 7, 8, 15, 16, 24, 31, 32, 33, 63, 100, 255]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bfe(sim: Simulator, kind: str) -> None:
    """Position and length are the low bytes; what lies above the top bit is the field's sign: bit
    min(position + length - 1, 31), or zero for a length of zero."""

    def extract(a: int, b: int, c: int) -> int:
        position, length = b & 0xFF, c & 0xFF
        source = a & 0xFFFFFFFF
        sign = 0
        if kind == "s32" and length > 0:
            sign = source >> min(position + length - 1, 31) & 1
        value = 0
        for i in range(32):
            inside = i < length and position + i <= 31
            value |= (source >> (position + i) & 1 if inside else sign) << i
        return value

    rows = [(a, b, c) for a in samples(kind, 24) for b in FIELDS for c in FIELDS]
    rows += [(-1, 4 + 256, 8 + 512), (0x12345678, 4 + 256, 8 + 512)]
    check(sim, f"bfe.{kind}", [kind, "u32", "u32"], kind, extract, rows)


def test_bfi(sim: Simulator) -> None:
    values = samples("u32", 400)
    rng = np.random.default_rng(1)
    rows = [
        (int(rng.choice(values)), int(rng.choice(values)), position, length)
        for position in FIELDS
        for length in FIELDS
        for _ in range(8)
    ]

    def insert(a: int, b: int, position: int, length: int) -> int:
        for i in range(length):
            if position + i <= 31:
                b = b & ~(1 << (position + i)) | (a >> i & 1) << (position + i)
        return b

    inputs = [array([row[i] for row in rows], "u32") for i in range(4)]
    got = lanes(sim, "bfi.b32 %d, %a, %b, %c, %e;", inputs, np.uint32)
    assert_bits(got, array([insert(*row) for row in rows], "u32"), "bfi", {"row": np.array(rows)})


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bfind(sim: Simulator, kind: str) -> None:
    """The highest set bit; of a negative number the highest bit that is not its sign."""

    def find(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1  # -1 is 0xFFFFFFFF: none

    rows = [(value,) for value in samples(kind)]
    check(sim, f"bfind.{kind}", [kind], "u32", find, rows)
    check(
        sim,
        f"bfind.shiftamt.{kind}",
        [kind],
        "u32",
        lambda a: bits_of(kind) - 1 - find(a) if find(a) >= 0 else -1,
        rows,
    )


@pytest.mark.parametrize("bits", [32, 64])
def test_brev_clz_popc(sim: Simulator, bits: int) -> None:
    kind = f"u{bits}"
    rows = [(value,) for value in samples(kind)]
    reverse = lambda a: int(format(a, f"0{bits}b")[::-1], 2)  # noqa: E731
    check(sim, f"brev.b{bits}", [kind], kind, reverse, rows)
    check(sim, f"clz.b{bits}", [kind], "u32", lambda a: bits - a.bit_length(), rows)
    check(sim, f"popc.b{bits}", [kind], "u32", lambda a: bin(a).count("1"), rows)


@pytest.mark.parametrize("a_kind", ["u32", "s32"])
@pytest.mark.parametrize("b_kind", ["u32", "s32"])
def test_dp4a(sim: Simulator, a_kind: str, b_kind: str) -> None:
    def lane(value: int, i: int, kind: str) -> int:
        return wrap(value >> (8 * i) & 0xFF, f"{kind[0]}8")

    def dot(a: int, b: int, c: int) -> int:
        return c + sum(lane(a, i, a_kind) * lane(b, i, b_kind) for i in range(4))

    result = "s32" if "s32" in (a_kind, b_kind) else "u32"
    check(sim, f"dp4a.{a_kind}.{b_kind}", [a_kind, b_kind, result], result, dot)


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", INTEGERS)
def test_setp_and_selp(sim: Simulator, kind: str) -> None:
    rows = tuples([kind] * 2)
    inputs = [array([row[i] for row in rows], kind) for i in range(2)]
    for name, compare in COMPARE.items():
        body = f"setp.{name}.{kind} %p0, %a, %b; selp.u32 %d, 1, 2, %p0;"
        got = lanes(sim, body, inputs, np.uint32)
        want = np.array([1 if compare(*row) else 2 for row in rows], dtype=np.uint32)
        assert_bits(got, want, f"setp.{name}.{kind}")


@pytest.mark.parametrize(
    ("name", "compare"),
    [("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")],
)
def test_unsigned_compare_names(sim: Simulator, name: str, compare: str) -> None:
    rows = tuples(["u32"] * 2)
    inputs = [array([row[i] for row in rows], "u32") for i in range(2)]
    body = f"setp.{name}.u32 %p0, %a, %b; selp.u32 %d, 1, 0, %p0;"
    want = np.array([COMPARE[compare](*row) for row in rows], dtype=np.uint32)
    assert_bits(lanes(sim, body, inputs, np.uint32), want, name)


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
def test_setp_combines_with_a_predicate(sim: Simulator, combine: str) -> None:
    rows = tuples(["s32"] * 2)
    inputs = [array([row[i] for row in rows], "s32") for i in range(2)]
    body = (
        f"setp.gt.s32 %p1, %a, 0; setp.lt.{combine}.s32 %p0, %a, %b, %p1; selp.u32 %d, 1, 0, %p0;"
        f"setp.lt.{combine}.s32 %p2, %a, %b, !%p1; selp.u32 %d1, 1, 0, %p2;"
    )
    got = lanes(sim, body, inputs, [np.uint32, np.uint32])
    apply = {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}
    less, positive = inputs[0] < inputs[1], inputs[0] > 0
    assert_bits(got[0], apply[combine](less, positive).astype(np.uint32), combine)
    assert_bits(got[1], apply[combine](less, ~positive).astype(np.uint32), combine + " not")


def test_predicate_logic(sim: Simulator) -> None:
    rows = tuples(["s32"] * 2)
    inputs = [array([row[i] for row in rows], "s32") for i in range(2)]
    body = """
        setp.lt.s32 %p0, %a, %b; setp.gt.s32 %p1, %a, 0;
        and.pred %p2, %p0, %p1; or.pred %p3, %p0, %p1; xor.pred %p4, %p0, %p1; not.pred %p5, %p0;
        selp.u32 %d, 1, 0, %p2; selp.u32 %t0, 2, 0, %p3; or.b32 %d, %d, %t0;
        selp.u32 %t0, 4, 0, %p4; or.b32 %d, %d, %t0; selp.u32 %t0, 8, 0, %p5; or.b32 %d, %d, %t0;
    """
    x, y = inputs[0] < inputs[1], inputs[0] > 0
    want = (x & y) * 1 + (x | y) * 2 + (x ^ y) * 4 + ~x * 8
    assert_bits(lanes(sim, body, inputs, np.uint32), want.astype(np.uint32), "pred")


def test_vector_mov_packs_and_unpacks(sim: Simulator) -> None:
    values = array(samples("u64"), "u64")
    body = """
        mov.b64 {%t0, %t1}, %a; mov.b64 %d, {%t1, %t0};
        mov.b32 {%h0, %h1}, %t0; mov.b32 %d1, {%h1, %h0};
    """
    got = lanes(sim, body, [values], [np.uint64, np.uint32])
    low = (values & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    assert_bits(got[0], values << np.uint64(32) | values >> np.uint64(32), "mov.b64")
    assert_bits(got[1], low << np.uint32(16) | low >> np.uint32(16), "mov.b32")


PRMT_MODES: dict[str, Callable[[int], list[int]]] = {
    "f4e": lambda c: [c, c + 1, c + 2, c + 3],
    "b4e": lambda c: [c, c - 1, c - 2, c - 3],
    "rc8": lambda c: [c, c, c, c],
    "ecl": lambda c: [max(i, c) for i in range(4)],
    "ecr": lambda c: [min(i, c) for i in range(4)],
    "rc16": lambda c: [2 * (c & 1), 2 * (c & 1) + 1] * 2,
}


@pytest.mark.parametrize("mode", list(PRMT_MODES))
def test_prmt_modes(sim: Simulator, mode: str) -> None:
    """The two low bits of the selector choose the row of the mode's table; bytes count modulo 8."""

    def permute(a: int, b: int, c: int) -> int:
        pair = (b << 32 | a).to_bytes(8, "little")
        picked = bytes(pair[i % 8] for i in PRMT_MODES[mode](c & 3))
        return int.from_bytes(picked, "little")

    values = samples("u32", 12)
    rows = [(a, b, c) for a in values for b in values for c in range(4)]
    check(sim, f"prmt.b32.{mode}", ["u32"] * 3, "u32", permute, rows)


def test_cnot_and_sad(sim: Simulator) -> None:
    check(sim, "cnot.b32", ["u32"], "u32", lambda a: a == 0, [(v,) for v in samples("u32")])
    for kind in ("u32", "s32"):
        check(sim, f"sad.{kind}", [kind] * 3, kind, lambda a, b, c: c + abs(a - b))


def test_setp_gives_the_complement_too(sim: Simulator) -> None:
    rows = tuples(["s32"] * 2)
    inputs = [array([row[i] for row in rows], "s32") for i in range(2)]
    body = """
        setp.lt.s32 %p0|%p1, %a, %b; selp.u32 %d, 1, 0, %p0; selp.u32 %d1, 1, 0, %p1;
    """
    got = lanes(sim, body, inputs, [np.uint32, np.uint32])
    assert_bits(got[0], (inputs[0] < inputs[1]).astype(np.uint32), "p")
    assert_bits(got[1], (inputs[0] >= inputs[1]).astype(np.uint32), "q")
