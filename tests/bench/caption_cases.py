# SPDX-License-Identifier: Apache-2.0
"""A caption split of published size: 5,000 images with five references each, and one hypothesis."""

from __future__ import annotations

import random

IMAGES = 5_000
REFERENCES = 5
# As many words as the references of COCO's test split have, which Zipf's law spreads likewise.
WORDS = 9_000


def captions(seed: int = 0) -> tuple[dict[str, list[str]], dict[str, str]]:
    """References and hypotheses of 8 to 14 words; one in five needs the tokenizer's full rules."""
    rng = random.Random(seed)
    words = [f"w{index}" for index in range(WORDS)]
    weights = [1 / (index + 1) for index in range(WORDS)]
    endings = (".", " .", "", ", a man's red-and-white hat.", "!")

    def sentence() -> str:
        chosen = rng.choices(words, weights, k=rng.randint(8, 14))
        return f"A {' '.join(chosen)}{rng.choice(endings)}"

    refs = {str(n): [sentence() for _ in range(REFERENCES)] for n in range(IMAGES)}
    return refs, {key: sentence() for key in refs}
