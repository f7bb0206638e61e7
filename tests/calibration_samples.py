# SPDX-License-Identifier: Apache-2.0
"""Random calibration samples for the models of ``tiny_models``, texts of several lengths."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import IMAGE_TOKEN, PATCHES, QUERIES
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval


def samples_for(model: Any, count: int = 6, seed: int = 5) -> list[dict[str, Tensor]]:
    """``count`` samples of one image and one text of 4, 5 or 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        pixels = torch.randn(1, 3, 28, 28, generator=generator)
        text = torch.randint(3, IMAGE_TOKEN - 1, (1, 4 + index % 3), generator=generator)
        ids = text
        if not isinstance(model, Blip2ForImageTextRetrieval):
            images = QUERIES if isinstance(model, Blip2ForConditionalGeneration) else PATCHES
            ids = torch.cat([torch.full((1, images), IMAGE_TOKEN), text], dim=1)
        sample = {
            "pixel_values": pixels,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        if model.config.is_encoder_decoder:
            sample["decoder_input_ids"] = text
        found.append(sample)
    return found


def padded(samples: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    """The samples as one batch, texts filled up with token 1 and masked."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    rows: dict[str, list[Tensor]] = {"pixel_values": [], "input_ids": [], "attention_mask": []}
    for sample in samples:
        missing = longest - sample["input_ids"].shape[1]
        pad = (0, missing) if side == "right" else (missing, 0)
        rows["pixel_values"].append(sample["pixel_values"])
        for name, value in (("input_ids", 1), ("attention_mask", 0)):
            rows[name].append(torch.nn.functional.pad(sample[name], pad, value=value))
    return {name: torch.cat(parts) for name, parts in rows.items()}
