# SPDX-License-Identifier: Apache-2.0
"""What each width would cost each linear of a recipe: the table that ``mmq.allocate`` reads.

Every linear is quantized at every width by the recipe's method, on the inputs of the unquantized
model (so that linears are independent), and its output error is measured on those inputs; nothing
is changed in the model. On request the errors are weighted by the Fisher information of the
outputs, which estimates the KL divergence of the model's predictions; or each quantized linear
alone is put into the model and that divergence is measured; or both, each where it serves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mmq.calibrate import (
    advance,
    block_inputs,
    calibrating,
    capture,
    head_inputs,
    replaced_weights,
    run_block,
)
from mmq.error_table import LARGE, Choice, ErrorTable, Objective, UnitErrors
from mmq.errors import MmqError
from mmq.hessian import InputStats
from mmq.linear import Layout
from mmq.methods import quantize_weight
from mmq.models import LinearUnit, architecture_of, blocks_of
from mmq.outputs import OutputDivergence, gradient_energies
from mmq.packed import PackedWeight
from mmq.plan import LayerPlan, Plan, plan
from mmq.prepare import calibration_batches
from mmq.recipe import UNTOUCHED_BITS, Recipe
from mmq.samples import Sample
from mmq.scaling import Member, dense_linear, run_time_scales
from mmq.spec import BITS

Bank = dict[tuple[str, int], PackedWeight]


def measure_errors(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    bits: Sequence[int],
    *,
    objectives: Sequence[Objective] = ("mixed",),
    file: Path | None = None,
    bank: Bank | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ErrorTable:
    """The errors of every linear that ``recipe`` quantizes, at every width of ``bits``.

    Args:
      model: a supported dense model; as before on return.
      recipe: gives the linears, the method, the grid and the number of samples; its widths do not
        matter, but for 16, which leaves a linear out.
      samples: model inputs, as for ``mmq.quantize``.
      bits: 2 to 8, and 16 for linears that may stay as they are.
      objectives: what must be found: ``fisher`` needs :func:`mmq.outputs.gradient_energies`, ``kl``
        a pass over the samples per linear and width, ``mixed`` the first, and the passes where
        errors are large; the others come with every table.
      file: a table to go on with and to write after every block; what it holds is not measured
        again.
      bank: filled with every packed weight; then all of them are computed, whatever ``file`` holds.
      progress: called with a path, and the linears done and in all.

    Raises MmqError for widths that do not exist, a recipe without linears, a file of another model,
    recipe or samples, and as ``mmq.quantize``.
    """
    widths = checked_widths(bits)
    decided = plan(recipe, model)
    if not decided.quantized():
        raise MmqError("recipe: expected at least one linear to quantize, got none")
    batches = calibration_batches(model, recipe, samples)
    setup = {
        "model_class": type(model).__name__,
        "recipe": recipe.to_dict(),
        "samples": _digest(tensor for batch in batches for _, tensor in sorted(batch.items())),
    }
    for objective in objectives:
        if objective not in get_args(Objective):
            known = ", ".join(get_args(Objective))
            raise MmqError(f"objective: expected one of {known}, got {objective!r}")
    work = _Work(model, decided, batches, widths, objectives, setup, file, bank, progress)
    work.start(file)
    missing = work.missing()
    if missing:
        with calibrating(model):
            if not {"fisher", "mixed"}.isdisjoint(objectives):
                paths = [unit.path for unit, _ in work.members]
                work.energies = gradient_energies(
                    model, work.architecture, batches, paths, seed=recipe.seed
                )
            if not {"kl", "mixed"}.isdisjoint(objectives):
                work.divergence = OutputDivergence(model, work.architecture, batches)
            work.all_stacks(missing)
    return work.table()


@dataclass(eq=False)
class _Work:
    """One table under way."""

    model: nn.Module
    plan: Plan
    batches: list[dict[str, Tensor]]
    widths: tuple[int, ...]
    objectives: Sequence[Objective]
    setup: dict[str, Any]
    file: Path | None
    bank: Bank | None
    progress: Callable[[str, int, int], None] | None
    energies: dict[str, Tensor] = field(default_factory=dict)
    divergence: OutputDivergence | None = None

    def __post_init__(self) -> None:
        self.architecture = architecture_of(self.model)
        self.members = self.plan.quantized()
        self.found: dict[str, UnitErrors] = {}

    def start(self, file: Path | None) -> None:
        """Every linear with the choices that ``file`` has, and 16 bits."""
        known: dict[str, UnitErrors] = {}
        if file is not None and file.exists():
            table = ErrorTable.read(file)
            _check_setup(file, table.setup, self.setup)
            known = {unit.path: unit for unit in table.units}
        for unit, _ in self.members:
            weight = _digest([dense_linear(self.model, unit.path).weight])
            old = known.get(unit.path)
            if old is not None and old.weight != weight:
                raise MmqError(f"{file}: expected errors of these weights, {unit.path} differs")
            full = Choice(UNTOUCHED_BITS, 2 * unit.weights, 0.0, 0.0, 0.0, 0.0)
            self.found[unit.path] = UnitErrors(
                unit.path,
                unit.component,
                unit.stack,
                unit.block,
                unit.layer_type,
                unit.n,
                unit.k,
                unit.input_group,
                weight,
                (full,) if old is None else old.choices,
            )

    def table(self) -> ErrorTable:
        """What there is, with the widths that were asked for."""
        units = [
            replace(unit, choices=tuple(c for c in unit.choices if c.bits in self.widths))
            for unit in self.found.values()
        ]
        return ErrorTable(self.setup, tuple(units))

    def missing(self) -> list[Member]:
        """The linears with something to measure."""

        def is_done(path: str) -> bool:
            good = {
                c.bits
                for c in self.found[path].choices
                if all(c.error(objective) is not None for objective in self.objectives)
            }
            return self.bank is None and good >= set(self.widths) - {UNTOUCHED_BITS}

        return [(unit, layer) for unit, layer in self.members if not is_done(unit.path)]

    def all_stacks(self, missing: list[Member]) -> None:
        """Block by block, on the inputs of the unquantized model."""
        done = len(self.members) - len(missing)
        max_tokens = self.plan.recipe.calibration.max_tokens
        for members, inputs in self._parts(missing, max_tokens):
            for unit, choice in self._choices(members, inputs):
                self._add(unit, choice)
            done += len(members)
            if self.file is not None:
                ErrorTable(self.setup, tuple(self.found.values())).save(self.file)
            if self.progress is not None:
                self.progress(members[-1][0].path, done, len(self.members))

    def _parts(
        self, missing: list[Member], max_tokens: int | None
    ) -> Iterator[tuple[list[Member], dict[str, InputStats]]]:
        """The linears of a block, or all heads, with the statistics of their inputs."""
        for stack in self.architecture.stacks:
            blocks: dict[int, list[Member]] = {}
            for unit, layer in missing:
                if unit.stack == stack.name and unit.block is not None:
                    blocks.setdefault(unit.block, []).append((unit, layer))
            if not blocks:
                continue
            calls = capture(self.model, self.architecture, stack, self.batches)
            for index, block in enumerate(blocks_of(self.model, stack)):
                members = blocks.get(index, [])
                if members:
                    units = [unit for unit, _ in members]
                    yield members, block_inputs(self.model, block, units, calls, max_tokens)
                if index == max(blocks):
                    break
                calls = [advance(stack, call, run_block(block, call)) for call in calls]
        heads = [(unit, layer) for unit, layer in missing if unit.block is None]
        if heads:
            units = [unit for unit, _ in heads]
            yield heads, head_inputs(self.model, self.architecture, units, self.batches, max_tokens)

    def _choices(
        self, members: list[Member], inputs: Mapping[str, InputStats]
    ) -> Iterator[tuple[LinearUnit, Choice]]:
        for width in self.widths:
            if width == UNTOUCHED_BITS:
                continue
            chosen = [(unit, _at_width(layer, width)) for unit, layer in members]
            scalings = run_time_scales(self.model, self.plan, chosen, inputs)
            for unit, layer in chosen:
                stats = inputs[unit.input_group]
                linear = dense_linear(self.model, unit.path)
                scaling, folds = scalings.get(unit.path, (None, True))
                packed, _ = quantize_weight(linear.weight, unit, layer, stats, scaling)
                if self.bank is not None:
                    self.bank[unit.path, width] = packed
                assert layer.spec is not None, "only quantized linears are listed"
                one_group = layer.spec.groups(unit.k) == 1
                order = layer.gptq.resolve_order(layer.spec, unit.k)
                layout = Layout.planned(
                    layer.spec,
                    unit.n,
                    unit.k,
                    perm=layer.method == "gptq" and order == "act" and not one_group,
                    # Where a reader may stay at 16 bits, nothing can be promised to fold.
                    in_scale=not folds or (scaling is not None and UNTOUCHED_BITS in self.widths),
                )
                effective = packed.effective_weight()
                yield unit, self._choice(unit, layout, linear, effective, stats)

    def _choice(
        self,
        unit: LinearUnit,
        layout: Layout,
        linear: nn.Linear,
        effective: Tensor,
        stats: InputStats,
    ) -> Choice:
        weight = linear.weight.detach().float()
        rows = row_errors(effective - weight, stats.hessian)
        output, total = float(rows.sum()), float(row_errors(weight, stats.hessian).sum())
        energy, kl = self.energies.get(unit.path), None
        relative = output / total if total > 0 else 0.0
        known = [c.kl for c in self.found[unit.path].choices if c.bits == layout.bits]
        asked = "kl" in self.objectives or relative > LARGE
        if self.divergence is not None and asked and known in ([], [None]):
            with replaced_weights({linear: effective}):
                kl = self.divergence()
        return Choice(
            bits=layout.bits,
            stored_bytes=layout.stored_bytes,
            output=output,
            relative=relative,
            fisher=None if energy is None else float(energy @ rows) / 2,
            kl=kl,
        )

    def _add(self, unit: LinearUnit, choice: Choice) -> None:
        """A choice in the place of an older one, whose estimates are kept."""
        entry = self.found[unit.path]
        for old in entry.choices:
            if old.bits == choice.bits:
                choice = replace(
                    choice,
                    fisher=old.fisher if choice.fisher is None else choice.fisher,
                    kl=old.kl if choice.kl is None else choice.kl,
                )
        others = [old for old in entry.choices if old.bits != choice.bits]
        choices = tuple(sorted([*others, choice], key=lambda c: c.bits))
        self.found[unit.path] = replace(entry, choices=choices)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """The mean over tokens of (D x)_i^2 for every row i of D [n, k], float64 [n]."""
    return ((difference @ hessian) * difference).sum(dim=1, dtype=torch.float64) / 2


def _at_width(layer: LayerPlan, bits: int) -> LayerPlan:
    assert layer.spec is not None, "only quantized linears are listed"
    return replace(layer, spec=replace(layer.spec, bits=bits))


def checked_widths(bits: Sequence[int]) -> tuple[int, ...]:
    """Widths in ascending order. Raises MmqError for none, and for one that does not exist."""
    allowed = (*BITS, UNTOUCHED_BITS)
    for width in bits:
        if width not in allowed:
            known = f"{BITS[0]} to {BITS[-1]}, or {UNTOUCHED_BITS}"
            raise MmqError(f"bits: expected {known}, got {width}")
    if not bits:
        raise MmqError("bits: expected at least one width, got none")
    return tuple(sorted(set(bits)))


def _check_setup(file: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in json.loads(json.dumps(new)).items():
        if old.get(name) != value:
            raise MmqError(f"{file}: expected {name} {value}, got {old.get(name)}; measure anew")


def _digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over shapes, types and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
