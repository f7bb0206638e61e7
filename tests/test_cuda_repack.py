# SPDX-License-Identifier: Apache-2.0
"""repack and unrepack on the interpreter, against the fragment order written down a second time.

The reference here starts from the PTX ISA: which element of the left operand of mma.m16n8k16 a
lane's register holds. What the project adds (which feature is which operand row, which bits of a
code lie in which word) is taken from the picture in csrc/cuda/tiles.h, not from its functions.
"""

import numpy as np
import pytest
import torch
from budgets import budget, factor
from simulated import asks_interpreter, cuda_kernels, needs_kernels, simulated_cuda

from mmq_ext import ops

pytestmark = needs_kernels
BITS = range(2, 9)
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def codes_of(rows: int, cols: int, bits: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(bits)
    return torch.randint(1 << bits, (rows, cols), dtype=torch.uint8, generator=g)


def registers(block: np.ndarray) -> np.ndarray:
    """[tile, step, register, half, lane] of one block of 64 features x 64 columns."""
    found = np.zeros((4, 4, 4, 2, 32), dtype=np.uint32)
    for tile in range(4):
        # Row g of the operand is feature 8g + 2 tile, row g + 8 the feature after it.
        rows = np.array([8 * (row % 8) + 2 * tile + row // 8 for row in range(16)])
        for step in range(4):
            operand = block[rows, 16 * step : 16 * step + 16]
            for half in range(2):  # a0..a7 of the PTX ISA, two to a register
                for register, (down, right) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                    found[tile, step, register, half] = operand[G + down, 2 * T + right + half]
    return found


def block_words(block: np.ndarray, bits: int) -> np.ndarray:
    """The 128 * bits words of a block: vectors of 32 lanes x 4 words."""
    held = registers(block)
    planes = [width for width in (8, 4, 2, 1) if bits & width]
    vectors = []
    low = 0
    for width in planes:
        part = held >> low & (1 << width) - 1
        words = np.zeros((4 * width, 32), dtype=np.uint32)  # of tiles 0..3 after one another
        per_word = 16 // width
        for tile in range(4):
            for number in range(16):  # registers times steps
                word = tile * width + number // per_word
                at = number % per_word * width
                for half in range(2):
                    words[word] |= part[tile, number % 4, number // 4, half] << 16 * half + at
        vectors.append(words.reshape(width, 4, 32).transpose(0, 2, 1))
        low += width
    return np.concatenate(vectors).reshape(-1)


def fragment_order(codes: torch.Tensor, bits: int) -> np.ndarray:
    n, k = codes.shape
    padded = np.zeros((-(-n // 64) * 64, -(-k // 64) * 64), dtype=np.uint32)
    padded[:n, :k] = codes.numpy()
    return np.concatenate(
        [
            block_words(padded[i : i + 64, j : j + 64], bits)
            for i in range(0, padded.shape[0], 64)
            for j in range(0, padded.shape[1], 64)
        ]
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1408), (63, 65), (64, 64), (65, 63), (130, 200)])
def test_fragment_order_bit_by_bit_and_back(bits, n, k):
    codes = codes_of(n, k, bits)
    words = ops.pack(codes, bits)
    with cuda_kernels():
        tiles = ops.repack(words, bits, k)
        back = ops.unrepack(tiles, bits, n, k)
    assert np.array_equal(tiles.numpy().view(np.uint32), fragment_order(codes, bits))
    assert torch.equal(back, words)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_has_one_place(bits):
    """One bit in, one bit out: no two bits of the codes share a place."""
    seen = torch.zeros(64 * 64 * bits // 8, dtype=torch.uint8)
    for bit in range(bits):
        codes = torch.full((64, 64), 1 << bit, dtype=torch.uint8)
        with cuda_kernels():
            tiles = ops.repack(ops.pack(codes, bits), bits, 64)
        assert not (seen & tiles).any()
        seen |= tiles
    assert (seen == 255).all()


def test_a_wrong_place_is_noticed():
    """The comparison can fail: steps in the place of registers."""
    codes = codes_of(64, 64, 4)
    swapped = codes.view(64, 4, 2, 8).transpose(1, 2).reshape(64, 64)
    with cuda_kernels():
        tiles = ops.repack(ops.pack(swapped, 4), 4, 64)
    assert not np.array_equal(tiles.numpy().view(np.uint32), fragment_order(codes, 4))


@asks_interpreter
@pytest.mark.parametrize("bits", BITS)
def test_counts(bits):
    """Done once per weight: only its stores are held to the ideal, and its loads to a budget."""
    limits = budget("repack")
    codes = codes_of(64, 512, bits)
    with simulated_cuda() as simulator:
        ops.unrepack(ops.repack(ops.pack(codes, bits), bits, 512), bits, 64, 512)
        launches = simulator.launches()[1:]
    assert len(launches) == 2
    for launch in launches:
        total = launch["total"]
        assert (
            factor(total, "store_sectors", "store_sectors_ideal") <= limits["store_sector_factor"]
        )
        requested, distinct = (total[f"read_bytes_{n}"] for n in ("requested", "distinct"))
        name = "unrepack" if "unrepack" in launch["kernel"] else "repack"
        assert requested <= limits["requested_per_distinct_byte"][name] * distinct
