# SPDX-License-Identifier: Apache-2.0
"""Calibration: what the first block of a stack is called with, and what each linear reads.

The model runs on every sample until its stack is entered; those calls, with all their arguments,
are kept. From then on the blocks are run one by one on the kept calls, so that memory is one block
and the activations between two blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmq.architectures import Architecture, Stack
from mmq.errors import MmqError
from mmq.hessian import Hessian, InputStats
from mmq.models import LinearUnit, blocks_of

_CACHE_ARGUMENTS = {"past_key_values": None, "use_cache": False}

Batch = Mapping[str, Tensor]
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a block: its hidden states [batch, tokens, width], all other arguments, and the
    number of the batch that it comes from."""

    hidden: Tensor
    rest: dict[str, Any]
    batch: int = 0


class _EnoughError(Exception):
    """Raised inside a forward pass when nothing more of it is needed."""


def evenly(count: int, keep: int) -> Tensor:
    """``keep`` of the indices 0..count-1 at equal distances, int64."""
    return torch.arange(keep) * count // keep


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Hook) -> Iterator[None]:
    """Calls ``hook(module, args, kwargs)`` before each call of the modules."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's training flags come back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Parameters do not require gradients; afterwards as before."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def run_model(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Batch],
    modules: Sequence[nn.Module],
    hook: Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], None],
) -> None:
    """Runs every pass of every batch, with ``hook(batch index, module, args, kwargs)``.

    The first batch runs to its end and shows how often a pass calls the modules; a later one stops
    at its last such call.
    """
    expected: list[int] = []
    for index, batch in enumerate(batches):
        for number, extra in enumerate(architecture.passes):
            seen = 0
            limit = expected[number] if index else None

            def count(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                index: int = index,
                limit: int | None = limit,
            ) -> None:
                nonlocal seen
                hook(index, module, args, kwargs)
                seen += 1
                if seen == limit:
                    raise _EnoughError

            with hooked(modules, count), suppress(_EnoughError):
                model(**batch, **dict(extra))
            if index == 0:
                expected.append(seen)


def capture(
    model: nn.Module, architecture: Architecture, stack: Stack, batches: Sequence[Batch]
) -> list[Call]:
    """The calls of the first block of ``stack``; equal calls of one batch are kept once.

    Raises MmqError when no batch reaches the stack.
    """
    block = blocks_of(model, stack)[0]
    signature = inspect.signature(type(block).forward)
    calls: list[Call] = []

    def keep(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _bind(signature, module, args, kwargs, index)
        if not any(call.batch == other.batch and _equal(call, other) for other in calls):
            calls.append(call)

    run_model(model, architecture, batches, [block], keep)
    if not calls:
        raise MmqError(f"{stack.path}: expected calibration samples that reach it, got none")
    return calls


def run_block(block: nn.Module, call: Call) -> Any:
    """What ``block`` returns for ``call``."""
    return block(call.hidden, **call.rest)


def advance(stack: Stack, call: Call, output: Any) -> Call:
    """The call of the next block, given the output of this one."""
    if isinstance(output, Tensor):
        return Call(output, call.rest, call.batch)
    carried = {name: output[index] for index, name in stack.carries}
    return Call(output[0], {**call.rest, **carried}, call.batch)


def gather(
    block: nn.Module,
    calls: Sequence[Call],
    inputs: Mapping[nn.Module, Hessian],
    max_tokens: int | None = None,
    weights: Sequence[Tensor] | None = None,
) -> None:
    """Runs all calls through ``block`` and adds what the given linears read.

    At most ``max_tokens`` tokens of each row of each call are taken, evenly spread. ``weights``
    [batch, tokens], one per call, are given to the linears that read so many tokens; others are
    unweighted. Raises MmqError, naming the linear, for inputs that are not finite.
    """
    current: Tensor | None = None

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module].add(*token_rows(args, kwargs, max_tokens, current))

    with hooked(list(inputs), add):
        for index, call in enumerate(calls):
            current = None if weights is None else weights[index]
            run_block(block, call)


def gather_from_model(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Batch],
    inputs: Mapping[nn.Module, Hessian],
    max_tokens: int | None = None,
) -> None:
    """Like :func:`gather`, for linears outside the stacks: runs the whole model."""

    def add(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module].add(*token_rows(args, kwargs, max_tokens))

    run_model(model, architecture, batches, list(inputs), add)


def block_inputs(
    model: nn.Module,
    block: nn.Module,
    units: Sequence[LinearUnit],
    calls: Sequence[Call],
    max_tokens: int | None = None,
    weights: Sequence[Tensor] | None = None,
) -> dict[str, InputStats]:
    """Statistics by input group, gathered at the first of the block's ``units`` of each group."""
    hessians: dict[str, Hessian] = {}
    hooks: dict[nn.Module, Hessian] = {}
    for unit in units:
        if unit.input_group not in hessians:
            hessian = _hessian(model, unit)
            hessians[unit.input_group] = hooks[model.get_submodule(unit.path)] = hessian
    gather(block, calls, hooks, max_tokens, weights)
    return {group: hessian.stats() for group, hessian in hessians.items()}


def head_inputs(
    model: nn.Module,
    architecture: Architecture,
    units: Sequence[LinearUnit],
    batches: Sequence[Batch],
    max_tokens: int | None = None,
) -> dict[str, InputStats]:
    """Statistics by path, of linears outside the stacks; runs the whole model."""
    hessians = {unit.path: _hessian(model, unit) for unit in units}
    hooks = {model.get_submodule(path): hessian for path, hessian in hessians.items()}
    gather_from_model(model, architecture, batches, hooks, max_tokens)
    return {path: hessian.stats() for path, hessian in hessians.items()}


def _hessian(model: nn.Module, unit: LinearUnit) -> Hessian:
    device = next(model.get_submodule(unit.path).parameters()).device
    return Hessian(unit.k, name=unit.path, device=device)


def token_rows(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_tokens: int | None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a linear reads, and the weights of its tokens; None where they are not its tokens'."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor), "a linear's input is a tensor"
    if weights is not None and weights.shape != x.shape[:-1]:
        weights = None
    if max_tokens is not None and x.dim() > 2 and x.shape[-2] > max_tokens:
        kept = evenly(x.shape[-2], max_tokens)
        return x[..., kept, :], None if weights is None else weights[..., kept]
    return x, weights


@contextmanager
def replaced_weights(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """The linears with other weights [n, k], rounded to their types; afterwards with their own."""
    own = {linear: linear.weight.data for linear in weights}
    try:
        for linear, weight in weights.items():
            linear.weight.data = weight.to(linear.weight.dtype)
        yield
    finally:
        for linear, weight in own.items():
            linear.weight.data = weight


def _bind(
    signature: inspect.Signature,
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
) -> Call:
    """All arguments by name, the first (hidden states) apart, and nothing cached."""
    bound = signature.bind(block, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    names = list(named)
    hidden = named.pop(names[1])
    del named[names[0]]
    for name, value in _CACHE_ARGUMENTS.items():
        if name in named:
            named[name] = value
    return Call(hidden.detach(), named, batch)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Call) and isinstance(b, Call):
        return _equal(a.hidden, b.hidden) and _equal(a.rest, b.rest)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)
