# SPDX-License-Identifier: Apache-2.0
"""Quantizing a model in place: vision, connector, language; block by block; stage by stage.

Inside a block, scales come first (AWQ): they are searched on the block as it is, for consumers
before their producers are rounded, and put into norms and producers, which leaves the block's
function as it was. Then each stage is rounded on the inputs that the rounded stages before it
produce, and the block's outputs with rounded weights are the next block's inputs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from mmq.architectures import Stack
from mmq.awq import (
    AwqSearch,
    awq_scales,
    error_factor,
    quantize_scaled,
    stored_scale,
)
from mmq.calibrate import Call, advance, calibrating, capture, gather, gather_from_model, run_block
from mmq.checkpoint import MANIFEST_ATTRIBUTE
from mmq.errors import MmqError
from mmq.fold import fold_into_linear, fold_into_norm, scale_inputs
from mmq.gptq import gptq
from mmq.grid import check_weight
from mmq.hessian import Hessian, InputStats, rescale_hessian
from mmq.linear import QuantLinear
from mmq.manifest import DenseRecord, LinearRecord, Manifest, component_totals, versions
from mmq.models import LinearUnit, architecture_of, blocks_of, unlisted_linears
from mmq.options import AwqOptions, GptqOptions
from mmq.plan import LayerPlan, Plan, plan
from mmq.recipe import Recipe
from mmq.report import Report
from mmq.rtn import rtn
from mmq.samples import Sample, check_samples, micro_batches, split_samples
from mmq.stored import account
from mmq_ext import cpu_isa

LOGGER: Final = logging.getLogger(__name__)
MICRO_BATCH: Final = 8  # Rows of equal shape run together; memory grows with it, results do not.

Member = tuple[LinearUnit, LayerPlan]


@dataclass(frozen=True)
class ProgressEvent:
    """One linear is done. ``error`` is its relative output error, None without samples; ``done`` of
    ``total`` linears are finished; ``elapsed`` and ``eta`` are seconds."""

    component: str
    stack: str
    block: int | None
    n_blocks: int
    path: str
    method: str
    bits: int
    error: float | None
    done: int
    total: int
    elapsed: float
    eta: float


Progress = Callable[[ProgressEvent], None]


def quantize(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample] | None = None,
    *,
    sample_ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Replaces the linears that ``recipe`` selects by packed ones, in place.

    Args:
      model: a supported model with dense linears, on the CPU.
      recipe: what to do with which linear.
      samples: model inputs, each a mapping of names to tensors with the batch first; padding is
        cut off. The first ``recipe.calibration.samples`` are used. None is allowed where only
        ``uniform`` and ``rtn`` are used, and then no output error is known.
      sample_ids: one per sample, for the record.
      progress: called after every linear.

    Returns the manifest, which also stays on the model for ``mmq.save``.

    Raises MmqError before anything is changed for an unsupported model, a selector without a match,
    weights or samples that are not finite, missing samples; later, naming the linear, for one that
    no sample reaches. When it is left by an error or an interrupt, the model in memory is partly
    quantized (a message is logged) and should be loaded again.
    """
    decided = plan(recipe, model)
    _check_weights(model, decided)
    batches = _batches(model, decided, samples, sample_ids)
    used = None if samples is None else len(samples[: recipe.calibration.samples])
    run = _Run(model, decided, batches, progress)
    finished = False
    try:
        with calibrating(model):
            run.untied = [_untie(model, unit) for unit, _ in decided.quantized() if unit.tied]
            run.all_stacks()
        finished = True
    finally:
        if not finished:
            LOGGER.error(
                "quantize: stopped with %d of %d linears packed; the model in memory is not usable,"
                " load it again",
                len(run.records),
                run.total,
            )
    manifest = _manifest(run, used, None if sample_ids is None else list(sample_ids)[:used])
    setattr(model, MANIFEST_ATTRIBUTE, manifest)
    return manifest


@dataclass(frozen=True, eq=False)
class _Scaling:
    """What AWQ's search decided for a linear: ``in_scale`` where it was not folded."""

    search: AwqSearch
    fold: str | None
    in_scale: Tensor | None


@dataclass(eq=False)
class _Run:
    """One quantization under way."""

    model: nn.Module
    plan: Plan
    batches: list[dict[str, Tensor]] | None
    progress: Progress | None
    records: list[LinearRecord] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.architecture = architecture_of(self.model)
        self.chosen = self.plan.quantized()
        self.total = len(self.chosen)
        self._weights_done = 0
        self._weights_total = sum(unit.weights for unit, _ in self.chosen)
        self._calibration = self.plan.recipe.calibration

    @property
    def _from_full(self) -> bool:
        return self._calibration.upstream == "full"

    def all_stacks(self) -> None:
        """Everything, in the order of calibration."""
        kept: dict[str, list[Call]] = {}
        heads: dict[str, InputStats] = {}
        if self.batches is not None and self._from_full:
            for stack in self.architecture.stacks:
                if self._members(stack):
                    kept[stack.name] = capture(self.model, self.architecture, stack, self.batches)
            paths = [unit.path for unit, _ in self.chosen if unit.block is None]
            heads = self._head_inputs(paths)
        for stack in self.architecture.stacks:
            if self._members(stack):
                self._stack(stack, kept.pop(stack.name, None))
            for unit, layer in self.chosen:
                if unit.stack == stack.name and unit.block is None:
                    found = heads or self._head_inputs([unit.path])
                    self._pack(
                        unit, layer, found.get(unit.path), self._head_scaling(unit, layer, found)
                    )

    def _members(self, stack: Stack) -> list[Member]:
        return [
            (unit, layer)
            for unit, layer in self.chosen
            if unit.stack == stack.name and unit.block is not None
        ]

    def _stack(self, stack: Stack, calls: list[Call] | None) -> None:
        by_block: dict[int, list[Member]] = {}
        for unit, layer in self._members(stack):
            assert unit.block is not None
            by_block.setdefault(unit.block, []).append((unit, layer))
        if self.batches is None:
            for members in by_block.values():
                for unit, layer in members:
                    self._pack(unit, layer, None, None)
            return
        if calls is None:
            calls = capture(self.model, self.architecture, stack, self.batches)
        last = max(by_block)
        for index, block in enumerate(blocks_of(self.model, stack)):
            members = by_block.get(index, [])
            following: list[Call] = []
            if self._from_full and index < last:
                following = [advance(stack, call, run_block(block, call)) for call in calls]
            if members:
                self._block(block, members, calls)
            if index == last:
                return
            if not self._from_full:
                following = [advance(stack, call, run_block(block, call)) for call in calls]
            calls = following

    def _block(self, block: nn.Module, members: list[Member], calls: list[Call]) -> None:
        scalings = self._scale(block, members, calls)
        stages = sorted({unit.stage for unit, _ in members})
        step_by_step = self._calibration.true_sequential and not self._from_full
        for stage_set in [{stage} for stage in stages] if step_by_step else [set(stages)]:
            part = [(unit, layer) for unit, layer in members if unit.stage in stage_set]
            inputs = self._inputs(block, part, calls)
            for unit, layer in part:
                self._pack(unit, layer, inputs[unit.input_group], scalings.get(unit.path))

    def _inputs(
        self, block: nn.Module, members: list[Member], calls: list[Call]
    ) -> dict[str, InputStats]:
        """Statistics by input group, gathered at the first linear of each."""
        hessians: dict[str, Hessian] = {}
        hooks: dict[nn.Module, Hessian] = {}
        for unit, _ in members:
            if unit.input_group not in hessians:
                hessian = Hessian(unit.k, name=unit.path)
                hessians[unit.input_group] = hessian
                hooks[self.model.get_submodule(unit.path)] = hessian
        gather(block, calls, hooks, self._calibration.max_tokens)
        return {group: hessian.stats() for group, hessian in hessians.items()}

    def _head_inputs(self, paths: Sequence[str]) -> dict[str, InputStats]:
        if self.batches is None or not paths:
            return {}
        modules = {path: self.model.get_submodule(path) for path in paths}
        width = {unit.path: unit.k for unit, _ in self.chosen}
        hessians = {path: Hessian(width[path], name=path) for path in paths}
        gather_from_model(
            self.model,
            self.architecture,
            self.batches,
            {modules[path]: hessians[path] for path in paths},
            self._calibration.max_tokens,
        )
        return {path: hessian.stats() for path, hessian in hessians.items()}

    def _scale(
        self, block: nn.Module, members: list[Member], calls: list[Call]
    ) -> dict[str, _Scaling]:
        """Searches and folds the scales of all input groups of the block that AWQ has a part in."""
        scaled = [(unit, layer) for unit, layer in members if layer.method == "awq"]
        if not scaled:
            return {}
        inputs = self._inputs(block, scaled, calls)
        planned = {unit.path: layer for unit, layer in members}
        found: dict[str, _Scaling] = {}
        for group, stats in inputs.items():
            part = [(unit, layer) for unit, layer in scaled if unit.input_group == group]
            readers = [unit for unit, _ in self.plan.layers if unit.input_group == group]
            folds = len(part) == len(readers) and self._may_fold(part, planned)
            search = self._search(part, stats, folds)
            if search.alpha == 0.0:
                found |= {unit.path: _Scaling(search, None, None) for unit, _ in part}
            elif folds:
                found |= self._fold(part, search)
            else:
                for unit, layer in part:
                    assert layer.spec is not None
                    scale = stored_scale(search.scale, layer.spec)
                    found[unit.path] = _Scaling(search, None, scale)
        return found

    def _search(self, part: list[Member], stats: InputStats, folds: bool) -> AwqSearch:
        """One scale for linears with one input, each on its own grid."""
        unit, layer = part[0]
        shared = unit.fold if folds and unit.fold is not None and unit.fold.repeat > 1 else None
        return awq_scales(
            [self._dense(member).weight for member, _ in part],
            stats.mean_abs,
            error_factor(stats, name=unit.path),
            [member.spec for _, member in part if member.spec is not None],
            layer.awq,
            source_rows=None if shared is None else shared.source_rows(),
            name=unit.path,
        )

    def _head_scaling(
        self, unit: LinearUnit, layer: LayerPlan, inputs: Mapping[str, InputStats]
    ) -> _Scaling | None:
        """The scale of a head; nothing before a head may take it."""
        if layer.method != "awq" or layer.spec is None:
            return None
        search = self._search([(unit, layer)], inputs[unit.path], folds=False)
        scale = stored_scale(search.scale, layer.spec) if search.alpha > 0 else None
        return _Scaling(search, None, scale)

    def _may_fold(self, part: list[Member], planned: Mapping[str, LayerPlan]) -> bool:
        """Whether 1/s may go into the producer: all its readers are scaled, and a producing linear
        is itself quantized (one that stays dense stays untouched)."""
        return all(
            layer.awq.fold
            and unit.fold is not None
            and (unit.fold.kind == "norm" or unit.fold.producer in planned)
            for unit, layer in part
        )

    def _fold(self, part: list[Member], search: AwqSearch) -> dict[str, _Scaling]:
        fold = part[0][0].fold
        assert fold is not None
        producer = self.model.get_submodule(fold.producer)
        if fold.kind == "norm":
            fold_into_norm(producer, search.scale)
        else:
            assert isinstance(producer, nn.Linear)
            per_row = torch.ones(fold.channels)
            per_row[fold.source_rows()] = search.scale
            fold_into_linear(producer, per_row, slice(fold.row_start, fold.row_stop))
        for unit, _ in part:
            scale_inputs(self._dense(unit), search.scale)
        return {unit.path: _Scaling(search, fold.producer, None) for unit, _ in part}

    def _dense(self, unit: LinearUnit) -> nn.Linear:
        linear = self.model.get_submodule(unit.path)
        assert isinstance(linear, nn.Linear)
        return linear

    def _pack(
        self,
        unit: LinearUnit,
        layer: LayerPlan,
        stats: InputStats | None,
        scaling: _Scaling | None,
    ) -> None:
        """Quantizes one linear, puts the packed one in its place, records and reports."""
        spec = layer.spec
        assert spec is not None
        linear = self._dense(unit)
        weight = linear.weight.detach().float()
        hessian = None if stats is None else stats.hessian
        in_scale = None if scaling is None else scaling.in_scale
        if in_scale is not None and hessian is not None:
            weight = weight * in_scale
            hessian = rescale_hessian(hessian, in_scale)
        if layer.method in ("uniform", "rtn"):
            packed, report = rtn(weight, spec, hessian=hessian, name=unit.path, method=layer.method)
        elif hessian is None:
            raise MmqError(f"{unit.path}: expected calibration inputs for {layer.method}, got none")
        elif layer.method == "gptq":
            packed, report = gptq(weight, hessian, spec, layer.gptq, name=unit.path)
        else:
            packed, report = quantize_scaled(
                weight,
                hessian,
                spec,
                layer.awq,
                search=None if scaling is None else scaling.search,
                in_scale=in_scale,
                clip_rows=_clip_rows(unit),
                name=unit.path,
            )
        replacement = QuantLinear.replacing(linear, packed)
        self.model.set_submodule(unit.path, replacement)
        self.records.append(_record(unit, layer, report, replacement, stats, scaling))
        self._report_progress(unit, layer, report)

    def _report_progress(self, unit: LinearUnit, layer: LayerPlan, report: Report) -> None:
        self._weights_done += unit.weights
        elapsed = time.monotonic() - self.started
        eta = elapsed * (self._weights_total / self._weights_done - 1)
        LOGGER.info(
            "%s: %s %d bit, relative error %s",
            unit.path,
            layer.method,
            report.bits,
            report.relative_error,
        )
        if self.progress is not None:
            self.progress(
                ProgressEvent(
                    component=unit.component,
                    stack=unit.stack,
                    block=unit.block,
                    n_blocks=unit.n_blocks,
                    path=unit.path,
                    method=layer.method,
                    bits=report.bits,
                    error=report.relative_error,
                    done=len(self.records),
                    total=self.total,
                    elapsed=elapsed,
                    eta=eta,
                )
            )


def _clip_rows(unit: LinearUnit) -> Tensor | None:
    """Which rows AWQ may clip, bool [n]; None is all."""
    if unit.clip_rows == "all":
        return None
    rows = torch.zeros(unit.n, dtype=torch.bool)
    if unit.clip_rows == "value-third":
        rows[2 * unit.n // 3 :] = True
    return rows


def _check_weights(model: nn.Module, decided: Plan) -> None:
    for unit, _ in decided.quantized():
        module = model.get_submodule(unit.path)
        if not isinstance(module, nn.Linear):
            raise MmqError(f"{unit.path}: expected a dense linear, got {type(module).__name__}")
        check_weight(module.weight, unit.path)


def _batches(
    model: nn.Module,
    decided: Plan,
    samples: Sequence[Sample] | None,
    sample_ids: Sequence[str] | None,
) -> list[dict[str, Tensor]] | None:
    """The calibration batches, None where the recipe runs without any."""
    if samples is None:
        for unit, layer in decided.quantized():
            if layer.method in ("gptq", "awq"):
                raise MmqError(
                    f"samples: expected calibration samples for {layer.method} of {unit.path}, "
                    "got none"
                )
        return None
    check_samples(samples)
    if sample_ids is not None and len(sample_ids) != len(samples):
        raise MmqError(
            f"sample_ids: expected one per sample ({len(samples)}), got {len(sample_ids)}"
        )
    stacks = {stack.name for stack in architecture_of(model).stacks}
    used = samples[: decided.recipe.calibration.samples]
    rows = split_samples(used, encoder_decoder="encoder" in stacks)
    return micro_batches(rows, MICRO_BATCH)


def _untie(model: Any, unit: LinearUnit) -> str:
    """Gives a tied head a weight of its own, in the model and in its configuration."""
    if any(stack.name == "encoder" for stack in architecture_of(model).stacks):
        raise MmqError(
            f"{unit.path}: expected a head that can be untied; this model ties it together with "
            "its encoder and decoder embeddings"
        )
    linear = model.get_submodule(unit.path)
    linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    for module in model.modules():
        keys = getattr(module, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            for key in [key for key in keys if f"{unit.path}.weight".endswith(key)]:
                del keys[key]
        config: Any = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    return unit.path


def _record(
    unit: LinearUnit,
    layer: LayerPlan,
    report: Report,
    packed: QuantLinear,
    stats: InputStats | None,
    scaling: _Scaling | None,
) -> LinearRecord:
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
    )


def _manifest(run: _Run, used: int | None, sample_ids: list[str] | None) -> Manifest:
    recipe = run.plan.recipe
    dense = [
        DenseRecord(unit.path, unit.component, unit.n, unit.k, layer.reason, unit.tied)
        for unit, layer in run.plan.layers
        if layer.spec is None
    ]
    sizes = account(run.model)
    return Manifest(
        model_class=type(run.model).__name__,
        architecture=run.architecture.name,
        recipe=recipe.to_dict(),
        seed=recipe.seed,
        upstream=recipe.calibration.upstream,
        sample_count=0 if used is None else used,
        sample_ids=sample_ids,
        versions=versions(),
        cpu_isa=cpu_isa(),
        linears=run.records,
        dense=dense,
        unlisted=unlisted_linears(run.model),
        untied=run.untied,
        coverage=json.loads(json.dumps(run.plan.coverage.to_dict())),
        components=component_totals(run.records, dense),
        parameters=sizes.parameters,
        packed_weights=sizes.packed_weights,
        packed_bytes=sizes.packed_bytes,
        payload_bytes=sizes.payload_bytes,
        bits_per_weight=sizes.packed_bits_per_weight,
        model_bits_per_weight=sizes.model_bits_per_weight,
        seconds=time.monotonic() - run.started,
        notes=list(run.plan.coverage.notes),
    )
