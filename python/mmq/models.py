# SPDX-License-Identifier: Apache-2.0
"""From a model to its linears: where each stands, what it reads, where AWQ may fold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mmq.architectures import (
    ARCHITECTURES,
    Architecture,
    ClipRows,
    Component,
    Condition,
    Fold,
    FoldKind,
    LayerType,
    LinearRow,
    Stack,
)
from mmq.errors import MmqError

Third = Literal["front", "middle", "end"]


@dataclass(frozen=True)
class ResolvedFold:
    """A fold with its place in the model.

    ``producer`` is a full module path. ``row_start`` and ``row_stop`` bound the producer's rows
    (for a norm: its channels). With grouped-query attention a value row feeds the same channel of
    ``repeat`` query heads of width ``head_dim``; otherwise ``repeat`` is 1.
    """

    kind: FoldKind
    producer: str
    row_start: int
    row_stop: int
    repeat: int = 1
    head_dim: int = 1

    @property
    def channels(self) -> int:
        """How many scales may be chosen freely: one per row of the producer."""
        return self.row_stop - self.row_start

    def source_rows(self) -> torch.Tensor:
        """For each input channel of the consumer, the scale that it must use.

        Returns int64 [k] with values in [0, channels); add ``row_start`` for the producer's row.
        """
        heads = torch.arange(self.channels).view(-1, self.head_dim)
        return heads.repeat_interleave(self.repeat, dim=0).reshape(-1)


@dataclass(frozen=True)
class LinearUnit:
    """One linear of a model: what a recipe selects and an algorithm quantizes.

    ``block`` and ``third`` are None for a head. ``input_group`` is equal for linears that read the
    same tensor inside one block and may share one Hessian and one AWQ scale; ``input_source`` is
    equal for all linears of the model that read the same tensor. ``n`` are out-features, ``k``
    in-features. ``tied`` means that the weight is also another module's parameter, and
    ``reaches_output`` is False where no output of the model depends on it.
    """

    path: str
    component: Component
    stack: str
    block: int | None
    n_blocks: int
    third: Third | None
    layer_type: LayerType
    stage: int
    input_group: str
    input_source: str
    n: int
    k: int
    bias: bool
    fold: ResolvedFold | None
    clip_rows: ClipRows
    tied: bool
    reaches_output: bool

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.n * self.k


def third_of(block: int, n_blocks: int) -> Third:
    """Integer thirds: front is [0, n//3), middle [n//3, 2n//3), end [2n//3, n)."""
    if not 0 <= block < n_blocks:
        raise MmqError(f"block: expected 0 <= block < {n_blocks}, got {block}")
    if block < n_blocks // 3:
        return "front"
    return "middle" if block < 2 * n_blocks // 3 else "end"


def config_value(config: object, path: str) -> object:
    """The value of a dotted attribute, None where any part of the path is absent."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _holds(config: object, condition: Condition) -> bool:
    path, allowed = condition
    return config_value(config, path) in allowed


def supported() -> list[str]:
    """One line per supported architecture: the class and what its configuration must say."""
    lines = []
    for architecture in ARCHITECTURES:
        needs = ", ".join(
            f"{path}={'|'.join(map(str, values))}" for path, values in architecture.requires
        )
        lines.append(f"{architecture.model_class} ({needs})")
    return lines


def architecture_of(model: nn.Module) -> Architecture:
    """The row of ARCHITECTURES that describes ``model``.

    Raises MmqError that lists the supported architectures when none does.
    """
    classes = {cls.__name__ for cls in type(model).__mro__}
    config = getattr(model, "config", None)
    for architecture in ARCHITECTURES:
        if architecture.model_class in classes and all(
            _holds(config, condition) for condition in architecture.requires
        ):
            return architecture
    conditions = {path for row in ARCHITECTURES for path, _ in row.requires}
    found = ", ".join(
        f"{path}={config_value(config, path)}"
        for path in sorted(conditions)
        if config_value(config, path) is not None
    )
    raise MmqError(
        f"model: expected one of {'; '.join(supported())}, got {type(model).__name__} ({found})"
    )


def blocks_of(model: nn.Module, stack: Stack) -> nn.ModuleList:
    """The blocks of ``stack`` in ``model``. Raises MmqError where the path names no module list."""
    module = _submodule(model, stack.path)
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        got = "nothing" if module is None else f"{type(module).__name__}"
        raise MmqError(f"{stack.path}: expected a list of blocks, got {got}")
    return module


def reached_blocks(model: nn.Module, stack: Stack) -> int:
    """How many blocks of ``stack``, counted from the first, the model's output depends on."""
    n_blocks = len(blocks_of(model, stack))
    if stack.feature_layer is None:
        return n_blocks
    value = config_value(getattr(model, "config", None), stack.feature_layer)
    layers = list(value) if isinstance(value, (list, tuple)) else [value]
    last = 0
    for layer in layers:
        if not isinstance(layer, int) or not -n_blocks - 1 <= layer <= n_blocks:
            raise MmqError(
                f"{stack.feature_layer}: expected hidden states of {n_blocks} blocks, got {layer!r}"
            )
        last = max(last, layer if layer >= 0 else n_blocks + 1 + layer)
    return last


def resolve(model: nn.Module) -> list[LinearUnit]:
    """All linears of ``model`` that its architecture names, in the order of calibration.

    Blocks come stack by stack, inside a block by stage; a head follows the stack that it reads.

    Raises MmqError for an unsupported model, for a row that matches no module, and for a fold whose
    producer does not fit.
    """
    architecture = architecture_of(model)
    shared = _shared_parameters(model)
    units: list[LinearUnit] = []
    for stack in architecture.stacks:
        units += _stack_units(model, stack, shared)
        for head in architecture.heads:
            if head.after != stack.name:
                continue
            module = _linear(model, head.path)
            if module is None:
                if head.optional:
                    continue
                raise MmqError(f"{head.path}: expected a linear in {architecture.name}, got none")
            units.append(
                LinearUnit(
                    path=head.path,
                    component=head.component,
                    stack=head.after,
                    block=None,
                    n_blocks=0,
                    third=None,
                    layer_type="head",
                    stage=0,
                    input_group=head.path,
                    input_source=head.path,
                    n=module.out_features,
                    k=module.in_features,
                    bias=module.bias is not None,
                    fold=None,
                    clip_rows="all",
                    tied=id(module.weight) in shared,
                    reaches_output=True,
                )
            )
    return units


def unlisted_linears(model: nn.Module) -> list[str]:
    """Paths of linears that the architecture's rows do not name; they always stay dense."""
    listed = {unit.path for unit in resolve(model)}
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in listed
    ]


def _stack_units(model: nn.Module, stack: Stack, shared: set[int]) -> Iterator[LinearUnit]:
    blocks = blocks_of(model, stack)
    reached = reached_blocks(model, stack)
    config = config_value(getattr(model, "config", None), stack.config)
    for row in stack.linears:
        present = [_linear(block, row.path) is not None for block in blocks]
        if not any(present) or (row.presence == "every" and not all(present)):
            missing = present.index(False)
            raise MmqError(
                f"{stack.path}.{missing}.{row.path}: expected a linear, got none "
                f"({sum(present)} of {len(blocks)} blocks have it)"
            )
    for index, block in enumerate(blocks):
        prefix = f"{stack.path}.{index}"
        for row in sorted(stack.linears, key=lambda row: row.stage):
            module = _linear(block, row.path)
            if module is None:
                continue
            group = f"{prefix}:{row.shares}"
            yield LinearUnit(
                path=f"{prefix}.{row.path}",
                component=stack.component,
                stack=stack.name,
                block=index,
                n_blocks=len(blocks),
                third=third_of(index, len(blocks)),
                layer_type=row.layer_type,
                stage=row.stage,
                input_group=group,
                input_source=f"{stack.path}:{row.shares}" if row.same_in_all_blocks else group,
                n=module.out_features,
                k=module.in_features,
                bias=module.bias is not None,
                fold=_resolve_fold(block, prefix, row, module, stack, config),
                clip_rows=row.clip_rows,
                tied=id(module.weight) in shared,
                reaches_output=index < reached,
            )


def _resolve_fold(
    block: nn.Module,
    prefix: str,
    row: LinearRow,
    consumer: nn.Linear,
    stack: Stack,
    config: object,
) -> ResolvedFold | None:
    fold = row.fold
    if fold is None or not all(_holds(config, condition) for condition in fold.when):
        return None
    path = f"{prefix}.{fold.producer}"
    k = consumer.in_features
    if fold.kind == "norm":
        _check_norm_consumers(stack, fold)
        norm = _submodule(block, fold.producer)
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (k,):
            got = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(norm).__name__
            raise MmqError(f"{path}: expected a norm with {k} weights, got {got}")
        return ResolvedFold("norm", path, 0, k)
    producer = _linear(block, fold.producer)
    if producer is None:
        raise MmqError(f"{path}: expected a linear to fold into, got none")
    rows = producer.out_features
    start = 2 * rows // 3 if fold.rows == "value-third" else 0
    channels = rows - start
    if channels == k:
        return ResolvedFold("linear", path, start, rows)
    heads = config_value(config, "num_attention_heads")
    if row.layer_type != "attention" or not isinstance(heads, int) or k % channels or k % heads:
        raise MmqError(f"{path}: expected {k} rows to feed {prefix}.{row.path}, got {channels}")
    return ResolvedFold("linear", path, start, rows, repeat=k // channels, head_dim=k // heads)


def _check_norm_consumers(stack: Stack, fold: Fold) -> None:
    """A norm may take 1/s only if all its readers share that s, so they must be one input group."""
    groups = {
        row.shares for row in stack.linears if row.fold and row.fold.producer == fold.producer
    }
    if len(groups) != 1:
        raise MmqError(
            f"{stack.name}.{fold.producer}: expected one input group behind a folded norm, "
            f"got {sorted(groups)}"
        )


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = root
    for name in path.split("."):
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _linear(root: nn.Module, path: str) -> nn.Linear | None:
    """The dense or packed linear at ``path``; packed ones have the attributes of ``nn.Linear``."""
    module = _submodule(root, path)
    if module is None or not hasattr(module, "in_features") or not hasattr(module, "out_features"):
        return None
    return module  # type: ignore[return-value]


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module holds, by storage where there is one."""
    owners: dict[tuple[str, int], list[int]] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta or parameter.numel() == 0:
            key = ("object", id(parameter))
        else:
            key = (str(parameter.device), parameter.data_ptr())
        owners.setdefault(key, []).append(id(parameter))
    return {identity for holders in owners.values() if len(holders) > 1 for identity in holders}
