# SPDX-License-Identifier: Apache-2.0
"""Rows on disk while a run is under way: append-only, resumable after a kill at any point.

A process predicts its share of a task's batches and appends every row to a file of its own,
``<task>.<rank>-of-<count>.jsonl.part``. Every line carries the hash of the run's configuration (the
protocol, the model's weights and the kind of device). A run takes up all complete lines that it
finds, whichever number of processes wrote them: batches are the same for any number, so that
results are, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmq.linear import QuantLinear
from mmq_evals.errors import EvalError

Row = dict[str, Any]
# Called after every row (of retrieval: image) with the task's name, those done and those in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Shard:
    """One process of ``count``: it predicts batches ``rank``, ``rank + count``, ...

    Raises:
        EvalError: the rank is not one of the count.
    """

    rank: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise EvalError(
                f"shard: expected a rank from 0 to {self.count - 1}, got {self.rank} of "
                f"{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "0/4", the first of four."""
        rank, slash, count = text.partition("/")
        if not (slash and rank.isdecimal() and count.isdecimal()):
            raise EvalError(f"shard: expected rank/count such as 0/4, got {text!r}")
        return cls(int(rank), int(count))


WHOLE = Shard()


def model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of all tensors of the state dict with their names, types and shapes, and of the
    modes in which packed linears run."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            digest.update(f"{name} {module.mode}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class RowStore:
    """The unfinished rows of one task of one run in a folder."""

    def __init__(self, folder: Path, task: str, run: str) -> None:
        self._folder, self._task, self._run = folder, task, run

    def beside(self, kind: str, content: str) -> RowStore:
        """The store for rows of another kind about the same run, which depend on ``content``."""
        run = hashlib.sha256(f"{self._run} {content}".encode()).hexdigest()[:16]
        return RowStore(self._folder, f"{self._task}-{kind}", run)

    def files(self) -> list[Path]:
        """Every process's file, of this run or another."""
        return sorted(self._folder.glob(f"{self._task}.*-of-*.jsonl.part"))

    def read(self) -> dict[str, Row]:
        """All complete rows, by id. A line without an end, which a kill may leave, does not count.

        Raises:
            EvalError: a line is not a row, or is of a run with another configuration.
        """
        rows: dict[str, Row] = {}
        for file in self.files():
            for number, line in enumerate(_complete_lines(file), start=1):
                try:
                    row = json.loads(line)
                    run = row.pop("run")
                    rows.setdefault(row["id"], row)
                except (ValueError, KeyError, AttributeError, TypeError) as error:
                    raise EvalError(f"out: {file}, line {number} is not a row: {error}") from None
                if run != self._run:
                    raise EvalError(
                        f"out: {file} holds rows of an unfinished run with another model, protocol "
                        f"or device (configuration {run}, expected {self._run}); finish that run, "
                        "or choose another folder, or --overwrite"
                    )
        return rows

    def append(self, rows: Iterable[Row], done: Container[str], shard: Shard) -> Iterator[Row]:
        """Writes each row that is not yet ``done`` to the shard's file, and hands it on."""
        path = self._folder / f"{self._task}.{shard.rank}-of-{shard.count}.jsonl.part"
        if path.exists():
            kept = sum(len(line) + 1 for line in _complete_lines(path))
            with path.open("r+b") as file:
                file.truncate(kept)
        with path.open("ab") as file:
            for row in rows:
                if row["id"] in done:
                    continue  # its batch was computed again for the sake of others
                # ASCII JSON: no character of a prediction can end a line.
                file.write(json.dumps({"run": self._run, **row}).encode("ascii") + b"\n")
                file.flush()
                yield row

    def keep(
        self,
        rows: Iterable[Row],
        done: Collection[str],
        shard: Shard,
        progress: Progress | None,
        name: str,
        total: int,
    ) -> None:
        """Appends all rows and reports each as one of ``total`` of ``name``."""
        for count, _ in enumerate(self.append(rows, done, shard), start=len(done) + 1):
            if progress is not None:
                progress(name, count, total)

    def remove(self) -> None:
        """Removes every process's file."""
        for file in self.files():
            file.unlink(missing_ok=True)


def forget_rows(folder: Path) -> None:
    """Removes the rows of every unfinished run in a folder."""
    for file in folder.glob("*.*-of-*.jsonl.part"):
        file.unlink()


def _complete_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1]
