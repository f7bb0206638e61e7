# SPDX-License-Identifier: Apache-2.0
"""Where a model is, and where it may go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mmq_ext
from mmq.errors import MmqError
from mmq.linear import QuantLinear
from mmq_ext.device import ask


def find_device(name: str) -> torch.device:
    """The device called ``name``: cpu, cuda or cuda:N.

    Raises MmqError that says what is missing where the machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MmqError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise MmqError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if torch.version.cuda is None:
        raise MmqError(
            f"device: expected a torch that has CUDA for {name!r}, got {torch.__version__}, which "
            "is built without it"
        )
    count = torch.cuda.device_count()
    if count <= (device.index or 0):
        raise MmqError(f"device: expected {name!r} to exist, got {count} CUDA devices; see doctor")
    return device


def check_cuda(tensor: Tensor) -> None:
    """Refuses the CUDA device of ``tensor`` where the kernels cannot run on it, saying why not."""
    try:
        problem = str(ask(tensor, mmq_ext.cuda_status)["problem"])
    except RuntimeError as error:  # a build without them
        problem = str(error)
    if problem:
        raise MmqError(f"device: expected one that runs the CUDA kernels, got {problem}")


def device_of(model: nn.Module) -> torch.device:
    """The device of all parameters and buffers of ``model``.

    Raises MmqError that names one where there are two.
    """
    first: torch.device | None = None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            raise MmqError(f"{name}: expected the whole model on {first}, got {tensor.device}")
    return torch.device("cpu") if first is None else first


def check_kernels(model: nn.Module, device: torch.device) -> None:
    """Refuses packed layers that the kernels of ``device`` cannot run, naming the first."""
    if device.type != "cuda":
        return
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.compute_dtype == torch.float32:
            raise MmqError(
                f"{path}: expected a packed layer that computes in float16 or bfloat16 on CUDA, "
                "got float32; load with dtype bfloat16"
            )
