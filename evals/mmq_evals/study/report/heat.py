# SPDX-License-Identifier: Apache-2.0
"""Heat maps: differences to full precision by component, part and bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmq_evals.study.report import charts
from mmq_evals.study.report.markup import signed
from mmq_evals.study.text import points

Data = Mapping[str, Any]

HEAT_STEPS = 9


def heat_class(value: float, most: float) -> str:
    """The colour step of a difference: l1 to l9 for losses, g1 to g9 for gains."""
    step = round(HEAT_STEPS * min(abs(value) / most, 1.0)) if most > 0 else 0
    return "" if step == 0 else f"{'l' if value < 0 else 'g'}{step}"


def _heat_cell(row: Data | None, most: float) -> str:
    if row is None:
        return "<td>"
    difference = row["difference"]
    css = heat_class(difference["value"], most)
    marked = f" class={css}" if css else ""
    interval = ""
    if difference["low"] is not None:
        ends = " to ".join(points(difference[end], sign=True) for end in ("low", "high"))
        interval = f"<br><small>{signed(ends)}</small>"
    return f"<td{marked}>{signed(points(difference['value'], sign=True))}{interval}"


def heat_of_components(target: Data) -> str:
    """Component by bits, a block of rows for each method."""
    grids = [grid for grid in charts.main_grids(target) if grid["dose_response"]]
    rows = [row for grid in grids for row in grid["dose_response"]]
    if not rows:
        return ""
    most = max(abs(row["difference"]["value"]) for row in rows)
    widths = sorted({row["bits"] for row in rows})
    body = []
    for grid in grids:
        known = {(row["factor"], row["bits"]): row for row in grid["dose_response"]}
        body.append(f"<tr class=head><th colspan={len(widths) + 1}>{escape(grid['label'])}")
        for name in dict.fromkeys(row["factor"] for row in grid["dose_response"]):
            cells = "".join(_heat_cell(known.get((name, width)), most) for width in widths)
            body.append(f"<tr><th scope=row>{escape(name)}{cells}")
    heads = "".join(f"<th scope=col>{width:g} bits" for width in widths)
    note = '<p class="note">Difference to full precision.</p>'
    return note + _heat_table("", heads, body)


def _heat_table(corner: str, heads: str, body: Sequence[str]) -> str:
    return (
        '<div class="scroll" tabindex=0><table class="heat"><thead><tr><th scope=col>'
        f"{escape(corner)}{heads}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def heat_of_parts(target: Data) -> str:
    """Parts of components (thirds, layer types) by bits, for every method."""
    known: dict[tuple[str, str, float], Data] = {}
    for grid in target["grids"]:
        for row in grid["dose_response"]:
            if "." in row["factor"]:
                known.setdefault((grid["label"], row["factor"], row["bits"]), row)
    if not known:
        return ""
    most = max(abs(row["difference"]["value"]) for row in known.values())
    body = []
    widths = sorted({bits for _, _, bits in known})
    types = ("attention", "mlp", "")
    for label in dict.fromkeys(label for label, _, _ in known):
        factors = dict.fromkeys(factor for other, factor, _ in known if other == label)
        places = dict.fromkeys(_place_and_type(factor)[0] for factor in factors)
        body.append(f"<tr class=head><th colspan={1 + len(widths) * len(types)}>{escape(label)}")
        for place in places:
            by_type = {_place_and_type(f)[1]: f for f in factors if _place_and_type(f)[0] == place}
            cells = [
                _heat_cell(known.get((label, by_type.get(kind, ""), width)), most)
                for width in widths
                for kind in types
            ]
            body.append(f"<tr><th scope=row>{escape(place)}{''.join(cells)}")
    heads = "".join(
        f"<th scope=col>{width:g} bits<br>{kind or 'both'}" for width in widths for kind in types
    )
    return _heat_table("", heads, body)


def _place_and_type(factor: str) -> tuple[str, str]:
    words = factor.split(".")
    kind = next((word for word in words if word in ("attention", "mlp")), "")
    return " ".join(word for word in words if word != kind), kind
