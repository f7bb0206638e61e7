# SPDX-License-Identifier: Apache-2.0
"""Statements of the CUDA sources, found by their text: where reports and counts must point."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulator import Finding

CUDA = Path(__file__).parents[1] / "csrc/cuda"
STATEMENT_LINES = 4  # at most


@dataclass(frozen=True)
class Place:
    """A statement of csrc/cuda."""

    file: str
    text: str  # in the statement's first line
    after: str = ""  # a mutation's name: the first such statement behind its #if

    def line(self) -> int:
        lines = (CUDA / self.file).read_text().splitlines()
        first = 0
        if self.after:
            first = next(i for i, line in enumerate(lines) if line.endswith(f"_{self.after}"))
        return next(i for i in range(first, len(lines)) if self.text in lines[i]) + 1

    def is_named(self, finding: Finding) -> bool:
        """Whether the finding, or the call it names, lies in the statement."""
        places = [f"{Path(finding.file).name}:{finding.line}"]
        places += re.findall(r"called at (\S+:\d+)\)", finding.message)
        return any(f"{self.file}:{self.line() + i}" in places for i in range(STATEMENT_LINES))

    def counts(self, launch: dict[str, Any]) -> dict[str, int]:
        """What a launch counted at the statement, summed over its lines."""
        first = self.line()
        found = [
            counts
            for counts in launch["by_line"]
            if Path(counts["file"]).name == self.file
            and first <= counts["line"] < first + STATEMENT_LINES
        ]
        assert found, f"{launch['kernel']} counted nothing at {self}"
        return {
            name: sum(counts[name] for counts in found)
            for name in found[0]
            if name not in ("file", "line")
        }
