# SPDX-License-Identifier: Apache-2.0
"""Imports the three configuration dialects of the study (arXiv 2601.15287) as recipes.

- uniform: a list of {model_part, layer_group, layer_type, num_bits};
- GPTQ: {vision, qformer, language}, each with bits and GPTQ's parameters;
- AWQ: {vit_layers, qformer_layers, llm_layers} for BLIP-2 or {vision_layers, llm_layers} for LLaVA,
  bits per kind of linear.

``corrected`` takes selectors at their word. ``as-executed`` selects what the released code really
changed, to compare with its scores. 16 bits mean untouched in both, and a note says so. No file of
the study applies to a T5 language model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final, Literal, get_args

from mmq.architectures import Component
from mmq.errors import MmqError
from mmq.recipe import UNTOUCHED_BITS, Recipe, parse_recipe
from mmq.spec import BITS

Semantics = Literal["corrected", "as-executed"]
Dialect = Literal["uniform", "gptq", "awq"]
Entry = dict[str, Any]


@dataclass(frozen=True)
class StudyImport:
    """An imported configuration; ``notes`` name every place where recipe and original differ."""

    dialect: Dialect
    semantics: Semantics
    recipe: Recipe
    notes: tuple[str, ...]


PARTS: Final[dict[str, Component]] = {
    "VIT": "vision",
    "QFORMER": "connector",
    "LLM": "language",
}
GROUPS: Final = {"FIRST": "front", "MIDDLE": "middle", "LAST": "end", "ALL": None}
TYPES: Final = {"MLP": "mlp", "ATTENTION": "attention", "BOTH": None}
SWEEP_BITS: Final = (16, 8, 6, 5, 4, 3)

# A single glob on the Q-Former's "layer.*.attention" would also meet "crossattention", because
# * matches dots; the two forms below are the one- and two-digit block indices.
_QFORMER_BLOCKS: Final = ("qformer.encoder.layer.?.", "qformer.encoder.layer.??.")
_VIT_BLOCKS: Final = ("vision_model.encoder.layers.*.",)
_OPT_BLOCKS: Final = ("language_model.model.decoder.layers.*.",)

_AWQ_BLIP2: Final[dict[str, tuple[tuple[str, ...], dict[str, str]]]] = {
    "vit_layers": (
        _VIT_BLOCKS,
        {
            "self_attn": "self_attn.qkv",
            "self_attn_output": "self_attn.projection",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        },
    ),
    "qformer_layers": (
        _QFORMER_BLOCKS,
        {
            "self_attn": "attention.attention.*",
            "self_attn_output": "attention.output.dense",
            "intermediate_query": "intermediate_query.dense",
            "output_query": "output_query.dense",
            "cross_attn": "crossattention.attention.*",
            "cross_attn_output": "crossattention.output.dense",
            "intermediate_txt": "intermediate.dense",
            "output_txt": "output.dense",
        },
    ),
    "llm_layers": (
        _OPT_BLOCKS,
        {
            "self_attn": "self_attn.[qkv]_proj",
            "self_attn_output": "self_attn.out_proj",
            "fc1": "fc1",
            "fc2": "fc2",
        },
    ),
}
_AWQ_LLAVA: Final[dict[str, Component]] = {"vision_layers": "vision", "llm_layers": "language"}
_AWQ_LLAVA_TYPES: Final = {"self_attn": "attention", "mlp": "mlp"}

_GPTQ_PARTS: Final[dict[str, Component]] = {
    "vision": "vision",
    "qformer": "connector",
    "language": "language",
}
_GPTQ_DEFAULTS: Final[dict[str, Any]] = {
    "bits": UNTOUCHED_BITS,
    "percent_dampening": 0.01,
    "group_size": -1,
    "use_symmetric": True,
    "use_act_order": False,
    "use_static_groups": False,
}
_GPTQ_BLOCK: Final = 32

_TRAILING_COMMA: Final = re.compile(r'("(?:[^"\\]|\\.)*")|,(\s*[\]}])')


def load_study_config(path: str | Path, semantics: Semantics = "corrected") -> StudyImport:
    """Reads one JSON file of the study. Raises MmqError that begins with the path."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MmqError(f"{path}: expected a readable file, got {error}") from error
    try:
        return import_study_config(text, semantics)
    except MmqError as error:
        raise MmqError(f"{path}: {error}") from error


def import_study_config(
    source: str | list[Any] | Mapping[str, Any], semantics: Semantics = "corrected"
) -> StudyImport:
    """The recipe of one configuration, given as JSON text or plain data.

    The dialect is told by the form. Commas before a closing bracket are accepted with a note.
    Raises MmqError for unknown keys and values.
    """
    if semantics not in get_args(Semantics):
        raise MmqError(f"semantics: expected corrected or as-executed, got {semantics!r}")
    notes: list[str] = []
    data = _parse(source, notes) if isinstance(source, str) else source
    importers: dict[Dialect, Callable[[Any, Semantics, list[str]], Entry]] = {
        "uniform": _import_uniform,
        "gptq": _import_gptq,
        "awq": _import_awq,
    }
    dialect = _dialect(data)
    recipe = parse_recipe(importers[dialect](data, semantics, notes))
    if recipe == Recipe():
        notes.append("nothing is quantized: the full-precision model")
    return StudyImport(dialect, semantics, recipe, tuple(notes))


def _parse(text: str, notes: list[str]) -> Any:
    def keep_strings(match: re.Match[str]) -> str:
        return match[1] if match[1] is not None else match[2]

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        repaired = _TRAILING_COMMA.sub(keep_strings, text)
        try:
            data = json.loads(repaired)
        except json.JSONDecodeError:
            raise MmqError(f"expected JSON, got {error}") from error
    notes.append("warning: the file has trailing commas, which JSON does not allow; ignored")
    return data


def _dialect(data: Any) -> Dialect:
    if isinstance(data, list):
        return "uniform"
    if isinstance(data, Mapping) and data:
        keys = set(data)
        if keys <= set(_GPTQ_PARTS):
            return "gptq"
        if keys <= set(_AWQ_BLIP2) or keys <= set(_AWQ_LLAVA):
            return "awq"
        raise MmqError(
            f"expected keys of one dialect: {', '.join(_GPTQ_PARTS)} (GPTQ), "
            f"{', '.join(_AWQ_BLIP2)} or {', '.join(_AWQ_LLAVA)} (AWQ), got {', '.join(data)}"
        )
    raise MmqError(f"expected a list or a non-empty mapping, got {json.dumps(data, default=str)}")


def _one_of(where: str, value: Any, allowed: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise MmqError(f"{where}: expected one of {', '.join(allowed)}, got {value!r}")
    return allowed[value]


def _touched(where: str, bits: Any, notes: list[str]) -> bool:
    """Whether the part is quantized at all; for 16 bits a note says what the original did.

    Raises MmqError unless ``bits`` is 2 to 8 or 16.
    """
    if type(bits) is not int or bits not in (*BITS, UNTOUCHED_BITS):
        raise MmqError(f"{where}: expected 2 to 8, or 16, got {bits!r}")
    if bits == UNTOUCHED_BITS:
        notes.append(
            f"{where}: 16 bits are imported as untouched; the original rounds to a 16-bit grid"
        )
    return bits != UNTOUCHED_BITS


def _import_uniform(data: list[Any], semantics: Semantics, notes: list[str]) -> Entry:
    overrides: list[Entry] = []
    seen: set[tuple[Component, str, str]] = set()
    for index, entry in enumerate(data):
        where = f"entry {index}"
        keys = ("model_part", "layer_group", "layer_type", "num_bits")
        if not isinstance(entry, dict) or set(entry) != set(keys):
            raise MmqError(f"{where}: expected the keys {', '.join(keys)}, got {entry!r}")
        component = _one_of(f"{where}.model_part", entry["model_part"], PARTS)
        third = _one_of(f"{where}.layer_group", entry["layer_group"], GROUPS)
        layer_type = _one_of(f"{where}.layer_type", entry["layer_type"], TYPES)
        if not _touched(f"{where}.num_bits", entry["num_bits"], notes):
            continue
        covered = {
            (component, one_third, one_type)
            for one_third in ([third] if third else ["front", "middle", "end"])
            for one_type in ([layer_type] if layer_type else ["attention", "mlp"])
        }
        if covered & seen:
            notes.append(f"{where}: overlaps an earlier entry and wins; the original rounds twice")
        seen |= covered
        selector: Entry | None = {"layer_type": layer_type} if layer_type else {}
        if semantics == "as-executed":
            selector = _executed(component, layer_type)
        if selector is None:
            notes.append(f"{where}: left out, the original changes none of these linears")
            continue
        if third is not None:
            selector["third"] = third
        overrides.append(
            {
                "component": component,
                **selector,
                "method": "uniform",
                "bits": entry["num_bits"],
            }
        )
    if overrides:
        notes.append("biases stay as they are; the original rounds them too")
    return {"overrides": overrides}


def _executed(component: Component, layer_type: str | None) -> Entry | None:
    """What the uniform code changes: of OPT the feed-forward part, of the Q-Former self-attention.

    None where it changes nothing.
    """
    if component == "connector":
        match = [f"{block}attention.*" for block in _QFORMER_BLOCKS]
        return None if layer_type == "mlp" else {"match": match}
    if component == "language":
        return None if layer_type == "attention" else {"layer_type": "mlp"}
    return {"layer_type": layer_type} if layer_type else {}


def _import_gptq(data: Mapping[str, Any], semantics: Semantics, notes: list[str]) -> Entry:
    recipe: Entry = {}
    for part, component in _GPTQ_PARTS.items():
        if part not in data:
            continue
        given = data[part]
        if not isinstance(given, Mapping) or "bits" not in given:
            raise MmqError(f"{part}: expected a mapping with bits, got {given!r}")
        unknown = sorted(set(given) - set(_GPTQ_DEFAULTS))
        if unknown:
            known = ", ".join(_GPTQ_DEFAULTS)
            raise MmqError(f"{part}: expected keys of {known}, got {', '.join(unknown)}")
        if not _touched(f"{part}.bits", given["bits"], notes):
            continue
        values = {**_GPTQ_DEFAULTS, **given}
        static = bool(values["use_static_groups"])
        if values["use_act_order"] and not static and values["group_size"] != -1:
            notes.append(f"{part}: act-order implies static groups here, the original has dynamic")
        recipe[component] = {
            "method": "gptq",
            "bits": values["bits"],
            "group_size": values["group_size"],
            "zero": "symmetric" if values["use_symmetric"] else "integer",
            "clip": "none",
            "gptq": {
                "order": "act" if values["use_act_order"] else "none",
                "damp": values["percent_dampening"],
                "block": _GPTQ_BLOCK,
                "dead": "zero" if semantics == "as-executed" else "keep",
                **({"static_groups": True} if static else {}),
            },
        }
    heads = ["*lm_head", *(["*language_projection"] if "qformer" in data else [])]
    if "language" in recipe and semantics == "as-executed":
        recipe["heads"] = heads
        recipe["untie_heads"] = True
        recipe["overrides"] = [{"match": heads, **recipe["language"]}]
        notes.append(
            f"{', '.join(heads)}: quantized with the language model's settings; a tied lm_head is "
            "untied, the original changes the input embedding with it"
        )
    elif "language" in recipe:
        notes.append(f"{', '.join(heads)}: stay dense; the original quantizes them")
    return recipe


def _import_awq(data: Mapping[str, Any], _: Semantics, notes: list[str]) -> Entry:
    overrides: list[Entry] = []
    is_llava = "vision_layers" in data or any(
        isinstance(kinds, Mapping) and "mlp" in kinds for kinds in data.values()
    )
    for part, kinds in data.items():
        known = _one_of("part", part, _AWQ_LLAVA if is_llava else _AWQ_BLIP2)
        if not isinstance(kinds, Mapping):
            raise MmqError(f"{part}: expected a mapping of kinds to bits, got {kinds!r}")
        for kind, bits in kinds.items():
            if is_llava:
                layer_type = _one_of(part, kind, _AWQ_LLAVA_TYPES)
                selector: Entry = {"component": known, "layer_type": layer_type}
            else:
                blocks, paths = known
                path = _one_of(part, kind, paths)
                selector = {"match": [f"{block}{path}" for block in blocks]}
            if _touched(f"{part}.{kind}", bits, notes):
                settings = {"method": "awq", "bits": bits, "group_size": 128, "zero": "integer"}
                overrides.append({**selector, **settings, "awq": {"steps": 20, "clip": True}})
    if overrides:
        notes.append("exponents are 0, 1/20, ..., 1; the original tries the integers 0 to 19")
    return {"overrides": overrides}


def uniform_grid() -> list[list[Entry]]:
    """The 1,674 configurations of the uniform sweep, in the order of their index.

    The order of bits, types and main parts is the study's; that of the group subsets (by size) and
    of the settings of the other parts (off before on) is assumed.
    """
    return [entries for entries in _sweep() if entries]


def uniform_files() -> list[list[Entry]]:
    """All 1,728 files of the sweep's folder; 1,621 of them differ.

    The last 54 are left over from a sweep that kept the empty configurations: the end of it that
    the 1,674 did not overwrite. This is inferred; it gives the one empty list that is there.
    """
    grid = uniform_grid()
    return [*grid, *list(_sweep())[len(grid) :]]


def _sweep() -> Iterator[list[Entry]]:
    groups = [name for name, third in GROUPS.items() if third is not None]
    subsets = [subset for size in range(len(groups) + 1) for subset in combinations(groups, size)]
    for bits, layer_type, main in product(SWEEP_BITS, TYPES, PARTS):
        others = [part for part in PARTS if part != main]
        for subset, switches in product(subsets, product((False, True), repeat=len(others))):
            chosen = {main: subset}
            chosen |= {part: ("ALL",) * on for part, on in zip(others, switches, strict=True)}
            yield [
                {
                    "model_part": part,
                    "layer_group": group,
                    "layer_type": layer_type,
                    "num_bits": bits,
                }
                for part in PARTS
                for group in chosen[part]
            ]
