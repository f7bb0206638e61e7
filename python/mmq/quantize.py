# SPDX-License-Identifier: Apache-2.0
"""Quantizing a model in place: vision, connector, language; block by block; stage by stage.

Inside a block, scales come first (AWQ): they are searched on the block as it is, for consumers
before their producers are rounded, and put into norms and producers, which leaves the block's
function as it was. Then each stage is rounded on the inputs that the rounded stages before it
produce, and the block's outputs with rounded weights are the next block's inputs.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mmq.correction import corrects, paired_inputs, without_correction
from mmq.device import device_of
from mmq.errors import MmqError
from mmq.hessian import InputStats
from mmq.linear import QuantLinear
from mmq.manifest import DenseRecord, LinearRecord, Manifest, component_totals, versions
from mmq.methods import quantize_weight
from mmq.models import LinearUnit, architecture_of, blocks_of, unlisted_linears
from mmq.place import Packed, Place
from mmq.plan import LayerPlan, Plan, plan
from mmq.prepare import batches_of, check_calibration, check_weights
from mmq.recipe import Recipe
from mmq.records import record_of
from mmq.report import Report
from mmq.samples import Sample
from mmq.scaling import Member, Scaling, dense_linear, scale_block, scale_head
from mmq.stored import account
from mmq.tokens import Gradients, block_gradients, token_weights
from mmq_ext import cpu_isa

LOGGER: Final = logging.getLogger(__name__)


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
    check_weights(model, decided)
    device_of(model)  # Refuses a model on two devices.
    batches = batches_of(model, decided, samples, sample_ids)
    check_calibration(model, decided, batches)
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
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.architecture = architecture_of(self.model)
        self.chosen = self.plan.quantized()
        self.total = len(self.chosen)
        self._weights_done = 0
        self._weights_total = sum(unit.weights for unit, _ in self.chosen)
        self._calibration = self.plan.recipe.calibration
        self._gradients: Gradients = {}

    @property
    def _from_full(self) -> bool:
        return self._calibration.upstream == "full"

    @property
    def _needs_full(self) -> bool:
        """Whether the activations of the unquantized model are kept beside the quantized ones."""
        return self._from_full or self._calibration.token_weights == "qig" or corrects(self.chosen)

    def all_stacks(self) -> None:
        """Everything, in the order of calibration."""
        kept: dict[str, list[Call]] = {}
        heads: dict[str, InputStats] = {}
        if self.batches is not None and self._needs_full:
            for stack in self.architecture.stacks:
                if self._members(stack):
                    kept[stack.name] = capture(self.model, self.architecture, stack, self.batches)
        if self.batches is not None and self._from_full:
            paths = [unit.path for unit, _ in self.chosen if unit.block is None]
            heads = self._head_inputs(paths)
        if self.batches is not None and self._calibration.token_weights in ("modality", "grad"):
            self._gradients = block_gradients(self.model, self.architecture, self.batches)
        for stack in self.architecture.stacks:
            if self._members(stack):
                self._stack(stack, kept.pop(stack.name, None))
            for unit, layer in self.chosen:
                if unit.stack == stack.name and unit.block is None:
                    found = heads or self._head_inputs([unit.path])
                    stats = found.get(unit.path)
                    scaling = scale_head(self.model, unit, layer, stats)
                    self._keep(self._pack(unit, layer, stats, scaling))

    def _members(self, stack: Stack) -> list[Member]:
        return [
            (unit, layer)
            for unit, layer in self.chosen
            if unit.stack == stack.name and unit.block is not None
        ]

    def _stack(self, stack: Stack, full: list[Call] | None) -> None:
        """Block by block; ``full`` are the unquantized model's calls, where they are needed."""
        by_block: dict[int, list[Member]] = {}
        for unit, layer in self._members(stack):
            assert unit.block is not None
            by_block.setdefault(unit.block, []).append((unit, layer))
        if self.batches is None:
            for members in by_block.values():
                for unit, layer in members:
                    self._keep(self._pack(unit, layer, None, None))
            return
        calls = full if full is not None and self._from_full else None
        if calls is None:
            calls = capture(self.model, self.architecture, stack, self.batches)
        last = max(by_block)
        for index, block in enumerate(blocks_of(self.model, stack)):
            members = by_block.get(index, [])
            following: list[Call] = []
            if full is not None and (index < last or not self._from_full):
                following = [advance(stack, call, run_block(block, call)) for call in full]
            if members:
                place = Place(stack, index, block, calls, full or [], following)
                self._block(place, members)
            if index == last:
                return
            if not self._from_full:
                calls = [advance(stack, call, run_block(block, call)) for call in calls]
            else:
                calls = following
            full = None if full is None else following

    def _block(self, place: Place, members: list[Member]) -> None:
        weights = self._token_weights(place, members)
        scalings = self._scale(place, members, weights)
        if not corrects(members):
            for packed in self._stages(place, members, scalings, weights):
                self._keep(packed)
            return
        # Twice: plainly, and corrected on top of the same dense linears; the better one stays.
        seen, held = place.split(self._calibration.held_out)
        if weights is not None:
            weights = [weights[i] for i in seen.numbers]
        dense = {unit.path: dense_linear(self.model, unit.path) for unit, _ in members}
        plain_members = [(unit, without_correction(layer)) for unit, layer in members]
        twin = copy.deepcopy(place.block)
        plain = list(self._stages(seen, plain_members, scalings, weights))
        plain_error = held.error()
        for path, linear in dense.items():
            self.model.set_submodule(path, linear)
        corrected = list(self._stages(seen, members, scalings, weights, twin))
        error = held.error()
        better = error < plain_error
        self.notes.append(
            f"{place.path}: correction {'kept' if better else 'left out'}, held-out error "
            f"{error:.4g} with it, {plain_error:.4g} without"
        )
        for packed in corrected if better else plain:
            self.model.set_submodule(packed.unit.path, packed.module)
            self._keep(packed)

    def _token_weights(self, place: Place, members: list[Member]) -> list[Tensor] | None:
        """By call [rows, tokens], None where every token counts 1."""
        kind = self._calibration.token_weights
        if kind == "none" or self.batches is None:
            return None
        weights = token_weights(
            kind, self.model, self.architecture, place, members, self.batches, self._gradients
        )
        if weights is None:
            self.notes.append(f"{place.path}: no label depends on it, so that tokens count 1")
            return None
        values = torch.cat([part.flatten() for part in weights])
        low, high = float(values.min()), float(values.max())
        self.notes.append(f"{place.path}: {kind} token weights from {low:.3g} to {high:.3g}")
        return weights

    def _stages(
        self,
        place: Place,
        members: list[Member],
        scalings: Mapping[str, Scaling],
        weights: list[Tensor] | None,
        twin: nn.Module | None = None,
    ) -> Iterator[Packed]:
        """Quantizes the linears stage by stage and puts the packed ones in their places. With
        ``twin``, the block in full precision, GPTQ is corrected."""
        max_tokens = self._calibration.max_tokens
        stages = sorted({unit.stage for unit, _ in members})
        step_by_step = self._calibration.true_sequential and not self._from_full
        for stage_set in [{stage} for stage in stages] if step_by_step else [set(stages)]:
            part = [(unit, layer) for unit, layer in members if unit.stage in stage_set]
            units = [unit for unit, _ in part]
            if twin is None:
                found = block_inputs(
                    self.model, place.block, units, place.calls, max_tokens, weights
                )
                inputs: Mapping[str, tuple[InputStats, Tensor | None]] = {
                    group: (stats, None) for group, stats in found.items()
                }
            else:
                inputs = paired_inputs(
                    place.block,
                    twin,
                    place.path,
                    units,
                    place.calls,
                    place.full,
                    max_tokens,
                    weights,
                )
            for unit, layer in part:
                stats, asymmetry = inputs[unit.input_group]
                yield self._pack(unit, layer, stats, scalings.get(unit.path), asymmetry)

    def _head_inputs(self, paths: Sequence[str]) -> dict[str, InputStats]:
        if self.batches is None or not paths:
            return {}
        units = [unit for unit, _ in self.chosen if unit.path in paths]
        return head_inputs(
            self.model, self.architecture, units, self.batches, self._calibration.max_tokens
        )

    def _scale(
        self, place: Place, members: list[Member], weights: list[Tensor] | None
    ) -> dict[str, Scaling]:
        units = [unit for unit, layer in members if layer.method == "awq"]
        if not units:
            return {}
        max_tokens = self._calibration.max_tokens
        inputs = block_inputs(self.model, place.block, units, place.calls, max_tokens, weights)
        return scale_block(self.model, self.plan, members, inputs)

    def _pack(
        self,
        unit: LinearUnit,
        layer: LayerPlan,
        stats: InputStats | None,
        scaling: Scaling | None,
        asymmetry: Tensor | None = None,
    ) -> Packed:
        """Quantizes one linear and puts the packed one in its place."""
        linear = dense_linear(self.model, unit.path)
        packed, report = quantize_weight(linear.weight, unit, layer, stats, scaling, asymmetry)
        module = QuantLinear.replacing(linear, packed)
        self.model.set_submodule(unit.path, module)
        record = record_of(unit, layer, report, module, stats, scaling)
        return Packed(unit, layer, module, report, record)

    def _keep(self, packed: Packed) -> None:
        """Records and reports a linear that stays as it is now."""
        self.records.append(packed.record)
        self._report_progress(packed.unit, packed.layer, packed.report)

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
        notes=[*run.plan.coverage.notes, *run.notes],
    )
