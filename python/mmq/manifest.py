# SPDX-License-Identifier: Apache-2.0
"""The record of one quantization: everything that was resolved, done, skipped or fallen back to."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, Final, get_args, get_origin, get_type_hints

import torch

from mmq.architectures import COMPONENTS
from mmq.errors import MmqError

MANIFEST_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
_PACKAGES: Final = ("mmq", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class LinearRecord:
    """One packed linear.

    ``spec`` is the grid (the fields of QuantSpec), ``options`` those of its method.
    ``relative_error`` is the mean of |(W_hat - W) x|^2 over that of |W x|^2 on the calibration
    inputs, None without any. ``tokens`` is how many of them were seen. ``alpha`` is AWQ's exponent,
    ``fold`` the producer that took 1/s (None: no scale, or ``in_scale``). ``damp`` is GPTQ's share
    of the mean diagonal. ``stored_bytes`` counts the packed tensors without the bias.
    ``approximation`` says how AWQ ranked its exponents, "" where all errors were exact.
    """

    path: str
    component: str
    stack: str
    block: int | None
    third: str | None
    layer_type: str
    method: str
    bits: int
    n: int
    k: int
    spec: dict[str, Any]
    options: dict[str, Any]
    tokens: int | None
    relative_error: float | None
    output_error: float | None
    weight_mse: float
    alpha: float | None
    fold: str | None
    in_scale: bool
    perm: bool
    damp: float | None
    dead_columns: int
    fallback: str
    notes: list[str]
    stored_bytes: int
    bits_per_weight: float
    approximation: str = ""


@dataclass(frozen=True)
class DenseRecord:
    """One linear that stayed as it was, and why. ``tied``: an embedding shares its weight."""

    path: str
    component: str
    n: int
    k: int
    reason: str
    tied: bool


@dataclass(frozen=True)
class ComponentTotals:
    """The listed linears of one component: how many, how many of them packed, and the packed ones'
    weights, bytes and stored bits per weight (None without any)."""

    linears: int
    packed: int
    packed_weights: int
    packed_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class Manifest:
    """What ``mmq.quantize`` did; JSON-ready by :meth:`to_dict`.

    ``bits_per_weight`` is that of the packed linears, ``model_bits_per_weight`` all stored bits
    over ``parameters`` (a tied tensor counted once), ``payload_bytes`` the bytes of all tensors of
    the file that ``mmq.save`` writes.
    """

    model_class: str
    architecture: str
    recipe: dict[str, Any]
    seed: int
    upstream: str
    sample_count: int
    sample_ids: list[str] | None
    versions: dict[str, str]
    cpu_isa: str
    linears: list[LinearRecord]
    dense: list[DenseRecord]
    unlisted: list[str]
    untied: list[str]
    coverage: dict[str, Any]
    components: dict[str, ComponentTotals]
    parameters: int
    packed_weights: int
    packed_bytes: int
    payload_bytes: int
    bits_per_weight: float | None
    model_bits_per_weight: float
    seconds: float
    manifest_version: int = MANIFEST_VERSION
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object, where: str = MANIFEST_NAME) -> Manifest:
        """The inverse of :meth:`to_dict`.

        Raises MmqError that names ``where`` for a newer version, missing or unknown keys, a value
        of another type than its field's.
        """
        if not isinstance(data, Mapping):
            raise MmqError(f"{where}: expected a JSON object, got {type(data).__name__}")
        found = data.get("manifest_version")
        if found != MANIFEST_VERSION:
            raise MmqError(f"{where}: expected manifest version {MANIFEST_VERSION}, got {found!r}")
        read: Manifest = _read(cls, data, where)
        return read

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads a manifest file. Raises MmqError that names it."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MmqError(f"{path}: expected a readable JSON manifest, got {error}") from error
        return cls.from_dict(data, str(path))

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.model_class}: {len(self.linears)} linears packed, {len(self.dense)} dense, "
            f"{self.sample_count} calibration samples, {self.seconds:.1f} s"
        ]
        for name, totals in self.components.items():
            bits = "-" if totals.bits_per_weight is None else f"{totals.bits_per_weight:.3f}"
            lines.append(
                f"  {name:<10} {totals.packed:>4} of {totals.linears} linears, "
                f"{bits} bits per weight, {totals.packed_bytes} bytes"
            )
        packed = "-" if self.bits_per_weight is None else f"{self.bits_per_weight:.3f}"
        lines.append(
            f"  packed linears {packed} bits per weight; whole model "
            f"{self.model_bits_per_weight:.3f} bits per parameter, {self.payload_bytes} bytes"
        )
        fallbacks = [record for record in self.linears if record.fallback]
        lines += [f"  fallback: {record.path}: {record.fallback}" for record in fallbacks]
        ranked = sum(record.approximation != "" for record in self.linears)
        if ranked:
            lines.append(f"  approximation: AWQ ranked the exponents of {ranked} linears, see them")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _read(kind: Any, value: object, where: str, name: str = "") -> Any:
    """The JSON ``value`` of the field ``name`` as ``kind``, an annotation of the records above."""
    at = f"{where}: {name}" if name else where
    arguments = get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, UnionType):  # a kind or None
        return None if value is None else _read(arguments[0], value, where, name)
    is_record = is_dataclass(kind)
    plain = Mapping if is_record else get_origin(kind) or kind
    accepted = (int, float) if plain is float else plain
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        expected = "a JSON object" if plain in (dict, Mapping) else plain.__name__
        raise MmqError(f"{at}: expected {expected}, got {value!r}")
    if isinstance(value, list):
        return [_read(arguments[0], v, where, f"{name}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    prefix = f"{name}." if name else ""
    if not is_record:
        return {k: _read(arguments[1], v, where, f"{prefix}{k}") for k, v in value.items()}
    known = {item.name: item for item in fields(kind)}
    optional = {
        item.name
        for item in known.values()
        if item.default is not MISSING or item.default_factory is not MISSING
    }
    wrong = (known.keys() - optional - value.keys()) | (value.keys() - known.keys())
    if wrong:
        expected = ", ".join(known)
        raise MmqError(f"{at}: expected the keys {expected}; missing or unknown: {sorted(wrong)}")
    kinds = get_type_hints(kind)
    return kind(**{k: _read(kinds[k], v, where, f"{prefix}{k}") for k, v in value.items()})


def component_totals(
    linears: Sequence[LinearRecord], dense: Sequence[DenseRecord]
) -> dict[str, ComponentTotals]:
    """The totals of each component that has a listed linear."""
    totals: dict[str, ComponentTotals] = {}
    for component in COMPONENTS:
        packed = [record for record in linears if record.component == component]
        count = len(packed) + sum(record.component == component for record in dense)
        weights = sum(record.n * record.k for record in packed)
        stored = sum(record.stored_bytes for record in packed)
        bits = 8 * stored / weights if weights else None
        if count:
            totals[component] = ComponentTotals(count, len(packed), weights, stored, bits)
    return totals


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        if package not in found:
            found[package] = package_version(package)
    return found


def package_version(package: str) -> str:
    """The installed version, "unknown" when it runs from a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
