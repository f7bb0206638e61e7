# SPDX-License-Identifier: Apache-2.0
"""Composed scenes: one to three coloured shapes on a tinted background, with words about them.

A scene is drawn from a seed, rendered at 48 x 48 pixels with jitter and noise, and described by
five reference captions, by questions with one answer each, and by the content of its sixteen
patches. The splits are disjoint by content: a hash of what the scene shows (the objects, and for a
single object its place) decides to which split it belongs, so no test content is ever trained on.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "calibration", "test"]

IMAGE_PIXELS = 48
PATCH_PIXELS = 12
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
SIZES = ("small", "large")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 50, 225),
    "yellow": (240, 220, 30),
    "teal": (0, 128, 128),
    "gray": (128, 128, 128),
    "brown": (150, 70, 30),
    "black": (20, 20, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "pale": (240, 240, 245),
    "sandy": (232, 212, 168),
    "rosy": (242, 190, 200),
    "leafy": (190, 226, 180),
}
# Number of scenes with a published id in each split. Training draws from its stream by number.
SPLIT_SIZES: dict[Split, int] = {"train": 200_000, "calibration": 512, "test": 500}

_RADIUS_PIXELS = {"small": (4.5, 5.5), "large": (7.0, 8.5)}
WIDTHS = ("9", "10", "11", "14", "15", "16", "17")
_COLUMNS = ("left", "", "right")
_ROWS = ("top", "", "bottom")
_INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
_NUMBERS = ("no", "one", "two", "three")
_SUPERSAMPLE = 4
_JITTER_PIXELS = 2.5


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, and its centre and radius in pixels."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> str:
        """For example "small red circle"."""
        return f"{self.size} {self.color} {self.shape}"

    @property
    def width(self) -> str:
        """Twice the radius, rounded to a pixel: one of WIDTHS."""
        return str(round(2 * self.radius))

    @property
    def patch(self) -> int:
        """Row-major number of the patch in which the centre lies."""
        return int(self.y // PATCH_PIXELS) * (IMAGE_PIXELS // PATCH_PIXELS) + int(
            self.x // PATCH_PIXELS
        )


@dataclass(frozen=True)
class Scene:
    """Objects from left to right on a background; ``seed`` gives the pixels' noise."""

    things: tuple[Thing, ...]
    background: str
    seed: int

    @property
    def content(self) -> str:
        """What the scene shows, apart from pixels: the key that decides the split."""
        kinds = sorted(thing.kind for thing in self.things)
        if len(kinds) == 1:
            kinds.append(place(self.things[0]) or "in between")
        return " + ".join(kinds)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its only answer, and its type."""

    text: str
    answer: str
    type: str


def split_of(content: str) -> Split:
    """The split to which a content belongs: 20 % test, 10 % calibration, 70 % train."""
    bucket = hashlib.sha256(content.encode()).digest()[0] % 10
    if bucket < 2:
        return "test"
    return "calibration" if bucket == 2 else "train"


def place(thing: Thing) -> str | None:
    """Where the object is, in thirds of the picture, or None when too near to a border of them."""
    words = []
    for value, names in ((thing.y, _ROWS), (thing.x, _COLUMNS)):
        third = value * 3 / IMAGE_PIXELS
        if abs(third - 1) < 0.12 or abs(third - 2) < 0.12:
            return None
        words.append(names[min(int(third), 2)])
    named = " ".join(word for word in words if word)
    return f"at the {named}" if named else "in the center"


def relation(a: Thing, b: Thing) -> str | None:
    """How ``a`` lies to ``b`` on the dominant axis, or None when neither axis dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(abs(dx) - abs(dy)) < 4:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _centre(rng: random.Random, radius: float) -> float:
    """A coordinate near the middle of a patch, at least a pixel inside the picture."""
    middle = (rng.randrange(IMAGE_PIXELS // PATCH_PIXELS) + 0.5) * PATCH_PIXELS
    near = middle + rng.uniform(-_JITTER_PIXELS, _JITTER_PIXELS)
    return min(max(near, radius + 1), IMAGE_PIXELS - 1 - radius)


def _draw(rng: random.Random, count: int) -> Scene | None:
    """One attempt at a scene; None when its objects overlap or their places are ambiguous."""
    things: list[Thing] = []
    for _ in range(count):
        size = rng.choice(SIZES)
        radius = rng.uniform(*_RADIUS_PIXELS[size])
        thing = Thing(
            size,
            rng.choice(tuple(COLORS)),
            rng.choice(SHAPES),
            _centre(rng, radius),
            _centre(rng, radius),
            radius,
        )
        for other in things:
            if math.hypot(thing.x - other.x, thing.y - other.y) < radius + other.radius + 1:
                return None
            if thing.kind == other.kind or relation(thing, other) is None:
                return None
        things.append(thing)
    if count == 1 and place(things[0]) is None:
        return None
    things.sort(key=lambda thing: thing.x)
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)), rng.getrandbits(32))


def scene(split: Split, index: int) -> Scene:
    """The scene number ``index`` of a split; the same on every machine."""
    rng = random.Random(f"mmq scenes {split} {index}")
    count = rng.choices((1, 2, 3), weights=(15, 50, 35))[0]
    while True:
        drawn = _draw(rng, count)
        if drawn is not None and split_of(drawn.content) == split:
            return drawn


def scenes(
    split: Split, limit: int | None = None, *, size: int | None = None
) -> Iterator[tuple[str, Scene]]:
    """Ids and scenes of a split, in order: the first SPLIT_SIZES of them, or the first ``size``.

    The contents of the test and calibration splits are distinct, so that a caption names one image.
    Raises ValueError for an unknown split.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"expected a split of {', '.join(SPLIT_SIZES)}, got {split!r}")
    size = SPLIT_SIZES[split] if size is None else size
    wanted = size if limit is None else min(limit, size)
    seen: set[str] = set()
    index = 0
    while wanted > 0:
        drawn = scene(split, index)
        if split == "train" or drawn.content not in seen:
            seen.add(drawn.content)
            wanted -= 1
            yield f"scene-{split}-{index:06d}", drawn
        index += 1


def _polygon(
    thing: Thing, angles_and_radii: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    scale = _SUPERSAMPLE
    return [
        (
            scale * (thing.x + thing.radius * r * math.sin(math.radians(a))),
            scale * (thing.y - thing.radius * r * math.cos(math.radians(a))),
        )
        for a, r in angles_and_radii
    ]


def _paint(
    draw: ImageDraw.ImageDraw,
    thing: Thing,
    fill: tuple[int, int, int],
    ground: tuple[int, int, int],
) -> None:
    scale, x, y, r = _SUPERSAMPLE, thing.x, thing.y, thing.radius

    def box(half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return (
            scale * (x - half_width),
            scale * (y - half_height),
            scale * (x + half_width),
            scale * (y + half_height),
        )

    if thing.shape in ("circle", "ring"):
        draw.ellipse(box(r, r), fill=fill)
        if thing.shape == "ring":
            draw.ellipse(box(0.5 * r, 0.5 * r), fill=ground)
    elif thing.shape == "square":
        draw.rectangle(box(0.88 * r, 0.88 * r), fill=fill)
    elif thing.shape == "cross":
        draw.rectangle(box(r, 0.34 * r), fill=fill)
        draw.rectangle(box(0.34 * r, r), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon(_polygon(thing, [(0, 1.1), (125, 1.15), (235, 1.15)]), fill=fill)
    else:
        points = [(36.0 * i, 1.15 if i % 2 == 0 else 0.45) for i in range(10)]
        draw.polygon(_polygon(thing, points), fill=fill)


def render(shown: Scene) -> Image.Image:
    """The scene as an RGB image of 48 x 48 pixels, antialiased, with colour jitter and noise."""
    rng = np.random.default_rng(shown.seed)

    def jitter(color: tuple[int, int, int]) -> tuple[int, int, int]:
        moved = np.clip(np.asarray(color) + rng.integers(-14, 15, 3), 0, 255)
        return int(moved[0]), int(moved[1]), int(moved[2])

    ground = jitter(BACKGROUNDS[shown.background])
    side = IMAGE_PIXELS * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for thing in shown.things:
        _paint(draw, thing, jitter(COLORS[thing.color]), ground)
    pixels = np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.int16)
    noisy = np.clip(pixels + np.rint(rng.normal(0.0, 6.0, pixels.shape)), 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def captions(shown: Scene) -> tuple[str, ...]:
    """Five reference captions: the same facts in five phrasings, objects from left to right."""
    on = f"on a {shown.background} background"
    if len(shown.things) == 1:
        thing = shown.things[0]
        a, at = f"a {thing.kind}", place(thing)
        return (
            f"{a} {at} {on}",
            f"there is {a} {at}",
            f"{on} there is {a} {at}",
            f"a {shown.background} picture with {a} {at}",
            f"one {thing.size} {thing.shape} in {thing.color} {at} {on}",
        )
    kinds = [f"a {thing.kind}" for thing in shown.things]
    links = [relation(a, b) or "near" for a, b in zip(shown.things, shown.things[1:], strict=False)]
    inverse = [_INVERSE[link] for link in links]
    if len(kinds) == 2:
        (a, b), (ab,), (ba,) = kinds, links, inverse
        return (
            f"{a} {ab} {b} {on}",
            f"there is {a} {ab} {b}",
            f"{on} there is {b} {ba} {a}",
            f"a {shown.background} picture with {a} {ab} {b}",
            f"two shapes , {b} is {ba} {a} {on}",
        )
    (a, b, c), (ab, bc), (ba, _) = kinds, links, inverse
    return (
        f"{a} {ab} {b} and {b} {bc} {c} {on}",
        f"there is {a} {ab} {b} which is {bc} {c}",
        f"{on} there is {b} {ba} {a} and {bc} {c}",
        f"a {shown.background} picture with {a} {ab} {b} which is {bc} {c}",
        f"three shapes , {a} and {b} and {c} {on}",
    )


def _unique(shown: Scene, attribute: str) -> list[Thing]:
    values = [getattr(thing, attribute) for thing in shown.things]
    return [t for t in shown.things if values.count(getattr(t, attribute)) == 1]


def widths(shown: Scene) -> list[Question]:
    """How wide is every object that its shape names, in pixels; from left to right."""
    return [
        Question(f"how many pixels wide is the {thing.shape}?", thing.width, "width")
        for thing in _unique(shown, "shape")
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def questions(shown: Scene, rng: random.Random) -> list[Question]:
    """Up to ten questions about a scene, in random order; yes and no are equally likely.

    Most have one clear answer. Widths are a reading of a continuous quantity: whatever the model's
    precision, some of them lie near a border between two answers.
    """
    things = list(shown.things)
    asked = [
        Question("what is the background?", shown.background, "background"),
        Question("how many shapes are there?", _NUMBERS[len(things)], "count"),
    ]
    if by_shape := _unique(shown, "shape"):
        thing = rng.choice(by_shape)
        asked.append(Question(f"what color is the {thing.shape}?", thing.color, "color"))
        asked.append(Question(f"how big is the {thing.shape}?", thing.size, "size"))
        asked += widths(shown)
    if by_color := _unique(shown, "color"):
        thing = rng.choice(by_color)
        asked.append(Question(f"what shape is the {thing.color} object?", thing.shape, "shape"))
    asked.append(_existence(shown, rng))
    attribute = rng.choice(("size", "color"))
    value = getattr(rng.choice(things), attribute)
    count = sum(getattr(thing, attribute) == value for thing in things)
    asked.append(Question(f"how many {value} shapes are there?", _NUMBERS[count], "count"))
    if len(things) == 2:
        a, b = rng.sample(things, 2)
        text = f"what is {_INVERSE[relation(a, b) or 'left of']} the {a.kind}?"
        asked.append(Question(text, f"{b.color} {b.shape}", "which"))
    rng.shuffle(asked)
    return asked


def _existence(shown: Scene, rng: random.Random) -> Question:
    """Is there a colour and shape together; a false pair differs in one attribute if it can."""
    pairs = {(thing.color, thing.shape) for thing in shown.things}
    color, shape = rng.choice(sorted(pairs))
    present = rng.random() < 0.5
    while not present and (color, shape) in pairs:
        if rng.random() < 0.5:
            color = rng.choice(tuple(COLORS))
        else:
            shape = rng.choice(SHAPES)
    return Question(f"is there a {color} {shape}?", _yes(present), "exists")
