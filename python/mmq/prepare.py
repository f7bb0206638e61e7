# SPDX-License-Identifier: Apache-2.0
"""Before any work: what a quantization refuses, and its calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from mmq.correction import corrects
from mmq.device import check_cuda, device_of
from mmq.errors import MmqError
from mmq.grid import check_weight
from mmq.models import architecture_of
from mmq.place import held_out_step
from mmq.plan import Plan
from mmq.recipe import Recipe
from mmq.samples import Sample, check_samples, micro_batches, split_samples
from mmq.scaling import dense_linear
from mmq.tokens import check_weighable
from mmq_ext.device import on_cuda

MICRO_BATCH: Final = 8  # Rows of equal shape run together; results change by rounding only.


def check_weights(model: nn.Module, decided: Plan) -> None:
    """Refuses weights that are not finite, or that the kernels of the device do not multiply."""
    units = [unit for unit, _ in decided.quantized()]
    if units and on_cuda(weight := dense_linear(model, units[0].path).weight):
        check_cuda(weight)
    for unit in units:
        weight = dense_linear(model, unit.path).weight
        check_weight(weight, unit.path)
        if on_cuda(weight) and weight.dtype not in (torch.float16, torch.bfloat16):
            raise MmqError(
                f"{unit.path}: expected float16 or bfloat16 weights on CUDA, got {weight.dtype}; "
                "convert the model, as by model.to(torch.bfloat16)"
            )


def check_calibration(
    model: nn.Module, decided: Plan, batches: list[dict[str, Tensor]] | None
) -> None:
    """Refuses token weights and corrections that this model, recipe or data cannot have."""
    calibration = decided.recipe.calibration
    if calibration.token_weights != "none":
        if batches is None:
            raise MmqError("calibration.token_weights: expected calibration samples, got none")
        check_weighable(architecture_of(model))
    if corrects(decided.layers):
        if calibration.upstream == "full":
            raise MmqError(
                "gptq.correction: expected upstream: quantized, got full, where inputs are right"
            )
        every = held_out_step(calibration.held_out)
        if len(batches or ()) < every:
            raise MmqError(
                f"gptq.correction: expected at least {every} batches of calibration samples, of "
                f"which one is held out, got {len(batches or ())} (of up to {MICRO_BATCH} samples "
                "of equal shape)"
            )


def batches_of(
    model: nn.Module,
    decided: Plan,
    samples: Sequence[Sample] | None,
    sample_ids: Sequence[str] | None,
) -> list[dict[str, Tensor]] | None:
    """The calibration batches, None where the recipe runs without any."""
    if samples is None:
        for unit, layer in decided.quantized():
            if layer.method in ("gptq", "awq"):
                raise MmqError(
                    f"samples: expected calibration samples for {layer.method} of {unit.path}, "
                    "got none"
                )
        return None
    return calibration_batches(model, decided.recipe, samples, sample_ids)


def calibration_batches(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    sample_ids: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """The samples that ``recipe`` uses, freed of padding, in batches on the model's device.

    Raises MmqError as :func:`mmq.samples.check_samples` and for ids that do not match.
    """
    check_samples(samples)
    if sample_ids is not None and len(sample_ids) != len(samples):
        raise MmqError(
            f"sample_ids: expected one per sample ({len(samples)}), got {len(sample_ids)}"
        )
    stacks = {stack.name for stack in architecture_of(model).stacks}
    used = samples[: recipe.calibration.samples]
    rows = split_samples(used, encoder_decoder="encoder" in stacks)
    device = device_of(model)
    return [
        {name: x.to(device) for name, x in batch.items()}
        for batch in micro_batches(rows, MICRO_BATCH)
    ]
