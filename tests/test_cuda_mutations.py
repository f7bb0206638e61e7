# SPDX-License-Identifier: Apache-2.0
"""Seeded bugs in the CUDA kernels: the interpreter reports each, at the line of the mutation.

The libraries are those of cmake/cuda_mutations.cmake (target mmq_cuda_mutations). A mutated
launcher takes the place of the compiled module's for one call; everything else is as shipped.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import pytest
from budgets import factor
from compare import assert_within
from places import Place
from shapes import Problem, problem
from simulated import missing, simulated_cuda
from test_gptq_block import problem as gptq_problem
from torch import Tensor

from mmq_ext import _C, cuda_ops, ops

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("MMQ_CUDA_MUTATIONS", ROOT / "build/dev/mutations"))

pytestmark = pytest.mark.skipif(
    (bool(missing()) or not FOLDER.exists())
    and "mutations" not in os.environ.get("MMQ_REQUIRE", ""),
    reason=missing() or "no mutated libraries (ninja mmq_cuda_mutations)",
)


def _fields(kind: type[ctypes._SimpleCData], names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class PackedGemmArgs(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "x tiles affine bias perm in_scale y workspace"),
        *_fields(ctypes.c_int64, "m n k group_size"),
        *_fields(ctypes.c_int, "bits activation affine_kind scale_type"),
    )


class GptqBlockArgs(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "w u scales zeros group_of codes errors"),
        *_fields(ctypes.c_int64, "n cols groups"),
        ("bits", ctypes.c_int),
        ("float_zero", ctypes.c_bool),
        ("min_code", ctypes.c_int),
    )


ARGUMENTS = {"packed_gemm": PackedGemmArgs, "gptq_block": GptqBlockArgs}


def mutate(monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> None:
    """Lets the mutated library's launcher serve ``op``."""
    library = ctypes.CDLL(str(FOLDER / f"libmmq_cuda_{name}.so"), mode=os.RTLD_LAZY)
    function = getattr(library, f"mmq_cuda_{op}")

    def launch(*numbers: float) -> None:
        *values, stream = numbers
        status = function(ctypes.byref(ARGUMENTS[op](*values)), ctypes.c_void_p(stream))
        assert status == 0, f"{op} of {name}: status {status}"

    monkeypatch.setattr(_C, f"cuda_{op}", launch)


LOAD = Place("ptx.cuh", "ldmatrix.sync.aligned")
# Where the missing thing is noticed: a skipped wait or barrier has no line of its own, its reader
# has; the accumulator's garbage where it would leave the block.
REPORTED = {
    "divergent_barrier": (
        "deadlock",
        Place("gptq_block.cu", "__syncthreads();", "MUTATE_DIVERGENT_BARRIER"),
    ),
    "no_cp_async_wait": ("in-flight", LOAD),
    "no_barrier": ("race", LOAD),
    "no_row_guard": (
        "out-of-bounds",
        Place("gemm_mma.cuh", "cp_async_zfill(", "MUTATE_NO_ROW_GUARD"),
    ),
    "uninitialised_accumulator": (
        "uninitialised",
        Place("gemm_reduce.cuh", "= {sum[0], sum[1], sum[2], sum[3]};"),
    ),
}


@pytest.fixture(autouse=True)
def fresh_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation may leave its locks closed; the next call must not meet them."""
    monkeypatch.setattr(cuda_ops, "_workspaces", {})


def gemm_problem() -> Problem:
    """Split over blocks along k (locks), 13 rows of 16 (the guard), a partial strip of n."""
    return problem(13, 300, 1024, 128, 4, symmetric=True).as_cuda()


def run(op: str) -> Tensor | None:
    """One call of the operator; a launch that never ends is an error of the launcher."""
    if op == "packed_gemm":
        return gemm_problem().run("exact")
    with pytest.raises(AssertionError, match="status 702"):
        ops.gptq_block(*gptq_problem(9, 64))
    return None


def ldmatrix_factor(launch: dict[str, Any]) -> float:
    """Shared wavefronts against the ideal, at the lines of ldmatrix alone."""
    return factor(LOAD.counts(launch), "shared_wavefronts", "shared_ideal")


def test_without_a_mutation():
    p = gemm_problem()
    with simulated_cuda(sm_count=8) as simulator:
        y = p.run("exact")
        assert ldmatrix_factor(simulator.launches()[-1]) == 1
    assert_within(y, p.reference("exact"), p.cuda_bound())


@pytest.mark.parametrize("name", REPORTED)
def test_reported_with_its_line(monkeypatch, name):
    kind, place = REPORTED[name]
    op = "gptq_block" if name == "divergent_barrier" else "packed_gemm"
    mutate(monkeypatch, name, op)
    with simulated_cuda(sm_count=8) as simulator:
        run(op)
        found = simulator.findings()
        simulator.clear()
    named = [finding for finding in found if finding.kind == kind and place.is_named(finding)]
    assert named, f"expected {kind} at {place}, got " + "; ".join(map(str, found))
    if name == "no_row_guard":
        assert re.search(r"\d+ bytes past the end of packed_gemm\.x", named[0].message)


def test_no_swizzle_costs_wavefronts(monkeypatch):
    """The rows of an 8 x 8 matrix all begin in the same banks: 8 wavefronts where 1 does."""
    mutate(monkeypatch, "no_swizzle", "packed_gemm")
    p = gemm_problem()
    with simulated_cuda(sm_count=8) as simulator:
        y = p.run("exact")
        assert ldmatrix_factor(simulator.launches()[-1]) == 8
    assert_within(y, p.reference("exact"), p.cuda_bound())


def test_lock_not_reset_is_a_leftover(monkeypatch):
    mutate(monkeypatch, "lock_not_reset", "packed_gemm")
    with simulated_cuda(sm_count=8) as simulator:
        run("packed_gemm")
        (finding,) = simulator.take("leftover")
    assert "packed_gemm.workspace" in finding.message
    assert "packed_gemm_mma" in finding.kernel


@pytest.mark.parametrize("name", ["swapped_operands", "wrong_zero"])
def test_wrong_result(monkeypatch, name):
    """No check can see these; the comparison with the reference does, and nothing else."""
    mutate(monkeypatch, name, "packed_gemm")
    p = gemm_problem()
    with simulated_cuda(sm_count=8):
        y = p.run("exact")
    with pytest.raises(AssertionError, match="elements are out of bounds"):
        assert_within(y, p.reference("exact"), p.cuda_bound())
