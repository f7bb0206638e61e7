# SPDX-License-Identifier: Apache-2.0
"""Results that runs share: outputs of a tower on the same images, inputs that a processor made.

A module's output is remembered under a name of its weights and a digest of everything it was called
with, so that what comes back is bit by bit what would have been computed. Runs that share a vision
setting compute the vision tower once; runs that share the connector, too, compute both once.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

Value = TypeVar("Value")

MEMO_BYTES: Final = 512 << 20
_PLAIN: Final = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class Bounded(Generic[Value]):
    """Values by key, those used least recently dropped beyond ``capacity`` bytes."""

    def __init__(self, capacity: int = MEMO_BYTES) -> None:
        self._capacity, self._held = capacity, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: Hashable) -> Value | None:
        """The value, None where there is none (any more)."""
        found = self._values.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keeps ``value`` of ``size`` bytes, unless that is more than may be kept in all."""
        if size > self._capacity or key in self._values:
            return
        self._values[key] = (value, size)
        self._held += size
        while self._held > self._capacity:
            _, (_, dropped) = self._values.popitem(last=False)
            self._held -= dropped


@contextmanager
def remembering(module: nn.Module, name: str, memo: Bounded[Any]) -> Iterator[None]:
    """Inside, calls of ``module`` without gradients are looked up in ``memo`` first.

    ``name`` must be different for different weights, and for every module that shares ``memo``.
    Calls with an argument that has no digest are not remembered. What comes back is shared: no one
    may change it in place.
    """
    forward = module.forward

    @functools.wraps(forward)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        digest = None if torch.is_grad_enabled() else digest_of((args, kwargs))
        if digest is None:
            return forward(*args, **kwargs)
        key = (name, digest)
        found = memo.get(key)
        if found is None:
            found = forward(*args, **kwargs)
            memo.put(key, found, size_of(found))
        return found

    module.forward = remembered
    try:
        yield
    finally:
        del module.forward


class RememberingProcessor:
    """A processor that makes the inputs of the same images and texts once."""

    def __init__(self, processor: Any, memo: Bounded[Any]) -> None:
        self._processor, self._memo = processor, memo

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._processor, name)
        return RememberingProcessor(value, self._memo) if name == "image_processor" else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        digest = digest_of((args, kwargs))
        if digest is None:
            return self._processor(*args, **kwargs)
        key = (id(self._processor), digest)
        found = self._memo.get(key)
        if found is None:
            found = self._processor(*args, **kwargs)
            self._memo.put(key, found, size_of(found))
        return found


def digest_of(value: Any) -> bytes | None:
    """A digest of nested tensors, images and plain values; None if it holds anything else."""
    state = hashlib.blake2b(digest_size=20)
    return state.digest() if _feed(state, value) else None


def size_of(value: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0


def _feed(state: Any, value: Any) -> bool:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(f"tensor {value.dtype} {tuple(value.shape)} {value.device};".encode())
        state.update(flat.view(torch.uint8).numpy().data)
        return True
    if isinstance(value, Image.Image):
        state.update(f"image {value.mode} {value.size};".encode())
        state.update(value.tobytes())
        return True
    if isinstance(value, (list, tuple)):
        state.update(f"sequence {len(value)};".encode())
        return all(_feed(state, item) for item in value)
    if isinstance(value, dict):
        state.update(f"mapping {len(value)};".encode())
        return all(_feed(state, pair) for pair in sorted(value.items()))
    if isinstance(value, _PLAIN):
        state.update(f"{type(value).__name__} {value!r};".encode())
        return True
    return False
