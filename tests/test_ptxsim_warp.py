# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's warp instructions: shuffles, votes, ldmatrix, movmatrix, mma."""

from collections.abc import Iterator

import numpy as np
import pytest
from exact_floats import BF16, F32, Array, to_double
from simulator import Simulator, assert_bits, kernel, lanes, needs_simulator

pytestmark = needs_simulator

ALL = "0xffffffff"
LANE = np.arange(32)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def shuffle(mode: str, values: Array, b: int, c: int) -> tuple[Array, Array]:
    """The pseudo-code of shfl.sync in the PTX ISA, lane by lane."""
    clamp, segment = c & 31, c >> 8 & 31
    result, inside = values.copy(), np.zeros(32, dtype=np.uint32)
    for lane in range(32):
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        if mode == "up":
            source, valid = lane - b, lane - b >= highest
        elif mode == "down":
            source, valid = lane + b, lane + b <= highest
        elif mode == "bfly":
            source, valid = lane ^ b, lane ^ b <= highest
        else:
            source = lowest | (b & ~segment)
            valid = source <= highest
        result[lane] = values[source if valid else lane]
        inside[lane] = valid
    return result, inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_with_segments(sim: Simulator, mode: str) -> None:
    """Widths 32 to 1; the clamp is what __shfl_*_sync passes: 0 for up, width - 1 segments else."""
    values = np.random.default_rng(0).integers(0, 1 << 32, 32, dtype=np.uint32)
    for width in (32, 16, 8, 4, 2, 1):
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        for b in (0, 1, 2, 3, 5, 8, 15, 16, 31):
            body = f"shfl.sync.{mode}.b32 %d|%p0, %a, {b}, {c}, {ALL}; selp.u32 %d1, 1, 0, %p0;"
            got = lanes(sim, body, [values], [np.uint32, np.uint32])
            want = shuffle(mode, values, b, c)
            assert_bits(got[0], want[0], f"shfl.{mode} {b} width {width}")
            assert_bits(got[1], want[1], f"shfl.{mode} {b} width {width}: predicate")


def test_shuffle_source_differs_per_lane(sim: Simulator) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 32, 32, dtype=np.uint32)
    sources = rng.integers(0, 32, 32, dtype=np.uint32)
    got = lanes(sim, f"shfl.sync.idx.b32 %d, %a, %b, 31, {ALL};", [values, sources], np.uint32)
    assert_bits(got, values[sources], "shfl.idx")


def test_votes(sim: Simulator) -> None:
    rng = np.random.default_rng(2)
    flags = (rng.random(32 * 40) < np.repeat(np.linspace(0, 1, 40), 32)).astype(np.uint32)
    body = f"""
        setp.ne.u32 %p0, %a, 0;
        vote.sync.ballot.b32 %d, %p0, {ALL};
        vote.sync.all.pred %p1, %p0, {ALL}; vote.sync.any.pred %p2, %p0, {ALL};
        vote.sync.uni.pred %p3, %p0, {ALL};
        vote.sync.any.pred %p4, !%p0, {ALL};
        selp.u32 %d1, 1, 0, %p1; selp.u32 %t0, 2, 0, %p2; or.b32 %d1, %d1, %t0;
        selp.u32 %t0, 4, 0, %p3; or.b32 %d1, %d1, %t0;
        selp.u32 %t0, 8, 0, %p4; or.b32 %d1, %d1, %t0;
    """
    got = lanes(sim, body, [flags], [np.uint32, np.uint32])
    warps = flags.reshape(-1, 32) != 0
    ballot = (warps * (np.uint64(1) << LANE.astype(np.uint64))).sum(axis=1).astype(np.uint32)
    every, some = warps.all(axis=1), warps.any(axis=1)
    logic = every * 1 + some * 2 + (every | ~some) * 4 + ~every * 8
    assert_bits(got[0], np.repeat(ballot, 32), "ballot")
    assert_bits(got[1], np.repeat(logic.astype(np.uint32), 32), "all, any, uni, any not")


def test_vote_of_a_part_of_the_warp(sim: Simulator) -> None:
    """Lanes outside the mask give zero bits; the two halves vote apart."""
    flags = np.array([1, 0] * 16, dtype=np.uint32)
    body = """
        setp.ne.u32 %p0, %a, 0; mov.u32 %t0, %laneid; setp.lt.u32 %p1, %t0, 8; @%p1 bra $low;
        vote.sync.ballot.b32 %d, %p0, 0xffffff00; activemask.b32 %d1; bra $end;
        $low: vote.sync.ballot.b32 %d, %p0, 0xff; activemask.b32 %d1;
        $end:
    """
    got = lanes(sim, body, [flags], [np.uint32, np.uint32])
    want = np.where(LANE < 8, 0x55, 0x55555500).astype(np.uint32)
    assert_bits(got[0], want, "ballot of a part")
    assert_bits(got[1], np.where(LANE < 8, 0xFF, 0xFFFFFF00).astype(np.uint32), "activemask")


@pytest.mark.parametrize("bits", [32, 64])
def test_match(sim: Simulator, bits: int) -> None:
    """Any: the lanes with the same value; all: every lane or none."""
    dtype = np.dtype(f"u{bits // 8}")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, 128).astype(dtype) << dtype.type(bits - 4)
    values[:32] = 7
    body = f"""
        match.any.sync.b{bits} %d, %a, {ALL};
        match.all.sync.b{bits} %d1|%p0, %a, {ALL}; selp.u32 %d2, 1, 0, %p0;
    """
    got = lanes(sim, body, [values], [np.uint32] * 3)
    warps = values.reshape(-1, 32)
    same = warps[:, :, None] == warps[:, None, :]
    masks = (same * (np.uint64(1) << LANE.astype(np.uint64))).sum(axis=2).astype(np.uint32)
    every = np.repeat((warps == warps[:, :1]).all(axis=1), 32)
    assert_bits(got[0], masks.ravel(), "match.any")
    assert_bits(got[1], np.where(every, 0xFFFFFFFF, 0).astype(np.uint32), "match.all")
    assert_bits(got[2], every.astype(np.uint32), "match.all predicate")


@pytest.mark.parametrize("kind", ["u32", "s32", "b32"])
def test_redux(sim: Simulator, kind: str) -> None:
    dtype = np.int32 if kind == "s32" else np.uint32
    values = np.random.default_rng(3).integers(0, 1 << 32, 320, dtype=np.uint32).view(dtype)
    warps = values.reshape(-1, 32)
    cases = {
        "add": np.add.reduce(warps, axis=1, dtype=dtype),
        "min": warps.min(axis=1),
        "max": warps.max(axis=1),
    }
    if kind == "b32":
        cases = {
            "and": np.bitwise_and.reduce(warps, axis=1),
            "or": np.bitwise_or.reduce(warps, axis=1),
            "xor": np.bitwise_xor.reduce(warps, axis=1),
        }
    for name, want in cases.items():
        got = lanes(sim, f"redux.sync.{name}.{kind} %d, %a, {ALL};", [values], dtype)
        assert_bits(got, np.repeat(want, 32).astype(dtype), f"redux.{name}.{kind}")


def fragment_rows(matrix: Array) -> Array:
    """An 8x8 matrix of halves as one register per lane: row lane / 4, columns 2 (lane % 4), +1."""
    low = matrix[LANE // 4, 2 * (LANE % 4)].astype(np.uint32)
    return low | matrix[LANE // 4, 2 * (LANE % 4) + 1].astype(np.uint32) << np.uint32(16)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(sim: Simulator, count: int, transposed: bool) -> None:
    """Lane 8 q + r gives the address of row r of matrix q; rows lie in random order."""
    rng = np.random.default_rng(count)
    matrices = rng.integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    places = rng.permutation(32)[: 8 * count]
    shared = np.zeros((32, 8), dtype=np.uint16)
    shared[places] = matrices.reshape(-1, 8)
    addresses = np.zeros(32, dtype=np.uint32)
    addresses[: 8 * count] = 16 * places
    registers = ", ".join(f"%d{i}" for i in range(count))
    suffix = ".trans" if transposed else ""
    body = f"""
        .shared .align 16 .b8 tile[512];
        mov.u32 %t1, tile; mov.u32 %t0, %tid.x; shl.b32 %t0, %t0, 4; add.u32 %t0, %t0, %t1;
        st.shared.v4.b32 [%t0], {{%a0, %a1, %a2, %a3}}; bar.sync 0;
        add.u32 %t2, %t1, %b;
        ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{registers}}}, [%t2];
    """
    got = lanes(sim, body, [shared.view(np.uint32), addresses], (np.uint32, count))
    for i in range(count):
        matrix = matrices[i].T if transposed else matrices[i]
        assert_bits(got[:, i].copy(), fragment_rows(matrix), f"ldmatrix matrix {i}")


def test_movmatrix_transposes(sim: Simulator) -> None:
    matrix = np.random.default_rng(0).integers(0, 1 << 16, (8, 8), dtype=np.uint16)
    got = lanes(
        sim, "movmatrix.sync.aligned.m8n8.trans.b16 %d, %a;", [fragment_rows(matrix)], np.uint32
    )
    assert_bits(got, fragment_rows(matrix.T), "movmatrix")


def pack(values: Array) -> Array:
    """Little-endian elements of the last axis as 32-bit registers."""
    return np.ascontiguousarray(values).view(np.uint32).reshape(*values.shape[:-1])


GROUP, THREAD = LANE // 4, LANE % 4  # groupID and threadID_in_group of the PTX ISA


def fragment_a16(a: Array, k: int) -> Array:
    """A of 16 x k 16-bit elements. Element i of a lane (two to a register): row group for i in
    0, 1, 4, 5 and group + 8 else; column 2 thread + (i & 1), + 8 from i = 4 on (k = 16)."""
    elements = []
    for i in range(k // 2):
        row = GROUP + 8 * (i // 2 % 2)
        elements.append(a[row, 2 * THREAD + (i & 1) + 8 * (i // 4)])
    return pack(np.stack(elements, axis=1).reshape(32, -1, 2))


def fragment_b16(b: Array, k: int) -> Array:
    """B of k x 8: row 2 thread + (i & 1), + 8 from i = 2 on; column group."""
    elements = [b[2 * THREAD + (i & 1) + 8 * (i // 2), GROUP] for i in range(k // 4)]
    return pack(np.stack(elements, axis=1).reshape(32, -1, 2))


def fragment_c(c: Array) -> Array:
    """C and D of 16 x 8 words: row group, + 8 from i = 2 on; column 2 thread + (i & 1)."""
    return np.stack([c[GROUP + 8 * (i // 2), 2 * THREAD + (i & 1)] for i in range(4)], axis=1)


def mma_body(shape: str, types: str, a_count: int, b_count: int) -> str:
    def group(name: str, count: int) -> str:
        return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"

    a, b, c, d = group("a", a_count), group("b", b_count), group("c", 4), group("d", 4)
    return f"mma.sync.aligned.{shape}.row.col.{types} {d}, {a}, {b}, {c};"


def half_patterns(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    values = rng.normal(size=shape)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def doubles(patterns: Array, kind: str) -> Array:
    if kind == "f16":
        return patterns.view(np.float16).astype(np.float64)
    return to_double(patterns, BF16)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("k", [16, 8])
def test_mma_of_halves(k: int, kind: str, truncate: bool) -> None:
    """fp32 accumulation, within the error of a sum of k + 1 terms; both accumulation modes."""
    rng = np.random.default_rng(k)
    with Simulator(mma_truncate=truncate) as sim:
        for _ in range(8):
            a, b = half_patterns(rng, kind, (16, k)), half_patterns(rng, kind, (k, 8))
            c = rng.normal(size=(16, 8)).astype(np.float32)
            body = mma_body(f"m16n8k{k}", f"f32.{kind}.{kind}.f32", k // 4, k // 8)
            inputs = [fragment_a16(a, k), fragment_b16(b, k), fragment_c(c)]
            inputs = [values.reshape(32, -1) for values in inputs]
            got = lanes(sim, body, inputs, (np.float32, 4))
            exact_a, exact_b = doubles(a, kind), doubles(b, kind)
            bound = fragment_c((np.abs(exact_a) @ np.abs(exact_b) + np.abs(c)) * (k + 1) * 2.0**-23)
            error = np.abs(got - fragment_c(exact_a @ exact_b + c))
            assert (error <= bound).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_of_small_integers_is_exact(sim: Simulator, kind: str) -> None:
    """Every product and sum fits: a wrong layout or a lost term cannot hide in a tolerance."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.float32)

    def patterns(values: Array) -> Array:
        if kind == "f16":
            return values.astype(np.float16).view(np.uint16)
        return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    body = mma_body("m16n8k16", f"f32.{kind}.{kind}.f32", 4, 2)
    inputs = [fragment_a16(patterns(a), 16), fragment_b16(patterns(b), 16), fragment_c(c)]
    got = lanes(sim, body, inputs, (np.float32, 4))
    assert_bits(got, fragment_c(a @ b + c).astype(np.float32), f"mma {kind}")


def test_mma_with_half_accumulators(sim: Simulator) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-4, 5, shape) for shape in ((16, 16), (16, 8), (16, 8)))

    def patterns(values: Array) -> Array:
        return values.astype(np.float16).view(np.uint16)

    body = """
        mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16
            {%d0, %d1}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1};
    """
    packed = pack(fragment_c(patterns(c)).reshape(32, 2, 2))
    inputs = [fragment_a16(patterns(a), 16), fragment_b16(patterns(b), 16), packed]
    got = lanes(sim, body, inputs, (np.uint32, 2))
    want = pack(fragment_c(patterns(a @ b + c)).reshape(32, 2, 2))
    assert_bits(got, want, "mma with f16 accumulators")


@pytest.mark.parametrize("a_kind", ["s8", "u8"])
@pytest.mark.parametrize("b_kind", ["s8", "u8"])
def test_mma_of_bytes(sim: Simulator, a_kind: str, b_kind: str) -> None:
    """m16n8k32: A row group, + 8 in odd registers; column 4 thread + i, + 16 from register 2 on."""
    rng = np.random.default_rng(0)
    dtypes = {"s8": np.int8, "u8": np.uint8}

    def random(kind: str, shape: tuple[int, int]) -> Array:
        limits = np.iinfo(dtypes[kind])
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtypes[kind])

    a, b = random(a_kind, (16, 32)), random(b_kind, (32, 8))
    c = rng.integers(-(1 << 31), 1 << 31, (16, 8)).astype(np.int32)
    columns = 4 * THREAD[:, None] + np.arange(4)
    frag_a = [a[(GROUP + 8 * (r & 1))[:, None], columns + 16 * (r // 2)] for r in range(4)]
    frag_b = [b[columns + 16 * r, GROUP[:, None]] for r in range(2)]
    inputs = [pack(np.stack(frag, axis=1)) for frag in (frag_a, frag_b)]
    body = mma_body("m16n8k32", f"s32.{a_kind}.{b_kind}.s32", 4, 2)
    got = lanes(sim, body, [*inputs, fragment_c(c)], (np.int32, 4))
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    assert_bits(got, fragment_c(exact).astype(np.int32), f"mma {a_kind} {b_kind}")


def test_mma_accumulates_infinities_and_nans(sim: Simulator) -> None:
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[0, 0], b[0, 0] = np.inf, 1  # row 0, column 0: inf; the rest of row 0: inf * 0 = NaN
    patterns = [values.astype(np.float16).view(np.uint16) for values in (a, b)]
    c = np.zeros((16, 8), dtype=np.float32)
    inputs = [fragment_a16(patterns[0], 16), fragment_b16(patterns[1], 16), fragment_c(c)]
    got = lanes(sim, mma_body("m16n8k16", "f32.f16.f16.f32", 4, 2), inputs, (np.float32, 4))
    want = np.zeros((16, 8), dtype=np.float32)
    want[0] = [np.inf] + [np.nan] * 7
    assert_bits(got, fragment_c(want), "mma of infinities")


def test_shuffle_from_an_absent_lane_is_found(sim: Simulator) -> None:
    """Lanes 16 to 31 have returned: what lane 0 reads from lane 16 is undefined."""
    out = np.zeros(32, dtype=np.uint32)
    body = """
        mov.u32 %t0, %tid.x; setp.ge.u32 %p0, %t0, 16; @%p0 ret;
        shfl.sync.bfly.b32 %t1, %t0, 16, 31, 0xffff;
        mul.wide.u32 %l0, %t0, 4; add.u64 %l0, %q0, %l0; st.global.u32 [%l0], %t1;
    """
    sim.run_ptx(kernel(body, ["u64"]), [out])
    assert sim.findings()
    sim.clear()


def test_samples_hold_the_corners() -> None:
    assert {0, 1, F32.infinity, F32.nan} <= set(F32.samples(100).tolist())
