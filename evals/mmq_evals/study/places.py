# SPDX-License-Identifier: Apache-2.0
"""Where a run of a sweep belongs: among parts of components, among whole ones, or both.

A sweep's row holds the ``levels`` of its axes beside the columns of widths. The width of a
component with several is a mean there, which is no level of any grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmq.architectures import COMPONENTS
from mmq.options import AwqOptions, GptqOptions
from mmq.recipe import Calibration

UNTOUCHED = 16.0
LAYER_TYPES = ("attention", "mlp")
WORDS = frozenset((*COMPONENTS, "front", "middle", "end", *LAYER_TYPES))
# Axes that are columns of the table as well, and those that only say widths.
_COLUMNS = ("method", "group_size", "zero", "clip", "seed", "calibration.upstream")
_WIDTHS = ("bits", "layer_type")
_DEFAULTS = {"gptq": GptqOptions(), "awq": AwqOptions(), "calibration": Calibration()}

Widths = Mapping[str, float]


def levels_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The axes of a sweep's row; empty for other rows, and for full precision."""
    levels = record.get("levels")
    if isinstance(levels, str):
        try:
            levels = json.loads(levels)
        except ValueError:
            return {}
    if not isinstance(levels, Mapping):
        return {}
    # Parquet fills what other rows have with nulls.
    return {axis: level for axis, level in levels.items() if level is not None}


def is_selector(axis: str) -> bool:
    """Whether an axis names linears, such as ``vision`` or ``language.end.mlp``."""
    return ":" not in axis and all(word in WORDS for word in axis.split("."))


def places_of(widths: Widths, levels: Mapping[str, Any]) -> tuple[Widths, ...]:
    """The places of a run with some axes; ``widths`` are its columns of widths.

    A run on whole components has one place; one on parts of them has another if every component has
    one width throughout.
    """
    chosen = {axis: level for axis, level in levels.items() if is_selector(axis)}
    narrowed = levels.get("layer_type", "both")
    suffix = f".{narrowed}" if narrowed in LAYER_TYPES else ""
    whole = {name: width for name, width in widths.items() if name.partition(".")[2] in COMPONENTS}
    if not suffix and all(axis in COMPONENTS for axis in chosen):
        return (whole,)
    parts = {
        f"bits.{axis}" + ("" if suffix[1:] in axis.split(".") else suffix): _width(level, levels)
        for axis, level in chosen.items()
    }
    places: list[Widths] = [parts] if parts else []
    if _even(widths, whole, suffix):
        places.append(whole)
    return tuple(places)


def _width(level: Any, levels: Mapping[str, Any]) -> float:
    if isinstance(level, Mapping):
        level = level.get("bits", levels.get("bits", UNTOUCHED))
    if level is True:
        level = levels.get("bits", UNTOUCHED)
    return UNTOUCHED if level is False else float(level)


def _even(widths: Widths, whole: Widths, suffix: str) -> bool:
    """Whether every component has one width throughout."""
    if suffix:
        return all(width == UNTOUCHED for width in whole.values())
    if any(width != int(width) for width in whole.values()):
        return False
    for name, width in widths.items():
        words = name.removeprefix("bits.").split(".")
        mine = [value for part, value in whole.items() if part.removeprefix("bits.") in words]
        if any(width != value for value in mine or whole.values()):
            return False
    return True


def options_of(levels: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings among the axes for which a table has no column, as text; what is a default anyway
    is no option."""
    found = []
    for axis, value in sorted(levels.items()):
        if axis in (*_COLUMNS, *_WIDTHS) or is_selector(axis):
            continue
        place, colon, setting = axis.rpartition(":")
        owner = setting.partition(".")[0]
        single = [(setting.removeprefix("calibration."), value)]
        # Parquet fills what other rows have with nulls.
        found += [
            f"{place + ' ' if colon else ''}{key.replace('_', ' ')} "
            + (level if isinstance(level, str) else json.dumps(level, sort_keys=True))
            for key, level in (value.items() if isinstance(value, Mapping) else single)
            if level is not None and level != getattr(_DEFAULTS.get(owner), key, None)
        ]
    return tuple(found)
