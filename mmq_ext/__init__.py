# SPDX-License-Identifier: Apache-2.0
"""Native quantization kernels and their torch operators.

Importing this package loads the compiled module (which links neither torch nor CUDA) and registers
the operators ``torch.ops.mmq.*``; the typed functions are in :mod:`mmq_ext.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch  # noqa: F401  (first: its OpenMP runtime is the one the kernels fork through)

from mmq_ext import _C, ops

__all__ = [
    "cpu_isa",
    "cpu_isas",
    "cuda_library_path",
    "cuda_status",
    "ops",
    "threading_backend",
    "use_isa",
]


def cpu_isa() -> str:
    """Name of the instruction set whose kernels run: the best supported one, or MMQ_CPU_ISA.

    Raises ValueError if MMQ_CPU_ISA names an unknown or unsupported one.
    """
    return _C.cpu_isa()


def cpu_isas() -> list[str]:
    """Names of the instruction sets with kernels that this machine supports, best first."""
    return _C.cpu_isas()


def threading_backend() -> str:
    """The OpenMP runtime (shared with torch) that the kernels fork through, or "std::thread"."""
    return _C.threading_backend()


def cuda_library_path() -> str:
    """The file that the CUDA kernels are opened from: MMQ_CUDA_LIBRARY, or beside this package."""
    return _C.cuda_library_path()


def cuda_status() -> dict[str, str | int]:
    """What the CUDA library holds and what this machine has; opens the library.

    Keys: path, architectures ("80 86 ... +ptx100"), devices (how many), problem (empty if the
    current device can run the kernels, else what is wrong and what to do), and with a device its
    capability (80 for 8.0). Raises RuntimeError where there is no library, saying how to build it.
    """
    return _C.cuda_status()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of one instruction set inside the block, for tests and benchmarks.

    Raises ValueError for an unknown or unsupported name. Process-wide, not per thread.
    """
    before = _C.select_isa(name)
    try:
        yield
    finally:
        _C.select_isa(before)
