# SPDX-License-Identifier: Apache-2.0
"""The sample browser: images with the answers of full precision and of quantized runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mmq_evals.study.report.browser import Answer, Sample

FIRST_SAMPLES = 6


def sample_browser(samples: Sequence[Sample]) -> str:
    """Cards; all but the first in a fold."""
    if not samples:
        return ""
    cards = [_sample(sample) for sample in samples]
    shown = f'<div class="cards">{"".join(cards[:FIRST_SAMPLES])}</div>'
    rest = cards[FIRST_SAMPLES:]
    if rest:
        shown += (
            f"<details><summary>{len(rest)} more</summary>"
            f'<div class="cards">{"".join(rest)}</div></details>'
        )
    return shown


def _sample(sample: Sample) -> str:
    image = f'<img src="{sample.image}" alt="image of {escape(sample.id)}">' if sample.image else ""
    asked = f'<p class="asked">{escape(sample.question)}</p>' if sample.question else ""
    truth = f'<p class="truth">expected: {escape(sample.expected)}</p>' if sample.expected else ""
    # Runs that say the same share a row; full precision comes first.
    by_text: dict[str, list[Answer]] = {}
    for answer in (sample.full, *sample.answers):
        by_text.setdefault(answer.text, []).append(answer)
    rows = "".join(_said(text, answers) for text, answers in by_text.items())
    css = "card sample" if image else "card sample bare"
    return (
        f'<div class="{css}">{image}<div>{asked}{truth}<p class="truth"><code>'
        f"{escape(sample.id)}</code></p></div><table><tbody>{rows}</tbody></table></div>"
    )


def _said(text: str, answers: Sequence[Answer]) -> str:
    first = answers[0]
    shown = escape(text) or "<em>empty</em>"
    marked = " class=changed" if first.changed else ""
    score = "" if first.score is None else f"{100 * first.score:.0f}"
    # A run's name and widths stay on one line.
    labels = escape(
        ", ".join(answer.label.replace(" ", "\N{NO-BREAK SPACE}") for answer in answers)
    )
    return f"<tr><td><span{marked}>{shown}</span><br><small>{labels}</small><td>{score}"
