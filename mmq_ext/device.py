# SPDX-License-Identifier: Apache-2.0
"""Which tensors the CUDA kernels serve, and how a CUDA function gets at its tensors and stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmq_ext.checks import require

Tensors = Mapping[str, Tensor]
Answer = TypeVar("Answer")


class CudaDevice:
    """CUDA as torch has it. Tests put a simulated device in its place, see :func:`use_device`."""

    def serves(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` (real or fake) is one of CUDA's, in its layouts."""
        return tensor.is_cuda

    def stream(self, tensor: Tensor) -> int:
        """The current stream of the tensor's device, as a cudaStream_t."""
        return int(torch.cuda.current_stream(tensor.device).cuda_stream)

    def current(self, tensor: Tensor) -> AbstractContextManager[Any]:
        """Makes the tensor's device the current one."""
        return torch.cuda.device(tensor.device)

    def entered(
        self, op: str, inputs: Tensors, outputs: Tensors, kept: Tensors
    ) -> AbstractContextManager[Any]:
        """The same for a call of a kernel. ``outputs`` hold nothing yet, ``kept`` hold what the
        last call left in them."""
        return self.current(next(iter(inputs.values())))


_device = CudaDevice()


def on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels serve ``tensor``: its packed layouts are then theirs."""
    return _device.serves(tensor)


def stream_of(tensor: Tensor) -> int:
    """The stream that a kernel on ``tensor`` runs in."""
    return _device.stream(tensor)


def ask(tensor: Tensor, function: Callable[..., Answer], *numbers: int) -> Answer:
    """``function(*numbers)``, a question to the library whose answer depends on the device."""
    with _device.current(tensor):
        return function(*numbers)


@contextmanager
def use_device(device: CudaDevice) -> Iterator[None]:
    """Lets ``device`` stand for CUDA inside the block, for tests. Process-wide, not per thread."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


def check_one_device(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuses tensors that are not all on the first one's device, naming the tensor."""
    first = ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not first:
            first, device = name, tensor.device
        elif tensor.device != device:
            require(False, op, f"{name} on {device}, where {first} is", tensor.device)


def launch(
    op: str,
    function: Callable[..., None],
    inputs: Mapping[str, Tensor | None],
    outputs: Tensors,
    *numbers: float | bool,
    kept: Tensors | None = None,
) -> None:
    """``function(addresses of inputs, outputs and kept, *numbers, stream)`` on their device.

    Inputs are copied where they are not contiguous, or begin where 16-byte loads cannot.
    """
    kept = {} if kept is None else kept
    check_one_device(op, {**inputs, **outputs, **kept})
    ready = {name: None if tensor is None else _aligned(tensor) for name, tensor in inputs.items()}
    used = {name: tensor for name, tensor in ready.items() if tensor is not None}
    addresses = [
        0 if tensor is None else tensor.data_ptr()
        for tensor in (*ready.values(), *outputs.values(), *kept.values())
    ]
    with _device.entered(op, used, outputs, kept):
        function(*addresses, *numbers, _device.stream(next(iter(used.values()))))


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
