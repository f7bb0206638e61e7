# SPDX-License-Identifier: Apache-2.0
"""The packed linear layer: codes in the kernels' order in memory, canonical tensors in its state.

A layer is in one of two states. *Canonical*: the buffers are the tensors of ``mmq.packed``, which
is what a state dict shows and what a loader fills. *Ready*: ``qweight`` is replaced by ``tiles``,
the order that the kernels of the device read, with ``affine`` beside it (scale and zero or minimum
of every group, likewise); the small canonical tensors stay. ``prepare`` and ``restore`` go back and
forth, bitwise. Only a ready layer runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from mmq.errors import MmqError
from mmq.packed import TENSOR_NAMES, PackedWeight
from mmq.rtn import rtn
from mmq.spec import BITS, SCALE_DTYPES, QuantSpec, ScaleDtype, Zero
from mmq_ext import ops

Mode = Literal["exact", "int8"]

_SCALE_LIKE: Final = ("scales", "mins", "in_scale", "affine")
_INPUT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """What a packed layer's tensors are, without the tensors: one row of a file's module table.

    ``per_tensor`` means one scale for the whole matrix, stored as [1, 1]. ``perm``, ``in_scale``
    and ``bias`` say which optional tensors exist. The other fields are those of PackedWeight.
    """

    bits: int
    group_size: int
    zero: Zero
    n: int
    k: int
    method: str
    fallback: str
    scale_dtype: ScaleDtype
    per_tensor: bool
    perm: bool
    in_scale: bool
    bias: bool

    @classmethod
    def of(cls, packed: PackedWeight, bias: bool) -> Layout:
        """The layout of ``packed`` with or without a bias."""
        names: dict[torch.dtype, ScaleDtype] = {
            SCALE_DTYPES[name]: name for name in get_args(ScaleDtype)
        }
        return cls(
            bits=packed.bits,
            group_size=packed.group_size,
            zero=packed.zero,
            n=packed.n,
            k=packed.k,
            method=packed.method,
            fallback=packed.fallback,
            scale_dtype=names[packed.scales.dtype],
            per_tensor=packed.per_tensor,
            perm=packed.perm is not None,
            in_scale=packed.in_scale is not None,
            bias=bias,
        )

    @classmethod
    def planned(
        cls, spec: QuantSpec, n: int, k: int, *, perm: bool = False, in_scale: bool = False
    ) -> Layout:
        """The layout that an [n, k] matrix on the grid ``spec`` will have, without a bias."""
        return cls(
            bits=spec.bits,
            group_size=spec.group_size,
            zero=spec.zero,
            n=n,
            k=k,
            method="",
            fallback="",
            scale_dtype=spec.scale_dtype,
            per_tensor=spec.per_tensor,
            perm=perm,
            in_scale=in_scale,
            bias=False,
        )

    @classmethod
    def from_dict(cls, name: str, data: object) -> Layout:
        """The inverse of :meth:`to_dict`.

        Raises MmqError that names ``name`` for a missing or unknown key or an impossible value.
        """
        if not isinstance(data, Mapping):
            raise MmqError(f"{name}: expected a table of layout fields, got {type(data).__name__}")
        known = {field.name: field.type for field in fields(cls)}
        if set(data) != set(known):
            wrong = sorted(map(str, set(data) ^ set(known)))
            raise MmqError(f"{name}: expected the fields {sorted(known)}, got {wrong} differently")
        kinds = {"int": int, "bool": bool}
        for key, annotation in known.items():
            kind = kinds.get(str(annotation), str)
            if type(data[key]) is not kind:
                raise MmqError(f"{name}.{key}: expected {kind.__name__}, got {data[key]!r}")
        layout = cls(**data)
        good = (
            layout.bits in BITS
            and (layout.group_size == -1 or layout.group_size > 0)
            and layout.zero in get_args(Zero)
            and layout.scale_dtype in SCALE_DTYPES
            and layout.n > 0
            and layout.k > 0
            and not (layout.per_tensor and layout.group_size != -1)
        )
        if not good:
            raise MmqError(f"{name}: expected a layout that mmq writes, got {dict(data)}")
        return layout

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each canonical tensor, without the bias."""
        groups = 1 if self.group_size == -1 else -(-self.k // self.group_size)
        rows = 1 if self.per_tensor else self.n
        scale = SCALE_DTYPES[self.scale_dtype]
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "qweight": (torch.int32, (self.n, ops.row_words(self.k, self.bits))),
            "scales": (scale, (rows, groups)),
        }
        if self.zero == "integer":
            found["qzeros"] = (torch.int32, (rows, ops.row_words(groups, self.bits)))
        if self.zero == "float":
            found["mins"] = (scale, (rows, groups))
        if self.perm:
            found["perm"] = (torch.int32, (self.k,))
        if self.in_scale:
            found["in_scale"] = (scale, (self.k,))
        return found

    @property
    def stored_bytes(self) -> int:
        """Bytes of the canonical tensors, without the bias: what a file needs."""
        return sum(kind.itemsize * math.prod(shape) for kind, shape in self.tensors().values())


class QuantLinear(nn.Module):
    """y = (x / in_scale)[..., perm] @ W_hat.T + bias with W_hat packed at 2 to 8 bits.

    The state dict has the names of ``mmq.packed`` and ``bias``. ``.to(dtype)`` and the like change
    the *compute* dtype: that of the bias and of :attr:`weight`. Scales keep their storage dtype,
    because rounding them again would move weights off the grid that was chosen.

    Args:
      packed: the matrix; ``n`` out-features, ``k`` in-features.
      bias: [n] or None, in the compute dtype.
      dtype: the compute dtype; float32, float16 or bfloat16.
      mode: "exact" (fp32 activations) or "int8" (activations quantized per row and group).

    Raises MmqError for a bias of another shape, a dtype or a mode that the kernels do not have.
    """

    qweight: Tensor | None
    scales: Tensor
    qzeros: Tensor | None
    mins: Tensor | None
    perm: Tensor | None
    in_scale: Tensor | None
    tiles: Tensor | None
    affine: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        mode: Mode = "exact",
    ) -> None:
        packed.validate()
        self._setup(Layout.of(packed, bias is not None), packed.tensors(), bias, dtype, mode)
        self.prepare()

    @classmethod
    def empty(
        cls,
        layout: Layout,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "meta",
        mode: Mode = "exact",
    ) -> QuantLinear:
        """A layer in the canonical state with uninitialized tensors, for a loader to fill.

        Call :meth:`prepare` afterwards.
        """
        layer = cls.__new__(cls)
        tensors = {
            name: torch.empty(shape, dtype=kind, device=device)
            for name, (kind, shape) in layout.tensors().items()
        }
        bias = torch.empty(layout.n, dtype=dtype, device=device) if layout.bias else None
        layer._setup(layout, tensors, bias, dtype, mode)
        return layer

    @classmethod
    def from_float(
        cls, linear: nn.Linear, spec: QuantSpec, *, mode: Mode = "exact", name: str = "weight"
    ) -> QuantLinear:
        """Rounds ``linear`` to nearest on the grid ``spec``. Errors name ``name``."""
        packed, _ = rtn(linear.weight.detach(), spec, name=name)
        return cls.replacing(linear, packed, mode=mode)

    @classmethod
    def replacing(
        cls, linear: nn.Linear, packed: PackedWeight, *, mode: Mode = "exact"
    ) -> QuantLinear:
        """A layer with ``packed`` for the weight and ``linear``'s bias, dtype and training flag."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(packed, bias, dtype=linear.weight.dtype, mode=mode)
        return layer.train(linear.training)

    def _setup(
        self,
        layout: Layout,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
        mode: Mode,
    ) -> None:
        super().__init__()
        if mode not in ops.GEMM_MODES:
            raise MmqError(f"mode: expected one of {', '.join(ops.GEMM_MODES)}, got {mode!r}")
        if dtype not in _INPUT_DTYPES:
            raise MmqError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
        if bias is not None and tuple(bias.shape) != (layout.n,):
            raise MmqError(f"bias: expected shape [{layout.n}], got {list(bias.shape)}")
        self.layout = layout
        self.mode: Mode = mode
        self.in_features = layout.k
        self.out_features = layout.n
        self.compute_dtype = dtype
        self._row_group_size = layout.k if layout.group_size == -1 else layout.group_size
        for name in TENSOR_NAMES:
            self.register_buffer(name, tensors.get(name))
        self.register_buffer("tiles", None, persistent=False)
        self.register_buffer("affine", None, persistent=False)
        parameter = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", parameter)

    @property
    def weight(self) -> Tensor:
        """An empty tensor of the compute dtype and device; neither parameter nor buffer.

        Model code reads ``weight.dtype`` and ``weight.device`` of its linears. The packed matrix
        itself is :attr:`packed`.
        """
        return torch.empty(0, dtype=self.compute_dtype, device=self.scales.device)

    @property
    def packed(self) -> PackedWeight:
        """The canonical matrix; with the layer ready, ``qweight`` is unpacked from the tiles."""
        return PackedWeight(
            qweight=self._canonical_qweight(),
            scales=self.scales,
            qzeros=self.qzeros,
            mins=self.mins,
            perm=self.perm,
            in_scale=self.in_scale,
            n=self.layout.n,
            k=self.layout.k,
            bits=self.layout.bits,
            group_size=self.layout.group_size,
            zero=self.layout.zero,
            method=self.layout.method,
            fallback=self.layout.fallback,
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of the canonical tensors, without the bias: what a file needs."""
        return self.layout.stored_bytes

    @property
    def is_ready(self) -> bool:
        """Whether the layer holds tiles and can run."""
        return self.tiles is not None

    def prepare(self) -> None:
        """Canonical to ready; nothing to do where the layer is ready."""
        if self.tiles is not None or self.qweight is None:
            return
        layout = self.layout
        zeros = None if layout.zero == "symmetric" else self.packed.grid().rows(layout.n).zeros
        scales = self.scales.expand(layout.n, -1)
        self.affine = ops.repack_affine(scales, zeros, layout.bits, layout.zero == "float")
        self.tiles = ops.repack(self.qweight, self.layout.bits, self.layout.k)
        self.qweight = None

    def narrow_scales(self) -> None:
        """Puts scales that a loader widened back into their storage type, which is lossless."""
        for name, (dtype, _) in self.layout.tensors().items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.dtype != dtype:
                setattr(self, name, tensor.to(dtype))

    def restore(self) -> None:
        """Ready to canonical, bitwise the tensors that :meth:`prepare` began with."""
        self.qweight = self._canonical_qweight()
        self.tiles = None
        self.affine = None

    def _canonical_qweight(self) -> Tensor:
        if self.qweight is not None:
            return self.qweight
        assert self.tiles is not None, "a layer is canonical or ready"
        return ops.unrepack(self.tiles, self.layout.bits, self.layout.n, self.layout.k)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k], float32, float16 or bfloat16, to [..., n] in the same dtype."""
        # nn.Module looks an attribute up in three dictionaries, which is slow where it is called
        # for every token.
        buffers, k, n = self._buffers, self.in_features, self.out_features
        tiles, affine = buffers["tiles"], buffers["affine"]
        if tiles is None or affine is None:
            raise MmqError("packed linear: expected a prepared layer, got a canonical one")
        shape = x.shape
        if shape[-1] != k:
            raise MmqError(f"packed linear: expected [..., {k}], got {list(shape)}")
        y = ops.packed_gemm(
            x if len(shape) == 2 else x.flatten(0, -2) if len(shape) > 2 else x[None],
            tiles,
            affine,
            n=n,
            bits=self.layout.bits,
            group_size=self._row_group_size,
            bias=self._parameters["bias"],
            perm=buffers["perm"],
            in_scale=buffers["in_scale"],
            mode=self.mode,
        )
        return y if len(shape) == 2 else y.reshape(*shape[:-1], n)

    def dequantize(self) -> Tensor:
        """The effective weight, float32 [n, k]: y = x @ W_hat.T + bias."""
        return self.packed.effective_weight()

    def to_dense(self) -> nn.Linear:
        """A dense linear of the compute dtype with the same function, up to rounding to it."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.dequantize().to(self.compute_dtype)
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return dense

    def extra_repr(self) -> str:
        layout = self.layout
        parts = [
            f"in_features={layout.k}, out_features={layout.n}, bits={layout.bits}",
            f"group_size={'tensor' if layout.per_tensor else layout.group_size}",
            f"zero={layout.zero}, method={layout.method}, bias={layout.bias}",
        ]
        parts += [name for name in ("perm", "in_scale") if getattr(layout, name)]
        return ", ".join([*parts, f"mode={self.mode}"])

    # torch's own hooks below: moving, saving, loading.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        probe = fn(self.weight)
        moves = probe.device.type != self.scales.device.type
        ready = self.is_ready
        if ready and moves:
            self.restore()  # Tiles are in the order of one kind of device.
        before = {
            name: tensor.dtype
            for name in _SCALE_LIKE
            if isinstance(tensor := getattr(self, name), Tensor)
        }
        kept: dict[str, Tensor] = {}
        for name, dtype in before.items():
            tensor = getattr(self, name)
            moved = fn(tensor)
            kept[name] = moved if moved.dtype == dtype else tensor.to(moved.device)
            self._buffers[name] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            self._buffers[name] = tensor
        if probe.dtype in _INPUT_DTYPES:
            self.compute_dtype = probe.dtype
        if ready and moves and probe.device.type != "meta":
            self.prepare()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.qweight is None:
            destination[prefix + "qweight"] = self._canonical_qweight()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, (dtype, _) in self.layout.tensors().items():
            found = state_dict.get(prefix + name)
            if isinstance(found, Tensor) and found.dtype != dtype:
                error_msgs.append(f"{prefix}{name}: expected {dtype}, got {found.dtype}")
        if error_msgs:
            return
        ready = self.is_ready
        if ready:
            self.restore()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not error_msgs and not self.scales.is_meta:
            try:
                self.packed.validate(prefix.rstrip("."))
            except MmqError as error:
                error_msgs.append(str(error))
        if ready:
            self.prepare()
