# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changed_share(agreement: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """The share of predictions that are not those of full precision, with its interval: captions,
    answers, or first candidates of retrieval. None where there is nothing to compare with."""
    if "flipped answers" in agreement:
        return {key: agreement["flipped answers"][key] for key in ("value", "low", "high")}
    for name in ("identical captions", "same first candidate"):
        if name in agreement:
            same = agreement[name]
            ends = {"value": "value", "low": "high", "high": "low"}
            return {key: 1.0 - same[other] for key, other in ends.items()}
    return None


def format_result(result: dict[str, Any]) -> str:
    """A plain table: scores times 100 with intervals, paired differences, baselines."""
    lines = ["Scores times 100, with 95 % bootstrap intervals over images."]
    for name, entry in result["tasks"].items():
        counts = entry["counts"]
        lines.append(
            f"{name}: {counts['rows']} rows of {counts['clusters']} images "
            f"({entry['protocol']['data']['name']}, {entry['protocol']['data']['split']}), "
            f"{entry['seconds']['predict']:.0f} s"
        )
        if counts.get("failed"):
            first = next(iter(entry["failed"].values()))
            lines.append(f"  not scored: {counts['failed']} rows; the first: {first}")
        paired = entry.get("against_reference", {}).get("differences", {})
        for metric in entry["shown"]:
            score = entry["scores"][metric]
            line = (
                f"  {metric:<24}{100 * score['value']:8.2f}  "
                f"[{100 * score['low']:.2f}, {100 * score['high']:.2f}]"
            )
            if metric in paired:
                change = paired[metric]
                line += (
                    f"  {100 * change['value']:+.2f} [{100 * change['low']:+.2f}, "
                    f"{100 * change['high']:+.2f}] p {change['p_value']:.4f}"
                )
            lines.append(line + ("  *" if metric == entry["primary"] else ""))
        for baseline, scores in entry["baselines"].items():
            shown = ", ".join(
                f"{key} {100 * scores[key]:.2f}" for key in entry["shown"] if key in scores
            )
            lines.append(f"  {baseline}: {shown}")
        agreement = entry.get("against_reference", {}).get("agreement", {})
        lines += agreement_lines(agreement)
    return "\n".join(lines)


def agreement_lines(agreement: dict[str, dict[str, Any]]) -> list[str]:
    """A line for every measure of agreement with its interval and count, times 100 but for nats."""
    lines = []
    for name, found in agreement.items():
        factor, digits = (1, 5) if found.get("unit") == "nats" else (100, 2)
        line = f"  {name}: {factor * found['value']:.{digits}f}"
        if found["low"] is not None:
            line += f" [{factor * found['low']:.{digits}f}, {factor * found['high']:.{digits}f}]"
        line += f" {found['unit']}" if "unit" in found else ""
        if found.get("not_finite"):
            line += f" ({found['not_finite']} samples without finite logits left out)"
        if "count" in found:
            line += f" ({found['count']} of {found['samples']})"
        lines.append(line)
    return lines
