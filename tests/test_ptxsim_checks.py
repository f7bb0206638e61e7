# SPDX-License-Identifier: Apache-2.0
"""What the PTX interpreter finds and counts: each check on a seeded bug and on its correct twin."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from simulator import Simulator, kernel, needs_simulator

pytestmark = needs_simulator

FILES = '.file 1 "/somewhere/kernel.cu"'
MINE = "mov.u32 %t0, %tid.x; mul.wide.u32 %l0, %t0, 4; add.u64 %l1, %q0, %l0;"
TILE = """
    .shared .align 16 .b8 tile[4096];
    mov.u32 %t0, %tid.x; mov.u32 %t1, tile; shl.b32 %t2, %t0, 2; add.u32 %t3, %t1, %t2;
    mul.wide.u32 %l0, %t0, 4; add.u64 %l1, %q0, %l0;
"""
OTHER_WARP = "xor.b32 %t4, %t2, 128; add.u32 %t4, %t4, %t1;"


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


def words(count: int) -> Any:
    return np.zeros(count, dtype=np.uint32)


def run(sim: Simulator, body: str, params: list[Any], **options: Any) -> None:
    sim.run_ptx(kernel(body, ["u64"] * len(params), prologue=FILES), params, **options)


def test_out_of_bounds_names_line_lane_and_distance(sim: Simulator) -> None:
    """Lane 31 of warp 1 is the first past an array of 63 words; memory behind it is untouched."""
    memory = words(64)
    body = f"{MINE}\n.loc 1 42 7\nst.global.u32 [%l1], 5;"
    sim.register(memory[:63], "x")
    run(sim, body, [memory[:63]], block=(64,))
    [finding] = sim.take("out-of-bounds")
    assert finding.file.endswith("kernel.cu")
    assert (finding.line, finding.warp, finding.lane) == (42, 1, 31)
    assert finding.kernel == "test"
    assert "x" in finding.message
    assert memory[63] == 0
    assert (memory[:63] == 5).all()


def test_out_of_bounds_reads_give_zeros(sim: Simulator) -> None:
    memory = np.full(32, 9, dtype=np.uint32)
    out = words(32)
    body = f"{MINE} add.u64 %l2, %q1, %l0; ld.global.u32 %t3, [%l1+64]; st.global.u32 [%l2], %t3;"
    sim.register(memory[:24], "x")
    run(sim, body, [memory[:24], out])
    assert {finding.kind for finding in sim.findings()} <= {"out-of-bounds", "uninitialised"}
    assert out[:8].tolist() == [9] * 8
    assert out[8:].tolist() == [0] * 24
    sim.clear()


def test_null_pointers(sim: Simulator) -> None:
    run(
        sim,
        f"{MINE} mov.u64 %l2, 0; ld.global.u32 %t1, [%l2]; st.global.u32 [%l1], 1;",
        [words(32)],
    )
    sim.take("out-of-bounds")


def test_shared_out_of_bounds(sim: Simulator) -> None:
    """The window ends at the static and the dynamic bytes of the launch."""
    body = f"{TILE}\nst.shared.u32 [%t3], %t0; st.shared.u32 [%t3+3972], %t0;"
    run(sim, body, [words(32)])
    sim.take("out-of-bounds")
    run(sim, body, [words(32)], shared_bytes=16)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_misaligned(sim: Simulator, space: str) -> None:
    address = {"global": "%l1", "shared": "%t3"}[space]
    body = f"{TILE}\nst.{space}.v2.b32 [{address}], {{%t0, %t0}};"
    run(sim, body, [words(64)], block=(1,))
    run(sim, body.replace(f"[{address}]", f"[{address}+4]"), [words(64)], block=(1,))
    sim.take("misaligned")


def test_uninitialised_global_memory(sim: Simulator) -> None:
    """A dead load is no finding; a store of what was loaded is, a value that depends on it too."""
    source, out = words(32), words(32)
    dead = f"{MINE} add.u64 %l2, %q1, %l0; ld.global.u32 %t3, [%l1]; st.global.u32 [%l2], 1;"
    sim.run_ptx(kernel(dead, ["u64", "u64"]), [source, out], defined=[False, True])
    assert not sim.findings()
    used = dead.replace("[%l2], 1;", "[%l2], %t4;").replace(
        "st.global", "mad.lo.u32 %t4, %t3, 3, 1; st.global"
    )
    sim.run_ptx(kernel(used, ["u64", "u64"]), [source, out], defined=[False, True])
    sim.take("uninitialised")
    sim.run_ptx(kernel(used, ["u64", "u64"]), [source, out])


def test_writing_defines_memory(sim: Simulator) -> None:
    memory, out = words(32), words(32)
    body = f"{MINE} add.u64 %l2, %q1, %l0; st.global.u32 [%l1], %t0; ld.global.u32 %t3, [%l1]; "
    body += "st.global.u32 [%l2], %t3;"
    sim.run_ptx(kernel(body, ["u64", "u64"]), [memory, out], defined=[False, False])


def test_uninitialised_shared_memory_and_registers(sim: Simulator) -> None:
    run(sim, f"{TILE}\nld.shared.u32 %t5, [%t3]; st.global.u32 [%l1], %t5;", [words(32)])
    sim.take("uninitialised")
    run(sim, f"{MINE} add.u32 %t9, %t9, 1; st.global.u32 [%l1], %t9;", [words(32)])
    sim.take("uninitialised")
    run(sim, f"{MINE} setp.eq.u32 %p0, %t9, 1; @%p0 bra $end; $end:", [words(32)])
    sim.take("uninitialised")


def test_uninitialised_accumulator_of_mma(sim: Simulator) -> None:
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    operands = "{%f0, %f1, %f2, %f3}, {%t1, %t1, %t1, %t1}, {%t1, %t1}, {%f0, %f1, %f2, %f3};"
    clear = "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(4))
    body = f"{MINE} mov.b32 %t1, 0; CLEAR {mma}{operands} st.global.f32 [%l1], %f3;"
    run(sim, body.replace("CLEAR", clear), [words(32)])
    run(sim, body.replace("CLEAR", clear[: clear.index("mov.f32 %f3")]), [words(32)])
    sim.take("uninitialised")


@pytest.mark.parametrize("order", ["write-read", "read-write", "write-write"])
def test_shared_races(sim: Simulator, order: str) -> None:
    """Two warps on the same words without a barrier between; with one there is no race."""
    fill = "st.shared.u32 [%t3], %t0; bar.sync 0;"
    first, second = {
        "write-read": ("st.shared.u32 [%t3], %t0;", "ld.shared.u32 %t5, [%t4];"),
        "read-write": ("ld.shared.u32 %t5, [%t4];", "st.shared.u32 [%t3], %t0;"),
        "write-write": ("st.shared.u32 [%t3], %t0;", "st.shared.u32 [%t4], %t0;"),
    }[order]
    end = "st.global.u32 [%l1], %t5;" if order != "write-write" else ""
    for barrier in ("bar.sync 0;", ""):
        body = f"\n.loc 1 7 1\n{first} {barrier}\n.loc 1 8 1\n{second} {end}"
        run(sim, f"{TILE} {OTHER_WARP} {fill} {body}", [words(64)], block=(64,))
        if barrier:
            assert not sim.findings()
    for finding in sim.take("race"):
        assert finding.line in (7, 8)


def test_bytes_of_one_word_by_two_warps_are_no_race(sim: Simulator) -> None:
    """Warp 0 writes the even bytes, warp 1 the odd ones."""
    body = f"""
        {TILE} and.b32 %t5, %t0, 31; shr.u32 %t6, %t0, 5; shl.b32 %t5, %t5, 1;
        add.u32 %t5, %t5, %t6; add.u32 %t5, %t5, %t1; st.shared.u8 [%t5], %t0;
    """
    run(sim, body, [words(64)], block=(64,))


def test_reading_what_cp_async_still_copies(sim: Simulator) -> None:
    copy = "cp.async.ca.shared.global [%t3], [%l1], 4; cp.async.commit_group;"
    use = "ld.shared.u32 %t5, [%t3]; add.u32 %t5, %t5, 1; st.global.u32 [%l1], %t5;"
    run(sim, f"{TILE} {copy} cp.async.wait_group 0; {use}", [words(32)])
    run(sim, f"{TILE} {copy}\n.loc 1 99 1\n{use} cp.async.wait_all;", [words(32)])
    found = sim.take("in-flight")
    assert found[0].line == 99


def test_cp_async_of_another_warp_needs_a_barrier(sim: Simulator) -> None:
    """Waiting makes a warp's own copies visible to itself; the other warp needs the barrier."""
    copy = "cp.async.ca.shared.global [%t3], [%l1], 4; cp.async.wait_all;"
    use = f"{OTHER_WARP} ld.shared.u32 %t5, [%t4]; add.u64 %l2, %q1, %l0; st.global.u32 [%l2], %t5;"
    run(sim, f"{TILE} {copy} bar.sync 0; {use}", [words(64), words(64)], block=(64,))
    run(sim, f"{TILE} {copy} {use}", [words(64), words(64)], block=(64,))
    assert {finding.kind for finding in sim.findings()} & {"race", "in-flight"}
    sim.clear()


def test_barrier_in_a_part_of_a_warp(sim: Simulator) -> None:
    body = f"{MINE} setp.lt.u32 %p0, %t0, 16; @!%p0 bra $end; bar.sync 0; $end:"
    run(sim, body, [words(64)], block=(64,))
    found = sim.findings()
    assert {finding.kind for finding in found} <= {"barrier", "deadlock"}
    assert found
    sim.clear()


def test_barrier_that_one_warp_never_reaches(sim: Simulator) -> None:
    """Warps that have exited do not count; one that waits elsewhere for ever is a deadlock."""
    body = f"{MINE} setp.lt.u32 %p0, %t0, 32; @%p0 ret; bar.sync 0; st.global.u32 [%l1], 1;"
    run(sim, body, [words(64)], block=(64,))
    assert not sim.findings()


def test_deadlock_and_endless_loops(sim: Simulator) -> None:
    sim.configure("max_instructions", 100_000)
    run(sim, "$spin: ld.volatile.global.u32 %t0, [%q0]; setp.eq.u32 %p0, %t0, 0; @%p0 bra $spin;",
        [words(1)], block=(1,))  # fmt: skip
    found = sim.findings()
    assert {finding.kind for finding in found} <= {"endless", "deadlock"}
    assert found
    sim.clear()


def test_trap(sim: Simulator) -> None:
    run(sim, "\n.loc 1 13 1\ntrap;", [words(1)])
    [finding] = sim.take("trap")
    assert finding.line == 13


def test_leftovers_of_declared_ranges(sim: Simulator) -> None:
    lock = words(4)
    sim.register(lock, "lock")
    sim.declare_zero(lock, "lock")
    run(sim, "st.global.u32 [%q0], 1; st.global.u32 [%q0], 0;", [lock], block=(1,))
    run(sim, "st.global.u32 [%q0+4], 258;", [lock], block=(1,))
    [finding] = sim.take("leftover")
    assert finding.message.startswith(
        "lock: 2 of 16 bytes are not zero at exit, the first is byte 4"
    )
    lock[:] = 0


def test_each_finding_is_reported_once(sim: Simulator) -> None:
    run(sim, f"{MINE} st.global.u32 [%l1+1024], 1;", [words(32)], grid=(10,))
    [finding] = sim.take("out-of-bounds")
    assert finding.count >= 10


def test_checks_can_be_switched_off() -> None:
    with Simulator(checks=False) as sim:
        run(sim, f"{TILE} ld.shared.u32 %t5, [%t3]; st.global.u32 [%l1], %t5;", [words(32)])


def test_the_context_fails_on_findings() -> None:
    with pytest.raises(AssertionError, match="trap"), Simulator() as sim:
        run(sim, "trap;", [words(1)])


# --- counters -------------------------------------------------------------------------------------


def counts(sim: Simulator) -> dict[str, Any]:
    [launch] = sim.launches()
    sim.clear()
    return launch


def shared_store(stride_bytes: int, size: int = 4) -> str:
    values = {4: "b32 [%t6], %t0", 8: "v2.b32 [%t6], {%t0, %t0}",
              16: "v4.b32 [%t6], {%t0, %t0, %t0, %t0}"}[size]  # fmt: skip
    return f"{TILE} mad.lo.u32 %t6, %t0, {stride_bytes}, %t1; st.shared.{values};"


@pytest.mark.parametrize(
    ("stride", "size", "wavefronts", "ideal"),
    [
        (4, 4, 1, 1),  # one word per bank
        (0, 4, 1, 1),  # all lanes one word
        (8, 4, 2, 1),  # every other bank
        (128, 4, 32, 1),  # all in one bank
        (132, 4, 1, 1),  # padded
        (8, 8, 2, 2),  # half-warps
        (16, 16, 4, 4),  # quarter-warps
        (32, 16, 8, 4),
        (128, 16, 32, 4),
    ],
)
def test_shared_wavefronts(
    sim: Simulator, stride: int, size: int, wavefronts: int, ideal: int
) -> None:
    body = shared_store(stride, size).replace("tile[4096]", "tile[8192]")
    run(sim, body, [words(32)])
    total = counts(sim)["total"]
    assert (total["shared_wavefronts"], total["shared_ideal"]) == (wavefronts, ideal)


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (128, 32), (144, 4)])
def test_ldmatrix_wavefronts(sim: Simulator, stride: int, wavefronts: int) -> None:
    """One wavefront a matrix if its eight rows lie in different banks."""
    body = f"""
        {TILE.replace("tile[4096]", "tile[8192]")} mad.lo.u32 %t6, %t0, {stride}, %t1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%t7, %t8, %t9, %t10}}, [%t6];
    """
    run(sim, body, [words(32)])
    total = counts(sim)["total"]
    assert (total["shared_wavefronts"], total["shared_ideal"]) == (wavefronts, 4)


@pytest.mark.parametrize(
    ("stride", "sectors", "ideal"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1), (128, 32, 4)]
)
def test_sectors(sim: Simulator, stride: int, sectors: int, ideal: int) -> None:
    """Distinct 32-byte sectors of a request; ideal is as many as its distinct bytes fill."""
    memory = np.zeros(4096 + 32, dtype=np.uint8)
    start = -memory.ctypes.data % 32
    aligned = memory[start : start + 4096]
    body = f"""
        mov.u32 %t0, %tid.x; mul.wide.u32 %l0, %t0, {stride}; add.u64 %l1, %q0, %l0;
        ld.global.u32 %t1, [%l1]; st.global.u32 [%l1], %t0;
    """
    run(sim, body, [aligned])
    launch = counts(sim)
    total = launch["total"]
    assert (total["load_sectors"], total["load_sectors_ideal"]) == (sectors, ideal)
    assert (total["store_sectors"], total["store_sectors_ideal"]) == (sectors, ideal)
    assert total["read_bytes_requested"] == total["read_bytes_distinct"] == 32 * sectors
    assert total["written_bytes_requested"] == total["written_bytes_distinct"] == 32 * sectors


def test_requested_against_distinct_bytes(sim: Simulator) -> None:
    """Four blocks read the same array; the range is reported by its name."""
    memory = np.zeros(1024 + 32, dtype=np.uint8)
    start = -memory.ctypes.data % 32
    weights = memory[start : start + 1024]
    sim.register(weights, "weights")
    body = """
        mov.u32 %t0, %tid.x; mul.wide.u32 %l0, %t0, 16; add.u64 %l1, %q0, %l0;
        ld.global.v4.u32 {%t1, %t2, %t3, %t4}, [%l1];
    """
    run(sim, body, [weights], grid=(4,))
    launch = counts(sim)
    total = launch["total"]
    assert (total["read_bytes_requested"], total["read_bytes_distinct"]) == (4 * 512, 512)
    assert (total["load_requests"], total["load_requests_16_bytes"]) == (4, 4)
    [read] = [read for read in launch["reads"] if read["name"] == "weights"]
    assert (read["requested"], read["distinct"], read["bytes"]) == (2048, 512, 1024)


def test_requested_and_distinct_bytes_by_line(sim: Simulator) -> None:
    """Line 10 reads 128 bytes a warp, line 20 the same and as many behind them, line 30 writes the
    first ones; two warps of each of three blocks do the same."""
    memory = np.zeros(512 + 32, dtype=np.uint8)
    start = -memory.ctypes.data % 32
    both = memory[start : start + 512]
    body = """
        mov.u32 %t0, %laneid; mul.wide.u32 %l0, %t0, 4; add.u64 %l1, %q0, %l0;
        .loc 1 10 1
        ld.global.u32 %t1, [%l1];
        .loc 1 20 1
        ld.global.u32 %t2, [%l1]; ld.global.u32 %t3, [%l1+128];
        .loc 1 30 1
        st.global.u32 [%l1], %t0;
        .loc 1 40 1
    """
    run(sim, body, [both], grid=(3,), block=(64,))
    table = sim.table()
    launch = counts(sim)
    names = [
        f"{way}_bytes_{kind}" for way in ("read", "written") for kind in ("requested", "distinct")
    ]
    by_line = {entry["line"]: [entry[name] for name in names] for entry in launch["by_line"]}
    warps = 6
    assert by_line[10] == [warps * 128, 128, 0, 0]
    assert by_line[20] == [warps * 256, 256, 0, 0]
    assert by_line[30] == [0, 0, warps * 128, 128]
    assert by_line[40] == [0, 0, 0, 0]
    # What two lines read is requested by both, and distinct once.
    assert [launch["total"][name] for name in names] == [warps * 384, 256, warps * 128, 128]
    for line, row in ((20, "1536 1.00 256 0 - 0"), (30, "0 - 0 768 1.00 128")):
        # The first table is of instructions and wavefronts, the second one of memory.
        _, text = (text for text in table.splitlines() if f"kernel.cu:{line} " in text)
        assert " ".join(text.split()) == f"kernel.cu:{line} {row}"


def test_distinct_bytes_far_apart(sim: Simulator) -> None:
    """Sectors 1 MB apart, in two arrays, read twice by one instruction of a loop."""
    first, second = np.zeros(1 << 20, dtype=np.uint8), np.zeros(1 << 20, dtype=np.uint8)
    sim.register(first, "first")
    sim.register(second, "second")
    body = """
        mov.u64 %l1, %q0; mov.u64 %l2, %q1; mov.u32 %t0, 0;
        .loc 1 20 1
        $again: ld.global.u8 %h1, [%l1]; ld.global.u8 %h2, [%l1+1048575];
        mov.u64 %l3, %l1; mov.u64 %l1, %l2; mov.u64 %l2, %l3;
        add.u32 %t0, %t0, 1; setp.lt.u32 %p0, %t0, 4; @%p0 bra $again;
        .loc 1 30 1
    """
    run(sim, body, [first, second], block=(1,))
    launch = counts(sim)
    [line] = [entry for entry in launch["by_line"] if entry["line"] == 20]
    assert (line["read_bytes_requested"], line["read_bytes_distinct"]) == (8 * 32, 4 * 32)
    for read in launch["reads"]:
        assert (read["requested"], read["distinct"]) == (4 * 32, 2 * 32)
    assert {read["name"] for read in launch["reads"]} == {"first", "second"}


def test_one_request_to_two_arrays(sim: Simulator) -> None:
    """Even lanes read one array, odd ones the other: each sector counts for its own."""
    arrays = [np.zeros(256 + 32, dtype=np.uint8) for _ in range(2)]
    first, second = (a[-a.ctypes.data % 32 :][:256] for a in arrays)
    sim.register(first, "first")
    sim.register(second, "second")
    body = """
        mov.u32 %t0, %laneid; and.b32 %t1, %t0, 1; setp.eq.u32 %p0, %t1, 0;
        selp.b64 %l1, %q0, %q1, %p0; mul.wide.u32 %l0, %t0, 4; add.u64 %l1, %l1, %l0;
        ld.global.u32 %t2, [%l1];
    """
    run(sim, body, [first, second])
    launch = counts(sim)
    assert launch["total"]["read_bytes_requested"] == launch["total"]["read_bytes_distinct"] == 256
    assert [(r["requested"], r["distinct"]) for r in launch["reads"]] == [(128, 128), (128, 128)]


def test_instructions_by_opcode_and_line(sim: Simulator) -> None:
    """Three turns of a loop of four instructions on line 20, in two warps."""
    body = """
        .loc 1 10 1
        mov.u32 %t0, 0;
        .loc 1 20 1
        $again: add.u32 %t0, %t0, 1; xor.b32 %t1, %t0, 5; setp.lt.u32 %p0, %t0, 3; @%p0 bra $again;
        .loc 1 30 1
    """
    run(sim, body, [words(1)], block=(64,))
    launch = counts(sim)
    by_line = {entry["line"]: entry["instructions"] for entry in launch["by_line"]}
    assert by_line[20] == 2 * 3 * 4
    by_opcode = launch["by_opcode"]
    assert sum(by_opcode.values()) == launch["total"]["instructions"]
    assert [count for name, count in by_opcode.items() if name.startswith("xor")] == [6]


def test_reports_as_table(sim: Simulator) -> None:
    run(sim, f"{MINE} st.global.u32 [%l1], 1;\n.loc 1 5 1\ntrap;", [words(32)])
    table = sim.table()
    sim.clear()
    assert "no time on a GPU" in table
    assert "kernel.cu:5" in table
    assert "trap" in table
    assert "findings: none" in sim.table()
