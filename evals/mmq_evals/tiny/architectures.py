# SPDX-License-Identifier: Apache-2.0
"""The tiny models' configurations as data, their shared tokenizer and their processors.

Widths are chosen so that tails occur: heads of 88 and a width of 264 in the vision tower,
feed-forward widths of 400, 272, 336 and 528, and a language width of 192, one and a half groups
of 128.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import MODELS
from .scenes import BACKGROUNDS, COLORS, IMAGE_PIXELS, PATCH_PIXELS, SHAPES, SIZES, WIDTHS

# Models and processors of transformers, which have no usable static types.
Model = Any
Processor = Any

PAD, BOS, EOS, UNK, IMAGE = range(5)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
# Whole phrases of the LLaVA-1.5 prompt that are one token each here.
PHRASES = ("USER:", "ASSISTANT:", "Answer the question using a single word or phrase.")
WORDS = (
    *SIZES,
    *COLORS,
    *SHAPES,
    *BACKGROUNDS,
    *(
        "a on and the there is with in at of photo picture background which one two three no "
        + "shapes shape left right above below top bottom center , ? what how many are big "
        + "color object yes not does image contain present rectangle pixels wide"
    ).split(),
    *WIDTHS,
)

_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_VISION = {
    "hidden_size": 264,
    "intermediate_size": 400,
    "num_attention_heads": 3,
    "image_size": IMAGE_PIXELS,
    "patch_size": PATCH_PIXELS,
}
_BLIP2_VISION = _VISION | {"num_hidden_layers": 3, "initializer_range": 0.02}
_QFORMER = {
    "vocab_size": 128,
    "hidden_size": 192,
    "intermediate_size": 272,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 264,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
}
_OPT = _IDS | {
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 192,
    "word_embed_proj_dim": 192,
    "ffn_dim": 336,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 80,
    "do_layer_norm_before": True,
    "dropout": 0.0,
}
_LLAMA = _IDS | {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 192,
    "intermediate_size": 528,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_CLIP = _VISION | {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 4,
    "projection_dim": 192,
}


def build(name: str) -> Model:
    """A freshly initialised model of one of ``MODELS``, in float32, from torch's seed."""
    if name == "tiny-llava":
        # LLaVA-1.5 takes the last but one layer and never uses the last; here every block counts.
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=_CLIP,
                text_config=_LLAMA,
                image_token_index=IMAGE,
                image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
                vision_feature_layer=-1,
                tie_word_embeddings=False,
                **_IDS,
            )
        )
    if name not in MODELS:
        raise ValueError(f"expected a tiny model of {', '.join(MODELS)}, got {name!r}")
    retrieval = name == "tiny-blip2-retrieval"
    config = Blip2Config(
        vision_config=_BLIP2_VISION,
        qformer_config=_QFORMER | {"use_qformer_text_input": retrieval},
        text_config=_OPT,
        num_query_tokens=8,
        image_text_hidden_size=128,
        # With an index the retrieval class cuts the first eight ids off every text.
        image_token_index=None if retrieval else IMAGE,
    )
    model = (Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration)(config)
    # Queries are initialised to zero, which leaves them equal to each other for ever in retrieval.
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    return model


def tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer that puts ``<s>`` in front."""
    words = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *PHRASES, *WORDS))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=padding_side,
        model_max_length=128,
    )


def processor(name: str) -> Processor:
    """The processor that belongs to one of ``MODELS``; it needs Pillow and no torchvision."""
    side = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    if name == "tiny-llava":
        images = CLIPImageProcessorPil(size=side, crop_size=side)
        return LlavaProcessor(  # type: ignore[no-untyped-call]
            images,
            tokenizer("left"),
            patch_size=PATCH_PIXELS,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    retrieval = name == "tiny-blip2-retrieval"
    return Blip2Processor(  # type: ignore[no-untyped-call]
        BlipImageProcessorPil(size=side),
        tokenizer("right" if retrieval else "left"),
        num_query_tokens=None if retrieval else 8,
    )
