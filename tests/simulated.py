# SPDX-License-Identifier: Apache-2.0
"""The CUDA functions on CPU tensors: through the PTX interpreter, or through a GPU where one is.

`simulated_cuda()` runs the unchanged libmmq_cuda.so on the interpreter; every tensor of a call is
device memory for its time, outputs hold NaN or 0xcd and count as undefined before. Leaving it fails
on findings. `borrowed_gpu()` copies the tensors of each call to a real GPU and back. Under both,
CPU tensors have CUDA's layouts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from simulator import Simulator, available
from torch import Tensor

import mmq_ext
from mmq_ext.checks import CUDA_FUNCTIONS
from mmq_ext.device import CudaDevice, Tensors, use_device

COUNTER_BYTES = 4 * 16384  # kGemmCounters of csrc/cuda/gemm.cu


def missing() -> str:
    """Why "cuda" cannot run here; empty if it can."""
    if not Path(mmq_ext.cuda_library_path()).exists():
        return "CUDA: libmmq_cuda.so is not built (no nvcc)"
    if on_gpu():
        return "" if torch.cuda.is_available() else "CUDA: this machine has no device"
    if not available():
        return "simulated CUDA: the PTX interpreter is not built (cmake -DMMQ_PTXSIM=ON)"
    return ""


def _fill(tensor: Tensor) -> None:
    """Values that a test notices where a kernel writes nothing."""
    tensor.fill_(torch.nan if tensor.is_floating_point() else 0x4D)


class SimulatedCuda(CudaDevice):
    """The interpreter in CUDA's place: CPU tensors are its memory during a call."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    def serves(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def stream(self, tensor: Tensor) -> int:
        return 0

    def current(self, tensor: Tensor) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def entered(self, op: str, inputs: Tensors, outputs: Tensors, kept: Tensors) -> Iterator[None]:
        mine: dict[int, Tensor] = {}
        for tensors, defined in ((inputs, True), (outputs, False)):
            for name, tensor in tensors.items():
                if tensor.numel() == 0 or tensor.data_ptr() in mine:
                    continue
                if not defined:
                    _fill(tensor)
                mine[tensor.data_ptr()] = tensor
                self._simulator.register(tensor, f"{op}.{name}", defined=defined)
        for name, tensor in kept.items():
            # Counters that every call leaves zero, then memory without meaning.
            mine[tensor.data_ptr()] = tensor
            counters = tensor[:COUNTER_BYTES]
            tensor[COUNTER_BYTES:].fill_(0xFF)
            self._simulator.register(tensor, f"{op}.{name}", defined=False)
            self._simulator.mark_defined(counters)
            self._simulator.declare_zero(counters, f"{op}.{name}")
        try:
            yield
        finally:
            for tensor in mine.values():
                self._simulator.unregister(tensor)


class BorrowedGpu(CudaDevice):
    """A real device whose layouts CPU tensors have too; they ask the current one."""

    def serves(self, tensor: Tensor) -> bool:
        return tensor.device.type in ("cpu", "cuda")

    def current(self, tensor: Tensor) -> AbstractContextManager[Any]:
        return super().current(tensor) if tensor.device.type == "cuda" else nullcontext()


@contextmanager
def cpu_functions(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Puts ``functions`` in the place of the operators' CPU implementations."""
    library = torch.library.Library("mmq", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, function in functions.items():
                library.impl(name, function, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


@contextmanager
def simulated_cuda(**settings: object) -> Iterator[Simulator]:
    """The operators on the interpreter, with settings such as ``resident_blocks=2``."""
    with ExitStack() as stack:
        simulator = stack.enter_context(Simulator(**settings))
        stack.enter_context(use_device(SimulatedCuda(simulator)))
        stack.enter_context(cpu_functions(CUDA_FUNCTIONS))
        yield simulator


@contextmanager
def borrowed_gpu() -> Iterator[None]:
    """The operators on the current GPU: arguments go there, results come back."""

    def over(name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.mmq, name).default

        def run(*arguments: Any) -> Any:
            moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
            found = op(*moved)
            return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()

        return run

    with use_device(BorrowedGpu()), cpu_functions({name: over(name) for name in CUDA_FUNCTIONS}):
        yield


def on_gpu() -> bool:
    """Whether "cuda" means a real device: MMQ_TEST_GPU=1, as in `make test-gpu`."""
    return os.environ.get("MMQ_TEST_GPU") == "1"


@contextmanager
def cuda_kernels(**settings: object) -> Iterator[None]:
    """The operators on a real device where the tests were started for one, else simulated with
    ``settings``."""
    with borrowed_gpu() if on_gpu() else simulated_cuda(**settings):
        yield


needs_kernels = pytest.mark.skipif(bool(missing()), reason=missing() or "it runs")
asks_interpreter = pytest.mark.skipif(on_gpu(), reason="asks the interpreter")
