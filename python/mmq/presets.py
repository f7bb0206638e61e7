# SPDX-License-Identifier: Apache-2.0
"""Published configurations as data, and models without weights (on torch's meta device)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from mmq.architectures import ARCHITECTURES
from mmq.errors import MmqError


@dataclass(frozen=True)
class Preset:
    """One published checkpoint: the model class and what its configuration says beyond defaults."""

    checkpoint: str
    model_class: str
    model_type: str
    config: dict[str, Any]


# What transformers leaves as the default of Blip2Config: ViT-g with 39 blocks of width 1408 at
# 224 px, and a Q-Former with 12 layers of width 768. Spelt out, so that a changed default shows.
_VIT_G: Final = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": True,
}
_QFORMER: Final = {
    "vocab_size": 30523,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
}
_RETRIEVAL: Final = {
    "qformer_config": {**_QFORMER, "use_qformer_text_input": True},
    "text_config": {"model_type": "opt"},  # not part of the retrieval model, but of its config
    "num_query_tokens": 32,
    "image_text_hidden_size": 256,
}

PRESETS: Final[dict[str, Preset]] = {
    "blip2-opt-2.7b": Preset(
        "Salesforce/blip2-opt-2.7b",
        "Blip2ForConditionalGeneration",
        "blip-2",
        {
            "vision_config": _VIT_G,
            "qformer_config": _QFORMER,
            "text_config": {
                "model_type": "opt",
                "hidden_size": 2560,
                "word_embed_proj_dim": 2560,
                "ffn_dim": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 50304,
                "max_position_embeddings": 2048,
            },
            "num_query_tokens": 32,
            "image_token_index": 50265,
        },
    ),
    # transformers 5 ties T5's lm_head to the embedding whatever the configuration says.
    "blip2-flan-t5-xl": Preset(
        "Salesforce/blip2-flan-t5-xl",
        "Blip2ForConditionalGeneration",
        "blip-2",
        {
            "vision_config": _VIT_G,
            "qformer_config": _QFORMER,
            "text_config": {
                "model_type": "t5",
                "d_model": 2048,
                "d_kv": 64,
                "d_ff": 5120,
                "num_layers": 24,
                "num_decoder_layers": 24,
                "num_heads": 32,
                "vocab_size": 32128,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            },
            "num_query_tokens": 32,
        },
    ),
    "blip2-itm-vit-g": Preset(
        "Salesforce/blip2-itm-vit-g",
        "Blip2ForImageTextRetrieval",
        "blip-2",
        {"vision_config": _VIT_G, **_RETRIEVAL},
    ),
    "blip2-itm-vit-g-coco": Preset(
        "Salesforce/blip2-itm-vit-g-coco",
        "Blip2ForImageTextRetrieval",
        "blip-2",
        {"vision_config": {**_VIT_G, "image_size": 364}, **_RETRIEVAL},
    ),
    "llava-1.5-7b": Preset(
        "llava-hf/llava-1.5-7b-hf",
        "LlavaForConditionalGeneration",
        "llava",
        {
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32064,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            },
            "image_token_index": 32000,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    ),
}


def build_meta(source: str | Path) -> nn.Module:
    """The model of a preset, or of a folder with a ``config.json``, without weights.

    All parameters are on the meta device: shapes, ties and modules are real, values are not.
    Raises MmqError for an unknown preset, an unreadable folder or an unsupported model.
    """
    import transformers

    preset = PRESETS.get(str(source))
    if preset is not None:
        config = transformers.AutoConfig.for_model(preset.model_type, **preset.config)
        model_class = preset.model_class
    else:
        model_class = _class_of_folder(Path(source))
        config = transformers.AutoConfig.from_pretrained(Path(source), local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, model_class)(config)
    return model.eval()


def _class_of_folder(folder: Path) -> str:
    path = folder / "config.json"
    if not path.is_file():
        raise MmqError(
            f"model: expected one of {', '.join(PRESETS)} or a folder with a config.json, "
            f"got {str(folder)!r}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MmqError(f"{path}: expected JSON, got {error}") from error
    names = data.get("architectures") if isinstance(data, dict) else None
    known = sorted({architecture.model_class for architecture in ARCHITECTURES})
    if not isinstance(names, list) or not names or names[0] not in known:
        raise MmqError(f"{path}: expected architectures: [one of {', '.join(known)}], got {names}")
    return str(names[0])
