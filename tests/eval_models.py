# SPDX-License-Identifier: Apache-2.0
"""Random models of the three classes, a few thousand parameters each, and dataset folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
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

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = [
    "a",
    "photo",
    "of",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "on",
    "the",
    "left",
    "right",
    "what",
    "color",
    "is",
    "it",
    "yes",
    "no",
    "question",
    ":",
    "short",
    "answer",
    "?",
    "user",
    "assistant",
    "single",
    "word",
    "or",
    "phrase",
    ".",
    "using",
]
COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
PIXELS = 16


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )
    result.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return result


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": 8,
}


def blip2(kind: str) -> tuple[Any, Any]:
    """A model and its processor; ``kind`` is caption, t5 or retrieval."""
    torch.manual_seed(0)
    retrieval = kind == "retrieval"
    text: dict[str, Any] = IDS | {
        "model_type": "opt",
        "vocab_size": 64,
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 80,
    }
    if kind == "t5":
        text = {
            "model_type": "t5",
            "vocab_size": 64,
            "d_model": 24,
            "d_kv": 12,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        }
    config = Blip2Config(
        vision_config=VISION | {"initializer_range": 0.3},
        qformer_config={
            "vocab_size": 64,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 24,
            "max_position_embeddings": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.3,
            "use_qformer_text_input": retrieval,
        },
        text_config=text,
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=None if retrieval else 4,
        initializer_range=0.3,
    )
    model = (Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration)(config)
    torch.nn.init.normal_(model.query_tokens)
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": PIXELS, "width": PIXELS}),
        tokenizer(),
        num_query_tokens=None if retrieval else 4,
    )
    return model.eval(), processor


def llava() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        text_config=IDS
        | {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
        },
        image_token_index=4,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    side = {"height": PIXELS, "width": PIXELS}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


# ---- dataset folders -----------------------------------------------------------------------------


def write_image(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), COLORS[color]).save(path)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def karpathy_coco(root: Path, n: int = 7, n_test: int = 4) -> Path:
    """The first ``n_test`` images are test, the others train; two captions each."""
    colors = list(COLORS)
    images = []
    for index in range(n):
        color = colors[index % 3]
        name = f"COCO_val2014_{index:012d}.jpg"
        write_image(root / "val2014" / name, color)
        sentences = [f"A {color} square.", f"the {color} photo number {index}"]
        images.append(
            {
                "filepath": "val2014",
                "filename": name,
                "cocoid": 100 + index,
                "imgid": index,
                "split": "test" if index < n_test else "train",
                "sentences": [
                    {"raw": raw, "tokens": raw.split(), "imgid": index, "sentid": 10 * index + k}
                    for k, raw in enumerate(sentences)
                ],
            }
        )
    write_json(root / "dataset_coco.json", {"dataset": "coco", "images": images})
    return root


def vqav2(root: Path, split: str = "val2014") -> Path:
    """Three questions about two images, ten answers each."""
    rows = [(42, 420, "what color is it?", "red"), (42, 421, "is it red?", "yes")]
    rows.append((7, 70, "is it {blue}?", "no"))
    write_image(root / split / f"COCO_{split}_000000000042.jpg")
    write_image(root / split / f"COCO_{split}_000000000007.jpg", "green")
    questions = [
        {"image_id": image, "question_id": key, "question": text} for image, key, text, _ in rows
    ]
    annotations = [
        {
            "question_id": key,
            "image_id": image,
            "question_type": "is it" if answer in ("yes", "no") else "what color",
            "answer_type": "yes/no" if answer in ("yes", "no") else "other",
            "multiple_choice_answer": answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1}
                for k in range(10)
            ],
        }
        for image, key, _, answer in rows
    ]
    write_json(
        root / f"v2_OpenEnded_mscoco_{split}_questions.json",
        {"questions": questions, "data_subtype": split},
    )
    write_json(root / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})
    return root


def gqa(root: Path) -> Path:
    """Two balanced questions and one that is not."""

    def question(text: str, answer: str, structural: str, balanced: bool) -> dict[str, Any]:
        return {
            "question": text,
            "answer": answer,
            "imageId": "n1",
            "isBalanced": balanced,
            "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
        }

    write_image(root / "images" / "n1.jpg")
    write_json(
        root / "testdev_balanced_questions.json",
        {
            "11": question("what color is it?", "red", "query", True),
            "12": question("is it red?", "yes", "verify", True),
            "13": question("is it red or blue?", "red", "choose", False),
        },
    )
    return root
