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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from mmq.architectures import Stack
from mmq.calibrate import (
    Call,
    advance,
    block_inputs,
    calibrating,
    capture,
    head_inputs,
    run_block,
)
from mmq.checkpoint import MANIFEST_ATTRIBUTE
from mmq.device import check_cuda, device_of
from mmq.errors import MmqError
from mmq.grid import check_weight
from mmq.hessian import InputStats
from mmq.linear import QuantLinear
from mmq.manifest import DenseRecord, LinearRecord, Manifest, component_totals, versions
from mmq.methods import quantize_weight
from mmq.models import LinearUnit, architecture_of, blocks_of, unlisted_linears
from mmq.plan import LayerPlan, Plan, plan
from mmq.recipe import Recipe
from mmq.records import record_of
from mmq.report import Report
from mmq.samples import Sample, check_samples, micro_batches, split_samples
from mmq.scaling import Member, Scaling, dense_linear, scale_block, scale_head
from mmq.stored import account
from mmq_ext import cpu_isa
from mmq_ext.device import on_cuda

LOGGER: Final = logging.getLogger(__name__)
MICRO_BATCH: Final = 8  # Rows of equal shape run together; results change by rounding only.


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
    recipe: Recipe | Plan,
    samples: Sequence[Sample] | None = None,
    *,
    sample_ids: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Replaces the linears that ``recipe`` selects by packed ones, in place.

    Args:
      model: a supported model with dense linears, all on one device; on CUDA in float16 or
        bfloat16, which is what its packed kernel multiplies. It stays there.
      recipe: what to do with which linear; or a plan of it for this model, already made.
      samples: model inputs, each a mapping of names to tensors with the batch first, on any
        device; padding is cut off. The first ``recipe.calibration.samples`` are used. None is
        allowed where only ``uniform`` and ``rtn`` are used, and then no output error is known.
      sample_ids: one per sample, for the record.
      progress: called after every linear.

    Returns the manifest, which also stays on the model for ``mmq.save``.

    Raises MmqError before anything is changed for an unsupported model, a selector without a match,
    weights or samples that are not finite, missing samples, a device or type without kernels;
    later, naming the linear, for one that no sample reaches. When it is left by an error or an
    interrupt, the model in memory is partly quantized (a message is logged) and should be loaded
    again.
    """
    decided = recipe if isinstance(recipe, Plan) else plan(recipe, model)
    _check_weights(model, decided)
    device_of(model)  # Refuses a model on two devices.
    batches = _batches(model, decided, samples, sample_ids)
    used = None if samples is None else len(samples[: decided.recipe.calibration.samples])
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
                    stats = found.get(unit.path)
                    scaling = scale_head(self.model, unit, layer, stats)
                    self._pack(unit, layer, stats, scaling)

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
        """Statistics by input group."""
        units = [unit for unit, _ in members]
        return block_inputs(self.model, block, units, calls, self._calibration.max_tokens)

    def _head_inputs(self, paths: Sequence[str]) -> dict[str, InputStats]:
        if self.batches is None or not paths:
            return {}
        units = [unit for unit, _ in self.chosen if unit.path in paths]
        return head_inputs(
            self.model, self.architecture, units, self.batches, self._calibration.max_tokens
        )

    def _scale(
        self, block: nn.Module, members: list[Member], calls: list[Call]
    ) -> dict[str, Scaling]:
        scaled = [(unit, layer) for unit, layer in members if layer.method == "awq"]
        if not scaled:
            return {}
        return scale_block(self.model, self.plan, members, self._inputs(block, scaled, calls))

    def _pack(
        self,
        unit: LinearUnit,
        layer: LayerPlan,
        stats: InputStats | None,
        scaling: Scaling | None,
    ) -> None:
        """Quantizes one linear, puts the packed one in its place, records and reports."""
        linear = dense_linear(self.model, unit.path)
        packed, report = quantize_weight(linear.weight, unit, layer, stats, scaling)
        replacement = QuantLinear.replacing(linear, packed)
        self.model.set_submodule(unit.path, replacement)
        self.records.append(record_of(unit, layer, report, replacement, stats, scaling))
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


def _check_weights(model: nn.Module, decided: Plan) -> None:
    units = [unit for unit, _ in decided.quantized()]
    if units and on_cuda(weight := dense_linear(model, units[0].path).weight):
        check_cuda(weight)
    for unit in units:
        weight = dense_linear(model, unit.path).weight
        check_weight(weight, unit.path)
        if on_cuda(weight) and weight.dtype not in (torch.float16, torch.bfloat16):
            raise MmqError(
                f"{unit.path}: expected float16 or bfloat16 weights on CUDA, got {weight.dtype}; "
                "convert the model, as by model.to(torch.bfloat16)"
            )


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
    return calibration_batches(model, decided.recipe, samples, sample_ids)


def calibration_batches(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    sample_ids: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """The samples that ``recipe`` uses, freed of padding, in batches on the model's device.

    Raises MmqError as :func:`mmq.samples.check_samples` and for ids that do not match.
    """
    check_samples(samples)
    if sample_ids is not None and len(sample_ids) != len(samples):
        raise MmqError(
            f"sample_ids: expected one per sample ({len(samples)}), got {len(sample_ids)}"
        )
    stacks = {stack.name for stack in architecture_of(model).stacks}
    used = samples[: recipe.calibration.samples]
    rows = split_samples(used, encoder_decoder="encoder" in stacks)
    device = device_of(model)
    return [
        {name: x.to(device) for name, x in batch.items()}
        for batch in micro_batches(rows, MICRO_BATCH)
    ]


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
