# SPDX-License-Identifier: Apache-2.0
"""packed_gemm of every implementation, in both modes, against float64 within a stated bound."""

import dataclasses
import importlib

import pytest
import torch
from compare import assert_within
from isas import BFLOAT16, CUDA, KNOWN, cpu_isa, every_isa, param, running
from shapes import BITS, GEMM_SHAPES, problem
from torch.utils._python_dispatch import TorchDispatchMode

import mmq_ext
from mmq_ext import dispatcher, ops, packed_ops

MODES = ("exact", "int8")
# CUDA has no int8 mode; test_cuda_errors.py has the refusal.
every_kernel = pytest.mark.parametrize(
    ("isa", "mode"), [*(param(isa, mode) for isa in KNOWN for mode in MODES), param(CUDA, "exact")]
)
every_mode = pytest.mark.parametrize("mode", MODES)
bfloat16_isa = pytest.mark.parametrize("isa", [param(name) for name in BFLOAT16])
every_width = pytest.mark.parametrize("bits", BITS)


def own(p, isa, mode="exact"):
    """The problem with activations of the type for which the implementation has its own kernel."""
    if isa == CUDA:
        return p.as_cuda()
    return p.as_bfloat16() if isa in BFLOAT16 and mode == "exact" else p


def check(p, isa, mode):
    """The kernel's result is within the rounding of the same computation in float64, and within the
    full bound of the exact product."""
    if isa == CUDA:
        check_cuda(p)
        return
    p = own(p, isa, mode)
    with mmq_ext.use_isa(isa):
        y = p.run(mode)
    assert y.dtype == p.x.dtype
    what = f"{isa} {mode} b={p.bits} n={p.n} x={list(p.x.shape)} g={p.group_size}"
    assert_within(y, p.reference(mode), p.bound(mode, rounding_only=True), what)
    assert_within(y, p.reference("exact"), p.bound(mode), what)


def check_cuda(p):
    """The same for the CUDA kernel, in 16 bits; or its refusal of a group size it does not have."""
    p = p.as_cuda()
    with running(CUDA):
        if not p.has_cuda_groups:
            with pytest.raises(ValueError, match=f"group_size={p.group_size}"):
                p.run("exact")
            return
        y = p.run("exact")
    assert y.dtype == p.x.dtype
    what = f"cuda b={p.bits} n={p.n} x={list(p.x.shape)} g={p.group_size}"
    assert_within(y, p.reference("exact"), p.cuda_bound(), what)


@every_kernel
@every_width
def test_awkward_shapes(isa, mode, bits):
    for seed, (m, n, k, group_size) in enumerate(GEMM_SHAPES):
        check(problem(m, n, k, group_size, bits, seed=seed, bias=seed % 2 == 0), isa, mode)


@every_kernel
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 14, 45, 65, 97, 130, 580])
def test_row_counts(isa, mode, m):
    for bits in (3, 8):
        for group_size in (32, 36):
            check(problem(m, 20, 140, group_size, bits, seed=m), isa, mode)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activation_types(isa, mode, dtype):
    check(problem(3, 10, 96, 32, 4, dtype=dtype, bias=True), isa, mode)
    check(problem(13, 10, 100, 33, 5, dtype=dtype, in_scale=True), isa, mode)


@every_kernel
@pytest.mark.parametrize("m", [2, 13])
def test_float_zero_permutation_scale_and_bias(isa, mode, m):
    for seed in range(4):
        p = problem(
            *(m, 9, 77, 16 << seed, 2 + 2 * seed),
            seed=seed,
            float_zero=True,
            perm=True,
            in_scale=True,
            bias=True,
        )
        check(p, isa, mode)


@every_kernel
@pytest.mark.parametrize("m", [1, 13])
@pytest.mark.parametrize("kind", ["symmetric", "integer", "float"])
def test_zero_kinds(isa, mode, m, kind):
    for bits in (3, 4, 8):
        zero = {"symmetric": kind == "symmetric", "float_zero": kind == "float"}
        check(problem(m, 20, 140, 32, bits, seed=bits, bias=True, **zero), isa, mode)


@cpu_isa
@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_16_bits_are_the_same_grid(isa, mode, dtype, symmetric):
    """The minima that kernels make of zeros are exact: in exact mode no bit differs from stored
    minima. In int8 mode zeros are subtracted before the scale is multiplied, within the bound."""
    for m, n, k, group_size in ((1, 20, 140, 32), (5, 9, 96, 16), (14, 40, 70, 7)):
        p = problem(m, n, k, group_size, 5, seed=m)
        scales = p.scales.to(dtype)
        scales[0, 0] = 2.0**-20  # subnormal in fp16
        zeros = None if symmetric else torch.full_like(p.scales, 3.0).mul_(p.codes[:, :1] % 10)
        stored = ops.repack_affine(scales, zeros, 5, float_zero=False)
        minima = -(16.0 if zeros is None else zeros) * scales.float()
        widened = ops.repack_affine(scales.float(), minima, 5, float_zero=True)
        assert (stored.dtype, widened.dtype) == (dtype, torch.float32)
        with mmq_ext.use_isa(isa):
            tiles, sizes = p.tiles(), {"n": n, "bits": 5, "group_size": group_size, "mode": mode}
            found, want = (ops.packed_gemm(p.x, tiles, a, **sizes) for a in (stored, widened))
        if mode == "exact":
            assert found.any()
            assert torch.equal(found, want)
            continue
        same = dataclasses.replace(p, scales=scales.float(), minima=minima, zeros=None)
        for y in (found, want):
            assert_within(y, same.reference(mode), same.bound(mode, rounding_only=True))


@every_kernel
def test_in_scale_divides_before_the_permutation(isa, mode):
    p, plain = problem(2, 8, 64, 32, 4, perm=True, in_scale=True), problem(2, 8, 64, 32, 4)
    if isa == CUDA:
        p = p.as_cuda()
    used = (p.x.float() / p.extra["in_scale"].float())[:, p.extra["perm"].long()].to(p.x.dtype)
    with running(isa):
        expected = ops.packed_gemm(
            used,
            plain.tiles(),
            plain.affine(),
            n=8,
            bits=4,
            group_size=32,
            mode=mode,
        )
        assert expected.any()
        assert torch.equal(p.run(mode), expected)


@cpu_isa
@pytest.mark.parametrize("m", [1, 13])
def test_long_groups_do_not_overflow_integer_sums(isa, m):
    k = 140_000  # 255 * 127 * k exceeds 2^31
    p = problem(m, 2, k, k, 8)
    p.codes.fill_(255)
    p.x.fill_(1.0)
    check(p, isa, "int8")


@cpu_isa
@every_width
def test_extreme_codes_do_not_saturate(isa, bits):
    for m in (1, 7):
        p = problem(m, 8, 128, 128, bits)
        p.codes.fill_((1 << bits) - 1)
        for sign in (1.0, -1.0):
            p.x.fill_(sign)
            check(p, isa, "int8")


@cpu_isa
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e30])
def test_tiny_and_large_activations(isa, size):
    for m in (1, 13):
        p = problem(m, 5, 70, 32, 4)
        p.x.mul_(size)
        for mode in MODES:
            check(p, isa, mode)


@every_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_visible(isa, value):
    for m in (2, 13):
        for group_size in (32, 7):
            p = problem(m, 9, 70, group_size, 4)
            p.x[1, 40] = value
            if isa == CUDA:
                p = problem(m, 9, 70, 32, 4, seed=group_size).as_cuda()
                p.x[1, 40] = value
            with running(isa):
                for mode in MODES if isa != CUDA else ("exact",):
                    y = own(p, isa, mode).run(mode)
                    finite = y.isfinite()
                    assert not finite[1].any()
                    assert finite[[row for row in range(m) if row != 1]].all()
                if isa != CUDA:
                    assert y[1].isnan().all()  # int8


@every_kernel
@pytest.mark.parametrize("shape", [(1, 9, 1408, 128), (13, 9, 100, 7), (13, 9, 100, 16)])
def test_one_corrupted_word_is_noticed(isa, mode, shape):
    """The bound can fail: one wrong word of codes puts its row out of it."""
    p = own(problem(*shape, 4), isa, mode)
    if isa == CUDA and not p.has_cuda_groups:
        pytest.skip("refused")
    words = ops.pack(p.codes, 4)
    words[3, 5] ^= 0x7FFFFFFF
    with running(isa):
        y = p.run(mode, tiles=ops.repack(words, 4, shape[2]))
    want = p.reference(mode)
    bound = p.cuda_bound() if isa == CUDA else p.bound(mode, rounding_only=True)
    with pytest.raises(AssertionError, match="elements are out of bounds"):
        assert_within(y, want, bound)
    untouched = [row for row in range(p.n) if row != 3]
    assert_within(y[:, untouched], want[:, untouched], bound[:, untouched])


@cpu_isa
@every_mode
def test_results_do_not_depend_on_the_thread_count(isa, mode):
    before = torch.get_num_threads()
    try:
        for m, n, k, group_size in ((1, 300, 1024, 128), (33, 300, 320, 32), (9, 264, 300, 20)):
            p = own(problem(m, n, k, group_size, 3), isa, mode)
            tiles = p.tiles()
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with mmq_ext.use_isa(isa):
                    results.append(p.run(mode, tiles))
            assert results[0].any()
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [50, 64])
def test_instruction_sets_agree(mode, dtype, group_size):
    """Also where no bound sees it: all kernels quantize activations to the same codes."""
    p = problem(6, 40, 500, group_size, 5, dtype=dtype, bias=True)
    results = []
    for isa in mmq_ext.cpu_isas():
        with mmq_ext.use_isa(isa):
            results.append(p.run(mode))
    assert results[0].any()
    for result in results[1:]:
        assert_within(result, results[0].double(), 2 * p.bound(mode, rounding_only=True))


def cancelling(m, n, k, group_size, bits, float_zero=False):
    """Whole groups whose products take each other away: y is zero, so that no rounding of the
    result hides what happened before."""
    p = problem(m, n, 2 * k, group_size, bits, float_zero=float_zero).as_bfloat16()
    groups = k // group_size
    p.codes[:, k:] = p.codes[:, :k]
    p.x[:, k:] = -p.x[:, :k]
    for part in (p.scales, p.minima, p.zeros):
        if part is not None:
            part[:, groups:] = part[:, :groups]
    return p


@cpu_isa
@pytest.mark.parametrize("float_zero", [False, True])
@pytest.mark.parametrize("group_size", [32, 96, 192])
def test_sums_that_cancel(isa, group_size, float_zero):
    for bits in (2, 5, 8):
        p = cancelling(14, 20, 192, group_size, bits, float_zero)
        check(p, isa, "exact")
        assert not p.reference("exact").abs().gt(1e-9).any()
        p.codes[3, 5] ^= 1 << (bits - 1)  # the bound can fail: one bit of one code
        with mmq_ext.use_isa(isa):
            y = p.run("exact")
        p.codes[3, 5] ^= 1 << (bits - 1)
        with pytest.raises(AssertionError, match="elements are out of bounds"):
            assert_within(y, p.reference("exact"), p.bound("exact"))


@bfloat16_isa
@every_width
def test_bfloat16_activations(isa, bits):
    """Shapes around the blocks of rows, the strip, the panel, and with several panels to a group;
    with the rows' first columns alone, so that nothing else covers an error."""
    shapes = (
        (6, 1, 1, 1),
        (7, 33, 31, 32),
        (8, 31, 257, 256),
        (15, 40, 520, 320),
        (13, 65, 700, 700),
    )
    for seed, (m, n, k, group_size) in enumerate(shapes):
        for kind in ({"symmetric": True}, {}, {"float_zero": True}):
            p = problem(m, n, k, group_size, bits, seed=seed, bias=seed % 2 == 0, **kind)
            check(p, isa, "exact")
            p.x[:, 1:] = 0
            check(p, isa, "exact")


@bfloat16_isa
def test_bfloat16_activations_are_permuted_and_divided(isa):
    for seed, extra in enumerate(
        ({"perm": True}, {"in_scale": True}, {"perm": True, "bias": True})
    ):
        check(problem(13, 20, 96, 32, 4, seed=seed, **extra), isa, "exact")


def test_bfloat16_is_multiplied_where_it_can_be():
    """The same problem on two rows of the table: the kernels differ, so some last bits do."""
    if not set(BFLOAT16) <= set(mmq_ext.cpu_isas()):
        pytest.skip(f"this machine has no {BFLOAT16[0]}")
    for m, group_size, differs in ((64, 64, True), (5, 64, False), (64, 40, False)):
        p = cancelling(m, 64, 320, group_size, 4)
        results = []
        for isa in ("avx512bf16", "avx512"):
            with mmq_ext.use_isa(isa):
                results.append(p.run("exact"))
        assert torch.equal(*results) != differs


@bfloat16_isa
def test_what_bfloat16_products_would_lose_is_left_to_fp32(isa):
    """Subnormal numbers, those whose sums could become so or overflow, NaN and infinity."""
    outside = [2.0**-133, 2.0**-126, 2.0**-120, 2.0**111, 3e38, float("nan"), float("inf")]
    for value in outside:
        for sign in (1.0, -1.0):
            p = cancelling(13, 20, 96, 32, 4)
            p.x[5, 70] = sign * value
            assert p.x[5, 70].isnan() or float(p.x[5, 70]) == pytest.approx(sign * value, rel=0.01)
            with mmq_ext.use_isa("avx512"):
                want = p.run("exact")
            with mmq_ext.use_isa(isa):
                torch.testing.assert_close(p.run("exact"), want, rtol=0, atol=0, equal_nan=True)
    for value in (2.0**-119, 2.0**110):
        p = cancelling(13, 20, 96, 32, 4)
        p.x.copy_(p.x.sign() * value)
        check(p, isa, "exact")
        p.x[5, 70] = -p.x[5, 70]
        check(p, isa, "exact")


@pytest.mark.parametrize("zero", [-1, 256])
def test_zeros_beyond_a_byte_are_refused(zero):
    zeros = torch.tensor([[0], [zero]])
    message = "repack_affine: expected integer zeros from 0 to 255, got"
    with pytest.raises(ValueError, match=message):
        ops.repack_affine(torch.ones(2, 1).half(), zeros, 4, float_zero=False)
    ops.repack_affine(torch.ones(2, 1).half(), zeros.float(), 4, float_zero=True)


@cpu_isa
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_columns_leave_the_bias(isa, mode, dtype):
    x, tiles, affine = torch.empty(13, 0, dtype=dtype), torch.empty(0).byte(), torch.empty(0)
    bias = torch.randn(9)
    with mmq_ext.use_isa(isa):
        y = ops.packed_gemm(x, tiles, affine, n=9, bits=4, group_size=32, bias=bias, mode=mode)
    assert torch.equal(y, bias.to(dtype).expand(13, 9))


@bfloat16_isa
def test_results_below_the_normal_numbers_are_kept(isa):
    p = problem(8, 3, 32, 32, 4, symmetric=True).as_bfloat16()
    p.scales.fill_(2.0**-14)
    p.codes.fill_(9)  # 1
    p.x.zero_()
    p.x[:, 7] = torch.tensor([2.0**-i for i in range(112, 120)])
    with mmq_ext.use_isa(isa):
        y = p.run("exact")
    assert torch.equal(y, (p.x[:, 7:8].float() * 2.0**-14).bfloat16().expand(8, 3))
    assert y.all()


@every_kernel
def test_opcheck(isa, mode):
    p = problem(3, 9, 70, 32, 4, perm=True, in_scale=True, bias=True)
    p = p.as_cuda() if isa == CUDA else p
    extra = [p.extra[name] for name in ("bias", "perm", "in_scale")]
    with running(isa):
        args = (p.x, p.tiles(), p.affine(), *extra, p.n, p.bits, p.group_size, mode)
        torch.library.opcheck(torch.ops.mmq.packed_gemm.default, args)


@every_kernel
def test_compiles_without_a_graph_break(isa, mode):
    p = problem(3, 9, 70, 32, 4, bias=True)
    p = p.as_cuda() if isa == CUDA else p

    def linear(x):
        y = ops.packed_gemm(
            x.relu(), tiles, affine, n=9, bits=4, group_size=32, mode=mode, **p.extra
        )
        return y * 2

    with running(isa):
        tiles, affine = p.tiles(), p.affine()
        torch.compiler.reset()
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        expected = linear(p.x)
        assert expected.any()
        torch.testing.assert_close(compiled(p.x), expected, rtol=0, atol=0)


class Seen(TorchDispatchMode):
    """The names of the ops that torch sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_short_way_is_equal_and_torch_sees_what_it_has_to(monkeypatch):
    p = problem(3, 9, 70, 32, 4, perm=True, in_scale=True, bias=True)
    short = p.run("exact")
    assert short.any()
    names = [p.extra[name] for name in ("bias", "perm", "in_scale")]
    args = (p.x, p.tiles(), p.affine(), *names, p.n, p.bits, p.group_size, "exact")
    assert torch.equal(short, torch.ops.mmq.packed_gemm.default(*args))
    with Seen() as seen:
        assert torch.equal(p.run("exact"), short)
    assert "mmq.packed_gemm.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        p.run("exact")
    assert "mmq::packed_gemm" in {event.key for event in profile.key_averages()}
    tiles, affine = p.tiles(), p.affine()
    traced = torch.jit.trace(
        lambda x: ops.packed_gemm(x, tiles, affine, n=9, bits=4, group_size=32), p.x
    )
    assert "mmq::packed_gemm" in str(traced.graph)
    # Outside of all these the dispatcher has no part in it.
    monkeypatch.setattr(packed_ops, "_packed_gemm_cpu", lambda *_: "short")
    assert p.run("exact") == "short"


def test_columns_past_32_bits_are_refused():
    x, tiles = torch.empty(0, 2**31), torch.empty(0, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"packed_gemm: expected k below 2\^31, got 2147483648"):
        ops.packed_gemm(x, tiles, torch.empty(0), n=0, bits=4, group_size=2**31)


def test_a_torch_without_these_private_names_sees_every_call(monkeypatch):
    x = torch.zeros(1, 8)
    assert not dispatcher.needs_dispatcher(x)
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, "_len_torch_dispatch_stack")
        importlib.reload(dispatcher)
        assert dispatcher.needs_dispatcher(x)
    importlib.reload(dispatcher)
    assert not dispatcher.needs_dispatcher(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tensors_that_are_no_memory_take_the_long_way():
    p = problem(3, 9, 70, 32, 4)
    meta = ops.packed_gemm(
        p.x.to("meta"), p.tiles().to("meta"), p.affine().to("meta"), n=9, bits=4, group_size=32
    )
    assert meta.is_meta
    assert meta.shape == (3, 9)
    tiles, affine = p.tiles(), p.affine()

    def product(x):
        return ops.packed_gemm(x, tiles, affine, n=9, bits=4, group_size=32)

    assert product(p.x).any()
    mapped = torch.vmap(product)(torch.stack([p.x, 2 * p.x]))
    assert torch.equal(mapped, torch.stack([product(p.x), product(2 * p.x)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x of float32, float16 or bfloat16"),
        ({"x": torch.zeros(64)}, r"x of shape \[m, k\], got \[64\]"),
        ({"x": torch.zeros(2, 65)}, r"tiles of shape \[768\], got \[512\]"),
        ({"tiles": torch.zeros(512)}, "tiles of torch.uint8, got torch.float32"),
        ({"affine": torch.zeros(3)}, r"affine of shape \[64\], got \[3\]"),
        ({"n": 33}, r"tiles of shape \[1536\], got \[512\]"),
        ({"n": -1}, "n of 0 or more, got -1"),
        ({"bits": 1}, "bits from 2 to 8, got 1"),
        ({"group_size": 0}, "a positive group size, got 0"),
        ({"group_size": -1}, "a positive group size, got -1"),
        ({"mode": "fast"}, "mode as one of exact, int8, got 'fast'"),
        ({"bias": torch.zeros(5)}, r"bias of shape \[8\], got \[5\]"),
        ({"perm": torch.zeros(64, dtype=torch.int64)}, "perm of torch.int32, got torch.int64"),
        ({"in_scale": torch.ones(8)}, r"in_scale of shape \[64\], got \[8\]"),
    ],
)
def test_refusals_say_what_was_expected(change, message):
    arguments = {
        "x": torch.zeros(2, 64),
        "tiles": torch.zeros(512, dtype=torch.uint8),
        "affine": torch.zeros(64),
        "n": 8,
        "bits": 4,
        "group_size": 32,
    }
    ops.packed_gemm(**arguments)
    with pytest.raises(ValueError, match=f"packed_gemm: expected {message}"):
        ops.packed_gemm(**(arguments | change))


@every_width
@pytest.mark.parametrize("isa", [param("avx512")])
@pytest.mark.parametrize(
    "shape",
    [(1, 70, 300, 128), (3, 70, 300, 128), (17, 40, 130, 32), (97, 24, 70, 32), (25, 72, 100, 7)],
)
def test_integer_products_are_the_same_on_every_instruction_set(isa, shape, bits):
    p = problem(*shape, bits, bias=True)
    with mmq_ext.use_isa(isa):
        found = p.run("int8")
    assert found.any()
    with mmq_ext.use_isa("avx2"):
        assert torch.equal(p.run("int8"), found)
