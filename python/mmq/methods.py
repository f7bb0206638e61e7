# SPDX-License-Identifier: Apache-2.0
"""One linear's weight, rounded by the method that its plan names."""

from __future__ import annotations

from torch import Tensor

from mmq.awq import quantize_scaled
from mmq.errors import MmqError
from mmq.gptq import gptq
from mmq.hessian import InputStats, rescale_hessian
from mmq.models import LinearUnit
from mmq.packed import PackedWeight
from mmq.plan import LayerPlan
from mmq.report import Report
from mmq.rtn import rtn
from mmq.scaling import Scaling, clip_rows


def quantize_weight(
    weight: Tensor,
    unit: LinearUnit,
    layer: LayerPlan,
    stats: InputStats | None,
    scaling: Scaling | None,
    asymmetry: Tensor | None = None,
) -> tuple[PackedWeight, Report]:
    """Quantizes ``weight`` as ``layer`` says.

    Args:
      weight: floating point [n, k]; not changed.
      unit: which linear it is.
      layer: the method and the grid, which is not None.
      stats: of the linear's inputs; None where the method runs without any.
      scaling: what AWQ's search decided; a scale that was folded is in ``weight`` and ``stats``.
      asymmetry: D of :mod:`mmq.correction`, for GPTQ.

    Raises MmqError, naming the linear, as the method does, and for missing inputs.
    """
    spec = layer.spec
    assert spec is not None, "dense linears are not quantized"
    weight = weight.detach().float()
    hessian = None if stats is None else stats.hessian
    in_scale = None if scaling is None else scaling.in_scale
    if in_scale is not None and hessian is not None:
        weight = weight * in_scale
        hessian = rescale_hessian(hessian, in_scale)
    if layer.method in ("uniform", "rtn"):
        return rtn(weight, spec, hessian=hessian, name=unit.path, method=layer.method)
    if hessian is None:
        raise MmqError(f"{unit.path}: expected calibration inputs for {layer.method}, got none")
    if layer.method == "gptq":
        return gptq(weight, hessian, spec, layer.gptq, asymmetry=asymmetry, name=unit.path)
    return quantize_scaled(
        weight,
        hessian,
        spec,
        layer.awq,
        search=None if scaling is None else scaling.search,
        in_scale=in_scale,
        clip_rows=clip_rows(unit),
        name=unit.path,
    )
