# SPDX-License-Identifier: Apache-2.0
"""The table of what each width costs each linear: numbers, and the file that holds them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from mmq.errors import MmqError

FORMAT: Final = "mmq-errors"
VERSION: Final = 1

# Relative error above which the second order is not trusted. Measured: on the tiny models the
# estimate is right within a factor of two below it, up to a hundred times too small above (DESIGN).
LARGE: Final = 0.1

Objective = Literal["relative", "output", "fisher", "kl", "mixed"]


@dataclass(frozen=True)
class Choice:
    """One linear at one width.

    ``stored_bytes`` are those of its file, an upper bound: a permutation or input scale that turns
    out to be the identity is not stored. ``output`` is the mean over tokens of |(W_hat - W) x|^2,
    ``relative`` its ratio to the mean of |W x|^2, ``fisher`` the estimated and ``kl`` the measured
    KL divergence per prediction, in nats; both None unless they were asked for.
    """

    bits: int
    stored_bytes: int
    output: float
    relative: float
    fisher: float | None = None
    kl: float | None = None

    def error(self, objective: Objective) -> float | None:
        """The number that ``objective`` sums; None where it was not found.

        ``mixed`` is ``kl`` where ``relative`` exceeds LARGE, else ``fisher``.
        """
        if objective == "mixed":
            objective = "kl" if self.relative > LARGE else "fisher"
        value: float | None = getattr(self, objective)
        return value


@dataclass(frozen=True)
class UnitErrors:
    """All choices of one linear, by ascending width. ``weight`` is the SHA-256 of its matrix."""

    path: str
    component: str
    stack: str
    block: int | None
    layer_type: str
    n: int
    k: int
    input_group: str
    weight: str
    choices: tuple[Choice, ...]

    def choice(self, bits: int) -> Choice:
        """The choice of this width. Raises MmqError that lists the widths that there are."""
        for choice in self.choices:
            if choice.bits == bits:
                return choice
        widths = ", ".join(str(choice.bits) for choice in self.choices)
        raise MmqError(f"{self.path}: expected one of {widths} bits, got {bits}")


@dataclass(frozen=True)
class ErrorTable:
    """The linears that a recipe quantizes, with their choices.

    ``setup`` says what was measured: model class, recipe, a hash of the samples.
    """

    setup: dict[str, Any]
    units: tuple[UnitErrors, ...]

    def save(self, path: Path) -> None:
        """Writes JSON, all of it or nothing."""
        data = {"format": FORMAT, "version": VERSION, "setup": self.setup}
        data["units"] = [asdict(unit) for unit in self.units]
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise MmqError(f"{path}: expected a writable file, got {error}") from error

    @classmethod
    def read(cls, path: Path) -> ErrorTable:
        """The inverse of :meth:`save`. Raises MmqError that names the file."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MmqError(f"{path}: expected a table of errors in JSON, got {error}") from error
        found = (data.get("format"), data.get("version")) if isinstance(data, dict) else None
        if found != (FORMAT, VERSION):
            raise MmqError(f"{path}: expected {FORMAT} version {VERSION}, got {found}")
        try:
            units = []
            for unit in data["units"]:
                choices = tuple(Choice(**choice) for choice in unit["choices"])
                units.append(UnitErrors(**{**unit, "choices": choices}))
            return cls(data["setup"], tuple(units))
        except (KeyError, TypeError) as error:
            raise MmqError(f"{path}: expected units with choices; {error}") from error
