# SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML: numbers and tables. All text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mmq_evals.study.text import number

Data = Mapping[str, Any]

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def signed(text: str) -> str:
    """Escaped, with real minus signs."""
    return escape(text).replace("-", MINUS)


def estimate(value: Data | None, *, sign: bool = False) -> str:
    """A score with its interval in small print."""
    if value is None:
        return ""
    head, _, interval = number(value, sign=sign).partition(" ")
    small = f" <small>{signed(interval)}</small>" if interval else ""
    return signed(head) + small


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    sortable: bool = False,
    tall: bool = False,
) -> str:
    """A table in a scroll box of its own. Cells are HTML already; heads and caption are text."""
    marked = " data-sortable" if sortable else ""
    # End tags of cells and rows are optional in HTML; a table of all runs has many of them.
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) for row in rows)
    heads = "".join(f"<th scope=col>{escape(cell)}" for cell in head)
    box = "scroll tall" if tall else "scroll"
    named = f'<p class="note">{escape(caption)}</p>' if caption else ""
    return (
        f'{named}<div class="{box}" tabindex=0><table{marked}><thead><tr>{heads}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: str) -> str:
    return cell if cell.startswith(("<td", "<th")) else f"<td>{cell}"
