# SPDX-License-Identifier: Apache-2.0
"""Calibration samples: checked, freed of padding, and batched without adding any.

A sample is a mapping from input names of the model to tensors with the batch first. Statistics are
taken over real tokens only, and that is safest where there are no others: a padded or batched
sample is cut into samples of one row without padding, and only rows of equal shapes are run
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmq.errors import MmqError

Sample = Mapping[str, Tensor]

_IGNORED_LABEL = -100  # torch's and Hugging Face's mark for label positions without a loss.


def check_samples(samples: Sequence[Sample]) -> None:
    """Refuses an empty set, values that are no batched tensors, and numbers that are not finite.

    Raises MmqError that names the sample and the input.
    """
    if len(samples) == 0:
        raise MmqError("samples: expected at least one calibration sample, got none")
    for index, sample in enumerate(samples):
        if not isinstance(sample, Mapping) or len(sample) == 0:
            got = type(sample).__name__
            raise MmqError(f"samples[{index}]: expected a mapping of model inputs, got {got}")
        for name, tensor in sample.items():
            where = f"samples[{index}].{name}"
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                got = "a scalar" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise MmqError(f"{where}: expected a tensor with the batch first, got {got}")
            if tensor.numel() == 0:
                raise MmqError(f"{where}: expected values, got shape {list(tensor.shape)}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise MmqError(f"{where}: expected finite values, got {bad} NaN or infinite")


def split_samples(
    samples: Sequence[Sample], *, encoder_decoder: bool = False
) -> list[dict[str, Tensor]]:
    """One unpadded row per sample, in order.

    Columns where ``attention_mask`` is 0 are cut from every input of its shape, and those of
    ``decoder_attention_mask`` from every decoder input; with ``encoder_decoder``, labels are a
    decoder input, and ignored labels at their end are cut too. A mask of ones stays.

    Raises MmqError that names the sample for inputs of different batch sizes, a mask that does not
    fit its tokens, and a row without any token.
    """
    rows: list[dict[str, Tensor]] = []
    for index, sample in enumerate(samples):
        tokens = sample.get("input_ids", sample.get("attention_mask"))
        size = next(iter(sample.values())).shape[0] if tokens is None else tokens.shape[0]
        for name, tensor in sample.items():
            if size > 1 and tensor.shape[0] != size:
                raise MmqError(
                    f"samples[{index}].{name}: expected a batch of {size}, got {tensor.shape[0]}"
                )
        for row in range(size):
            single = {
                name: tensor[row : row + 1] if size > 1 else tensor
                for name, tensor in sample.items()
            }
            rows.append(_without_padding(single, f"samples[{index}]", encoder_decoder))
    return rows


def _without_padding(
    single: dict[str, Tensor], where: str, encoder_decoder: bool
) -> dict[str, Tensor]:
    single = dict(single)
    if "input_ids" in single and "attention_mask" not in single:
        single["attention_mask"] = torch.ones_like(single["input_ids"])
    decoder = {
        name
        for name in single
        if name.startswith("decoder_") or (encoder_decoder and name == "labels")
    }
    if encoder_decoder and "labels" in single and "decoder_attention_mask" not in single:
        real = (single["labels"] != _IGNORED_LABEL).nonzero()
        last = int(real[:, 1].max()) + 1 if real.numel() else 0
        if last == 0:
            raise MmqError(f"{where}.labels: expected at least one label, got ignored ones only")
        for name in decoder:
            single[name] = single[name][:, :last]
    for mask_name, tokens_name, family in (
        ("attention_mask", "input_ids", set(single) - decoder),
        ("decoder_attention_mask", "decoder_input_ids", decoder),
    ):
        mask = single.get(mask_name)
        if mask is None:
            continue
        tokens = single.get(tokens_name, mask)
        if mask.dim() != 2 or mask.shape != tokens.shape:
            raise MmqError(
                f"{where}.{mask_name}: expected the shape of {tokens_name}, "
                f"{list(tokens.shape)}, got {list(mask.shape)}"
            )
        keep = mask[0] != 0
        if not bool(keep.any()):
            raise MmqError(f"{where}.{mask_name}: expected at least one real token, got none")
        for name in family:
            if single[name].shape == mask.shape:
                single[name] = single[name][:, keep]
    return single


def micro_batches(rows: Sequence[Mapping[str, Tensor]], size: int) -> list[dict[str, Tensor]]:
    """Rows of equal shapes and types joined into batches of at most ``size``, nothing padded.

    A row with a batch size other than 1 (several images for one text) stays alone.
    """
    groups: dict[tuple[object, ...], list[Mapping[str, Tensor]]] = {}
    batches: list[dict[str, Tensor]] = []
    for row in rows:
        if any(tensor.shape[0] != 1 for tensor in row.values()):
            batches.append(dict(row))
            continue
        kind = tuple(sorted((name, tuple(t.shape), str(t.dtype)) for name, t in row.items()))
        groups.setdefault(kind, []).append(row)
    for members in groups.values():
        for start in range(0, len(members), size):
            part = members[start : start + size]
            batches.append({name: torch.cat([row[name] for row in part]) for name in part[0]})
    return batches
