# SPDX-License-Identifier: Apache-2.0
"""The tables of calibration seeds and of options: heads and cells as text, for every form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Data = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]

SEEDS_NOTE = (
    "Score: mean over calibration seeds, standard deviation over seeds, and in brackets the one "
    "that resampling items would make of the same differences between seeds. KL is of the logits "
    "from full precision."
)
OPTIONS_NOTE = (
    "Difference to the same method without the option, mean over common seeds, with its interval "
    "over items and in braces the range over seeds; * where its p-value is below 0.05 after Holm's "
    "adjustment over the column. Of KL less is better."
)
SIGNIFICANT = 0.05


def repeat_tables(model: Data) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Name, note, head and rows of each of both tables that has rows."""
    both = (
        ("calibration seeds", SEEDS_NOTE, seeds_table(model)),
        ("options", OPTIONS_NOTE, options_table(model)),
    )
    return [(name, note, head, rows) for name, note, (head, rows) in both if rows]


def seeds_table(model: Data) -> Cells:
    """A row for each repeated cell, a column for each target; no rows where none is repeated."""
    return _table(model, "seeds", _spread)


def options_table(model: Data) -> Cells:
    """A row for each option and widths, a column for each target."""
    return _table(model, "options", _change)


def _table(model: Data, kind: str, cell: Callable[[Data, Callable[..., str]], str]) -> Cells:
    shown = [entry for entry in model["repeats"] if entry[kind]]
    rows: dict[tuple[str, str], dict[int, tuple[int, str]]] = {}
    for position, entry in enumerate(shown):
        form = _nats if entry["unit"] == "nats" else _points
        for row in entry[kind]:
            cells = rows.setdefault((row["grid"], row["widths"]), {})
            cells[position] = row["seeds"], cell(row, form)
    found = []
    for (grid, widths), cells in rows.items():
        most = max(seeds for seeds, _ in cells.values())
        texts = ["" for _ in shown]
        for position, (seeds, text) in cells.items():
            texts[position] = text if seeds == most else f"{text} of {seeds}"
        found.append([grid, widths, str(most), *texts])
    heads = [_head(entry["name"], entry["unit"]) for entry in shown]
    return ["grid", "widths", "seeds", *heads], found


def _head(name: str, unit: str) -> str:
    text = name.replace("_", " ").replace("accuracy always", "accuracy")
    return text.replace(" kl", " KL, 1e-3 nats") if unit == "nats" else text


def _spread(row: Data, form: Callable[..., str]) -> str:
    sampling = "" if row["sampling"] is None else f" ({form(row['sampling'])})"
    return f"{form(row['mean'])} \xb1 {form(row['deviation'])}{sampling}"


def _change(row: Data, form: Callable[..., str]) -> str:
    text = form(row["value"], sign=True)
    if row["low"] is not None:
        text += f" [{form(row['low'], sign=True)}, {form(row['high'], sign=True)}]"
    if row["adjusted"] is not None and row["adjusted"] < SIGNIFICANT:
        text += "*"
    if row["seeds"] > 1:
        text += f" {{{form(row['lowest'], sign=True)} to {form(row['highest'], sign=True)}}}"
    return text


def _points(value: float, *, sign: bool = False) -> str:
    """A score times 100."""
    return format(round(100 * value, 1) + 0.0, "+.1f" if sign else ".1f")


def _nats(value: float, *, sign: bool = False) -> str:
    """KL in 1e-3 nats."""
    return format(round(1000 * value, 2) + 0.0, "+.2f" if sign else ".2f")
