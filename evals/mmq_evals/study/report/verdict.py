# SPDX-License-Identifier: Apache-2.0
"""What a target's tables amount to, in sentences that say how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from mmq_evals.study.importance import NOISY
from mmq_evals.study.report.charts import main_grids
from mmq_evals.study.text import certain_text, number, percent

Data = Mapping[str, Any]
GOAL = 0.98


def verdict(target: Data) -> list[tuple[str, str]]:
    """Headings with sentences: size, importance, interactions, methods."""
    grids = main_grids(target)
    said = (
        ("Size", _size(target)),
        ("Importance", _importance(grids)),
        ("Range", _range_effect(grids)),
        ("Together", _interactions(grids)),
        ("Methods", _methods(target)),
    )
    return [(head, text) for head, text in said if text]


def _size(target: Data) -> str:
    if target["full"] is None:
        return "No full-precision run is in the table: losses are not known."
    reached: dict[str, Data] = {}
    for grid in target["grids"]:
        for row in grid["reaching"]:
            best = reached.get(grid["label"])
            if row["goal"] != GOAL or row["bpw"] is None:
                continue
            if best is None or row["bpw"] < best["bpw"]:
                reached[grid["label"]] = row
    goal = f"{100 * GOAL:.0f} % of full precision"
    if not reached:
        return f"No run keeps {goal}."
    label, row = min(reached.items(), key=lambda entry: entry[1]["bpw"])
    text = (
        f"{goal} from {row['bpw']:.2f} bits per weight: {label} {row['widths']}, "
        f"{number(row['score'])} against {number(target['full'])}"
        f"{certain_text(row)}"
    )
    others = sorted((r["bpw"], name) for name, r in reached.items() if name != label)
    if others:
        text += ". Others: " + ", ".join(_from(size, name, reached) for size, name in others)
    return text + "."


def _from(size: float, name: str, reached: Mapping[str, Data]) -> str:
    certain = reached[name]["certain"]
    return f"{name} from {size:.2f}" + ("" if certain is None else f" ({certain:.2f})")


def _part(grid: Data, *names: str) -> Data | None:
    """The first of some ranges that has shares."""
    for name in names:
        for part in grid["importance"]:
            if part["range"] == name and part["kind"] != "refused":
                found: Data = part
                return found
    return None


def _top(part: Data) -> Data:
    singles = [share for share in part["shares"] if len(share["factors"]) == 1]
    top: Data = max(singles, key=lambda share: share["value"])
    return top


def _importance(grids: Sequence[Data]) -> str:
    said: dict[str, list[str]] = {}
    noisy = []
    span = ""
    for grid in grids:
        part = _part(grid, ">=3", "all", "common levels")
        if part is None or len(part["shares"]) < 2:
            continue
        span = "From 3 bits up" if part["range"] == ">=3" else "Over all widths"
        if (part["noise"] or 0.0) > NOISY:
            noisy.append(grid["label"])
            continue
        top = _top(part)
        text = f"{percent(top, 0)} ({grid['label']})"
        said.setdefault(top["factors"][0], []).append(text)
    text = ""
    if said:
        found = "; ".join(f"{name} {', '.join(shares)}" for name, shares in said.items())
        text = f"{span}, largest share of the variance in percent: {found}."
    if noisy:
        text += (
            f" {span}, more than half of the variance is sampling noise with {', '.join(noisy)}: "
            "nothing can be ranked there."
        )
    return text.strip()


def _range_effect(grids: Sequence[Data]) -> str:
    turned = []
    for grid in grids:
        wide, narrow = _part(grid, "all"), _part(grid, ">=3", ">=4")
        if wide is None or narrow is None or (narrow["noise"] or 0.0) > NOISY:
            continue
        one, two = _top(wide), _top(narrow)
        if one["factors"] != two["factors"]:
            turned.append(
                f"{one['factors'][0]} leads over all widths and {two['factors'][0]} "
                f"from {'3' if narrow['range'] == '>=3' else '4'} bits up ({grid['label']})"
            )
    return f"The order depends on it: {'; '.join(turned)}." if turned else ""


def _interactions(grids: Sequence[Data]) -> str:
    found: dict[str, list[str]] = {}
    tested = False
    for grid in grids:
        for pair in grid["interactions"]:
            mean = pair["mean"]
            if mean is None or mean["low"] is None:
                continue
            tested = True
            if shown_sign(mean):
                text = f"{number(mean, sign=True)} ({grid['label']})"
                found.setdefault(" and ".join(pair["factors"]), []).append(text)
    if not tested:
        return ""
    if not found:
        return (
            "No pair of components loses more, or less, than the sum of each alone, as far as "
            "these samples can tell."
        )
    pairs = "; ".join(f"{name} {', '.join(means)}" for name, means in found.items())
    return (
        "Mean loss of two components beyond the sum of each alone, where its interval leaves out "
        f"zero: {pairs}."
    )


def shown_sign(estimate: Data) -> int:
    """1 or -1 for an interval on one side of zero as it is shown, with one decimal; else 0."""
    low, high = (round(100 * estimate[end], 1) for end in ("low", "high"))
    return int(low > 0.0) - int(high < 0.0)


def _methods(target: Data) -> str:
    """The methods in their order, each with its lead over the next."""
    coarse = {tuple(grid["factors"]) for grid in main_grids(target)}
    pairs: dict[tuple[str, str], Data] = {}
    for row in target["methods"]:
        if row["at_least"] == 3.0 and tuple(row["factors"]) in coarse:
            ends = [-row[end] if row[end] is not None else None for end in ("high", "low")]
            turned = {**row, "value": -row["value"], "low": ends[0], "high": ends[1]}
            pairs.setdefault((row["a"], row["b"]), row)
            pairs.setdefault((row["b"], row["a"]), turned)
    names = dict.fromkeys(name for pair in pairs for name in pair)
    leads = {name: sum(p["value"] for (a, _), p in pairs.items() if a == name) for name in names}
    order = sorted(names, key=lambda name: -leads[name])
    said = []
    for first, second in pairwise(order):
        lead = pairs.get((first, second))
        if lead is not None:
            known = lead["low"] is not None
            doubt = ", not told apart" if known and shown_sign(lead) < 1 else ""
            said.append(f"{first} over {second} {number(lead, sign=True)}{doubt}")
    if not said:
        return ""
    return f"At equal widths of 3 bits and more, mean lead in points: {'; '.join(said)}."
