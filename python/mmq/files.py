# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint's folder: JSON, the tensor file's header, its recorded checksum."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from mmq.errors import MmqError

CHECKSUMS_NAME: Final = "checksums.json"


def write_json(path: Path, data: object) -> None:
    """Writes ``data`` with sorted keys, indented, UTF-8."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; MmqError, one line, for a missing file and for other content."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MmqError(f"{path.parent}: expected a folder with {path.name}, got none") from error
    except (OSError, ValueError) as error:
        raise MmqError(f"{path}: expected readable JSON, got {line(error)}") from error
    if not isinstance(data, dict):
        raise MmqError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def checksum(path: Path) -> dict[str, Any]:
    """``bytes`` and ``sha256`` of a file, as they are recorded.

    One call hashes the mapped file, without a copy and without asking for Python's lock in between.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    if size:  # Nothing cannot be mapped.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            digest.update(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def unchanged(files: Sequence[Path]) -> Iterator[None]:
    """Compares files with their recorded sizes, and with their checksums beside the block's work.

    That work is the whole of loading, so nothing that it has made may leave the block's function
    before the block ends. A changed file is reported as such whatever error the block has met in
    it. Raises MmqError, one line, for a file that is missing, of another size or changed.
    """
    recorded = {path: _recorded(path) for path in files}
    with ThreadPoolExecutor(max_workers=1) as beside:
        found = {path: beside.submit(checksum, path) for path in files if recorded[path]}
        try:
            yield
        finally:
            for path, sums in found.items():
                if sums.result() != recorded[path]:
                    raise MmqError(f"{path}: expected the recorded SHA-256, the file was changed")


def _recorded(path: Path) -> dict[str, Any] | None:
    """The file's checksum as recorded, its size being that; None where there is no record."""
    if not path.is_file():
        raise MmqError(f"{path.parent}: expected a file {path.name}, got none")
    sums = path.parent / CHECKSUMS_NAME
    if not sums.is_file():
        return None
    expected = read_json(sums).get(path.name)
    if not isinstance(expected, dict) or set(expected) != {"bytes", "sha256"}:
        raise MmqError(f"{sums}: expected bytes and sha256 of {path.name}, got {expected!r}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise MmqError(f"{path}: expected {expected['bytes']} bytes, got {size}")
    return expected


def header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in the file; MmqError where it is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                name: (part.get_dtype(), tuple(part.get_shape()))
                for name in file.keys()  # noqa: SIM118  (safe_open is no mapping)
                for part in [file.get_slice(name)]
            }
    except (SafetensorError, OSError) as error:
        raise MmqError(f"{path}: expected a safetensors file, got {line(error)}") from error


def line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())
