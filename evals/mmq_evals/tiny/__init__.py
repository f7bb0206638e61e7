# SPDX-License-Identifier: Apache-2.0
"""The tiny models that ship with mmq: real architectures, trained from scratch on made-up scenes.

They exist so that the whole way (quantize, pack, load, evaluate) runs on real input in minutes.
They say nothing about the damage that low bits do to checkpoints of billions of parameters.
"""

from __future__ import annotations

from pathlib import Path

MODELS = ("tiny-blip2-caption", "tiny-blip2-retrieval", "tiny-llava")

# At training, where half of the captions have no prompt, and at inference. LLaVA's prompt is that
# of the published model, see ``mmq_evals.tasks.vqa``.
CAPTION_PROMPT = "a photo of"
# Enough for the longest reference caption: 29 tokens and the end.
CAPTION_MAX_NEW_TOKENS = 40


def path(name: str) -> Path:
    """The folder of a shipped checkpoint, for ``from_pretrained``.

    Raises ValueError for a name outside ``MODELS``.
    """
    if name not in MODELS:
        raise ValueError(f"expected a tiny model of {', '.join(MODELS)}, got {name!r}")
    return Path(__file__).parent / "checkpoints" / name
