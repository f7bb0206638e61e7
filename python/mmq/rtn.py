# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest: the grid plus rounding, the control every other method is compared with."""

from __future__ import annotations

from torch import Tensor

from mmq.grid import find_grid, quantize
from mmq.packed import PackedWeight
from mmq.report import Report, make_report
from mmq.spec import QuantSpec, ScaleDtype


def rtn(
    weight: Tensor,
    spec: QuantSpec,
    *,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    name: str = "weight",
    method: str = "rtn",
) -> tuple[PackedWeight, Report]:
    """Rounds ``weight`` [n, k] to the nearest point of its grid.

    Args:
      weight: floating point [n, k].
      spec: the grid; ``spec.clip`` chooses how ranges are found.
      importance: float [k], weights of the clip search, such as diag(H); None is unweighted.
      hessian: float32 [k, k], only to measure the output error.
      name: of the module, for messages and the report.
      method: the name that is recorded.

    Raises MmqError, naming the module, for weights that are not finite or do not fit the scales.
    """
    grid = find_grid(weight, spec, importance, name=name)
    packed = PackedWeight.from_codes(quantize(weight, grid), grid, spec, method=method)
    return packed, make_report(name, weight, packed, hessian)


def uniform(
    weight: Tensor,
    bits: int,
    *,
    scale_dtype: ScaleDtype = "float16",
    hessian: Tensor | None = None,
    name: str = "weight",
) -> tuple[PackedWeight, Report]:
    """The study's uniform method: one scale and one minimum for the whole matrix.

    w_hat = (hi - lo) * rint(Q * (w - lo) / (hi - lo)) / Q + lo with Q = 2^bits - 1; see
    :func:`rtn` for the arguments and errors.
    """
    spec = QuantSpec(bits, zero="float", per_tensor=True, scale_dtype=scale_dtype)
    return rtn(weight, spec, hessian=hessian, name=name, method="uniform")
