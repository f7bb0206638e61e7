# SPDX-License-Identifier: Apache-2.0
"""From what an algorithm reports of one linear to its line in the manifest."""

from __future__ import annotations

from dataclasses import asdict

from mmq.hessian import InputStats
from mmq.linear import QuantLinear
from mmq.manifest import LinearRecord
from mmq.models import LinearUnit
from mmq.options import AwqOptions, GptqOptions
from mmq.plan import LayerPlan
from mmq.report import Report
from mmq.scaling import Scaling


def record_of(
    unit: LinearUnit,
    layer: LayerPlan,
    report: Report,
    packed: QuantLinear,
    stats: InputStats | None,
    scaling: Scaling | None,
) -> LinearRecord:
    """The record of one packed linear; ``stats`` and ``scaling`` are None without inputs or AWQ."""
    used: dict[str, GptqOptions | AwqOptions] = {"gptq": layer.gptq, "awq": layer.awq}
    options = used.get(layer.method)
    return LinearRecord(
        path=unit.path,
        component=unit.component,
        stack=unit.stack,
        block=unit.block,
        third=unit.third,
        layer_type=unit.layer_type,
        method=layer.method,
        bits=report.bits,
        n=unit.n,
        k=unit.k,
        spec={} if layer.spec is None else asdict(layer.spec),
        options={} if options is None else asdict(options),
        tokens=None if stats is None else stats.tokens,
        relative_error=report.relative_error,
        output_error=report.output_error,
        weight_mse=report.weight_mse,
        alpha=None if scaling is None else scaling.search.alpha,
        fold=None if scaling is None else scaling.fold,
        in_scale=packed.layout.in_scale,
        perm=packed.layout.perm,
        damp=None if report.gptq is None else report.gptq.damp,
        dead_columns=0 if report.gptq is None else report.gptq.dead_columns,
        fallback=report.fallback,
        notes=list(report.notes),
        stored_bytes=packed.stored_bytes,
        bits_per_weight=report.bits_per_weight,
        approximation="" if scaling is None else scaling.search.approximation,
    )
