# SPDX-License-Identifier: Apache-2.0
"""The items that tasks are made of; every loader yields these and every task reads these.

An image is held as a function that opens it, so that a list of items costs no pixels and a broken
file is found when its own item is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

OpenImage = Callable[[], Image.Image]


@dataclass(frozen=True)
class CaptionItem:
    """One image and its reference captions."""

    id: str
    image: OpenImage
    references: tuple[str, ...]


@dataclass(frozen=True)
class VqaItem:
    """One question about one image.

    ``answers`` are the annotators' answers: ten for VQAv2, one for GQA and easy-vqa. Several
    questions may share ``image_id``; intervals are formed over images.
    """

    id: str
    image_id: str
    image: OpenImage
    question: str
    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""


@dataclass(frozen=True)
class RetrievalItem:
    """One image and the captions that belong to it; a retrieval set is a sequence of these."""

    id: str
    image: OpenImage
    captions: tuple[str, ...]
