# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's control flow: predicates, divergence, loops, barriers, locks, refusals."""

from collections.abc import Iterator

import numpy as np
import pytest
from simulator import HEADER, Simulator, SimulatorError, assert_bits, kernel, lanes, needs_simulator

pytestmark = needs_simulator


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def test_special_registers(sim: Simulator) -> None:
    """All lanes of a three-dimensional grid; warps count along x, then y, then z."""
    grid, block = (3, 2, 2), (4, 6, 2)
    names = ["tid.x", "tid.y", "tid.z", "ctaid.x", "ctaid.y", "ctaid.z", "laneid", "ntid.x",
             "ntid.y", "ntid.z", "nctaid.x", "nctaid.y", "nctaid.z"]  # fmt: skip
    out = np.zeros((2, 2, 3, 2, 6, 4, len(names)), dtype=np.uint32)
    stores = "".join(
        f"mov.u32 %t0, %{name}; st.global.u32 [%l0+{4 * i}], %t0;" for i, name in enumerate(names)
    )
    body = f"""
        mov.u32 %t1, %ctaid.z; mov.u32 %t2, %ctaid.y; mad.lo.u32 %t1, %t1, 2, %t2;
        mov.u32 %t2, %ctaid.x; mad.lo.u32 %t1, %t1, 3, %t2;
        mov.u32 %t2, %tid.z; mad.lo.u32 %t1, %t1, 2, %t2;
        mov.u32 %t2, %tid.y; mad.lo.u32 %t1, %t1, 6, %t2;
        mov.u32 %t2, %tid.x; mad.lo.u32 %t1, %t1, 4, %t2;
        mul.wide.u32 %l0, %t1, {4 * len(names)}; add.u64 %l0, %q0, %l0;
        {stores}
    """
    sim.run_ptx(kernel(body, ["u64"]), [out], grid=grid, block=block)
    cz, cy, cx, z, y, x = np.indices(out.shape[:-1])
    linear = x + 4 * y + 24 * z
    sizes = [np.full_like(x, size) for size in (*block, *grid)]
    want = np.stack([x, y, z, cx, cy, cz, linear % 32, *sizes], axis=-1).astype(np.uint32)
    assert_bits(out, want, "special registers")


def test_predicated_instructions(sim: Simulator) -> None:
    values = np.arange(-64, 64, dtype=np.int32)
    body = """
        setp.lt.s32 %p0, %a, 0; mov.u32 %d, 1; @%p0 neg.s32 %a, %a; @!%p0 mov.u32 %d, 2;
        add.u32 %d, %d, %a;
    """
    want = np.abs(values) + np.where(values < 0, 1, 2)
    assert_bits(lanes(sim, body, [values], np.uint32), want.astype(np.uint32), "predicated")


def test_nested_divergence_joins(sim: Simulator) -> None:
    """Four paths by two bits; after each join the whole warp votes."""
    values = np.random.default_rng(0).integers(0, 16, 128, dtype=np.uint32)
    body = """
        and.b32 %t0, %a, 1; setp.eq.u32 %p0, %t0, 1; and.b32 %t1, %a, 2; setp.eq.u32 %p1, %t1, 2;
        mov.u32 %d, 0;
        @%p0 bra $odd;
          @%p1 bra $even_two; add.u32 %d, %d, 1; bra $even_end;
          $even_two: add.u32 %d, %d, 2; $even_end: bra $end;
        $odd:
          @!%p1 bra $odd_none; add.u32 %d, %d, 3; bra.uni $odd_end;
          $odd_none: add.u32 %d, %d, 4; $odd_end:
        $end: bar.warp.sync 0xffffffff; activemask.b32 %d1;
    """
    got = lanes(sim, body, [values], [np.uint32, np.uint32])
    odd, two = values & 1, values >> 1 & 1
    want = np.where(odd, np.where(two, 3, 4), np.where(two, 2, 1)).astype(np.uint32)
    assert_bits(got[0], want, "divergence")
    assert_bits(got[1], np.full(128, 0xFFFFFFFF, dtype=np.uint32), "joined")


def test_loops_of_different_length(sim: Simulator) -> None:
    """The Collatz steps of 1 to 512: every lane leaves its loop at another time."""
    values = np.arange(1, 513, dtype=np.uint32)
    body = """
        mov.u32 %d, 0;
        $again: setp.eq.u32 %p0, %a, 1; @%p0 bra $done;
        and.b32 %t0, %a, 1; setp.eq.u32 %p1, %t0, 1; add.u32 %d, %d, 1;
        @%p1 bra $odd; shr.u32 %a, %a, 1; bra $again;
        $odd: mad.lo.u32 %a, %a, 3, 1; bra $again;
        $done:
    """
    body = body.replace("$done", "$finish")

    def steps(value: int) -> int:
        count = 0
        while value != 1:
            value = 3 * value + 1 if value % 2 else value // 2
            count += 1
        return count

    want = np.array([steps(int(value)) for value in values], dtype=np.uint32)
    assert_bits(lanes(sim, body, [values], np.uint32), want, "Collatz")


def test_early_returns_leave_the_rest_running(sim: Simulator) -> None:
    out = np.zeros(64, dtype=np.uint32)
    body = """
        mov.u32 %t0, %tid.x; rem.u32 %t1, %t0, 3; setp.eq.u32 %p0, %t1, 0; @%p0 ret;
        setp.eq.u32 %p0, %t1, 1; @%p0 exit;
        mul.wide.u32 %l0, %t0, 4; add.u64 %l0, %q0, %l0; st.global.u32 [%l0], 1;
    """
    sim.run_ptx(kernel(body, ["u64"]), [out], block=(64,))
    assert_bits(out, (np.arange(64) % 3 == 2).astype(np.uint32), "ret and exit")


@pytest.mark.parametrize("slice_length", [1, 7, 2000])
def test_barriers_order_the_warps(slice_length: int) -> None:
    """Every round each thread takes its left neighbour's number: a rotation of 256 threads."""
    values = np.random.default_rng(0).integers(0, 1 << 32, 256, dtype=np.uint32)
    body = """
        .shared .align 4 .b8 tile[1024];
        mov.u32 %t0, %tid.x; mov.u32 %t1, tile; shl.b32 %t2, %t0, 2; add.u32 %t3, %t1, %t2;
        add.u32 %t4, %t2, 1020; and.b32 %t4, %t4, 1023; add.u32 %t4, %t4, %t1;
        mov.u32 %d, %a; mov.u32 %t5, 0;
        $round: st.shared.u32 [%t3], %d; bar.sync 0; ld.shared.u32 %d, [%t4]; barrier.sync 0;
        add.u32 %t5, %t5, 1; setp.lt.u32 %p0, %t5, 37; @%p0 bra $round;
    """
    with Simulator(slice=slice_length) as sim:
        got = lanes(sim, body, [values], np.uint32, block=256)
    assert_bits(got, np.roll(values, 37), "barrier")


def test_barriers_reduce_over_the_block(sim: Simulator) -> None:
    """96 threads in three warps; one flag is set in the second."""
    flags = (np.arange(96) % 7 == 0).astype(np.uint32)
    body = """
        setp.ne.u32 %p0, %a, 0;
        bar.red.popc.u32 %d, 0, %p0; bar.red.and.pred %p1, 0, %p0; bar.red.or.pred %p2, 0, %p0;
        selp.u32 %d1, 1, 0, %p1; selp.u32 %t0, 2, 0, %p2; or.b32 %d1, %d1, %t0;
    """
    got = lanes(sim, body, [flags], [np.uint32, np.uint32], block=96)
    assert_bits(got[0], np.full(96, flags.sum(), dtype=np.uint32), "bar.red.popc")
    assert_bits(got[1], np.full(96, 2, dtype=np.uint32), "bar.red.and, or")


LOCK = """
    mov.u32 %t9, %tid.x; setp.ne.u32 %p0, %t9, 0; @%p0 bra $wait;
    $spin: atom.global.cas.b32 %t0, [%q0], 0, 1; setp.ne.u32 %p1, %t0, 0; @%p1 bra $spin;
    membar.gl;
    $wait: bar.sync 0;
    mul.wide.u32 %l0, %t9, 4; add.u64 %l1, %q1, %l0;
    ld.global.u32 %t1, [%l1]; mul.lo.u32 %t1, %t1, 3; add.u32 %t1, %t1, 1; st.global.u32 [%l1], %t1;
    bar.sync 0; @%p0 bra $out;
    membar.gl; atom.global.exch.b32 %t2, [%q0], 0;
    $out:
"""


@pytest.mark.parametrize(("resident", "slice_length"), [(1, 2000), (4, 3), (16, 50), (16, 2000)])
def test_spin_lock_between_blocks(resident: int, slice_length: int) -> None:
    """One lane of each block spins; a torn or lost step of the section changes every word."""
    lock, words = np.zeros(1, dtype=np.uint32), np.zeros(64, dtype=np.uint32)
    with Simulator(resident_blocks=resident, slice=slice_length) as sim:
        sim.run_ptx(kernel(LOCK, ["u64", "u64"]), [lock, words], grid=(16,), block=(64,))
    value = 0
    for _ in range(16):
        value = (3 * value + 1) & 0xFFFFFFFF
    assert lock[0] == 0
    assert_bits(words, np.full(64, value, dtype=np.uint32), "lock")


def test_spin_lock_between_lanes_of_one_warp(sim: Simulator) -> None:
    """Every lane takes the lock in turn: the loser's loop must not starve the holder."""
    lock, total = np.zeros(1, dtype=np.uint32), np.zeros(1, dtype=np.uint32)
    body = """
        mov.u32 %t3, 0;
        $again: atom.global.cas.b32 %t0, [%q0], 0, 1; setp.ne.u32 %p0, %t0, 0; @%p0 bra $next;
        ld.volatile.global.u32 %t1, [%q1]; add.u32 %t1, %t1, 1; st.volatile.global.u32 [%q1], %t1;
        membar.gl; atom.global.exch.b32 %t2, [%q0], 0; mov.u32 %t3, 1;
        $next: setp.eq.u32 %p1, %t3, 0; @%p1 bra $again;
    """
    sim.run_ptx(kernel(body, ["u64", "u64"]), [lock, total])
    assert total[0] == 32


def test_blocks_wait_for_a_later_block(sim: Simulator) -> None:
    """Block 0 spins on what block 1 writes: both must be resident."""
    flag = np.zeros(1, dtype=np.uint32)
    body = """
        mov.u32 %t0, %ctaid.x; setp.eq.u32 %p0, %t0, 1; @%p0 bra $write;
        $spin: ld.acquire.gpu.global.u32 %t1, [%q0]; setp.eq.u32 %p1, %t1, 0; @%p1 bra $spin;
        st.global.u32 [%q0], 7; bra $end;
        $write: st.release.gpu.global.u32 [%q0], 1;
        $end:
    """
    sim.run_ptx(kernel(body, ["u64"]), [flag], grid=(2,), block=(1,))
    assert flag[0] == 7


@pytest.mark.parametrize(
    ("instruction", "word"),
    [
        ("frobnicate.u32 %t0, %t1;", "frobnicate"),
        ("add.cc.u32 %t0, %t1, %t2;", "add.cc"),
        ("wgmma.fence.sync.aligned;", "wgmma"),
        ("bar.arrive 1, 64;", "bar"),
        (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{%f0, %f1, %f2, %f3}, {%t2, %t3, %t4, %t5}, {%t6, %t7}, {%f0, %f1, %f2, %f3};",
            "mma",
        ),
        ("tex.1d.v4.f32.f32 {%f0, %f1, %f2, %f3}, [%l0, {%f4}];", "tex"),
    ],
)
def test_unsupported_instructions_are_refused_at_parse(
    sim: Simulator, instruction: str, word: str
) -> None:
    """Also behind a branch that is never taken; the message names the kernel and the line."""
    text = kernel(f"bra $end;\n{instruction}\n$end:", ["u64"])
    line = next(i for i, row in enumerate(text.splitlines(), 1) if instruction in row)
    with pytest.raises(SimulatorError, match=word) as error:
        sim.check_ptx(text)
    assert "test" in str(error.value)
    assert str(line) in str(error.value)


def test_bad_texts_and_launches_are_refused(sim: Simulator) -> None:
    out = np.zeros(1, dtype=np.uint32)
    with pytest.raises(SimulatorError):
        sim.check_ptx(HEADER + ".visible .entry test() { add.u32 %t0, %t1; }")
    with pytest.raises(SimulatorError):
        sim.check_ptx(HEADER + ".visible .entry test() { bra $nowhere; }")
    text = kernel("", ["u64"])
    with pytest.raises(SimulatorError, match="expected a kernel other"):
        sim.run_ptx(text, [out], kernel="other")
    with pytest.raises(SimulatorError, match="expected 1 parameters, got 0"):
        sim.run_ptx(text, [])
    with pytest.raises(SimulatorError):
        sim.run_ptx(text, [out], block=(1025,))
    with pytest.raises(SimulatorError):
        sim.run_ptx(text, [out], shared_bytes=200_000)
