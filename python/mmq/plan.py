# SPDX-License-Identifier: Apache-2.0
"""A recipe applied to a model: one decision per linear, and a report of what matched what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmq.architectures import COMPONENTS, Component
from mmq.errors import MmqError
from mmq.models import LinearUnit, resolve
from mmq.options import AwqOptions, GptqOptions
from mmq.recipe import (
    DEFAULT_METHOD,
    LayerSettings,
    Method,
    Override,
    Recipe,
    awq_options,
    gptq_options,
    merge,
    spec_of,
)
from mmq.spec import QuantSpec


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one linear. ``spec`` is None exactly where ``method`` is "none"; ``reason``
    then says why it stays dense."""

    method: Method
    spec: QuantSpec | None = None
    gptq: GptqOptions = field(default_factory=GptqOptions)
    awq: AwqOptions = field(default_factory=AwqOptions)
    reason: str = ""


@dataclass(frozen=True)
class Match:
    """A selector of the recipe with the number of linears that it selects."""

    selector: str
    linears: int


@dataclass(frozen=True)
class Coverage:
    """What a recipe does to a model, for people and for the manifest.

    ``quantized`` counts linears per component and method, ``dense`` gives (path, reason) of all
    others, ``notes`` what a reader should know.
    """

    matches: tuple[Match, ...]
    quantized: dict[str, dict[str, int]]
    dense: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """``layers`` in the order of calibration, dense ones included, and the coverage report."""

    recipe: Recipe
    layers: tuple[tuple[LinearUnit, LayerPlan], ...]
    coverage: Coverage

    def quantized(self) -> list[tuple[LinearUnit, LayerPlan]]:
        """The layers that do not stay dense."""
        return [(unit, layer) for unit, layer in self.layers if layer.spec is not None]

    def only(self, component: Component) -> Plan:
        """The plan with every other component dense; the recipe and its report are the same."""
        dense = LayerPlan("none", reason="of another part")
        layers = tuple(
            (unit, layer if unit.component == component else dense) for unit, layer in self.layers
        )
        return replace(self, layers=layers)


def plan(recipe: Recipe, model: nn.Module) -> Plan:
    """Decides for every linear of ``model``.

    A component of heads alone, such as LLaVA's projector, is selected by its section, unless the
    recipe lists some of its heads.

    Raises MmqError for an unsupported model, a section, override or head that selects no linear, a
    tied head without ``untie_heads``, and settings that contradict each other on some linear.
    """
    return plan_units(recipe, resolve(model))


def plan_units(recipe: Recipe, units: Sequence[LinearUnit]) -> Plan:
    """:func:`plan` of a model whose linears are resolved already."""
    listed = _selected_heads(recipe, units)
    heads = listed | _implied_heads(recipe, units, listed)
    candidates = [unit for unit in units if unit.layer_type != "head" or unit.path in heads]
    matches = [
        Match(f"heads: {pattern}", sum(fnmatchcase(path, pattern) for path in heads))
        for pattern in recipe.heads
    ]
    for component in COMPONENTS:
        if recipe.section(component) is not None:
            count = sum(unit.component == component for unit in candidates)
            if count == 0:
                present = [name for name in COMPONENTS if any(u.component == name for u in units)]
                raise MmqError(
                    f"{component}: expected a section of a component that the model has, "
                    f"{' or '.join(present)}"
                )
            matches.append(Match(component, count))
    chosen: dict[str, list[Override]] = {unit.path: [] for unit in candidates}
    for index, override in enumerate(recipe.overrides):
        selected = [unit for unit in candidates if _is_selected(override, unit)]
        label = _label(index, override)
        if not selected:
            raise MmqError(
                f"{label}: expected at least one linear, it selects none"
                + _head_hint([unit for unit in units if _is_selected(override, unit)])
            )
        matches.append(Match(label, len(selected)))
        for unit in selected:
            chosen[unit.path].append(override)
    layers = tuple(
        (unit, _decide(recipe, unit, chosen[unit.path]))
        if unit.path in chosen
        else (unit, LayerPlan("none", reason="head, not selected"))
        for unit in units
    )
    notes = [
        f"{unit.path}: a head, selected by the section {unit.component}"
        for unit in units
        if unit.path in heads - listed
    ]
    return Plan(recipe, layers, _coverage(recipe, layers, tuple(matches), notes))


def _decide(recipe: Recipe, unit: LinearUnit, overrides: list[Override]) -> LayerPlan:
    base = [s for s in (recipe.all, recipe.section(unit.component)) if s is not None]
    settings: list[LayerSettings] = [*base, *overrides]
    if not settings:
        if unit.layer_type == "head":
            raise MmqError(
                f"heads: {unit.path} is selected, but the recipe has no settings for it; expected "
                f"a section {unit.component}, all, or an override"
            )
        return LayerPlan("none", reason="not in the recipe")
    merged = merge(settings)
    try:
        spec, gptq = spec_of(merged), gptq_options(merged)
        awq = replace(awq_options(merged), seed=recipe.seed)
    except MmqError as error:
        raise MmqError(f"{unit.path}: {error}") from error
    if spec is None:
        reason = "method none" if merged.method == "none" else "16 bits"
        return LayerPlan("none", reason=reason)
    if recipe.skip_unreachable and not unit.reaches_output:
        return LayerPlan("none", reason="no output depends on it")
    if unit.tied and not recipe.untie_heads:
        raise MmqError(
            f"{unit.path}: expected untie_heads: true to quantize a weight that an embedding shares"
        )
    return LayerPlan(merged.method or DEFAULT_METHOD, spec, gptq, awq)


def _selected_heads(recipe: Recipe, units: Sequence[LinearUnit]) -> set[str]:
    heads = [unit.path for unit in units if unit.layer_type == "head"]
    selected: set[str] = set()
    for pattern in recipe.heads:
        found = {path for path in heads if fnmatchcase(path, pattern)}
        if not found:
            raise MmqError(f"heads: expected {pattern!r} to match one of {', '.join(heads)}")
        selected |= found
    return selected


def _is_selected(override: Override, unit: LinearUnit) -> bool:
    patterns = (override.match,) if isinstance(override.match, str) else override.match
    blocks = override.blocks()
    return (
        (patterns is None or any(fnmatchcase(unit.path, pattern) for pattern in patterns))
        and override.component in (None, unit.component)
        and override.stack in (None, unit.stack)
        and override.third in (None, unit.third)
        and override.layer_type in (None, unit.layer_type)
        and (blocks is None or unit.block in blocks)
    )


def _label(index: int, override: Override) -> str:
    selectors = ", ".join(f"{name}={value}" for name, value in override.selectors().items())
    return f"overrides.{index} ({selectors})"


def _implied_heads(recipe: Recipe, units: Sequence[LinearUnit], listed: set[str]) -> set[str]:
    """Heads of components that have nothing else and a section; none where some are listed."""
    implied: set[str] = set()
    for component in COMPONENTS:
        mine = [unit for unit in units if unit.component == component]
        paths = {unit.path for unit in mine}
        if recipe.section(component) is not None and not paths & listed:
            implied |= paths if all(unit.layer_type == "head" for unit in mine) else set()
    return implied


def _head_hint(heads: list[LinearUnit]) -> str:
    """What to write so that a selector of nothing but heads takes effect."""
    if not heads:
        return ""
    paths = ", ".join(unit.path for unit in heads)
    return f"; heads are dense unless listed, expected heads: [{paths}] beside it"


def _coverage(
    recipe: Recipe,
    layers: tuple[tuple[LinearUnit, LayerPlan], ...],
    matches: tuple[Match, ...],
    notes: list[str],
) -> Coverage:
    quantized: dict[str, dict[str, int]] = {}
    for unit, layer in layers:
        if layer.spec is not None:
            methods = quantized.setdefault(unit.component, {})
            methods[layer.method] = methods.get(layer.method, 0) + 1
    notes = list(notes)
    skipped = sorted(
        {
            f"{unit.stack} block {unit.block}"
            for unit, layer in layers
            if layer.reason == "no output depends on it"
        }
    )
    if skipped:
        notes.append(f"skipped, because no output depends on them: {', '.join(skipped)}")
    used = {layer.method for _, layer in layers if layer.spec is not None}
    sections = [s for s in (recipe.all, *map(recipe.section, COMPONENTS)) if s is not None]
    for method in ("gptq", "awq"):
        given = any(getattr(s, method) is not None for s in (*sections, *recipe.overrides))
        if given and method not in used:
            notes.append(f"{method} options are given, but no linear is quantized by {method}")
    if not used:
        notes.append("no linear is quantized")
    dense = tuple((unit.path, layer.reason) for unit, layer in layers if layer.spec is None)
    return Coverage(matches, quantized, dense, tuple(notes))
