# SPDX-License-Identifier: Apache-2.0
"""The recipe: what to do with which linear, as YAML or JSON.

    all: {method: gptq, bits: 4}          # every linear of every stack
    vision: {bits: 8}                     # on top of "all", for one component
    overrides:                            # in order, later ones win key by key
      - {component: language, third: end, bits: 3}
      - {match: "*.fc2", group_size: 64}
    heads: ["*language_projection"]       # heads stay dense unless they are listed
    calibration: {samples: 128}
    seed: 0

A component without a section of its own and without ``all`` is left as it is. Every key of a
section may be left out; ``LayerSettings`` states the defaults. ``mmq.plan`` applies a recipe to a
model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, field_validator

from mmq.architectures import COMPONENTS, Component, LayerType
from mmq.errors import MmqError
from mmq.models import Third
from mmq.options import (
    AwqOptions,
    Correction,
    Dead,
    GptqOptions,
    OrderOption,
    Search,
    TokenWeights,
)
from mmq.schema import Strict, parse_text, read_text, validated
from mmq.spec import BITS, Clip, QuantSpec, ScaleDtype, SymmetricRange, Zero

Method = Literal["none", "uniform", "rtn", "gptq", "awq"]
Upstream = Literal["quantized", "full"]

UNTOUCHED_BITS = 16
DEFAULT_METHOD: Method = "gptq"
DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 128

_BLOCK_RANGE = re.compile(r"(\d+)-(\d+)")


class GptqSettings(Strict):
    """Keys of ``gptq``; see ``mmq.options.GptqOptions`` for meanings and defaults."""

    order: OrderOption | None = None
    damp: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    block: Annotated[int, Field(ge=1)] | None = None
    static_groups: bool | None = None
    dead: Dead | None = None
    correction: Correction | None = None
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class AwqSettings(Strict):
    """Keys of ``awq``; see ``mmq.options.AwqOptions`` for meanings and defaults."""

    steps: Annotated[int, Field(ge=1)] | None = None
    weight_aware: bool | None = None
    clip: bool | None = None
    fold: bool | None = None
    search: Search | None = None


class LayerSettings(Strict):
    """What to do with a linear. A key that is None says nothing; the defaults are in brackets.

    - ``method`` [gptq]: none, uniform, rtn, gptq or awq.
    - ``bits`` [4]: 2 to 8, or 16, which leaves the linear as it is.
    - ``group_size`` [128; uniform: -1]: in-features per group, -1 for one group per row.
    - ``zero`` [integer; uniform: float], ``symmetric_range`` [full], ``scale_dtype`` [float16].
    - ``clip`` [mse for rtn and gptq, else none], ``clip_steps`` [100], ``clip_shrink`` [0.8],
      ``clip_exponent`` [2.4]: the range search of the grid. AWQ has its own, ``awq.clip``.
    - ``gptq`` and ``awq``: options of the method; they say nothing for other methods.

    ``uniform`` is round to nearest with one scale for the whole matrix.
    """

    method: Method | None = None
    bits: int | None = None
    group_size: int | None = None
    zero: Zero | None = None
    symmetric_range: SymmetricRange | None = None
    clip: Clip | None = None
    clip_steps: Annotated[int, Field(ge=1)] | None = None
    clip_shrink: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    clip_exponent: Annotated[float, Field(gt=0.0)] | None = None
    scale_dtype: ScaleDtype | None = None
    gptq: GptqSettings | None = None
    awq: AwqSettings | None = None

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int | None) -> int | None:
        if bits is not None and bits not in (*BITS, UNTOUCHED_BITS):
            raise ValueError(f"expected {BITS[0]} to {BITS[-1]}, or {UNTOUCHED_BITS}, got {bits}")
        return bits

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, group_size: int | None) -> int | None:
        if group_size is not None and group_size != -1 and group_size < 1:
            raise ValueError(f"expected a positive number or -1 (per channel), got {group_size}")
        return group_size


class Override(LayerSettings):
    """Settings for the linears that meet all of the selectors given; at least one is needed.

    ``match`` is a glob (or several, any of which may match) on the full module path, in which ``*``
    also matches dots. ``block`` is an index, a range "3-7" (both ends included) or a list of
    indices.
    """

    match: str | tuple[str, ...] | None = None
    component: Component | None = None
    stack: str | None = None
    third: Third | None = None
    layer_type: LayerType | None = None
    block: int | str | tuple[int, ...] | None = None

    @field_validator("block")
    @classmethod
    def _check_block(
        cls, block: int | str | tuple[int, ...] | None
    ) -> int | str | tuple[int, ...] | None:
        if isinstance(block, str):
            found = _BLOCK_RANGE.fullmatch(block)
            if found is None or int(found[1]) > int(found[2]):
                raise ValueError(f"expected an index, a list or a range as 3-7, got {block!r}")
        return block

    def blocks(self) -> frozenset[int] | None:
        """The selected block indices, None for any."""
        if self.block is None:
            return None
        if isinstance(self.block, str):
            first, last = self.block.split("-")
            return frozenset(range(int(first), int(last) + 1))
        return frozenset((self.block,) if isinstance(self.block, int) else self.block)

    def selectors(self) -> dict[str, object]:
        """The selector keys that are given, with their values."""
        return {
            name: value
            for name in SELECTORS
            if (value := cast(object, getattr(self, name))) is not None
        }


SELECTORS = tuple(name for name in Override.model_fields if name not in LayerSettings.model_fields)


class Calibration(Strict):
    """How many samples are seen, and what each block is calibrated on.

    ``upstream="quantized"`` feeds a block what the quantized blocks before it produce, ``"full"``
    the activations of the unquantized model. ``true_sequential`` runs a block again after each of
    its stages. ``max_tokens`` bounds the tokens of one sample that enter the statistics.
    ``token_weights`` says how much each token counts, see ``mmq.tokens``; ``held_out`` is the share
    of the batches that decide, block by block, whether a correction of GPTQ stays.
    """

    samples: Annotated[int, Field(ge=1)] = 128
    upstream: Upstream = "quantized"
    true_sequential: bool = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    token_weights: TokenWeights = "none"
    held_out: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25


class Recipe(Strict):
    """A whole recipe; see the module's head for the form and ``LayerSettings`` for the keys.

    ``heads`` are globs on the paths of linears outside the stacks; ``untie_heads`` must be true to
    quantize one that shares its weight with an embedding. ``skip_unreachable`` leaves blocks dense
    that no output depends on.
    """

    all: LayerSettings | None = None
    vision: LayerSettings | None = None
    connector: LayerSettings | None = None
    language: LayerSettings | None = None
    overrides: tuple[Override, ...] = ()
    heads: tuple[str, ...] = ()
    untie_heads: bool = False
    calibration: Calibration = Calibration()
    seed: Annotated[int, Field(ge=0)] = 0
    skip_unreachable: bool = True

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: tuple[Override, ...]) -> tuple[Override, ...]:
        for index, override in enumerate(overrides):
            if not override.selectors():
                raise ValueError(f"override {index}: expected one of {', '.join(SELECTORS)}")
        return overrides

    @classmethod
    def simple(
        cls,
        method: Method,
        bits: int,
        group_size: int | None = None,
        zero: Zero | None = None,
        clip: Clip | None = None,
        seed: int = 0,
    ) -> Recipe:
        """The same settings for every linear of every stack. Raises MmqError as parsing does."""
        settings = {
            "method": method,
            "bits": bits,
            "group_size": group_size,
            "zero": zero,
            "clip": clip,
        }
        given = {key: value for key, value in settings.items() if value is not None}
        return parse_recipe({"all": given, "seed": seed})

    def section(self, component: Component) -> LayerSettings | None:
        """The section of one component, None where the recipe has none."""
        sections: dict[Component, LayerSettings | None] = {
            "vision": self.vision,
            "connector": self.connector,
            "language": self.language,
        }
        return sections[component]

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the given keys only; ``parse_recipe`` gives an equal recipe back."""
        data = self.model_dump(mode="json", exclude_none=True)
        return {key: value for key, value in data.items() if value not in ([], {})}


def merge(settings: list[LayerSettings]) -> LayerSettings:
    """Later settings over earlier ones, key by key, also inside ``gptq`` and ``awq``."""
    merged: dict[str, Any] = {}
    for layer in settings:
        for key, value in layer.model_dump(exclude_none=True, exclude=set(SELECTORS)).items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return LayerSettings.model_validate(merged)


def spec_of(settings: LayerSettings) -> QuantSpec | None:
    """The grid that ``settings`` describe with all defaults filled in; None means untouched.

    Raises MmqError for settings that contradict each other.
    """
    method = settings.method or DEFAULT_METHOD
    bits = DEFAULT_BITS if settings.bits is None else settings.bits
    if method == "none" or bits == UNTOUCHED_BITS:
        return None
    uniform = method == "uniform"
    if uniform and settings.group_size not in (None, -1):
        raise MmqError(
            f"group_size: expected none with method uniform (one scale per matrix), got "
            f"{settings.group_size}; rtn has groups"
        )
    if method == "awq" and settings.clip == "mse" and awq_options(settings).clip:
        raise MmqError("clip: expected none with method awq, which has awq.clip, got mse")
    given = {
        key: value
        for key in ("symmetric_range", "clip_steps", "clip_shrink", "clip_exponent", "scale_dtype")
        if (value := getattr(settings, key)) is not None
    }
    group_size = DEFAULT_GROUP_SIZE if settings.group_size is None else settings.group_size
    return QuantSpec(
        bits=bits,
        group_size=-1 if uniform else group_size,
        zero=settings.zero or ("float" if uniform else "integer"),
        per_tensor=uniform,
        clip=settings.clip or ("mse" if method in ("rtn", "gptq") else "none"),
        **given,
    )


def gptq_options(settings: LayerSettings) -> GptqOptions:
    """GPTQ's options with defaults filled in."""
    return GptqOptions(**(settings.gptq.model_dump(exclude_none=True) if settings.gptq else {}))


def awq_options(settings: LayerSettings) -> AwqOptions:
    """AWQ's options with defaults filled in."""
    return AwqOptions(**(settings.awq.model_dump(exclude_none=True) if settings.awq else {}))


def load_recipe(path: str | Path) -> Recipe:
    """Reads a .yaml, .yml or .json file.

    Raises MmqError that begins with the path, also for a file that asks for nothing.
    """
    path = Path(path)
    text = read_text(path, "recipe")
    try:
        recipe = parse_recipe(text)
    except MmqError as error:
        raise MmqError(f"{path}: {error}") from error
    sections = (recipe.all, *map(recipe.section, COMPONENTS))
    if not recipe.overrides and all(section is None for section in sections):
        raise MmqError(f"{path}: expected all, {', '.join(COMPONENTS)} or overrides, got none")
    return recipe


def parse_recipe(source: str | Mapping[str, Any]) -> Recipe:
    """A recipe from YAML or JSON text, or from plain data.

    Raises MmqError on the first reading, with every wrong key in one line and, for a misspelt one,
    the nearest known key.
    """
    data = parse_text(source, "recipe") if isinstance(source, str) else source
    if not isinstance(data, Mapping):
        raise MmqError(f"recipe: expected a mapping of sections, got {type(data).__name__}")
    recipe = validated(Recipe, data)
    _check_settings(recipe)
    return recipe


def _check_settings(recipe: Recipe) -> None:
    """Finds contradictions before a model is there; each section with what it inherits."""
    for component in COMPONENTS:
        sections = [s for s in (recipe.all, recipe.section(component)) if s is not None]
        if sections:
            settings = merge(sections)
            try:
                spec_of(settings)
                gptq_options(settings)
            except MmqError as error:
                raise MmqError(f"{component}.{error}") from error
