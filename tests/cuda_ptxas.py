# SPDX-License-Identifier: Apache-2.0
"""Registers, spills and shared memory per kernel and architecture, from the reports of ptxas.

    python tests/cuda_ptxas.py build/dev/cuda

reads every <object>.o.log that the build keeps there and prints a JSON document: for each kernel
and architecture the most of each number over the kernel's instantiations.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'")
SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (?P<count>\d+) registers")
SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass
class Usage:
    """What ptxas says of one compiled entry, or the most over several."""

    instantiations: int = 1
    registers: int = 0
    spill_bytes: int = 0  # stores and loads
    shared_bytes: int = 0  # static

    def joined(self, other: Usage) -> Usage:
        return Usage(
            self.instantiations + other.instantiations,
            max(self.registers, other.registers),
            max(self.spill_bytes, other.spill_bytes),
            max(self.shared_bytes, other.shared_bytes),
        )


def kernel_name(mangled: str) -> str:
    """The function's own name: the last of the length-prefixed parts that open an Itanium name."""
    names, at = [], len("_ZN") if mangled.startswith("_ZN") else len("_Z")
    while match := re.compile(r"\d+").match(mangled, at):
        at = match.end() + int(match[0])
        names.append(mangled[match.end() : at])
    if not mangled.startswith("_Z") or not names:
        raise ValueError(f"kernel_name: expected a mangled C++ name, got {mangled!r}")
    return names[-1]


def entries(log: str) -> list[tuple[str, str, Usage]]:
    """(kernel, architecture, usage) of every entry in a report."""
    found: list[tuple[str, str, Usage]] = []
    for line in log.splitlines():
        if match := ENTRY.search(line):
            found.append((kernel_name(match["name"]), match["arch"], Usage()))
        if not found:
            continue
        usage = found[-1][2]
        if match := SPILLS.search(line):
            usage.spill_bytes = int(match["stores"]) + int(match["loads"])
        if match := REGISTERS.search(line):
            usage.registers = int(match["count"])
            shared = SHARED.search(line)
            usage.shared_bytes = int(shared["bytes"]) if shared else 0
    return found


def usage_of(folder: Path) -> dict[str, dict[str, Usage]]:
    """kernel -> architecture -> usage, over every report in ``folder``."""
    logs = sorted(folder.glob("*.o.log"))
    if not logs:
        raise FileNotFoundError(f"usage_of: expected ptxas reports *.o.log in {folder}, found none")
    table: dict[str, dict[str, Usage]] = {}
    for log in logs:
        for kernel, arch, usage in entries(log.read_text()):
            row = table.setdefault(kernel, {})
            row[arch] = row[arch].joined(usage) if arch in row else usage
    return table


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    table = usage_of(Path(sys.argv[1]))
    print(json.dumps({k: {a: asdict(u) for a, u in row.items()} for k, row in table.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
