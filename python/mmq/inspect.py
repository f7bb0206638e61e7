# SPDX-License-Identifier: Apache-2.0
"""What a model is made of, component by component: linears, shapes, counts, shared inputs, folds.

Counts are of parameters, a tied one once. The nominal bits per weight are those of the study
(arXiv 2601.15287): bits for the linear weights of the stacks, 16 for all else, no scales or zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from mmq.architectures import COMPONENTS, Architecture, Component, Stack
from mmq.errors import MmqError
from mmq.models import (
    LinearUnit,
    architecture_of,
    blocks_of,
    reached_blocks,
    resolve,
    unlisted_linears,
)
from mmq.presets import build_meta

NOMINAL_BITS = (3, 4, 8)
DENSE_BITS = 16
KINDS = ("linear", "linear_bias", "head", "embedding", "norm", "convolution", "other")
THIRDS = ("front", "middle", "end")


def nominal_bpw(units: Iterable[LinearUnit], parameters: int, bits: dict[Component, int]) -> float:
    """The study's bits per weight: (sum bits_c n_c + 16 (total - sum n_c)) / total.

    n_c are the weights of component c's linears inside stacks; a component that ``bits`` does not
    name keeps 16. ``parameters`` is the model's total.
    """
    total = DENSE_BITS * parameters
    for unit in units:
        if unit.layer_type != "head":
            total += (bits.get(unit.component, DENSE_BITS) - DENSE_BITS) * unit.weights
    return total / parameters


def inspect_model(source: nn.Module | str | Path) -> dict[str, Any]:
    """All that is known of a model before it runs, as plain data.

    ``source`` is a model, the name of a preset, or a folder with a ``config.json`` (the last two
    are built without weights). Raises MmqError for an unsupported model.
    """
    model = source if isinstance(source, nn.Module) else build_meta(source)
    architecture = architecture_of(model)
    units = resolve(model)
    counts = _count_parameters(model, architecture, units)
    parameters = sum(sum(kinds.values()) for kinds in counts.values())
    components = {
        component: {
            "parameters": sum(counts[component].values()),
            "counts": counts[component],
            "stacks": [
                _describe_stack(model, stack, [u for u in units if u.stack == stack.name])
                for stack in architecture.stacks
                if stack.component == component
            ],
            "heads": [
                _describe_head(unit)
                for unit in units
                if unit.layer_type == "head" and unit.component == component
            ],
        }
        for component in COMPONENTS
        if sum(counts[component].values()) > 0
    }
    return {
        "source": type(model).__name__ if isinstance(source, nn.Module) else str(source),
        "architecture": architecture.name,
        "model_class": architecture.model_class,
        "parameters": parameters,
        "components": components,
        "tied": _tied_names(model),
        "unlisted_linears": unlisted_linears(model),
        "nominal_bpw": {
            str(bits): nominal_bpw(units, parameters, dict.fromkeys(COMPONENTS, bits))
            for bits in NOMINAL_BITS
        },
    }


def _count_parameters(
    model: nn.Module, architecture: Architecture, units: list[LinearUnit]
) -> dict[Component, dict[str, int]]:
    """Parameters per component and kind. A tied parameter counts where it is met first."""
    heads = {unit.path for unit in units if unit.layer_type == "head"}
    linears = {unit.path for unit in units} - heads
    counts: dict[Component, dict[str, int]] = {
        component: dict.fromkeys(KINDS, 0) for component in COMPONENTS
    }
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if path in linears:
            kind = "linear_bias" if leaf == "bias" else "linear"
        elif path in heads:
            kind = "head"
        else:
            kind = _kind(model.get_submodule(path))
        counts[_component(architecture, name)][kind] += parameter.numel()
    return counts


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    return "norm" if type(module).__name__.endswith("Norm") else "other"


def _component(architecture: Architecture, name: str) -> Component:
    fitting = [
        (len(prefix), component)
        for prefix, component in architecture.parts
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    if not fitting:
        known = ", ".join(prefix for prefix, _ in architecture.parts)
        raise MmqError(f"{name}: expected a parameter below one of {known}")
    return max(fitting)[1]


def _describe_stack(model: nn.Module, stack: Stack, units: list[LinearUnit]) -> dict[str, Any]:
    n_blocks = len(blocks_of(model, stack))
    units = [unit for unit in units if unit.layer_type != "head"]
    rows: dict[str, list[LinearUnit]] = {}
    for unit in units:
        rows.setdefault(unit.path.removeprefix(f"{stack.path}.{unit.block}."), []).append(unit)
    weights = {
        layer_type: {
            third: sum(
                unit.weights
                for unit in units
                if unit.layer_type == layer_type and unit.third == third
            )
            for third in THIRDS
        }
        for layer_type in ("attention", "mlp")
    }
    thirds = {third: len({unit.block for unit in units if unit.third == third}) for third in THIRDS}
    return {
        "name": stack.name,
        "path": stack.path,
        "blocks": n_blocks,
        "blocks_reaching_output": reached_blocks(model, stack),
        "blocks_per_third": thirds,
        "linears_in_stack": len(units),
        "weights": sum(unit.weights for unit in units),
        "weights_by_type_and_third": weights,
        "linears": [_describe_row(stack, path, found) for path, found in rows.items()],
    }


def _describe_row(stack: Stack, path: str, units: list[LinearUnit]) -> dict[str, Any]:
    first = units[0]
    fold = None
    if first.fold is not None:
        producer = first.fold.producer.removeprefix(f"{stack.path}.{first.block}.")
        fold = {
            "kind": first.fold.kind,
            "producer": producer,
            "rows": [first.fold.row_start, first.fold.row_stop],
            "repeat": first.fold.repeat,
        }
    return {
        "path": path,
        "layer_type": first.layer_type,
        "stage": first.stage,
        "n": first.n,
        "k": first.k,
        "bias": first.bias,
        "blocks": len(units),
        "weights": sum(unit.weights for unit in units),
        "input": first.input_group.rpartition(":")[2],
        "same_input_in_all_blocks": first.input_group != first.input_source,
        "fold": fold,
        "clip_rows": first.clip_rows,
    }


def _describe_head(unit: LinearUnit) -> dict[str, Any]:
    return {
        "path": unit.path,
        "after": unit.stack,
        "n": unit.n,
        "k": unit.k,
        "bias": unit.bias,
        "weights": unit.weights,
        "tied": unit.tied,
    }


def _tied_names(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def format_inspection(inspection: dict[str, Any]) -> str:
    """The result of ``inspect_model`` as a page of text."""
    lines = [
        f"{inspection['source']}: {inspection['architecture']}, {inspection['model_class']}",
        f"parameters {inspection['parameters']:,}",
    ]
    for component, part in inspection["components"].items():
        share = 100.0 * part["parameters"] / inspection["parameters"]
        lines += ["", f"{component}  {part['parameters']:,} parameters ({share:.2f} %)"]
        counts = (f"{kind} {count:,}" for kind, count in part["counts"].items() if count)
        lines.append(f"  {', '.join(counts)}")
        for stack in part["stacks"]:
            lines += _format_stack(stack)
        for head in part["heads"]:
            tied = ", tied to an embedding" if head["tied"] else ""
            lines.append(
                f"  head {head['path']}  {head['k']} -> {head['n']}, {head['weights']:,} weights, "
                f"dense unless selected{tied}"
            )
    lines.append("")
    lines += [f"tied: {' = '.join(names)}" for names in inspection["tied"]]
    if inspection["unlisted_linears"]:
        lines.append(f"always dense: {', '.join(inspection['unlisted_linears'])}")
    bpw = ", ".join(f"{value:.3f} at {bits}" for bits, value in inspection["nominal_bpw"].items())
    lines.append(f"nominal bits per weight, all stacks at b bits and the rest at 16: {bpw}")
    return "\n".join(lines)


def _format_stack(stack: dict[str, Any]) -> list[str]:
    thirds = "/".join(str(count) for count in stack["blocks_per_third"].values())
    lines = [
        f"  stack {stack['name']} ({stack['path']}): {stack['blocks']} blocks, "
        f"front/middle/end {thirds}, {stack['linears_in_stack']} linears, "
        f"{stack['weights']:,} weights"
    ]
    if stack["blocks_reaching_output"] < stack["blocks"]:
        lines.append(
            f"    blocks from index {stack['blocks_reaching_output']} on do not reach the output; "
            "they are skipped by default"
        )
    for layer_type, weights in stack["weights_by_type_and_third"].items():
        per_third = ", ".join(f"{third} {count:,}" for third, count in weights.items())
        lines.append(f"    {layer_type} weights: {per_third}")
    width = max(len(row["path"]) for row in stack["linears"])
    for row in stack["linears"]:
        fold = row["fold"]
        target = "in_scale" if fold is None else fold["producer"]
        if fold is not None and fold["rows"][0] > 0:
            target += f"[{fold['rows'][0]}:{fold['rows'][1]}]"
        shared = " (one tensor for all blocks)" if row["same_input_in_all_blocks"] else ""
        lines.append(
            f"    {row['path']:<{width}}  {row['k']:>5} -> {row['n']:<5} x{row['blocks']:<3} "
            f"{row['layer_type']:<9} bias {'yes' if row['bias'] else 'no':<4} "
            f"reads {row['input']}{shared}, AWQ scale into {target}"
        )
    return lines
