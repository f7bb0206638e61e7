# SPDX-License-Identifier: Apache-2.0
"""Asking a model about images: what it generates, and its logits on a given answer.

Prompts are padded on the left. New tokens are told from the prompt by position, never by text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmq_evals.errors import EvalError


@dataclass(frozen=True)
class Generation:
    """Decoding by beam search (greedy for one beam), never sampling. Lengths in new tokens."""

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        given: dict[str, Any] = {
            "do_sample": False,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.min_new_tokens > 0:
            given["min_new_tokens"] = self.min_new_tokens
        if self.num_beams > 1:
            given["length_penalty"] = self.length_penalty
        return given


@dataclass(frozen=True)
class Asking:
    """A prompt for each of some images, decoding, and the tokens that a prompt is cut to."""

    prompts: tuple[str, ...]
    generation: Generation
    max_prompt_tokens: int | None = None


@dataclass(frozen=True)
class Answer:
    """New text, special tokens dropped, and the new tokens, up to the one that ends the answer."""

    text: str
    tokens: tuple[int, ...]


def to_model(model: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors on the model's device, floats in its compute dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


@torch.no_grad()
def generate(
    model: Any, processor: Any, images: Sequence[Image.Image], asking: Asking
) -> list[Answer]:
    """Continue one prompt for each image.

    Raises:
        EvalError: as `prepare`.
    """
    inputs = prepare(model, processor, images, asking)
    arguments = asking.generation.arguments()
    if processor.tokenizer.pad_token_id is not None:
        arguments["pad_token_id"] = processor.tokenizer.pad_token_id
    output = model.generate(**inputs, **arguments)
    # An encoder-decoder's output begins with the token that starts its decoder.
    first = 1 if _encoder_decoder(model) else inputs["input_ids"].shape[1]
    ends = _end_tokens(model)
    tokens = [_until_end(row, ends) for row in output[:, first:].tolist()]
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Answer(text.strip(), row) for text, row in zip(texts, tokens, strict=True)]


@torch.no_grad()
def forced_logits(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    asking: Asking,
    tokens: Sequence[Sequence[int]],
) -> list[torch.Tensor]:
    """The logits from which each token of the given answers would have been chosen, whatever the
    model itself would say: for every image (tokens, vocabulary) in float32, without the rows by
    which tables are padded beyond the tokenizer's vocabulary.

    Raises:
        EvalError: as `prepare`, or an answer without tokens.
    """
    if any(len(row) == 0 for row in tokens):
        raise EvalError("forced_logits: expected at least one token in every answer")
    inputs = prepare(model, processor, images, asking)
    longest = max(map(len, tokens))
    pad = processor.tokenizer.pad_token_id or 0
    answers = torch.tensor(
        [[*row, *[pad] * (longest - len(row))] for row in tokens], device=model.device
    )
    given = torch.tensor([[i < len(row) for i in range(longest)] for row in tokens])
    mask = given.to(inputs["attention_mask"])
    if _encoder_decoder(model):
        start = model.config.text_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.cat(
            [torch.full_like(answers[:, :1], start), answers[:, :-1]], dim=1
        )
        first = 0
    else:
        first = inputs["input_ids"].shape[1] - 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answers], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    logits = model(**inputs).logits[:, first : first + longest].float()
    vocabulary = min(logits.shape[-1], len(processor.tokenizer))
    return [rows[: len(row), :vocabulary] for rows, row in zip(logits, tokens, strict=True)]


def prepare(
    model: Any, processor: Any, images: Sequence[Image.Image], asking: Asking
) -> dict[str, torch.Tensor]:
    """The model's inputs for prompts about images, on its device.

    Raises:
        EvalError: the processor puts no image tokens into the prompt, so that the model would not
            see the image.
    """
    text_arguments: dict[str, Any] = {"padding": True, "padding_side": "left"}
    if asking.max_prompt_tokens is not None:
        # The BLIP-2 processor takes its query tokens off the length before it cuts the text.
        queries = getattr(processor, "num_query_tokens", None) or 0
        text_arguments |= {"truncation": True, "max_length": asking.max_prompt_tokens + queries}
    inputs = processor(
        images=list(images), text=list(asking.prompts), return_tensors="pt", **text_arguments
    )
    image_token = getattr(model.config, "image_token_index", None)
    if image_token is None or not (inputs["input_ids"] == image_token).any(dim=1).all():
        raise EvalError(
            f"processor: expected image tokens (id {image_token}) in every prompt, got none; "
            "the processor's num_query_tokens or image token does not fit the model"
        )
    return to_model(model, inputs)


def _encoder_decoder(model: Any) -> bool:
    text_config = getattr(model.config, "text_config", model.config)
    return bool(getattr(text_config, "is_encoder_decoder", False))


def _end_tokens(model: Any) -> frozenset[int]:
    """Tokens at which `generate` of the model stops."""
    for config in (model.generation_config, model.config, model.config.text_config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()


def _until_end(tokens: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """With the first token that ends the answer; what follows pads the batch."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[: last + 1])
