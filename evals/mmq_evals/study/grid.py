# SPDX-License-Identifier: Apache-2.0
"""A study: grids of settings as YAML or JSON, and the recipes that they stand for.

    name: three-parts
    models: [tiny-blip2-caption]            # built-in names or folders
    tasks: [captioning]                     # default: all that fit a model
    limits: {captioning: 250}               # items per task; default: all
    recipe: {calibration: {samples: 64, upstream: full}}   # what every run begins with
    methods:                                # settings that go with a method wherever it is chosen
      rtn: {group_size: 64}
      gptq: {group_size: 64}
    grids:
      - axes:                               # every combination
          method: [rtn, gptq]
          vision: [2, 4, 16]                # a selector: the width of what it selects
          language.end.mlp: [3, 16]
        zip:                                # axes that go together, as one
          - {connector: [4, 8], group_size: [64, 32]}
        sample: 10                          # a random subset of that size, drawn by seed
      - runs:                               # or a list
          - {method: rtn, vision: 3, language: {bits: 4, method: gptq}}

An axis is named by what it sets:

- a selector, made of a component, a third and a layer type in any order, such as ``vision``,
  ``language.front`` or ``mlp``. Its levels are widths (16 is untouched), mappings of settings, or
  on and off: on is the width of the axis ``bits``.
- a selector and a key of its settings, such as ``language:method``.
- a key of the settings (``method``, ``bits``, ``group_size``, ``zero``, ...), for all selectors;
  for every linear of the model where no selector is among the axes.
- ``layer_type`` (attention, mlp or both), which narrows all selectors.
- ``seed`` or a key of the calibration, such as ``calibration.upstream``.

What no axis selects stays as the study's recipe says, untouched by default.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, cast, get_args

from pydantic import Field, field_validator

from mmq.architectures import COMPONENTS, Component, LayerType
from mmq.errors import MmqError
from mmq.models import Third
from mmq.recipe import (
    UNTOUCHED_BITS,
    Calibration,
    LayerSettings,
    Method,
    Recipe,
    merge,
    parse_recipe,
)
from mmq.schema import Strict, parse_text, read_text, validated
from mmq_evals.errors import EvalError
from mmq_evals.tasks.build import TASKS

Level = Any
Levels = dict[str, Level]

SHIPPED: Final = Path(__file__).parent / "grids"
_SETTINGS: Final = tuple(LayerSettings.model_fields)
_CALIBRATION: Final = tuple(f"calibration.{key}" for key in Calibration.model_fields)
_LAYER_TYPES: Final[dict[str, LayerType | None]] = {
    "attention": "attention",
    "mlp": "mlp",
    "both": None,
}


class Grid(Strict):
    """One grid; see the module's head. ``models``, ``tasks``, ``recipe`` and ``methods`` are those
    of the study where they are left out. ``nonempty`` leaves out settings whose selectors are all
    off."""

    name: str | None = None
    models: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    recipe: dict[str, Any] | None = None
    methods: dict[Method, LayerSettings] | None = None
    axes: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    zip: tuple[dict[str, tuple[Any, ...]], ...] = ()
    runs: tuple[dict[str, Any], ...] = ()
    sample: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    nonempty: bool = False


class Study(Strict):
    """A whole file; see the module's head. ``seed`` is that of the bootstrap. ``logits``: whether
    those of full precision are compared, for which a second, dense model is held."""

    name: str
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    data: str = "tiny"
    split: str = "test"
    limits: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 32
    seed: Annotated[int, Field(ge=0)] = 0
    logits: bool = True
    recipe: dict[str, Any] = Field(default_factory=dict)
    methods: dict[Method, LayerSettings] = Field(default_factory=dict)
    grids: Annotated[tuple[Grid, ...], Field(min_length=1)]

    @field_validator("grids")
    @classmethod
    def _check_names(cls, grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
        names = [grid.name for grid in grids if grid.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"expected different names, got {', '.join(names)}")
        return grids


@dataclass(frozen=True)
class Setting:
    """One point of a grid: the level of every axis, and the recipe that they make."""

    grid: str
    levels: Levels
    recipe: Recipe


@dataclass(frozen=True)
class Selector:
    """The linears of an axis: those that meet all parts that are given."""

    component: Component | None = None
    third: Third | None = None
    layer_type: LayerType | None = None

    def overlaps(self, other: Selector) -> bool:
        """Whether some linear may meet both."""
        pairs: tuple[tuple[str | None, str | None], ...] = (
            (self.component, other.component),
            (self.third, other.third),
            (self.layer_type, other.layer_type),
        )
        return all(one is None or two is None or one == two for one, two in pairs)

    def keys(self) -> dict[str, str]:
        """The selector keys of an override."""
        given = (("component", self.component), ("third", self.third))
        found = {name: value for name, value in given if value is not None}
        return found | ({} if self.layer_type is None else {"layer_type": self.layer_type})


def load_study(source: str | Path) -> Study:
    """Reads a study: a file, or the name of one that is shipped.

    Raises MmqError that begins with the path.
    """
    path = Path(source)
    shipped = SHIPPED / f"{source}.yaml"
    if not path.suffix and not path.exists():
        if not shipped.is_file():
            names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
            raise EvalError(f"grid: expected a file or one of {names}, got {str(source)!r}")
        path = shipped
    text = read_text(path, "grid")
    try:
        return parse_study(text)
    except MmqError as error:
        raise EvalError(f"{path}: {error}") from error


def parse_study(source: str | Mapping[str, Any]) -> Study:
    """A study from YAML or JSON text, or from plain data.

    Raises MmqError with every wrong key in one line; EvalError for tasks that nobody knows, and for
    grids that are empty or whose axes overlap.
    """
    data = parse_text(source, "grid") if isinstance(source, str) else source
    if not isinstance(data, Mapping):
        raise EvalError(f"grid: expected a mapping, got {type(data).__name__}")
    study = validated(Study, data)
    named = [*(study.tasks or ()), *(task for grid in study.grids for task in grid.tasks or ())]
    named += list(study.limits) if isinstance(study.limits, dict) else []
    for task in named:
        if task not in TASKS:
            raise EvalError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    for index, grid in enumerate(study.grids):
        settings_of(study, grid, grid.name or str(index), check_only=True)
    return study


def expand(study: Study) -> Iterator[tuple[Grid, list[Setting]]]:
    """Every grid with its settings, in order: the last axis varies fastest.

    Raises EvalError for a setting whose recipe contradicts itself.
    """
    for index, grid in enumerate(study.grids):
        yield grid, settings_of(study, grid, grid.name or str(index))


def settings_of(study: Study, grid: Grid, name: str, *, check_only: bool = False) -> list[Setting]:
    """The settings of one grid; with ``check_only`` the recipes are not made."""
    where = f"grid {name}"
    groups = [*({axis: levels} for axis, levels in grid.axes.items()), *grid.zip]
    if not groups and not grid.runs:
        raise EvalError(f"{where}: expected axes, zip or runs, got none")
    names = [axis for group in groups for axis in group]
    _check_axes(where, names)
    for group in groups:
        _check_levels(where, group)
    for run in grid.runs:
        _check_axes(where, list(run))
        for axis, level in run.items():
            _check_level(where, axis, level)
    points = [
        {axis: level for part in point for axis, level in part.items()}
        for point in itertools.product(*map(_together, groups))
        if groups
    ]
    points = [point for point in points if not (grid.nonempty and _all_off(point))]
    if grid.sample is not None:
        if grid.sample > len(points):
            raise EvalError(f"{where}: sample: expected at most {len(points)}, got {grid.sample}")
        chosen = random.Random(grid.seed).sample(range(len(points)), grid.sample)
        points = [points[index] for index in sorted(chosen)]
    points += [dict(run) for run in grid.runs]
    if not points:
        raise EvalError(f"{where}: expected at least one setting, got none")
    if check_only:
        return []
    base = study.recipe if grid.recipe is None else {**study.recipe, **grid.recipe}
    methods = {**study.methods, **(grid.methods or {})}
    found = []
    for point in points:
        try:
            found.append(Setting(name, point, _recipe(base, methods, point)))
        except MmqError as error:
            raise EvalError(f"{where}, {json.dumps(point)}: {error}") from error
    return found


def selector_of(axis: str) -> Selector | None:
    """The selector that an axis names, None where it names a setting."""
    name, _, key = axis.partition(":")
    if not key and (axis in _SETTINGS or axis in _CALIBRATION or axis in ("layer_type", "seed")):
        return None
    parts: dict[str, str] = {}
    kinds: dict[str, Sequence[str]] = {
        "component": COMPONENTS,
        "third": get_args(Third),
        "layer_type": ("attention", "mlp"),
    }
    for word in name.split("."):
        kind = next((kind for kind, words in kinds.items() if word in words), None)
        if kind is None or kind in parts or (key and key not in _SETTINGS):
            raise EvalError(
                f"axis {axis!r}: expected a selector of {', '.join(COMPONENTS)}, front, middle, "
                f"end, attention and mlp, each kind once, or a setting of layer_type, seed, "
                f"{', '.join((*_SETTINGS, *_CALIBRATION))}"
            )
        parts[kind] = word
    return Selector(
        cast(Component | None, parts.get("component")),
        cast(Third | None, parts.get("third")),
        cast(LayerType | None, parts.get("layer_type")),
    )


def finer_selectors(levels: Levels) -> list[str]:
    """The axes of a setting that select less than a component, or parts of several."""
    return [
        axis
        for axis in levels
        if ":" not in axis and axis not in COMPONENTS and selector_of(axis) is not None
    ]


def _together(group: Mapping[str, Sequence[Level]]) -> list[Levels]:
    """The axes of a zip, level by level; a single axis is a zip of one."""
    return [dict(zip(group, levels, strict=True)) for levels in zip(*group.values(), strict=True)]


def _all_off(point: Levels) -> bool:
    chosen = [level for axis, level in point.items() if selector_of(axis) and ":" not in axis]
    return all(level is False for level in chosen)


def _check_axes(where: str, axes: Sequence[str]) -> None:
    if len(set(axes)) < len(axes):
        raise EvalError(f"{where}: expected different axes, got {', '.join(axes)}")
    try:
        selectors = {axis: selector_of(axis) for axis in axes}
    except EvalError as error:
        raise EvalError(f"{where}: {error}") from None
    plain = {axis: found for axis, found in selectors.items() if found and ":" not in axis}
    for (one, first), (two, second) in itertools.combinations(plain.items(), 2):
        if first.overlaps(second):
            raise EvalError(f"{where}: axes {one} and {two} overlap: a linear may be in both")
    for axis in axes:
        if ":" in axis and axis.partition(":")[0] not in plain:
            raise EvalError(f"{where}: axis {axis}: expected an axis {axis.partition(':')[0]}, too")


def _check_levels(where: str, group: Mapping[str, Sequence[Level]]) -> None:
    lengths = {axis: len(levels) for axis, levels in group.items()}
    if not lengths or 0 in lengths.values():
        empty = next((axis for axis, count in lengths.items() if count == 0), "zip")
        raise EvalError(f"{where}: {empty}: expected at least one level, got none")
    if len(set(lengths.values())) > 1:
        raise EvalError(f"{where}: zip: expected equally many levels, got {lengths}")
    points = [json.dumps(levels) for levels in zip(*group.values(), strict=True)]
    for axis, levels in group.items():
        for level in levels:
            _check_level(where, axis, level)
    if len(set(points)) < len(points):
        raise EvalError(f"{where}: {', '.join(group)}: expected different levels")


def _check_level(where: str, axis: str, level: Level) -> None:
    expected = None
    if selector_of(axis) is not None and ":" not in axis:
        if isinstance(level, Mapping):
            validated(LayerSettings, level)
        elif not isinstance(level, int):
            expected = "a width, on, off, or a mapping of settings"
    elif axis == "layer_type" and level not in _LAYER_TYPES:
        expected = f"one of {', '.join(_LAYER_TYPES)}"
    if expected is not None:
        raise EvalError(f"{where}: {axis}: expected {expected}, got {json.dumps(level)}")


def _recipe(
    base: Mapping[str, Any], methods: Mapping[Method, LayerSettings], point: Levels
) -> Recipe:
    """The recipe of one setting: ``base``, and a section or an override for each selector."""
    recipe: dict[str, Any] = json.loads(json.dumps(base))
    for axis, level in point.items():
        if axis == "seed":
            recipe["seed"] = level
        elif axis in _CALIBRATION:
            calibration = {**recipe.get("calibration", {}), axis.partition(".")[2]: level}
            recipe["calibration"] = calibration
    common = {axis: level for axis, level in point.items() if axis in _SETTINGS}
    width = common.pop("bits", None)
    narrowed = _LAYER_TYPES[point.get("layer_type", "both")]
    selectors = {
        axis: selector
        for axis in point
        if ":" not in axis and (selector := selector_of(axis)) is not None
    }
    overrides = list(recipe.pop("overrides", ()))
    for axis, selector in selectors.items():
        level = point[axis]
        given: dict[str, Any] = {} if width is None else {"bits": width}
        if level is False:
            given = {"bits": UNTOUCHED_BITS}
        elif level is True and width is None:
            raise EvalError(f"{axis}: expected an axis bits beside the level on")
        elif isinstance(level, Mapping):
            given |= level
        elif level is not True:
            given = {"bits": level}
        own = {
            name.partition(":")[2]: value
            for name, value in point.items()
            if name.startswith(f"{axis}:")
        }
        settings = _settings(methods, {**common, **given, **own})
        if selector == Selector(selector.component) and narrowed is None:
            section = LayerSettings.model_validate(recipe.get(axis, {}))
            merged = merge([section, LayerSettings.model_validate(settings)])
            recipe[axis] = merged.model_dump(exclude_none=True)
            continue
        if selector.layer_type is not None and narrowed not in (None, selector.layer_type):
            raise EvalError(f"{axis}: expected a selector within layer_type {narrowed}")
        kind = {} if narrowed is None else {"layer_type": narrowed}
        overrides.append({**selector.keys(), **kind, **settings})
    if not selectors:
        settings = _settings(methods, {**common, **({} if width is None else {"bits": width})})
        if narrowed is not None:
            overrides.append({"layer_type": narrowed, **settings})
        elif settings:
            section = LayerSettings.model_validate(recipe.get("all", {}))
            merged = merge([section, LayerSettings.model_validate(settings)])
            recipe["all"] = merged.model_dump(exclude_none=True)
    return parse_recipe({**recipe, **({"overrides": overrides} if overrides else {})})


def _settings(methods: Mapping[Method, LayerSettings], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over what goes with its method; nothing but the width where that is 16."""
    if given.get("bits") == UNTOUCHED_BITS or given.get("method") == "none":
        return {"bits": UNTOUCHED_BITS}
    layers = [methods[given["method"]]] if given.get("method") in methods else []
    layers.append(validated(LayerSettings, given))
    return merge(layers).model_dump(exclude_none=True)
