# SPDX-License-Identifier: Apache-2.0
"""How one weight matrix is stored: width, groups, zero points, range search, scale type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from mmq.errors import MmqError

Zero = Literal["symmetric", "integer", "float"]
SymmetricRange = Literal["full", "restricted"]
Clip = Literal["none", "mse"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]

BITS: Final = (2, 3, 4, 5, 6, 7, 8)
SCALE_DTYPES: Final[dict[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one weight matrix W of shape [n, k] (out-features, in-features).

    A code q is an integer in [0, 2**bits - 1]; a group is a run of ``group_size`` in-features of
    one row, the last one may be shorter.

    - ``zero="symmetric"``: w = (q - 2**(bits-1)) * scale. ``symmetric_range="full"`` spreads
      the 2**bits - 1 steps over [-a, a] (the GPTQ reference's grid, +a itself clips);
      ``"restricted"`` has scale = a / (2**(bits-1) - 1) and leaves code 0 unused.
    - ``zero="integer"``: w = (q - z) * scale with an integer z in [0, 2**bits - 1].
    - ``zero="float"``: w = q * scale + minimum.

    ``group_size`` is -1 for one group per row (per channel). ``per_tensor`` gives the whole
    matrix one scale. ``clip="mse"`` searches the range that minimises
    sum |w - w_hat| ** clip_exponent over the shrink factors 1, 1 - 1/clip_steps, ... down to
    1 - clip_shrink.

    Raises MmqError for any value outside these rules.
    """

    bits: int
    group_size: int = -1
    zero: Zero = "integer"
    per_tensor: bool = False
    symmetric_range: SymmetricRange = "full"
    clip: Clip = "none"
    clip_steps: int = 100
    clip_shrink: float = 0.8
    clip_exponent: float = 2.4
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise MmqError(f"bits: expected one of {BITS}, got {self.bits!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise MmqError(
                f"group_size: expected a positive integer, or -1 (per row), got {self.group_size}"
            )
        if self.per_tensor and self.group_size != -1:
            raise MmqError(f"per_tensor: expected group_size -1 with it, got {self.group_size}")
        for name, value, allowed in (
            ("zero", self.zero, get_args(Zero)),
            ("symmetric_range", self.symmetric_range, get_args(SymmetricRange)),
            ("clip", self.clip, get_args(Clip)),
            ("scale_dtype", self.scale_dtype, get_args(ScaleDtype)),
        ):
            if value not in allowed:
                raise MmqError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if self.clip_steps < 1 or not 0.0 < self.clip_shrink < 1.0 or self.clip_exponent <= 0.0:
            raise MmqError(
                "clip: expected clip_steps >= 1, 0 < clip_shrink < 1 and clip_exponent > 0, got "
                f"{self.clip_steps}, {self.clip_shrink}, {self.clip_exponent}"
            )

    @property
    def max_code(self) -> int:
        """The largest code, 2**bits - 1."""
        return (1 << self.bits) - 1

    def groups(self, k: int) -> int:
        """Number of groups in a row of ``k`` in-features."""
        return 1 if self.group_size == -1 else -(-k // self.group_size)

    def row_group_size(self, k: int) -> int:
        """The group size with -1 resolved to ``k`` in-features."""
        return max(k, 1) if self.group_size == -1 else self.group_size

    @property
    def kind(self) -> str:
        """The grid's one-word name in the kernels: integer, float, symmetric or restricted."""
        if self.zero == "symmetric" and self.symmetric_range == "restricted":
            return "restricted"
        return self.zero

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """The storage type of scales and minima."""
        return SCALE_DTYPES[self.scale_dtype]
