# SPDX-License-Identifier: Apache-2.0
"""The folder of a sweep: a table that only grows, and claims that die with their process.

``results.jsonl`` gets one line per finished run, written and synchronized before the run counts as
done. A line without an end, which a kill may leave, does not count and is cut off by the next
writer. ``claims`` is an empty file of which each run in hand holds the lock of one byte: the system
lets go of it when the process ends, however it ends, and tells processes on other machines of a
shared file system, too.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from mmq_evals.errors import EvalError

RESULTS_NAME: Final = "results.jsonl"
CLAIMS_NAME: Final = "claims"
# The byte whose lock a writer of the table holds; those of runs are below.
_TABLE: Final = 1 << 60

Row = dict[str, Any]


class Store:
    """Rows by run id, and the claims on runs. One per process and folder: a process's second
    would not see the first one's claims."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, Row] = {}
        self._read, self._file = 0, 0
        self._claims = os.open(folder / CLAIMS_NAME, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Lets go of everything."""
        os.close(self._claims)

    def refresh(self) -> None:
        """Reads the rows that came since.

        Raises EvalError for a line that is not a row, and for a run that is there twice.
        """
        path = self.folder / RESULTS_NAME
        if not path.exists():
            return
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._file:  # another process took failed runs out
                self.rows, self._read, self._file = {}, 0, inode
            file.seek(self._read)
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            self._read += len(line) + 1
            row = parse_row(line, path)
            if row["run_id"] in self.rows:
                raise EvalError(f"{path}: expected every run once, got {row['run_id']} twice")
            self.rows[row["run_id"]] = row

    def append(self, row: Row) -> None:
        """Adds a row: on disk when this returns."""
        with self._locked(_TABLE), (self.folder / RESULTS_NAME).open("a+b") as file:
            whole = _whole_lines(file)
            file.truncate(whole)
            file.write(json.dumps(row).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.refresh()

    def forget_failed(self) -> int:
        """Takes failed runs out of the table, so that they are tried again; says how many."""
        with self._locked(_TABLE):
            self.refresh()
            kept = [row for row in self.rows.values() if row["status"] != "failed"]
            forgotten = len(self.rows) - len(kept)
            if forgotten:
                path = self.folder / RESULTS_NAME
                work = path.with_suffix(".part")
                with work.open("wb") as file:
                    file.writelines(json.dumps(row).encode("ascii") + b"\n" for row in kept)
                    file.flush()
                    os.fsync(file.fileno())
                work.replace(path)
                self.refresh()
        return forgotten

    @contextmanager
    def claim(self, run_id: str) -> Iterator[bool]:
        """Whether the run is this process's until the end of the block."""
        byte = int(run_id[:14], 16)
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, byte)

    @contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        fcntl.lockf(self._claims, fcntl.LOCK_EX, 1, byte)
        try:
            yield
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, byte)


def parse_row(line: bytes, path: Path) -> Row:
    """One line of the table. Raises EvalError that names the file."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EvalError(f"{path}: expected JSON lines, got {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("run_id"), str):
        raise EvalError(f"{path}: expected rows with a run_id, got {line[:80]!r}")
    return row


def write_parquet(rows: Mapping[str, Row], path: Path) -> None:
    """The table as Parquet, objects as JSON text, columns in alphabetical order.

    Raises EvalError without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise EvalError("parquet: expected the package pyarrow, it is not installed") from None
    names = sorted({name for row in rows.values() for name in row})
    columns = {name: [_cell(row.get(name)) for row in rows.values()] for name in names}
    work = path.with_name(path.name + ".part")
    pyarrow.parquet.write_table(pyarrow.table(columns), work)
    work.replace(path)


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    # One type a column: widths are whole or mean, so all numbers are floats.
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _whole_lines(file: Any) -> int:
    """The size of a file up to its last line end."""
    size = file.seek(0, os.SEEK_END)
    while size:
        start = max(0, size - 65536)
        file.seek(start)
        found = file.read(size - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        size = start
    return 0
