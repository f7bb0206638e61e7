# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported architecture, small enough for a test (widths 24 to 48)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE_TOKEN: Final = 59
QUERIES: Final = 4
VOCAB: Final = 60
PATCHES: Final = 4

_VISION: Final = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": 0.05,
}
_QFORMER: Final = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "encoder_hidden_size": 24,
    "vocab_size": VOCAB,
    "cross_attention_frequency": 2,
}
_OPT: Final = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "word_embed_proj_dim": 32,
}
_T5: Final = {
    "model_type": "t5",
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
_LLAMA: Final = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
}


def blip2_config(text: dict[str, object], **top: object) -> Blip2Config:
    """A captioning configuration with the language model ``text``."""
    return Blip2Config(
        vision_config=dict(_VISION),
        qformer_config=dict(_QFORMER),
        text_config=dict(text),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
        **top,
    )


def blip2_opt(**text: object) -> nn.Module:
    """BLIP-2 captioning over OPT; ``text`` overrides the language model's configuration."""
    return Blip2ForConditionalGeneration(blip2_config({**_OPT, **text}))


def blip2_t5(**text: object) -> nn.Module:
    """BLIP-2 captioning over a gated T5; ``text`` overrides its configuration."""
    return Blip2ForConditionalGeneration(blip2_config({**_T5, **text}))


def blip2_retrieval() -> nn.Module:
    """BLIP-2 retrieval with both heads and plain text input."""
    config = Blip2Config(
        vision_config=dict(_VISION),
        qformer_config={**_QFORMER, "use_qformer_text_input": True},
        text_config=dict(_OPT),
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    return Blip2ForImageTextRetrieval(config)


def llava(vision_feature_layer: int | list[int] = -2, **text: object) -> nn.Module:
    """LLaVA over CLIP and Llama; ``text`` overrides the language model's configuration."""
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION},
        text_config={**_LLAMA, **text},
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=vision_feature_layer,
    )
    return LlavaForConditionalGeneration(config)


TINY: Final[dict[str, Callable[[], nn.Module]]] = {
    "blip2-opt": blip2_opt,
    "blip2-t5": blip2_t5,
    "blip2-retrieval": blip2_retrieval,
    "llava": llava,
    "llava-gqa": lambda: llava(num_key_value_heads=2),
}


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter, norms and biases included, drawn from a seeded normal; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1.0 + 0.2 * noise if is_norm else 0.15 * noise)
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    """Logits of every path through ``model`` on a fixed random image and text, float tensors."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    text = torch.randint(3, IMAGE_TOKEN - 1, (2, 5), generator=generator)
    if isinstance(model, Blip2ForImageTextRetrieval):
        mask = torch.ones_like(text)
        mask[1, 3:] = 0
        return [
            model(pixels, text, mask.clone(), use_image_text_matching_head=itm).logits_per_image
            for itm in (True, False)
        ]
    count = QUERIES if isinstance(model, Blip2ForConditionalGeneration) else PATCHES
    ids = torch.cat([torch.full((2, count), IMAGE_TOKEN), text], dim=1)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = text
    return [model(pixel_values=pixels, **arguments).logits]
