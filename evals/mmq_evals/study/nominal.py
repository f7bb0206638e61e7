# SPDX-License-Identifier: Apache-2.0
"""Nominal sizes for tables that state none: bits per weight as arXiv 2601.15287 counts them.

Widths of the linears alone, without scales and zeros; embeddings, heads and norms at 16 bits. The
true size of a packed model is larger; tables of `mmq sweep` have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from mmq.architectures import Component
from mmq.inspect import nominal_bpw
from mmq.models import resolve
from mmq.presets import PRESETS, build_meta
from mmq_evals.errors import EvalError
from mmq_evals.study.table import Table

COLUMN = "bpw_nominal"
_NAMES: Mapping[str, Component] = {
    "vision": "vision",
    "vit": "vision",
    "visual": "vision",
    "connector": "connector",
    "qformer": "connector",
    "q_former": "connector",
    "language": "language",
    "llm": "language",
    "opt": "language",
    "text": "language",
}


def with_nominal_size(table: Table, preset: str) -> Table:
    """The table with a column `COLUMN`, from the widths and a published architecture.

    Raises:
        EvalError: no such preset, or a factor whose name is that of no component.
    """
    if preset not in PRESETS:
        raise EvalError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    components: dict[str, Component] = {}
    for factor in table.factors:
        name = table.name(factor).lower()
        if name not in _NAMES:
            raise EvalError(
                f"preset: expected factors named {', '.join(get_args(Component))}, vit, qformer or "
                f"llm, got {factor!r}"
            )
        components[factor] = _NAMES[name]
    model = build_meta(preset)
    units = resolve(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    runs = []
    for run in table.runs:
        bits = {components[f]: int(w) for f, w in run.places[-1].items() if f in components}
        bpw = nominal_bpw(units, parameters, bits)
        runs.append(replace(run, values={**run.values, COLUMN: bpw}))
    return replace(table, runs=tuple(runs))
