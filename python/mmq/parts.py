# SPDX-License-Identifier: Apache-2.0
"""Components quantized one at a time, kept, and put together into whole packed models.

A part is what quantizing one component changes: its packed linears, and the dense tensors that
took an AWQ scale. Parts that are calibrated on the full-precision upstream do not depend on each
other, so any combination of them is, bit by bit, the model that one call of ``mmq.quantize`` makes
of the same recipe. Calibrated behind quantized components, a part belongs to those it was made
behind, and to no others; token weights and corrections need the unquantized model then, and their
parts are made all at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmq.architectures import COMPONENTS, Component
from mmq.correction import corrects
from mmq.errors import MmqError
from mmq.linear import Layout, QuantLinear
from mmq.manifest import LinearRecord
from mmq.models import architecture_of
from mmq.plan import Plan
from mmq.quantize import quantize
from mmq.samples import Sample

_HEAD: Final = "mmq"  # The key of a part's table in its file's metadata.


@dataclass(frozen=True, eq=False)
class Part:
    """One quantized component: packed linears by path, changed dense tensors by name, records."""

    component: Component
    packed: Mapping[str, QuantLinear]
    dense: Mapping[str, Tensor]
    records: tuple[LinearRecord, ...]


def prefixes_of(model: nn.Module, component: Component) -> tuple[str, ...]:
    """The paths below which the parameters of ``component`` stand."""
    return tuple(path for path, owner in architecture_of(model).parts if owner == component)


def quantize_part(
    model: nn.Module,
    plan: Plan,
    component: Component,
    samples: Sequence[Sample] | None,
    upstream: Sequence[Part] = (),
) -> Part:
    """Quantizes ``component`` as ``plan`` says and leaves ``model`` as it was.

    Args:
      model: dense.
      plan: of the whole model; other components stay as they are.
      component: which.
      samples: as for ``mmq.quantize``.
      upstream: the parts of the components before it, which stand in the model meanwhile; needed
        where the plan's recipe says ``upstream: quantized`` and of no effect otherwise.

    Raises MmqError as ``mmq.quantize``, for a tied head, whose untying is not undone, and with
    ``upstream`` for a plan that needs :func:`quantize_parts`.
    """
    if upstream and looks_back(plan):
        raise MmqError(
            "parts: token weights and corrections look at the full-precision model, which is not "
            "there behind quantized parts; quantize_parts makes all at once"
        )
    with assembled(model, upstream):
        return _parts(model, plan.only(component), samples, [component])[0]


def quantize_parts(model: nn.Module, plan: Plan, samples: Sequence[Sample] | None) -> list[Part]:
    """All components that ``plan`` quantizes, in the order of calibration, each as it is in
    ``mmq.quantize`` of the whole; ``model`` is dense and stays as it was.

    Raises MmqError as :func:`quantize_part`.
    """
    chosen = {unit.component for unit, _ in plan.quantized()}
    return _parts(model, plan, samples, [name for name in COMPONENTS if name in chosen])


def looks_back(plan: Plan) -> bool:
    """Whether components behind quantized ones are compared with the full-precision model."""
    calibration = plan.recipe.calibration
    return calibration.upstream == "quantized" and (
        calibration.token_weights != "none" or corrects(plan.quantized())
    )


def _parts(
    model: nn.Module,
    plan: Plan,
    samples: Sequence[Sample] | None,
    components: Sequence[Component],
) -> list[Part]:
    """What ``mmq.quantize`` makes of ``components``, which are all that ``plan`` quantizes."""
    owners = {unit.path: unit.component for unit, _ in plan.quantized()}
    tied = [unit.path for unit, _ in plan.quantized() if unit.tied]
    if tied:
        raise MmqError(f"{tied[0]}: expected a head of its own weight in a part, got a tied one")
    modules = {path: model.get_submodule(path) for path in owners}
    below = {
        name: tuple(f"{prefix}." for prefix in prefixes_of(model, name)) for name in components
    }
    before = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if any(f"{name}.".startswith(prefixes) for prefixes in below.values())
    }
    try:
        records = quantize(model, plan, samples).linears
        made = {
            path: module
            for path in modules
            if isinstance(module := model.get_submodule(path), QuantLinear)
        }
        dense = {
            name: parameter.detach().clone()
            for name, (parameter, old) in before.items()
            if name.rpartition(".")[0] not in modules and not torch.equal(parameter, old)
        }
    finally:
        for path, module in modules.items():
            model.set_submodule(path, module)
        with torch.no_grad():
            for parameter, old in before.values():
                parameter.copy_(old)
    return [
        Part(
            component,
            {path: module for path, module in made.items() if owners[path] == component},
            {n: x for n, x in dense.items() if f"{n}.".startswith(below[component])},
            tuple(record for record in records if owners[record.path] == component),
        )
        for component in components
    ]


@contextmanager
def assembled(model: nn.Module, parts: Sequence[Part]) -> Iterator[None]:
    """``model`` with ``parts`` in place; as it was afterwards.

    Raises MmqError for two parts of one component and for a part of another model.
    """
    names = [part.component for part in parts]
    if len(set(names)) < len(names):
        raise MmqError(f"parts: expected one of each component, got {', '.join(names)}")
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(_in_place(model, part))
        yield


@contextmanager
def _in_place(model: nn.Module, part: Part) -> Iterator[None]:
    parameters = dict(model.named_parameters())
    modules = {}
    for path, packed in part.packed.items():
        modules[path] = linear = model.get_submodule(path)
        shape = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
        if shape != (packed.out_features, packed.in_features):
            raise MmqError(
                f"{path}: expected a linear {packed.in_features} -> {packed.out_features}, got "
                f"{type(linear).__name__}"
            )
    unknown = sorted(set(part.dense) - set(parameters))
    if unknown:
        raise MmqError(f"parts: expected parameters of the model, got {unknown[0]}")
    before = {name: parameters[name].detach().clone() for name in part.dense}
    try:
        for path, packed in part.packed.items():
            model.set_submodule(path, packed)
        with torch.no_grad():
            for name, tensor in part.dense.items():
                parameters[name].copy_(tensor)
        yield
    finally:
        for path, module in modules.items():
            model.set_submodule(path, module)
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)


def save_part(part: Part, path: Path) -> None:
    """Writes a part as one safetensors file, all of it or nothing."""
    tensors = {f"dense.{name}": tensor.contiguous() for name, tensor in part.dense.items()}
    for where, packed in part.packed.items():
        state = {**packed.state_dict()}
        tensors |= {f"{where}.{name}": tensor.contiguous() for name, tensor in state.items()}
    table = {
        "component": part.component,
        "layouts": {where: packed.layout.to_dict() for where, packed in part.packed.items()},
        "dtypes": {where: str(packed.compute_dtype) for where, packed in part.packed.items()},
        "records": [asdict(record) for record in part.records],
    }
    # A name of its own: two processes may write the same part, and either is right.
    work = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, work, metadata={_HEAD: json.dumps(table)})
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def load_part(path: Path) -> Part:
    """Reads what :func:`save_part` wrote, onto the CPU. Raises MmqError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            table = json.loads((file.metadata() or {}).get(_HEAD, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        packed = {
            where: _linear(where, layout, table["dtypes"][where], tensors)
            for where, layout in table["layouts"].items()
        }
        component = next(name for name in COMPONENTS if name == table["component"])
        records = tuple(LinearRecord(**record) for record in table["records"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise MmqError(f"{path}: expected a stored part, got {error}") from error
    dense = {
        name.removeprefix("dense."): tensor
        for name, tensor in tensors.items()
        if name.startswith("dense.")
    }
    return Part(component, packed, dense, records)


def _linear(where: str, layout: Any, dtype: str, tensors: Mapping[str, Tensor]) -> QuantLinear:
    kind = getattr(torch, dtype.removeprefix("torch."))
    layer = QuantLinear.empty(Layout.from_dict(where, layout), dtype=kind, device="cpu")
    state = {
        name.removeprefix(f"{where}."): tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] == where
    }
    layer.load_state_dict(state)
    layer.prepare()
    return layer.eval()
