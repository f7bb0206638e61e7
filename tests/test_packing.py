# SPDX-License-Identifier: Apache-2.0
"""pack, unpack, repack, unrepack: golden words, round trips, the layout bit by bit, refusals."""

import pytest
import torch
from compare import seeded
from isas import every_device, needs_cuda, running
from shapes import BITS, PACK_COLS, PACK_ROWS

from mmq_ext import _C, layouts, ops, reference

# Written down once by hand from the definition of the stream, not by this code.
GOLDEN = {
    2: ([i % 4 for i in range(16)], "e4e4e4e4"),
    3: ([i % 8 for i in range(32)], "88fac688 c688fac6 fac688fa"),
    4: (list(range(8)), "76543210"),
    5: (list(range(32)), "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
    6: ([i + 32 * (i % 2) for i in range(16)], "448c2840 aa489c69 bceb4cac"),
    7: (
        [4 * i for i in range(32)],
        "01820200 203860a1 a3058a12 224078e1 62a50992 9a3260b9 f9e3a70d",
    ),
    8: (list(range(4)), "03020100"),
}


def random_codes(rows: int, cols: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8, generator=seeded(bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("packer", [ops.pack, reference.pack])
def test_golden_words(bits, packer):
    codes, words = GOLDEN[bits]
    packed = packer(torch.tensor([codes], dtype=torch.uint8), bits)
    assert " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in packed[0]) == words


@every_device
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", PACK_COLS)
def test_round_trips_are_bitwise(device, bits, cols):
    for rows in PACK_ROWS:
        codes = random_codes(rows, cols, bits)
        with running(device):
            words = ops.pack(codes, bits)
            assert torch.equal(words, reference.pack(codes, bits))
            assert words.shape == (rows, ops.row_words(cols, bits))
            assert torch.equal(ops.unpack(words, bits, cols), codes)
            tiles = ops.repack(words, bits, cols)
            assert torch.equal(ops.unrepack(tiles, bits, rows, cols), words)


@needs_cuda
def test_cuda_tiles_have_the_size_that_the_library_says(isa):
    """The fake cannot ask the library, so Python has the formula again."""
    for bits in BITS:
        for n in (0, 1, 2, 63, 64, 65, 1408):
            for k in (0, 1, 16, 63, 64, 65, 4304):
                assert ops.tiles_bytes(n, k, bits, cuda=True) == _C.cuda_tiles_bytes(n, k, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", [1, 33, 129])
def test_native_equals_the_reference_bit_by_bit(bits, cols):
    for rows in PACK_ROWS:
        codes = random_codes(rows, cols, bits)
        words = ops.pack(codes, bits)
        assert torch.equal(words, reference.pack(codes, bits))
        assert torch.equal(reference.unpack(words, bits, cols), codes)
        tiles = ops.repack(words, bits, cols)
        assert tiles.numel() == ops.tiles_bytes(rows, cols, bits)
        assert torch.equal(tiles, reference.repack(words, bits, cols))


@every_device
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (3, 0), (0, 0)])
def test_empty_matrices(device, rows, cols):
    codes = torch.zeros(rows, cols, dtype=torch.uint8)
    with running(device):
        words = ops.pack(codes, 3)
        assert torch.equal(ops.unpack(words, 3, cols), codes)
        assert torch.equal(ops.unrepack(ops.repack(words, 3, cols), 3, rows, cols), words)


@every_device
def test_strided_and_unaligned_input_is_packed_like_a_copy(device):
    codes = random_codes(7, 10, 4)
    with running(device):
        for view in (codes.T, codes[1:]):
            words = ops.pack(view, 4)
            assert torch.equal(
                words, ops.pack(view.clone(memory_format=torch.contiguous_format), 4)
            )
            assert bool(words.any())


@every_device
@pytest.mark.parametrize("bits", range(2, 8))
def test_a_code_that_does_not_fit_is_refused(device, bits):
    codes = random_codes(2, 7, bits)
    codes[1, 3] = 1 << bits
    message = f"pack: expected codes below {1 << bits}, got {1 << bits}"
    with running(device), pytest.raises(ValueError, match=message):
        ops.pack(codes, bits)


@pytest.mark.parametrize("n", [1, 2, 16, 29])
@pytest.mark.parametrize("groups", [1, 5])
def test_affine_round_trip_and_order(n, groups):
    g = seeded(0)
    scales, minima = torch.randn(n, groups, generator=g), torch.randn(n, groups, generator=g)
    affine = ops.repack_affine(scales, minima, 4, float_zero=True)
    assert affine.numel() == ops.affine_floats(n, groups)
    back = ops.unrepack_affine(affine, n, groups)
    assert torch.equal(back[0], scales)
    assert torch.equal(back[1], minima)
    laid_out = affine.view(-1, groups, 2, 16)
    last = n - 1
    assert laid_out[last // 16, groups - 1, 0, last % 16] == scales[last, groups - 1]
    assert laid_out[last // 16, groups - 1, 1, last % 16] == minima[last, groups - 1]
    assert not laid_out[last // 16, :, :, last % 16 + 1 :].any()


@pytest.mark.parametrize("n", [1, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
def test_cuda_affine_has_three_forms(n, dtype, zero):
    g = seeded(1)
    scales = torch.rand(n, 3, generator=g).to(dtype)
    zeros = {
        "symmetric": None,
        "integer": torch.randint(0, 16, (n, 3), generator=g).float(),
        "float": torch.randn(n, 3, generator=g).to(dtype),
    }[zero]
    affine = layouts.cuda_affine(scales, zeros, 4, zero == "float")
    layouts.check_cuda_affine("test", affine, n, 3)
    padded = layouts.cuda_padded(n)
    kind = layouts.cuda_affine_kind(affine)
    if dtype == torch.float32 or zero == "float":
        assert kind == 2
        assert affine.dtype == torch.float32
        assert affine.shape == (3, padded, 2)
        middle = torch.full((n, 3), 8.0)
        minima = -(middle if zeros is None else zeros) * scales.float()
        assert torch.equal(affine[:, :n, 1].T, zeros.float() if zero == "float" else minima)
    else:
        assert kind == (0 if zeros is None else 1)
        assert affine.dtype == dtype
        assert affine.shape == ((3, padded) if zeros is None else (3, padded, 2))
    assert not affine[:, n:].any()
    back = layouts.cuda_unaffine(affine, n)
    assert torch.equal(back[0], scales.to(affine.dtype))
    if kind == 1:
        assert torch.equal(back[1].float(), zeros)
    for wrong in (affine[:2], affine[:, 1:], affine.double()):
        with pytest.raises(ValueError, match="test: expected affine"):
            layouts.check_cuda_affine("test", wrong, n, 3)


@pytest.mark.parametrize("n", [1, 17, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
def test_cpu_affine_has_three_forms(n, dtype, zero):
    g = seeded(2)
    scales = torch.rand(n, 2, generator=g).to(dtype)
    zeros = torch.randint(0, 256, (n, 2), generator=g).float()
    given = None if zero == "symmetric" else zeros
    affine = ops.repack_affine(scales, given, 8, float_zero=zero == "float")
    layouts.check_cpu_affine("test", affine, n, 2)
    kind = layouts.cpu_affine_kind(affine, n, 2)
    found, second = ops.unrepack_affine(affine, n, 2)
    assert torch.equal(found, scales.to(affine.dtype))
    if dtype == torch.float32 or zero == "float":
        assert (kind, affine.dtype) == (2, torch.float32)
        middle = zeros * 0 + 128 if given is None else zeros
        assert torch.equal(second, zeros if zero == "float" else -middle * scales.float())
    elif zero == "symmetric":
        assert (kind, affine.dtype, second) == (0, dtype, None)
    else:
        assert (kind, affine.dtype, second.dtype) == (1, dtype, dtype)
        assert torch.equal(second.float(), zeros)
    assert affine.numel() == ops.affine_floats(n, 2) // (2 if kind == 0 else 1)
    for wrong in (affine[1:], affine[None], affine.double()):
        with pytest.raises(ValueError, match="test: expected affine"):
            layouts.check_cpu_affine("test", wrong, n, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack(torch.zeros(2, 3), 4), "pack: expected codes of torch.uint8"),
        (lambda: ops.pack(torch.zeros(3, dtype=torch.uint8), 4), r"pack: .*shape \[\*, \*\]"),
        (lambda: ops.pack(torch.zeros(2, 3, dtype=torch.uint8), 9), "bits from 2 to 8, got 9"),
        (
            lambda: ops.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 33),
            r"unpack: expected words of shape \[\*, 5\], got \[2, 3\]",
        ),
        (
            lambda: ops.unpack(torch.zeros(2, 3, dtype=torch.int32), 4, -1),
            "unpack: expected cols of 0 or more, got -1",
        ),
        (
            lambda: ops.repack(torch.zeros(2, 3, dtype=torch.int32), 4, 33),
            r"repack: expected qweight of shape \[\*, 5\], got \[2, 3\]",
        ),
        (
            lambda: ops.unrepack(torch.zeros(7, dtype=torch.uint8), 4, 2, 3),
            r"unrepack: expected tiles of shape \[256\], got \[7\]",
        ),
    ],
)
def test_refusals_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_opcheck():
    codes = random_codes(3, 33, 5)
    words = ops.pack(codes, 5)
    tiles = ops.repack(words, 5, 33)
    for op, args in (
        (torch.ops.mmq.pack, (codes, 5)),
        (torch.ops.mmq.unpack, (words, 5, 33)),
        (torch.ops.mmq.repack, (words, 5, 33)),
        (torch.ops.mmq.unrepack, (tiles, 5, 3, 33)),
    ):
        torch.library.opcheck(op.default, args)
