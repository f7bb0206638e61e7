# SPDX-License-Identifier: Apache-2.0
"""packed_gemm's CUDA kernels on the interpreter: tiles, residency, mma rounding, and their counts.

tests/test_packed_gemm.py runs its shapes over these kernels too; here are the sizes at which they
change their path, in pairs of all parameters, and what only the interpreter can tell.
"""

import functools
import itertools
import random
from typing import Any

import pytest
import torch
from budgets import budget, factor
from compare import assert_within
from places import Place
from shapes import BITS, Problem, problem
from simulated import asks_interpreter, cuda_kernels, needs_kernels, simulated_cuda

pytestmark = needs_kernels

HALVES = (torch.float16, torch.bfloat16)
# Each on both sides of a limit: 8 rows of the small path, tiles of 16 and 64 rows; a lane's 8
# features, a strip of 64, a tile of 256; steps of 16 columns, tiles of 128, partial last groups.
CHOICES: dict[str, tuple[Any, ...]] = {
    "m": (1, 2, 7, 8, 9, 16, 17, 64, 65),
    "bits": tuple(BITS),
    "group_size": (16, 32, 48, 64, 128, -1),
    "k": (16, 200, 1000, 1408),
    "n": (2, 8, 300),
    "kind": ("symmetric", "integer", "float"),
    "extra": ("none", "bias", "perm", "in_scale", "all"),
    "dtype": HALVES,
}


def pairwise(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which every two values of different parameters meet: the best of some random rows,
    until nothing is left. Seeded, so always the same."""
    names, chance = list(choices), random.Random(0)
    left = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(choices[a]))
        for y in range(len(choices[b]))
    }

    def pairs(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    rows = []
    while left:
        a, x, b, y = min(left)  # at least this pair
        candidates = [
            {n: chance.randrange(len(choices[n])) for n in names} | {a: x, b: y} for _ in range(60)
        ]
        best = max(candidates, key=lambda row: len(pairs(row) & left))
        left -= pairs(best)
        rows.append({name: choices[name][i] for name, i in best.items()})
    return rows


ROWS = pairwise(CHOICES)


def made(row: dict[str, Any], seed: int) -> Problem:
    group = row["k"] if row["group_size"] == -1 else row["group_size"]
    wanted = {name: row["extra"] in (name, "all") for name in ("bias", "perm", "in_scale")}
    return problem(
        *(row["m"], row["n"], row["k"], group, row["bits"]),
        seed=seed,
        symmetric=row["kind"] == "symmetric",
        float_zero=row["kind"] == "float",
        **wanted,
    ).as_cuda(row["dtype"])


def test_the_rows_hold_every_pair():
    for a, b in itertools.combinations(CHOICES, 2):
        met = {(row[a], row[b]) for row in ROWS}
        assert met == set(itertools.product(CHOICES[a], CHOICES[b]))


@pytest.mark.parametrize("seed", range(len(ROWS)))
def test_pairs_of_all_parameters(seed):
    """On 4 multiprocessors, so that blocks share columns; tensor cores round in turn to nearest and
    towards zero."""
    p = made(ROWS[seed], seed)
    with cuda_kernels(sm_count=4, mma_truncate=seed % 2 == 1):
        y = p.run("exact")
    assert y.dtype == p.x.dtype
    assert_within(y, p.reference("exact"), p.cuda_bound(), str(ROWS[seed]))


@functools.cache
def shared_column_problem(m: int) -> Problem:
    """17 tiles of 128 columns (the last one partial), two columns of 256 features."""
    return problem(m, 300, 2112, 64, 4, seed=m, bias=True).as_cuda()


@pytest.mark.parametrize("m", [5, 16, 70])
@pytest.mark.parametrize("sm_count", [1, 3, 16])
def test_any_order_of_execution(m, sm_count):
    """The partition decides the order of additions, and nothing else does."""
    p = shared_column_problem(m)
    results = []
    for settings in ({}, {"resident_blocks": 1, "slice": 50}, {"resident_blocks": 5, "slice": 7}):
        with cuda_kernels(sm_count=sm_count, **settings):
            results.append(p.run("exact"))
    assert_within(results[0], p.reference("exact"), p.cuda_bound())
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("m", [5, 16, 70])
def test_rounding_of_the_tensor_cores_is_within_the_bound(m):
    p = shared_column_problem(m)
    results = []
    for truncate in (False, True):
        with cuda_kernels(sm_count=3, mma_truncate=truncate):
            results.append(p.run("exact"))
        assert_within(results[-1], p.reference("exact"), p.cuda_bound())


@asks_interpreter
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_shared_memory_of_every_architecture(capability):
    """Every width's stages fit: on 8.6, 8.9 and 12.0 a block has 99 KiB."""
    for bits, m in itertools.product(BITS, (8, 64)):
        p = problem(m, 64, 2048 if m == 8 else 128, 128, bits).as_cuda()
        with simulated_cuda(capability=capability):
            y = p.run("exact")
        assert_within(y, p.reference("exact"), p.cuda_bound(), f"{bits} bits")


@pytest.mark.parametrize("m", [1, 16, 64])
def test_one_wrong_code_is_noticed(m):
    """The bound can fail: one code of 600,000 changed by one step, in the last column."""
    p = shared_column_problem(m)
    wrong = problem(m, 300, 2112, 64, 4, seed=m, bias=True).as_cuda()
    wrong.codes[299, -1] ^= 8
    with cuda_kernels(sm_count=3):
        y = wrong.run("exact")
    with pytest.raises(AssertionError, match="elements are out of bounds"):
        assert_within(y, p.reference("exact"), p.cuda_bound())
    assert_within(y[:, :299], p.reference("exact")[:, :299], p.cuda_bound()[:, :299])


# --- counts -----------------------------------------------------------------------------------

# The statements that read weights, and the usual scales.
WEIGHTS = Place("ptx.cuh", "cp.async.cg.shared.global.L2::cache_hint")
GEMV_WEIGHTS = Place("ptx.cuh", "ld.global.nc.L1::no_allocate")
SCALES = Place("gemm_block.cuh", "packed_(__ldg(")


def launch_of(m: int, k: int, bits: int, dtype: torch.dtype, zeros: bool) -> dict[str, Any]:
    """The GEMM's launch: one column of 256 features on one multiprocessor, groups of 128."""
    p = problem(m, 256, k, 128, bits, symmetric=not zeros).as_cuda(dtype)
    with simulated_cuda(sm_count=1) as simulator:
        p.run("exact")
        launch = simulator.launches()[-1]  # behind the sums of activations, where there are zeros
    assert "packed_gem" in launch["kernel"]
    return launch


def mma_count(launch: dict[str, Any]) -> int:
    return sum(n for name, n in launch["by_opcode"].items() if name.startswith("mma"))


def steady(launches: list[dict[str, Any]], count: str) -> float:
    """By mma, in the difference of two lengths: without prologue and epilogue."""
    short, long = launches
    return (long["total"][count] - short["total"][count]) / (mma_count(long) - mma_count(short))


@asks_interpreter
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 16, 64])
def test_counts(m, bits, dtype, zeros):
    limits = budget("packed_gemm")
    launches = [launch_of(m, k, bits, dtype, zeros) for k in (1024, 2048)]
    total = launches[1]["total"]
    assert factor(total, "shared_wavefronts", "shared_ideal") <= limits["bank_conflict_factor"]
    assert factor(total, "store_sectors", "store_sectors_ideal") <= limits["store_sector_factor"]

    path = "gemv" if m == 1 else str(m)
    kind = "instructions_per_mma" + "_bfloat16" * (dtype == torch.bfloat16) + "_zeros" * zeros
    width = limits[str(bits)]
    assert steady(launches, "instructions") <= width[kind][path]
    assert steady(launches, "shared_wavefronts") <= width["shared_wavefronts_per_mma"][path]

    reads = {read["name"].split(".")[-1]: read for read in launches[1]["reads"]}
    weights = (GEMV_WEIGHTS if m == 1 else WEIGHTS).counts(launches[1])
    assert weights["read_bytes_requested"] == weights["read_bytes_distinct"]
    assert weights["read_bytes_distinct"] == reads["tiles"]["distinct"] == reads["tiles"]["bytes"]
    assert reads["tiles"]["requested"] == reads["tiles"]["bytes"]  # and at no other line
    assert total["written_bytes_requested"] == total["written_bytes_distinct"]
    requested, distinct = (total[f"read_bytes_{n}"] for n in ("requested", "distinct"))
    times = limits["requested_per_distinct_byte"]["zeros" if zeros else "scales"]
    assert requested <= times * distinct
    if not zeros:
        scales = SCALES.counts(launches[1])
        found = factor(scales, "read_bytes_requested", "read_bytes_distinct")
        assert found <= limits["requested_per_distinct_byte_at_scales"]
    if m == 1 and not zeros:  # beside zeros, scales are read tile by tile, in 8 bytes
        assert total["load_requests_16_bytes"] == total["load_requests"]


@asks_interpreter
def test_four_bits_meet_the_targets():
    """The targets that the budgets of the other widths were derived from."""
    targets = ((16, 11.9, 2.27), (64, 4.21, 1.0))
    for dtype, (m, instructions, wavefronts) in itertools.product(HALVES, targets):
        launches = [launch_of(m, k, 4, dtype, False) for k in (1024, 2048)]
        assert steady(launches, "instructions") <= instructions
        assert steady(launches, "shared_wavefronts") <= wavefronts
