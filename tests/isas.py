# SPDX-License-Identifier: Apache-2.0
"""The implementations that tests run over: every instruction set the library knows, and CUDA.

One that this machine lacks is skipped by name; MMQ_REQUIRE=avx2,cuda turns that into a failure.
CUDA means the kernels on the PTX interpreter, or a real device in `make test-gpu`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import mmq_ext

KNOWN = ("avx512bf16", "avx512", "avx2", "scalar")
BFLOAT16 = KNOWN[:1]  # those that multiply bfloat16 activations as they are
CPU = "cpu"  # ops that have one implementation for all instruction sets
CUDA = "cuda"


def _why_not(name: str) -> str:
    """Why ``name`` cannot run here; empty if it can."""
    if name == CPU:
        return ""
    if name != CUDA:
        return "" if name in mmq_ext.cpu_isas() else f"this machine has no {name}"
    from simulated import missing

    return missing()


def param(name: str, *more: object) -> object:
    """(name, *more) as a test's parameter, skipped where the implementation is absent."""
    required = os.environ.get("MMQ_REQUIRE", "").split(",")
    why = _why_not(name)
    marks = pytest.mark.skip(reason=why) if why and name not in required else ()
    return pytest.param(name, *more, marks=marks)


@contextmanager
def running(name: str) -> Iterator[None]:
    """Runs the operators' implementation ``name`` inside the block."""
    if name == CPU:
        yield
        return
    if name != CUDA:
        with mmq_ext.use_isa(name):
            yield
        return
    from simulated import cuda_kernels

    with cuda_kernels():
        yield


cpu_isa = pytest.mark.parametrize("isa", [param(name) for name in KNOWN])
every_isa = pytest.mark.parametrize("isa", [param(name) for name in (*KNOWN, CUDA)])
every_device = pytest.mark.parametrize("device", [param(name) for name in (CPU, CUDA)])
needs_cuda = pytest.mark.parametrize("isa", [param(CUDA)])
