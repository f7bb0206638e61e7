# SPDX-License-Identifier: Apache-2.0
"""What a model stores: the tensors of its file, and the account of their bytes.

One function decides what is written, and every reported size is counted on its result, so that a
report equals the file to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmq.linear import QuantLinear


@dataclass(frozen=True)
class Account:
    """Sizes of a model. ``parameters`` counts a packed matrix by its weights, a tied tensor once.

    ``payload_bytes`` is the sum over all stored tensors; ``packed_bytes`` the part of packed
    matrices without their biases, ``packed_weights`` how many weights those are.
    """

    parameters: int
    packed_weights: int
    packed_bytes: int
    payload_bytes: int

    @property
    def packed_bits_per_weight(self) -> float | None:
        """Stored bits per weight of the packed matrices, None without any."""
        return 8 * self.packed_bytes / self.packed_weights if self.packed_weights else None

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits of the whole model per parameter."""
        return 8 * self.payload_bytes / max(self.parameters, 1)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``model``'s file by name, contiguous.

    A tied tensor is stored once, under its first name. A dense float32 tensor whose every value
    float16 (else bfloat16) represents exactly is stored in that type: it is read back as float32
    without any change. Packed tensors keep their types.
    """
    exact = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for name in module.layout.tensors()
    }
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        found[name] = (tensor if name in exact else narrowed(tensor)).contiguous()
    return found


def narrowed(tensor: Tensor) -> Tensor:
    """``tensor``, or the same values in 16 bits where that loses nothing."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            half = tensor.to(dtype)
            if torch.equal(half.to(torch.float32), tensor):
                return half
    return tensor


def payload_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def account(model: nn.Module, tensors: dict[str, Tensor] | None = None) -> Account:
    """Counts ``model``, whose :func:`stored_tensors` may be given if they are at hand."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    weights = sum(module.layout.n * module.layout.k for module in packed)
    dense = sum(parameter.numel() for parameter in model.parameters())
    return Account(
        parameters=dense + weights,
        packed_weights=weights,
        packed_bytes=sum(module.stored_bytes for module in packed),
        payload_bytes=payload_bytes(stored_tensors(model) if tensors is None else tensors),
    )
