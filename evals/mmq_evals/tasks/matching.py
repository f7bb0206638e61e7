# SPDX-License-Identifier: Apache-2.0
"""What the BLIP-2 retrieval model computes: features of images and texts, and matching logits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import normalize

from mmq_evals.data.images import identity
from mmq_evals.data.items import RetrievalItem
from mmq_evals.rows import Shard, model_fingerprint
from mmq_evals.stats import FloatArray
from mmq_evals.tasks.base import read_images
from mmq_evals.tasks.features import Features, features_folder, fill, read_features
from mmq_evals.tasks.generation import to_model

MAX_WORDS = 50
MAX_TEXT_TOKENS = 35

_BLANKED = re.compile(r'[.!"()*#:;~]')


def prepare_text(caption: str) -> str:
    """Lower-case, blank ten marks, collapse spaces, keep the first 50 words."""
    return " ".join(_BLANKED.sub(" ", caption.lower()).split()[:MAX_WORDS])


def tokenize_texts(processor: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Ids and mask, each (texts, 35), padded on the right; no image tokens."""
    encoded = processor.tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=MAX_TEXT_TOKENS,
        padding_side="right",
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def vision_outputs(model: Any, processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """Last hidden states of the vision tower, (images, patches, width)."""
    pixels = processor.image_processor(images=list(images), return_tensors="pt")
    hidden: torch.Tensor = model.vision_model(**to_model(model, pixels)).last_hidden_state
    return hidden


@torch.no_grad()
def image_features(model: Any, vision: torch.Tensor) -> torch.Tensor:
    """Unit features (images, queries, dim) of `vision_outputs`."""
    hidden = model.qformer(
        query_embeds=model.query_tokens.expand(len(vision), -1, -1),
        encoder_hidden_states=vision,
        encoder_attention_mask=_ones(vision),
    ).last_hidden_state
    hidden = hidden.to(model.vision_projection.weight.dtype)
    return normalize(model.vision_projection(hidden), dim=-1)


@torch.no_grad()
def text_features(model: Any, texts: dict[str, torch.Tensor], index: slice) -> torch.Tensor:
    """Unit features (texts, dim) of some texts: the first token of the text-only pass."""
    ids, mask = _text_batch(model, texts, index)
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask
    ).last_hidden_state
    hidden = hidden[:, 0].to(model.text_projection.weight.dtype)
    return normalize(model.text_projection(hidden), dim=-1)


@torch.no_grad()
def match_pairs(
    model: Any,
    vision: torch.Tensor,
    texts: dict[str, torch.Tensor],
    image: npt.NDArray[np.int64],
    text: npt.NDArray[np.int64],
) -> FloatArray:
    """Matching logit 1, mean over the queries, of pairs of a row of ``vision`` and a text."""
    ids, mask = _text_batch(model, texts, torch.from_numpy(text))
    embeds = vision[torch.from_numpy(image).to(vision.device)]
    queries = model.query_tokens.expand(len(ids), -1, -1)
    hidden = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=torch.cat([_ones(queries), mask], dim=1),
        encoder_hidden_states=embeds,
        encoder_attention_mask=_ones(embeds),
    ).last_hidden_state
    hidden = hidden[:, : queries.shape[1]].to(model.itm_head.weight.dtype)
    logits = model.itm_head(hidden).mean(dim=1)[:, 1]
    return np.asarray(logits.double().cpu().numpy(), dtype=np.float64)


class EncodedImages:
    """Vision outputs and features of a retrieval set, made once, in files that processes share.

    Vision outputs depend on the images, the processor and the vision tower alone, so that models
    which differ in their Q-Former share them.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        items: Sequence[RetrievalItem],
        batch_size: int,
        scratch: Path,
    ) -> None:
        self._model, self._processor, self._scratch = model, processor, scratch
        self._batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
        self._content = {
            "images": [name, *(identity(item.id, item.image) for item in items)],
            "batch_size": batch_size,
            "processor": processor.image_processor.to_json_string(),
            "config": model.vision_model.config.to_json_string(),
            "vision": model_fingerprint(model.vision_model),
            "dtype": str(model.dtype),
            "device": model.device.type,
        }
        self._files: list[Path] = []
        self._features: list[torch.Tensor] = []
        self.decoded = np.zeros(len(items), dtype=bool)
        self.failed: dict[str, str] = {}

    def encode(self, shard: Shard) -> None:
        """Fill in the files; afterwards ``decoded`` says by image whether it decodes, and
        ``failed`` why not, by item id."""
        folder = features_folder(self._scratch, "vision", self._content)
        self._files = fill(folder, len(self._batches), shard, self._vision_batch)
        content = {**self._content, "model": model_fingerprint(self._model)}
        folder = features_folder(self._scratch, "images", content)
        start = 0
        for file, batch in zip(
            fill(folder, len(self._batches), shard, self._feature_batch), self._batches, strict=True
        ):
            tensors, known = read_features(file, self._model.device)
            self._features += tensors.values()
            self.failed |= known["failed"]
            self.decoded[start : start + len(batch)] = [i.id not in self.failed for i in batch]
            start += len(batch)

    def _vision_batch(self, number: int) -> Features:
        _, images, failed = read_images(self._batches[number])
        known = {"failed": failed}
        if not images:
            return {}, known
        return {"vision": vision_outputs(self._model, self._processor, images)}, known

    def _feature_batch(self, number: int) -> Features:
        tensors, known = read_features(self._files[number], self._model.device)
        if not tensors:
            return {}, known
        return {"features": image_features(self._model, tensors["vision"])}, known

    def encode_texts(
        self, texts: dict[str, torch.Tensor], step: int, shard: Shard
    ) -> list[torch.Tensor]:
        """Features of all texts, in parts of ``step``."""
        ids, mask = (texts[name].tolist() for name in ("input_ids", "attention_mask"))
        content = {"model": model_fingerprint(self._model), "texts": [ids, mask, step]}
        content |= {key: self._content[key] for key in ("dtype", "device")}
        folder = features_folder(self._scratch, "texts", content)

        def part(number: int) -> Features:
            rows = slice(number * step, (number + 1) * step)
            return {"features": text_features(self._model, texts, rows)}, {}

        files = fill(folder, math.ceil(len(ids) / step), shard, part)
        return [read_features(file, self._model.device)[0]["features"] for file in files]

    @torch.no_grad()
    def similarities(self, texts: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Largest dot product over the queries of an image, (decoded images, texts)."""
        features = torch.cat(list(texts))
        rows = [
            torch.einsum("iqd,td->iqt", part, features).amax(dim=1).float().cpu()
            for part in self._features
        ]
        return np.asarray(torch.cat([*rows, torch.empty(0, len(features))]).numpy())

    def vision(self, number: int) -> torch.Tensor:
        """Vision outputs of the images of a batch that decode."""
        return read_features(self._files[number], self._model.device)[0]["vision"]


def _ones(states: torch.Tensor) -> torch.Tensor:
    return torch.ones(states.shape[:2], dtype=torch.long, device=states.device)


def _text_batch(
    model: Any, texts: dict[str, torch.Tensor], index: slice | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of some texts, cut to the longest of them: padding is masked anyway."""
    ids, mask = texts["input_ids"][index], texts["attention_mask"][index]
    longest = max(1, int(mask.sum(dim=1).max()))
    return ids[:, :longest].to(model.device), mask[:, :longest].to(model.device)
