# SPDX-License-Identifier: Apache-2.0
"""Small charts as inline SVG: scales, axes and marks, all text escaped.

Colours are classes, which the page's style sheet gives for light and dark. Every series has a shape
of its own, too, so that no chart depends on colour. Panels are about as wide as a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360.0, 250.0
SERIES = 6
Point = tuple[float, float]


def linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end]; a range without width to its middle."""
    span = high - low
    if span <= 0.0:
        return lambda value: (start + end) / 2.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    inner = linear(math.log2(low), math.log2(high), start, end)
    return lambda value: inner(math.log2(value))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a range, about so many."""
    span = high - low
    if span <= 0.0:
        return [low]
    raw = span / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * magnitude >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def short(value: float) -> str:
    """A tick's label."""
    text = f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


@dataclass
class Panel:
    """One chart; marks are added in the order in which they are drawn."""

    title: str
    label: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = 44.0
    right: float = 12.0
    top: float = 30.0
    bottom: float = 40.0
    parts: list[str] = field(default_factory=list)

    @property
    def x_span(self) -> tuple[float, float]:
        return self.left, self.width - self.right

    @property
    def y_span(self) -> tuple[float, float]:
        return self.height - self.bottom, self.top

    def text(self, at: Point, text: str, css: str = "", anchor: str = "start") -> None:
        anchored = "" if anchor == "start" else f' text-anchor="{anchor}"'
        css = f' class="{css}"' if css else ""
        self.parts.append(
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}"{css}{anchored}>{escape(text)}</text>'
        )

    def line(self, points: Sequence[Point], css: str) -> None:
        if points:
            drawn = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            self.parts.append(f'<path class="{css}" d="M{drawn}"/>')

    def band(self, low: float, high: float, css: str) -> None:
        """A horizontal band between two heights."""
        x0, x1 = self.x_span
        self.parts.append(
            f'<rect class="{css}" x="{x0:.1f}" y="{min(low, high):.1f}" width="{x1 - x0:.1f}" '
            f'height="{abs(high - low):.1f}"/>'
        )

    def dots(self, points: Sequence[Point], css: str) -> None:
        """Many small dots as one path: strokes without length have round ends."""
        if points:
            drawn = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
            self.parts.append(f'<path class="dots {css}" d="{drawn}"/>')

    def mark(self, at: Point, series: int, hint: str = "", size: float = 3.6) -> None:
        """A marker with the shape of its series, and a hint that browsers show on hover."""
        x, y = at
        s = size
        shape = series % SERIES
        if shape == 0:
            drawn = f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z"
        elif shape == 1:
            q = s * 0.9
            drawn = f"M{x - q:.1f} {y - q:.1f}h{2 * q:.1f}v{2 * q:.1f}h{-2 * q:.1f}z"
        elif shape == 2:
            drawn = f"M{x:.1f} {y - s * 1.2:.1f}l{s * 1.15:.1f} {s * 2:.1f}h{-2.3 * s:.1f}z"
        elif shape == 3:
            d = s * 1.25
            drawn = f"M{x:.1f} {y - d:.1f}l{d:.1f} {d:.1f}l{-d:.1f} {d:.1f}l{-d:.1f} {-d:.1f}z"
        elif shape == 4:
            drawn = f"M{x:.1f} {y + s * 1.2:.1f}l{s * 1.15:.1f} {-s * 2:.1f}h{-2.3 * s:.1f}z"
        else:
            drawn = f"M{x - s:.1f} {y - s / 2:.1f}h{2 * s:.1f}v{s:.1f}h{-2 * s:.1f}z"
        title = f"<title>{escape(hint)}</title>" if hint else ""
        self.parts.append(f'<path class="mark s{shape}" d="{drawn}">{title}</path>')

    def whisker(self, one: Point, two: Point, series: int) -> None:
        self.line([one, two], f"whisker s{series % SERIES}")

    def x_axis(
        self, at: Sequence[float], labels: Sequence[str], name: str, *, grid: bool = False
    ) -> None:
        """Ticks at positions of the panel."""
        y0, y1 = self.y_span
        for x, label in zip(at, labels, strict=True):
            if grid:
                self.line([(x, y0), (x, y1)], "grid")
            self.text((x, y0 + 15), label, "tick", "middle")
        self.line([(self.x_span[0], y0), (self.x_span[1], y0)], "axis")
        self.text((sum(self.x_span) / 2, self.height - 7), name, "name", "middle")

    def y_axis(self, scale: Callable[[float], float], values: Sequence[float]) -> None:
        """Lines across the panel with labels to the left."""
        for value in values:
            y = scale(value)
            self.line([(self.x_span[0], y), (self.x_span[1], y)], "grid")
            self.text((self.left - 6, y + 3.5), short(value), "tick", "end")

    def svg(self) -> str:
        head = (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.label)}">'
        )
        title = f'<text class="title" x="{min(self.left, 10):g}" y="16">{escape(self.title)}</text>'
        return head + title + "".join(self.parts) + "</svg>"
