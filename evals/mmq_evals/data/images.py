# SPDX-License-Identifier: Apache-2.0
"""Opening images, with errors that name the item."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mmq_evals.data.items import OpenImage
from mmq_evals.errors import EvalError


def image_file(path: Path) -> OpenImage:
    """A function that opens ``path`` as RGB."""
    return partial(_open, path)


def path_of(open_image: OpenImage) -> Path | None:
    """The file that ``open_image`` opens; None for an image that is not a file."""
    if isinstance(open_image, partial) and open_image.args:
        where = open_image.args[0]
        return where if isinstance(where, Path) else None
    return None


def identity(item_id: str, open_image: OpenImage) -> str:
    """Tells an image from any other content under its name: a file by its size and time of change,
    other images by their pixels."""
    path = path_of(open_image)
    if path is not None:
        try:
            found = path.stat()
        except OSError as error:
            return f"{item_id} {path} {error.strerror}"
        return f"{item_id} {path.resolve()} {found.st_size} {found.st_mtime_ns}"
    pixels = open_image().convert("RGB")
    return f"{item_id} {pixels.size} {hashlib.sha256(pixels.tobytes()).hexdigest()}"


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        rgb: Image.Image = image.convert("RGB")
        return rgb


def read_image(item_id: str, open_image: OpenImage) -> Image.Image:
    """Open and decode the image of an item, as RGB.

    Raises:
        EvalError: the file is missing or does not decode; the message names the item and the file.
    """
    try:
        image = open_image()
        # A truncated file is found when its pixels are read.
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise EvalError(f"item {item_id!r}: no image file {error.filename}") from error
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,  # Pillow's word for a broken PNG chunk.
        ValueError,
    ) as error:
        where = path_of(open_image)
        name = "" if where is None else f" {where}"
        raise EvalError(f"item {item_id!r}: image{name} does not decode: {error}") from error
