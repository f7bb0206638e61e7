# SPDX-License-Identifier: Apache-2.0
"""One packed weight matrix: the tensors that are stored, on disk and in memory, and their checks.

The layout is the picture in DESIGN.md. For W of shape [n, k] with G = ceil(k / group_size) groups:

  qweight   int32 [n, ceil(k * bits / 32)]   codes, little-endian bit stream along in-features
  scales    fp16 | bf16 | fp32 [n, G]
  qzeros    int32 [n, ceil(G * bits / 32)]   integer zeros only, bit stream along groups
  mins      as scales, [n, G]                float zeros only
  perm      int32 [k]                        perm[j] = in-feature at packed position j
  in_scale  as scales, [k]                   divides the input, original order

One scale for the whole matrix is stored as [1, 1] (and one row of qzeros or mins).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, cast, get_args

import torch
from torch import Tensor

from mmq.errors import MmqError
from mmq.grid import Grid, dequantize
from mmq.spec import BITS, SCALE_DTYPES, QuantSpec, Zero
from mmq_ext import ops

TENSOR_NAMES: Final = ("qweight", "scales", "qzeros", "mins", "perm", "in_scale")
METADATA_NAMES: Final = ("bits", "group_size", "zero", "n", "k", "method", "fallback")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight matrix as codes and group parameters; see the module's picture.

    With d = :meth:`dequantize`, a layer computes y = (x / in_scale) @ d.T, so that the *effective
    weight* is d / in_scale, and d itself where there is no ``in_scale``. ``method`` says what chose
    the codes, ``fallback`` what was done instead of it, if anything.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    mins: Tensor | None
    perm: Tensor | None
    in_scale: Tensor | None
    n: int
    k: int
    bits: int
    group_size: int
    zero: Zero
    method: str
    fallback: str = ""

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        grid: Grid,
        spec: QuantSpec,
        perm: Tensor | None = None,
        in_scale: Tensor | None = None,
        *,
        method: str,
        fallback: str = "",
    ) -> PackedWeight:
        """Packs ``codes`` uint8 [n, k], which lie on ``grid``, in packed (permuted) order.

        ``perm`` [k] is stored unless it is the identity. ``in_scale`` [k] is rounded to the scale
        type: a caller that chose codes with it must have rounded it before.

        Raises MmqError when the parts do not fit each other, or a scale does not fit its type.
        """
        n, k = codes.shape
        dtype = spec.torch_scale_dtype
        if perm is not None:
            perm = perm.to(torch.int32)
            if torch.equal(perm, torch.arange(k, dtype=torch.int32, device=perm.device)):
                perm = None
        packed = cls(
            qweight=ops.pack(codes, spec.bits),
            scales=grid.scales.to(dtype),
            qzeros=ops.pack(grid.zeros.to(torch.uint8), spec.bits)
            if spec.zero == "integer"
            else None,
            mins=grid.zeros.to(dtype) if spec.zero == "float" else None,
            perm=perm,
            in_scale=None if in_scale is None else in_scale.to(dtype),
            n=n,
            k=k,
            bits=spec.bits,
            group_size=spec.group_size,
            zero=spec.zero,
            method=method,
            fallback=fallback,
        )
        packed.validate()
        return packed

    @classmethod
    def from_tensors(
        cls, metadata: Mapping[str, object], tensors: Mapping[str, Tensor], name: str = "weight"
    ) -> PackedWeight:
        """The inverse of :meth:`metadata` and :meth:`tensors`, strictly checked.

        Raises MmqError that names ``name`` and the field or tensor, what was expected, what came.
        """
        for field in METADATA_NAMES:
            if field not in metadata:
                raise MmqError(f"{name}: expected metadata field {field}, got {sorted(metadata)}")
        for field in ("bits", "group_size", "n", "k"):
            value = metadata[field]
            if not isinstance(value, int) or isinstance(value, bool):
                raise MmqError(f"{name}: expected an integer {field}, got {value!r}")
        for tensor in ("qweight", "scales"):
            if tensor not in tensors:
                raise MmqError(f"{name}: expected a tensor {tensor}, got {sorted(tensors)}")
        unknown = sorted(set(tensors) - set(TENSOR_NAMES))
        if unknown:
            raise MmqError(f"{name}: expected tensors of {TENSOR_NAMES}, got {unknown} too")
        packed = cls(
            qweight=tensors["qweight"],
            scales=tensors["scales"],
            qzeros=tensors.get("qzeros"),
            mins=tensors.get("mins"),
            perm=tensors.get("perm"),
            in_scale=tensors.get("in_scale"),
            n=cast(int, metadata["n"]),
            k=cast(int, metadata["k"]),
            bits=cast(int, metadata["bits"]),
            group_size=cast(int, metadata["group_size"]),
            zero=cast(Zero, metadata["zero"]),
            method=str(metadata["method"]),
            fallback=str(metadata["fallback"]),
        )
        packed.validate(name)
        return packed

    def metadata(self) -> dict[str, int | str]:
        """What the tensors do not say; JSON-ready. The file's format version is the file's."""
        return {name: getattr(self, name) for name in METADATA_NAMES}

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name; absent ones are left out."""
        found = {name: getattr(self, name) for name in TENSOR_NAMES}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def row_group_size(self) -> int:
        """The group size with -1 resolved to k: what the kernels take."""
        return self.k if self.group_size == -1 else self.group_size

    @property
    def groups(self) -> int:
        """Groups per row, G."""
        return 1 if self.group_size == -1 else -(-self.k // self.group_size)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole matrix of several rows."""
        return self.n != 1 and tuple(self.scales.shape) == (1, 1) and self.group_size == -1

    @property
    def nbytes(self) -> int:
        """Stored bytes of all tensors, without the bias."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / (n * k): the codes with their padding, scales, zeros, perm and in_scale."""
        return 8 * self.nbytes / (self.n * self.k)

    def codes(self) -> Tensor:
        """The codes in packed order, uint8 [n, k]."""
        return ops.unpack(self.qweight, self.bits, self.k)

    def grid(self) -> Grid:
        """The group parameters in float32: [n, G], or [1, 1] for one scale per matrix."""
        scales = self.scales.float()
        if self.mins is not None:
            zeros = self.mins.float()
        elif self.qzeros is not None:
            zeros = ops.unpack(self.qzeros, self.bits, self.groups).float()
        else:
            zeros = torch.full_like(scales, float(1 << (self.bits - 1)))
        return Grid(scales, zeros, self.bits, self.group_size, self.zero == "float")

    def dequantize(self) -> Tensor:
        """The matrix that the (divided) input is multiplied with: float32 [n, k], original order.

        ``in_scale`` is not divided in; see the class and :meth:`effective_weight`.
        """
        values = dequantize(self.codes(), self.grid())
        if self.perm is None:
            return values
        original = torch.empty_like(values)
        original[:, self.perm.long()] = values
        return original

    def effective_weight(self) -> Tensor:
        """The matrix W_hat with y = x @ W_hat.T for the undivided x: float32 [n, k]."""
        values = self.dequantize()
        return values if self.in_scale is None else values / self.in_scale.float()

    def validate(self, name: str = "weight") -> None:
        """Checks every rule of the layout.

        Raises MmqError, one line, that names ``name`` and the tensor, what was expected and what
        came: dtypes, shapes, set bits beyond the last code, scales that are not finite and
        positive, a perm that is no permutation, zeros of the wrong kind.
        """
        if self.bits not in BITS:
            raise MmqError(f"{name}: expected bits of {BITS}, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise MmqError(f"{name}: expected a positive group size or -1, got {self.group_size}")
        if self.zero not in get_args(Zero):
            raise MmqError(f"{name}: expected zero of {get_args(Zero)}, got {self.zero!r}")
        if self.n < 1 or self.k < 1:
            raise MmqError(f"{name}: expected n, k >= 1, got [{self.n}, {self.k}]")
        self._validate_zero_kind(name)
        self._validate_scales(name)
        rows, groups = self.scales.shape
        _check_stream(f"{name}.qweight", self.qweight, self.n, self.k, self.bits)
        if self.qzeros is not None:
            _check_stream(f"{name}.qzeros", self.qzeros, rows, groups, self.bits)
        if self.perm is not None:
            _check_shape(f"{name}.perm", self.perm, torch.int32, (self.k,))
            expected = torch.arange(self.k, dtype=torch.int32, device=self.perm.device)
            if not torch.equal(self.perm.sort().values, expected):
                raise MmqError(f"{name}.perm: expected a permutation of 0..{self.k - 1}")

    def _validate_zero_kind(self, name: str) -> None:
        wanted = {"integer": "qzeros", "float": "mins"}.get(self.zero)
        for tensor in ("qzeros", "mins"):
            present = getattr(self, tensor) is not None
            if present != (tensor == wanted):
                raise MmqError(
                    f"{name}.{tensor}: expected {'one' if tensor == wanted else 'none'} with "
                    f"{self.zero} zeros, got {'one' if present else 'none'}"
                )

    def _validate_scales(self, name: str) -> None:
        dtype = self.scales.dtype
        if dtype not in SCALE_DTYPES.values():
            raise MmqError(f"{name}.scales: expected {', '.join(SCALE_DTYPES)}, got {dtype}")
        shape = (self.n, self.groups)
        if self.group_size == -1 and tuple(self.scales.shape) == (1, 1):
            shape = (1, 1)
        _check_shape(f"{name}.scales", self.scales, dtype, shape)
        _check_positive(f"{name}.scales", self.scales)
        if self.mins is not None:
            _check_shape(f"{name}.mins", self.mins, dtype, shape)
            if not bool(torch.isfinite(self.mins).all()):
                raise MmqError(f"{name}.mins: expected finite minima, got NaN or infinity")
        if self.in_scale is not None:
            _check_shape(f"{name}.in_scale", self.in_scale, dtype, (self.k,))
            _check_positive(f"{name}.in_scale", self.in_scale)


def _check_shape(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise MmqError(
            f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _check_positive(name: str, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    low, high = map(float, torch.aminmax(tensor))  # NaN where there is one: one pass finds all.
    if not (low > 0 and high < math.inf):
        good = torch.isfinite(tensor) & (tensor > 0)
        index = (~good).nonzero()[0].tolist()
        raise MmqError(
            f"{name}: expected finite positive numbers, got {float(tensor[tuple(index)])} at "
            f"{index}"
        )


def _check_stream(name: str, words: Tensor, rows: int, cols: int, bits: int) -> None:
    """A bit stream: int32 [rows, ceil(cols * bits / 32)], zero bits after the last code."""
    count = ops.row_words(cols, bits)
    _check_shape(name, words, torch.int32, (rows, count))
    used = cols * bits - 32 * (count - 1)
    if count and used < 32:
        last = words[:, -1].long() & 0xFFFFFFFF
        bad = (last >> used).nonzero()
        if bad.numel():
            raise MmqError(
                f"{name}: expected zero bits after code {cols - 1} of each row, got set ones in "
                f"row {int(bad[0])}"
            )
