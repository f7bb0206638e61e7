# SPDX-License-Identifier: Apache-2.0
"""The tables of calibration seeds and of options: heads and cells as text, for every form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Data = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]

SEEDS_NOTE = (
    "Score: mean over calibration seeds, their standard deviation, and in brackets the one that "
    "resampling the same items alone would make."
)
OPTIONS_NOTE = (
    "Difference to the same method without the option, mean over common seeds, with its interval "
    "over items and in braces the range over seeds; * where its p-value is below 0.05 after Holm's "
    "adjustment over the column. KL is of the logits from full precision, in 1e-3 nats: less is "
    "better there."
)
SIGNIFICANT = 0.05


def seeds_table(model: Data) -> Cells:
    """A row for each repeated cell, a column for each target; no rows where none is repeated."""
    return _table(model, "seeds", ("grid", "widths", "seeds"), _spread)


def options_table(model: Data) -> Cells:
    """A row for each option and widths, a column for each target."""
    return _table(model, "options", ("grid", "widths", "seeds"), _change)


def _table(model: Data, kind: str, keys: Sequence[str], cell: Any) -> Cells:
    shown = [entry for entry in model["repeats"] if entry[kind]]
    rows: dict[tuple[str, ...], list[str]] = {}
    for position, entry in enumerate(shown):
        for row in entry[kind]:
            key = tuple(str(row[name]) for name in keys)
            cells = rows.setdefault(key, [""] * len(shown))
            cells[position] = cell(row, 1000.0 if entry["unit"] == "nats" else 100.0)
    heads = [entry["name"].replace("_", " ") for entry in shown]
    return [*keys, *heads], [[*key, *cells] for key, cells in rows.items()]


def _spread(row: Data, scale: float) -> str:
    sampling = "" if row["sampling"] is None else f" ({scale * row['sampling']:.1f})"
    return f"{scale * row['mean']:.1f} \xb1 {scale * row['deviation']:.1f}{sampling}"


def _change(row: Data, scale: float) -> str:
    text = f"{_signed(scale * row['value'])}"
    if row["low"] is not None:
        text += f" [{_signed(scale * row['low'])}, {_signed(scale * row['high'])}]"
    if row["adjusted"] is not None and row["adjusted"] < SIGNIFICANT:
        text += "*"
    if row["seeds"] > 1:
        text += f" {{{_signed(scale * row['lowest'])} to {_signed(scale * row['highest'])}}}"
    return text


def _signed(value: float) -> str:
    return format(round(value, 1) + 0.0, "+.1f")
