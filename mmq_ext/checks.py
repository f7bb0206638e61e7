# SPDX-License-Identifier: Apache-2.0
"""What all operators share: the form of a refusal, the sizes of the format, the registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

_LIBRARY: Final = torch.library.Library("mmq", "DEF")  # type: ignore[no-untyped-call]
# The numbers that the kernels know floating types by.
FLOATS: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# By op, for tests that run the CUDA functions on a simulated device.
CUDA_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {}


def require(ok: bool, op: str, expected: str, got: object) -> None:
    """Raises ValueError "<op>: expected <expected>, got <got>" unless ``ok``."""
    if not ok:
        raise ValueError(f"{op}: expected {expected}, got {got}")


def check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Refuses a tensor whose dtype, rank or sizes (None = any) are not the expected ones."""
    # These checks run at every call of a kernel: one comparison if all is well and no size is None.
    sizes = tensor.shape
    if tensor.dtype == dtype and sizes == shape:
        return
    if tensor.dtype != dtype:
        require(False, op, f"{name} of {dtype}", tensor.dtype)
    if len(sizes) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, sizes, strict=True)
    ):
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        require(False, op, f"{name} of shape {wanted}", list(sizes))


def choice(op: str, name: str, value: str, table: dict[str, int]) -> int:
    """The number that the kernels know ``value`` by; refuses a value outside ``table``."""
    if value not in table:
        require(False, op, f"{name} as one of {', '.join(table)}", repr(value))
    return table[value]


def check_bits(op: str, bits: int) -> None:
    """Refuses a width outside 2..8."""
    if not 2 <= bits <= 8:
        require(False, op, "bits from 2 to 8", bits)


def row_words(cols: int, bits: int) -> int:
    """Number of 32-bit words that ``cols`` codes of width ``bits`` occupy."""
    return -(-cols * bits // 32)


def group_count(k: int, group_size: int) -> int:
    """Number of groups in a row of ``k`` codes; the last one may be shorter."""
    return -(-k // group_size)


def register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op with its CPU implementation and its fake under ``torch.ops.mmq``."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mmq::{name}", fake, lib=_LIBRARY)


def register_cuda(name: str, cuda: Callable[..., Any]) -> None:
    """Registers the CUDA implementation of an op that :func:`register` defined."""
    _LIBRARY.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    CUDA_FUNCTIONS[name] = cuda
