# SPDX-License-Identifier: Apache-2.0
"""Which calls torch's dispatcher has to see; the others may go straight to the CPU's function."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.autograd import profiler

_MEMORY: Final = (Tensor, torch.nn.Parameter)

# torch has no public way to ask who is listening. A release that lacks one of these names costs
# speed, not function: then every call goes through the dispatcher.
try:
    from torch._C import (
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import peek_interpreter_stack

    _CAN_ASK = hasattr(profiler, "_is_profiler_enabled")
except ImportError:
    _CAN_ASK = False


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether torch has to see a call on these tensors, before or instead of the CPU's function.

    So it is under a trace, a mode, a transform, autograd or the profiler, and with tensors that are
    not just memory of the CPU. Otherwise an op may call its function itself: the way through the
    dispatcher takes 4 microseconds, which a product of one row over a small matrix notices.
    """
    if (
        torch.compiler.is_compiling()
        or not _CAN_ASK
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    ):
        return True
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _MEMORY or not tensor.is_cpu or (grad and tensor.requires_grad)
        ):
            return True
    return False
