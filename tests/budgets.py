# SPDX-License-Identifier: Apache-2.0
"""The budgets of the CUDA kernels: tests/ptxsim/budgets.json, one entry per operator.

Counts come from the PTX interpreter, registers from ptxas; none is a time. Registers are given out
in eights, and so are their budgets, by architecture. A budget is raised only with a reason in the
commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "ptxsim" / "budgets.json"


def budget(op: str) -> dict[str, Any]:
    """The entry of one operator."""
    return dict(json.loads(PATH.read_text())[op])


def registers() -> dict[str, dict[str, int]]:
    """The most registers per thread, by kernel and architecture, over all operators."""
    entries = json.loads(PATH.read_text()).values()
    return {kernel: row for entry in entries for kernel, row in entry["registers"].items()}


def factor(counts: dict[str, int], actual: str, ideal: str) -> float:
    """How many times the ideal a count is; 1 where there was nothing to count."""
    return counts[actual] / counts[ideal] if counts[ideal] else 1.0


def assert_memory(launch: dict[str, Any], limits: dict[str, Any]) -> None:
    """Shared-memory wavefronts and sectors of one launch against an operator's limits."""
    total = launch["total"]
    found = {
        "bank_conflict_factor": factor(total, "shared_wavefronts", "shared_ideal"),
        "store_sector_factor": factor(total, "store_sectors", "store_sectors_ideal"),
        "load_sector_factor": factor(total, "load_sectors", "load_sectors_ideal"),
    }
    over = {name: value for name, value in found.items() if value > limits[name]}
    assert not over, f"{launch['kernel']}: expected at most {limits}, got {over}"
