# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter's memory: loads, stores, windows, asynchronous copies, atomics."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from exact_floats import Array
from simulator import Simulator, assert_bits, kernel, lanes, needs_simulator

pytestmark = needs_simulator

OWN_WORD = "mov.u32 %t0, %tid.x; mul.wide.u32 %l0, %t0, 4; add.u64 %l1, %q0, %l0;"


@pytest.fixture
def sim() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.mark.parametrize(
    ("kind", "dtype", "target"),
    [
        ("u8", np.uint8, np.uint32),
        ("s8", np.int8, np.int32),
        ("b8", np.uint8, np.uint32),
        ("u16", np.uint16, np.uint32),
        ("s16", np.int16, np.int32),
        ("u32", np.uint32, np.uint32),
        ("u32", np.uint32, np.uint64),
        ("s32", np.int32, np.int64),
        ("f32", np.float32, np.float32),
        ("f64", np.float64, np.float64),
        ("u64", np.uint64, np.uint64),
    ],
)
def test_loads_extend_to_their_register(
    sim: Simulator, kind: str, dtype: type, target: type
) -> None:
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    memory = rng.integers(0, 256, 64 * size, dtype=np.uint8).view(dtype)
    out = np.zeros(64, dtype=target)
    wide = np.dtype(target).itemsize
    register = {"f32": "f32", "f64": "f64"}.get(kind, f"b{8 * wide}")
    body = f"""
        .reg .{register} %v;
        mov.u32 %t0, %tid.x; mul.wide.u32 %l0, %t0, {size}; add.u64 %l0, %q0, %l0;
        mul.wide.u32 %l1, %t0, {wide}; add.u64 %l1, %q1, %l1;
        ld.global.{kind} %v, [%l0]; st.global.b{8 * wide} [%l1], %v;
    """
    sim.run_ptx(kernel(body, ["u64", "u64"]), [memory, out], block=(64,))
    assert_bits(out, memory.astype(target), f"ld.{kind}")


@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
@pytest.mark.parametrize(
    ("count", "bits"), [(2, 8), (4, 8), (2, 16), (4, 16), (2, 32), (4, 32), (2, 64)]
)
def test_vectors_in_every_window(sim: Simulator, space: str, count: int, bits: int) -> None:
    """Loads vectors, stores them reversed into the window, loads and stores them from there."""
    size = count * bits // 8
    memory = np.random.default_rng(0).integers(0, 256, (64, size), dtype=np.uint8)
    out = np.zeros_like(memory)
    prefix = "h" if bits <= 16 else ("t" if bits == 32 else "l1")
    names = [f"%{prefix}{i}" for i in range(4)][:count]
    forward, backward = ", ".join(names), ", ".join(names[::-1])
    window = "%l2"
    setup = {
        "global": "mov.u64 %l2, %l1;",
        "shared": f".shared .align 16 .b8 tile[{64 * size}]; mov.u32 %t9, tile; "
        f"mad.lo.u32 %t9, %t8, {size}, %t9;",
        "local": f".local .align 16 .b8 depot[{size}]; mov.u64 %l2, depot;",
        "generic": f".shared .align 16 .b8 tile[{64 * size}]; mov.u32 %t9, tile; "
        f"mad.lo.u32 %t9, %t8, {size}, %t9; cvt.u64.u32 %l3, %t9; cvta.shared.u64 %l2, %l3;",
    }[space]
    if space == "shared":
        window = "%t9"
    suffix = "" if space == "generic" else f".{space}"
    body = f"""
        {setup.split(";")[0] + ";" if setup.startswith(".") else ""}
        mov.u32 %t8, %tid.x; mul.wide.u32 %l0, %t8, {size};
        add.u64 %l1, %q1, %l0; add.u64 %l0, %q0, %l0;
        {";".join(setup.split(";")[1:]) if setup.startswith(".") else setup}
        ld.global.v{count}.b{bits} {{{forward}}}, [%l0];
        st{suffix}.v{count}.b{bits} [{window}], {{{backward}}};
        ld{suffix}.v{count}.b{bits} {{{forward}}}, [{window}];
        st.global.v{count}.b{bits} [%l1], {{{forward}}};
    """
    sim.run_ptx(kernel(body, ["u64", "u64"]), [memory, out], block=(64,))
    want = memory.reshape(64, count, bits // 8)[:, ::-1].reshape(64, size)
    assert_bits(out, np.ascontiguousarray(want), f"v{count}.b{bits} {space}")


def test_addresses_convert_between_windows(sim: Simulator) -> None:
    """cvta to generic and back gives the window's address; global addresses are generic."""
    out = np.zeros(2, dtype=np.uint64)
    body = """
        .shared .align 4 .b8 tile[64];
        mov.u32 %t0, tile; add.u32 %t0, %t0, 12; cvt.u64.u32 %l0, %t0;
        cvta.shared.u64 %l1, %l0; cvta.to.shared.u64 %l2, %l1; sub.u64 %l2, %l2, %l0;
        cvta.to.global.u64 %l3, %q0; cvta.global.u64 %l4, %l3; sub.u64 %l4, %l4, %q0;
        st.global.u64 [%l3], %l2; st.global.u64 [%l3+8], %l4;
    """
    out[:] = 99
    sim.run_ptx(kernel(body, ["u64"]), [out], block=(1,))
    assert out.tolist() == [0, 0]


def test_windows_of_generic_addresses(sim: Simulator) -> None:
    out = np.zeros(4, dtype=np.uint32)
    body = f"""
        .shared .align 4 .b8 tile[64]; .local .align 4 .b8 depot[16];
        {OWN_WORD} mov.u64 %l2, tile; cvta.shared.u64 %l2, %l2;
        mov.u64 %l3, depot; cvta.local.u64 %l3, %l3;
        isspacep.shared %p0, %l2; selp.u32 %t1, 1, 0, %p0;
        isspacep.local %p0, %l3; selp.u32 %t2, 2, 0, %p0; or.b32 %t1, %t1, %t2;
        isspacep.global %p0, %q0; selp.u32 %t2, 4, 0, %p0; or.b32 %t1, %t1, %t2;
        isspacep.global %p0, %l2; selp.u32 %t2, 8, 0, %p0; or.b32 %t1, %t1, %t2;
        isspacep.shared %p0, %q0; selp.u32 %t2, 16, 0, %p0; or.b32 %t1, %t1, %t2;
        st.global.u32 [%l1], %t1;
    """
    sim.run_ptx(kernel(body, ["u64"]), [out], block=(4,))
    assert out.tolist() == [7] * 4


def test_dynamic_shared_memory(sim: Simulator) -> None:
    """An extern array begins after the static one and has the bytes of the launch."""
    out = np.zeros(256, dtype=np.uint32)
    prologue = ".extern .shared .align 16 .b8 dynamic[];"
    body = """
        .shared .align 16 .b8 fixed[64];
        mov.u32 %t0, %tid.x; mov.u32 %t1, dynamic; mov.u32 %t2, fixed;
        shl.b32 %t3, %t0, 2; add.u32 %t4, %t1, %t3;
        st.shared.u32 [%t4], %t0; setp.lt.u32 %p0, %t0, 16; add.u32 %t5, %t2, %t3;
        @%p0 st.shared.u32 [%t5], 0; bar.sync 0;
        xor.b32 %t6, %t3, 1020; add.u32 %t6, %t6, %t1; ld.shared.u32 %t7, [%t6];
        mul.wide.u32 %l0, %t0, 4; add.u64 %l1, %q0, %l0; st.global.u32 [%l1], %t7;
    """
    text = kernel(body, ["u64"], prologue=prologue)
    sim.run_ptx(text, [out], block=(256,), shared_bytes=1024)
    assert_bits(out, np.arange(255, -1, -1, dtype=np.uint32), "dynamic shared")


def test_module_variables_and_constants(sim: Simulator) -> None:
    out = np.zeros(4, dtype=np.uint32)
    prologue = """
        .visible .global .align 4 .u32 counter = 7;
        .const .align 4 .b8 table[16] = {1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 1, 0, 0};
    """
    body = f"""
        {OWN_WORD} mov.u64 %l2, table; add.u64 %l2, %l2, %l0; ld.const.u32 %t1, [%l2];
        ld.global.u32 %t2, [counter]; mad.lo.u32 %t1, %t1, 10, %t2; st.global.u32 [%l1], %t1;
    """
    sim.run_ptx(kernel(body, ["u64"], prologue=prologue), [out], block=(4,))
    assert out.tolist() == [17, 27, 37, 260 * 10 + 7]


def test_parameters_of_every_size(sim: Simulator) -> None:
    out = np.zeros(4, dtype=np.uint64)
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry test(.param .u64 out, .param .u8 a, .param .u16 b, .param .align 8 .b8 c[16],
                     .param .f32 d)
{
    .reg .b64 %l<8>; .reg .b32 %t<8>; .reg .b16 %h<4>; .reg .f32 %f<2>;
    ld.param.u64 %l0, [out];
    ld.param.u8 %h0, [a]; cvt.u64.u16 %l1, %h0; st.global.u64 [%l0], %l1;
    ld.param.s16 %t1, [b]; cvt.s64.s32 %l2, %t1; st.global.u64 [%l0+8], %l2;
    ld.param.u64 %l3, [c+8]; st.global.u64 [%l0+16], %l3;
    ld.param.f32 %f1, [d]; cvt.rzi.u64.f32 %l4, %f1; st.global.u64 [%l0+24], %l4;
    ret;
}
"""
    struct = np.array([(1, 2)], dtype=[("low", np.uint64), ("high", np.uint64)])[0]
    params = [out, np.uint8(200), np.int16(-2), struct, np.float32(5.5)]
    sim.run_ptx(text, params, block=(1,))
    assert out.tolist() == [200, (1 << 64) - 2, 2, 5]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_the_rest_with_zeros(sim: Simulator, size: int) -> None:
    """The source size is a register: bytes past it are zeros, and nothing is read there."""
    source = np.random.default_rng(0).integers(1, 256, (32, size), dtype=np.uint8)
    sizes = (np.arange(32) % (size + 1)).astype(np.uint32)
    words = size // 4
    names = ", ".join(f"%d{i}" for i in range(words))
    form = f"v{words}.b32 {{{names}}}" if words > 1 else f"b32 {names}"
    cache = "cg" if size == 16 else "ca"
    body = f"""
        .shared .align 16 .b8 tile[{32 * size}];
        mov.u32 %t0, %tid.x; mov.u32 %t1, tile; mad.lo.u32 %t1, %t0, {size}, %t1;
        mul.wide.u32 %l0, %t0, {size}; add.u64 %l0, %q0, %l0;
        cp.async.{cache}.shared.global [%t1], [%l0], {size}, %b;
        cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.{form}, [%t1];
    """
    inputs = [source.view(np.uint32), sizes]
    got = lanes(sim, body, inputs, (np.uint32, words))
    want = np.where(np.arange(size) < sizes[:, None], source, 0).astype(np.uint8)
    assert_bits(got.view(np.uint8), want, f"cp.async {size}")


def test_cp_async_lands_with_its_group(sim: Simulator) -> None:
    """Three groups; wait_group 1 leaves the newest in flight."""
    source = np.arange(96, dtype=np.uint32)
    copies = "".join(
        f"cp.async.ca.shared.global [%t1+{128 * i}], [%l0+{128 * i}], 4; cp.async.commit_group;"
        for i in range(3)
    )
    out = np.zeros(96, dtype=np.uint32)
    body = f"""
        .shared .align 16 .b8 tile[384];
        mov.u32 %t0, %tid.x; mov.u32 %t1, tile; shl.b32 %t2, %t0, 2; add.u32 %t1, %t1, %t2;
        cvt.u64.u32 %l1, %t2; add.u64 %l0, %q0, %l1; add.u64 %l2, %q1, %l1;
        {copies}
        cp.async.wait_group 1;
        ld.shared.u32 %t3, [%t1]; st.global.u32 [%l2], %t3;
        ld.shared.u32 %t3, [%t1+128]; st.global.u32 [%l2+128], %t3;
        cp.async.wait_all;
        ld.shared.u32 %t3, [%t1+256]; st.global.u32 [%l2+256], %t3;
    """
    sim.run_ptx(kernel(body, ["u64", "u64"]), [source, out])
    assert_bits(out, source, "cp.async groups")


def atomic(
    sim: Simulator,
    instruction: str,
    kind: str,
    initial: Array,
    operands: list[Array],
    *,
    space: str = "global",
) -> tuple[Array, Array]:
    """Every lane works on word lane % 4 of memory: the final words, and what each lane got."""
    count = len(operands[0])
    dtype = initial.dtype
    size = dtype.itemsize
    register = f"{'f' if dtype.kind == 'f' else 'b'}{8 * size}"
    names = [f"%v{i}" for i in range(len(operands))]
    loads = "".join(
        f"add.u64 %l3, %q{2 + i}, %l1; ld.global.b{8 * size} {name}, [%l3];"
        for i, name in enumerate(names)
    )
    words, old = initial.copy(), np.zeros(count, dtype=dtype)
    if space == "shared":
        declare = ".shared .align 8 .b8 tile[32];"
        copy_in = f"""
            cvt.u32.u64 %t3, %l0; mov.u32 %t4, tile; add.u32 %t3, %t3, %t4;
            setp.lt.u32 %p0, %t0, 4; add.u64 %l2, %q0, %l0;
            @%p0 ld.global.b{8 * size} %w, [%l2]; @%p0 st.shared.b{8 * size} [%t3], %w; bar.sync 0;
        """
        address = "%t3"
        copy_out = f"""
            bar.sync 0; @%p0 ld.shared.b{8 * size} %w, [%t3];
            @%p0 st.global.b{8 * size} [%l2], %w;
        """
    else:
        declare, copy_in, copy_out, address = "", "add.u64 %l2, %q0, %l0;", "", "%l2"
    values = ", ".join(names)
    is_red = instruction.startswith("red")
    target = "" if is_red else "%o, "
    keep = "" if is_red else f"add.u64 %l4, %q1, %l1; st.global.b{8 * size} [%l4], %o;"
    body = f"""
        {declare} .reg .{register} %w, %o, {values};
        mov.u32 %t0, %tid.x; and.b32 %t1, %t0, 3; mul.wide.u32 %l0, %t1, {size};
        mul.wide.u32 %l1, %t0, {size};
        {copy_in} {loads}
        {instruction.replace("SPACE", space)}.{kind} {target}[{address}], {values};
        {keep} {copy_out}
    """
    text = kernel(body, ["u64"] * (2 + len(operands)))
    sim.run_ptx(text, [words, old, *operands], block=(count,))
    return words, old


def wrapping(a: int, b: int) -> int:
    return (a + b) & 0xFFFFFFFF


ATOMICS: dict[str, Callable[[int, int], int]] = {
    "add.u32": wrapping,
    "exch.b32": lambda a, b: b,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "inc.u32": lambda a, b: 0 if a >= b else a + 1,
    "dec.u32": lambda a, b: b if a == 0 or a > b else a - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", list(ATOMICS))
def test_atomics(sim: Simulator, name: str, space: str) -> None:
    """Some order of the lanes of one word explains all results: the old values and the last one."""
    operation, kind = name.split(".")
    small = operation in ("inc", "dec")
    rng = np.random.default_rng(0)
    initial = np.array([5, 0, 0xFFFFFFF0, 77], dtype=np.uint32)
    if small:
        initial %= 8
    operands = rng.integers(0, 8 if small else 1 << 32, 32, dtype=np.uint32)
    instruction = f"atom.SPACE.{operation}"
    words, old = atomic(sim, instruction, kind, initial, [operands], space=space)
    for word in range(4):
        left = list(range(word, 32, 4))
        value = int(initial[word])
        # Each lane's old value must continue the chain; lanes with equal values may swap.
        while left:
            lane = next((i for i in left if int(old[i]) == value), None)
            assert lane is not None, f"{name}: no lane saw {value}"
            value = ATOMICS[name](value, int(operands[lane]))
            left.remove(lane)
        assert int(words[word]) == value
    if operation != "exch":
        instruction = f"red.SPACE.{operation}"
        assert_bits(
            atomic(sim, instruction, kind, initial, [operands], space=space)[0], words, name
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("add.u64", np.uint64), ("max.s32", np.int32), ("min.s32", np.int32), ("add.f32", np.float32)],
)
def test_atomics_of_other_types(sim: Simulator, name: str, dtype: type) -> None:
    operation, kind = name.split(".")
    values = np.arange(-16, 16).astype(np.int64)
    operands = values.astype(dtype)
    initial = np.array([1, 2, 3, 4], dtype=dtype)
    words, _ = atomic(sim, f"atom.SPACE.{operation}", kind, initial, [operands])
    columns = operands.reshape(8, 4)
    function = {"add": np.add, "max": np.maximum, "min": np.minimum}[operation]
    with np.errstate(over="ignore"):
        want = function.reduce(np.concatenate([initial[None], columns]), axis=0)
    assert_bits(words, want.astype(dtype), name)


def test_compare_and_swap(sim: Simulator) -> None:
    """Exactly one lane per word swaps; the others see its value."""
    initial = np.array([0, 0, 5, 0], dtype=np.uint32)
    compare, swap = np.zeros(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    words, old = atomic(sim, "atom.SPACE.cas", "b32", initial, [compare, swap])
    assert words[2] == 5
    assert (old[2::4] == 5).all()
    for word in (0, 1, 3):
        mine = old[word::4]
        winner = word + 4 * int(np.flatnonzero(mine == 0)[0])
        assert np.count_nonzero(mine == 0) == 1
        assert words[word] == swap[winner]


@pytest.mark.parametrize("suffix", ["", ".relaxed.gpu", ".acquire.gpu", ".acq_rel.gpu"])
def test_ordered_atomics_parse(sim: Simulator, suffix: str) -> None:
    initial, ones = np.zeros(4, dtype=np.uint32), np.ones(32, dtype=np.uint32)
    words, _ = atomic(sim, f"atom{suffix}.SPACE.add", "u32", initial, [ones])
    assert words.tolist() == [8] * 4


def test_cache_hints_do_not_change_loads(sim: Simulator) -> None:
    memory, out = np.arange(32, dtype=np.uint32), np.zeros(32, dtype=np.uint32)
    body = f"""
        {OWN_WORD} add.u64 %l2, %q1, %l0;
        createpolicy.fractional.L2::evict_first.b64 %l3, 1.0;
        ld.global.nc.u32 %t1, [%l1]; ld.global.cg.u32 %t2, [%l1]; ld.volatile.global.u32 %t3, [%l1];
        ld.global.L1::no_allocate.u32 %t4, [%l1]; ld.acquire.gpu.global.u32 %t5, [%l1];
        ld.global.nc.L1::no_allocate.L2::128B.u32 %t6, [%l1];
        prefetch.global.L2 [%l1];
        add.u32 %t1, %t1, %t2; add.u32 %t1, %t1, %t3; add.u32 %t1, %t1, %t4; add.u32 %t1, %t1, %t5;
        add.u32 %t1, %t1, %t6; st.release.gpu.global.u32 [%l2], %t1; membar.gl; fence.acq_rel.gpu;
    """
    sim.run_ptx(kernel(body, ["u64", "u64"]), [memory, out])
    assert_bits(out, 6 * memory, "cache hints")
