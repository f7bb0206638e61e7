# SPDX-License-Identifier: Apache-2.0
"""A block under quantization: where it stands, and what it is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mmq.architectures import Stack
from mmq.calibrate import Call, advance, run_block
from mmq.linear import QuantLinear
from mmq.manifest import LinearRecord
from mmq.models import LinearUnit
from mmq.plan import LayerPlan
from mmq.report import Report


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed linear that is not recorded yet."""

    unit: LinearUnit
    layer: LayerPlan
    module: QuantLinear
    report: Report
    record: LinearRecord


@dataclass(frozen=True, eq=False)
class Place:
    """Block ``index`` of ``stack``.

    ``calls`` are what the quantized model calls it with. ``full`` are the calls of the unquantized
    model and ``following`` what that one calls the next block with; they pair up with ``calls``,
    and are empty where nothing needs them. ``numbers`` are the places in the list of all calls.
    """

    stack: Stack
    index: int
    block: nn.Module
    calls: Sequence[Call]
    full: Sequence[Call] = ()
    following: Sequence[Call] = ()
    numbers: Sequence[int] = ()

    @property
    def path(self) -> str:
        """The block's module path."""
        return f"{self.stack.path}.{self.index}"

    def advance(self, call: Call) -> Call:
        """What the block as it is now calls the next one with."""
        return advance(self.stack, call, run_block(self.block, call))

    def split(self, share: float) -> tuple[Place, Place]:
        """The calls to calibrate on, and those of every n-th batch, held out, n = 1 / share."""
        every = held_out_step(share)
        parts: tuple[list[int], list[int]] = ([], [])
        for number, call in enumerate(self.calls):
            parts[call.batch % every == every - 1].append(number)
        seen, held = (
            Place(
                self.stack,
                self.index,
                self.block,
                [self.calls[i] for i in part],
                [self.full[i] for i in part],
                [self.following[i] for i in part],
                part,
            )
            for part in parts
        )
        return seen, held

    def error(self) -> float:
        """Mean squared difference of the block's outputs to the unquantized model's."""
        total, count = 0.0, 0
        for call, target in zip(self.calls, self.following, strict=True):
            difference = self.advance(call).hidden.double() - target.hidden.double()
            total += float(difference.square().sum())
            count += difference.numel()
        return total / count


def held_out_step(share: float) -> int:
    """Every how manieth batch is held out."""
    return max(2, round(1 / share))
