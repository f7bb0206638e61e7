# SPDX-License-Identifier: Apache-2.0
"""AWQ in a model: which linears share a scale, and where 1/s goes.

Folding leaves the function of the model as it was: a norm or a producing linear is divided by s,
the columns of its readers are multiplied. Where that cannot be, s stays with the linear as its
run-time divisor and nothing is changed yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmq.awq import AwqSearch, awq_scales, error_factor, stored_scale
from mmq.errors import MmqError
from mmq.fold import fold_into_linear, fold_into_norm, scale_inputs
from mmq.hessian import InputStats
from mmq.models import LinearUnit
from mmq.plan import LayerPlan, Plan

Member = tuple[LinearUnit, LayerPlan]


@dataclass(frozen=True, eq=False)
class Scaling:
    """What the search decided for one linear. ``fold`` is the producer that took 1/s, ``in_scale``
    [k] the run-time divisor (exact in its storage type); both None for exponent 0."""

    search: AwqSearch
    fold: str | None
    in_scale: Tensor | None


def scale_block(
    model: nn.Module, plan: Plan, members: Sequence[Member], inputs: Mapping[str, InputStats]
) -> dict[str, Scaling]:
    """Searches and folds the scales of all AWQ linears of a block, before any of it is rounded.

    Args:
      model: changed where a scale folds.
      plan: tells who else reads an input.
      members: all linears of the block that will be quantized, by whichever method.
      inputs: statistics by input group, of the groups with an AWQ linear.

    Returns the decision for each AWQ linear by path.
    """
    found: dict[str, Scaling] = {}
    for part, search, folds in _searches(model, plan, members, inputs):
        if folds and search.alpha > 0:
            found |= _fold(model, part, search)
        else:
            found |= {unit.path: _at_run_time(layer, search) for unit, layer in part}
    return found


def run_time_scales(
    model: nn.Module, plan: Plan, members: Sequence[Member], inputs: Mapping[str, InputStats]
) -> dict[str, tuple[Scaling, bool]]:
    """The same searches with nothing changed: every scale at run time, and whether it would fold.

    ``members`` may be heads, too.
    """
    return {
        unit.path: (_at_run_time(layer, search), folds)
        for part, search, folds in _searches(model, plan, members, inputs)
        for unit, layer in part
    }


def _searches(
    model: nn.Module, plan: Plan, members: Sequence[Member], inputs: Mapping[str, InputStats]
) -> Iterator[tuple[list[Member], AwqSearch, bool]]:
    """By input group: its AWQ linears, their scale, and whether that may be folded."""
    planned = {unit.path for unit, _ in members}
    for group, stats in inputs.items():
        part = [
            (unit, layer)
            for unit, layer in members
            if unit.input_group == group and layer.method == "awq"
        ]
        if part:
            readers = [unit for unit, _ in plan.layers if unit.input_group == group]
            folds = len(part) == len(readers) and _may_fold(part, planned)
            yield part, _search(model, part, stats, folds), folds


def scale_head(
    model: nn.Module, unit: LinearUnit, layer: LayerPlan, stats: InputStats | None
) -> Scaling | None:
    """The scale of a linear outside the stacks, where nothing may take 1/s; None without AWQ."""
    if layer.method != "awq" or stats is None:
        return None
    return _at_run_time(layer, _search(model, [(unit, layer)], stats, folds=False))


def clip_rows(unit: LinearUnit) -> Tensor | None:
    """Which rows AWQ may clip, bool [n]; None is all."""
    if unit.clip_rows == "all":
        return None
    rows = torch.zeros(unit.n, dtype=torch.bool)
    if unit.clip_rows == "value-third":
        rows[2 * unit.n // 3 :] = True
    return rows


def dense_linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear at ``path``. Raises MmqError where it is packed already."""
    linear = model.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise MmqError(f"{path}: expected a dense linear, got {type(linear).__name__}")
    return linear


def _search(model: nn.Module, part: Sequence[Member], stats: InputStats, folds: bool) -> AwqSearch:
    """One scale for linears with one input, each on its own grid."""
    unit, layer = part[0]
    shared = unit.fold if folds and unit.fold is not None and unit.fold.repeat > 1 else None
    return awq_scales(
        [dense_linear(model, member.path).weight for member, _ in part],
        stats.mean_abs,
        error_factor(stats, name=unit.path),
        [member.spec for _, member in part if member.spec is not None],
        layer.awq,
        source_rows=None if shared is None else shared.source_rows(),
        name=unit.path,
    )


def _may_fold(part: Sequence[Member], planned: set[str]) -> bool:
    """Whether 1/s may go into the producer; one that the recipe leaves dense stays untouched."""
    return all(
        layer.awq.fold
        and unit.fold is not None
        and (unit.fold.kind == "norm" or unit.fold.producer in planned)
        for unit, layer in part
    )


def _fold(model: nn.Module, part: Sequence[Member], search: AwqSearch) -> dict[str, Scaling]:
    fold = part[0][0].fold
    assert fold is not None, "_may_fold said so"
    producer = model.get_submodule(fold.producer)
    if fold.kind == "norm":
        fold_into_norm(producer, search.scale)
    else:
        assert isinstance(producer, nn.Linear), "producers are rounded after their readers' search"
        per_row = search.scale.new_ones(fold.channels)
        per_row[fold.source_rows().to(per_row.device)] = search.scale
        fold_into_linear(producer, per_row, slice(fold.row_start, fold.row_stop))
    for unit, _ in part:
        scale_inputs(dense_linear(model, unit.path), search.scale)
    return {unit.path: Scaling(search, fold.producer, None) for unit, _ in part}


def _at_run_time(layer: LayerPlan, search: AwqSearch) -> Scaling:
    if search.alpha == 0.0 or layer.spec is None:
        return Scaling(search, None, None)
    return Scaling(search, None, stored_scale(search.scale, layer.spec))
