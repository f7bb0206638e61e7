# SPDX-License-Identifier: Apache-2.0
"""Which cells the packed_gemm table has, and how much faster than the best peer each is to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

# (k, n) of the linears of LLaVA-1.5-7B's language model, BLIP-2's ViT-g and Q-Former, OPT-2.7B.
SHAPES = (
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (1408, 4224),
    (1408, 1408),
    (1408, 6144),
    (6144, 1408),
    (768, 3072),
    (2560, 10240),
    (10240, 2560),
)
ROWS = (1, 8, 64, 512)
BITS = (4, 2, 3, 5, 6, 7, 8)
# One large and one awkward shape, for what is not asked of all of them.
TYPICAL = ((4096, 4096), (1408, 6144))

# Times as fast as the best peer, by the most rows of activations.
Goals = tuple[tuple[int, float], ...]
MANY = 1 << 30
INT8_4_BITS: Goals = ((1, 1.1), (8, 1.3), (64, 1.4), (MANY, 1.5))
INT8_OTHERS: Goals = ((1, 1.1), (8, 1.2), (64, 1.2), (MANY, 1.3))
EXACT: Goals = ((1, 1.1), (8, 1.1), (64, 1.1), (MANY, 0.95))


class Cell(NamedTuple):
    """x [m, k] times packed W [n, k] of `bits` with groups of `group_size`, -1 for whole rows."""

    k: int
    n: int
    m: int
    bits: int
    group_size: int


def goal(mode: str, bits: int, m: int) -> float:
    """The ratio to the best peer that a cell is to reach."""
    goals = EXACT if mode == "exact" else INT8_4_BITS if bits == 4 else INT8_OTHERS
    return next(value for most, value in goals if m <= most)


def row_class(m: int) -> str:
    """The column of the summary that M belongs to."""
    return "1" if m == 1 else "2..8" if m <= 8 else "9..64" if m <= 64 else "over 64"


def grid(
    shapes: Iterable[tuple[int, int]] | None = None,
    rows: Iterable[int] | None = None,
    bits: Iterable[int] | None = None,
    group_sizes: Iterable[int] | None = None,
) -> list[Cell]:
    """All combinations; what is not given is two shapes, four Ms, 4 bits, groups of 128."""
    axes = (shapes or TYPICAL, rows or ROWS, bits or (4,), group_sizes or (128,))
    return [Cell(k, n, m, b, g) for (k, n), m, b, g in itertools.product(*axes)]


def standard() -> list[Cell]:
    """Every shape at every width, and at 4 bits in every group size; more Ms at two shapes."""
    cells = grid(SHAPES, bits=BITS)
    cells += grid(SHAPES, group_sizes=(32, 64, -1))
    cells += grid(rows=(32, 257, 577))
    return cells


def turns(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells of one shape and M together: they are timed in the same rounds."""
    found: dict[tuple[int, int, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.k, cell.n, cell.m), []).append(cell)
    return list(found.values())
