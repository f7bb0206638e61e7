# SPDX-License-Identifier: Apache-2.0
"""What a task is, and what tasks share: rows, image batches, generation, intervals.

A row is a JSON object about one query: ``id``, ``cluster`` (the image, over which intervals are
formed), the raw ``prediction`` and what is needed to score it again without the model or the data.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from mmq_evals.data.images import read_image
from mmq_evals.data.items import CaptionItem, RetrievalItem, VqaItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.rows import WHOLE, Row, Shard
from mmq_evals.tasks.generation import Asking

logger = logging.getLogger(__name__)

Item = TypeVar("Item", CaptionItem, RetrievalItem, VqaItem)


class Task(Protocol):
    """One task on one set of items.

    ``protocol`` is plain JSON data: all that a score depends on but the model's weights.
    ``primary`` names the metric that stands for the task in a table, ``shown`` those of a report.
    """

    @property
    def name(self) -> str: ...

    @property
    def primary(self) -> str: ...

    @property
    def shown(self) -> tuple[str, ...]: ...

    @property
    def dataset(self) -> Dataset[Any]: ...

    @property
    def items(self) -> Sequence[Any]: ...

    @property
    def protocol(self) -> dict[str, Any]: ...

    @property
    def ids(self) -> list[str]:
        """The ids of all rows, one a query, in their order."""

    @property
    def part_ids(self) -> list[str]:
        """The ids of what `predict` yields, in its order: rows, or what rows are made of."""

    def predict(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int,
        scratch: Path,
        done: Container[str] = (),
        shard: Shard = WHOLE,
    ) -> Iterator[Row]:
        """Run the model; yields parts in the order of the items.

        Batches whose parts are all ``done`` and those of other shards are left out; the others
        are computed whole, so that a part does not depend on what was done before.

        A part whose image does not decode is a `failed_row`, and the others go on. ``scratch`` is
        a folder for what is computed on the way and serves other shards and later runs.

        Raises:
            EvalError: the processor does not fit the model.
        """

    def rows(self, parts: Mapping[str, Row]) -> list[Row]:
        """The rows of all ``ids``, without scores, of all parts by id. A pure function."""

    def asking(self, items: Sequence[Any]) -> Asking | None:
        """How a language model is asked about some items; None for a task without one."""

    def sample_scores(self, row: Row) -> dict[str, float]:
        """Scores in [0, 1] (CIDEr: [0, 10]) of one row, by metric. A pure function of the row and
        the table of document frequencies in the task."""

    def breakdown(self, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """The primary score by group of scored rows, such as answer type; may be empty."""

    def baselines(self) -> dict[str, dict[str, float]]:
        """Scores of predictions made without looking at the image, by the same scorer."""


def batches(
    items: Sequence[Item],
    batch_size: int,
    done: Container[str] = (),
    shard: Shard = WHOLE,
) -> Iterator[Sequence[Item]]:
    """Consecutive batches, the last may be smaller: those of the shard that are not all done."""
    if batch_size < 1:
        raise EvalError(f"batch_size: expected at least 1, got {batch_size}")
    for number, start in enumerate(range(0, len(items), batch_size)):
        batch = items[start : start + batch_size]
        if number % shard.count == shard.rank and any(item.id not in done for item in batch):
            yield batch


def read_images(items: Sequence[Item]) -> tuple[list[Item], list[Image.Image], dict[str, str]]:
    """The items of a batch whose images decode, these images, and why the others failed, by id."""
    readable, images, failed = [], [], {}
    for item in items:
        try:
            images.append(read_image(item.id, item.image))
            readable.append(item)
        except EvalError as error:
            failed[item.id] = str(error)
    return readable, images, failed


def failed_row(row_id: str, why: str) -> Row:
    """Stands for a query whose image does not decode: it is counted, not scored."""
    return {"id": row_id, "failed": why}


def scored(task: Task, rows: Sequence[Row]) -> list[Row]:
    """The rows with their ``scores``."""
    return [{**row, "scores": task.sample_scores(row)} for row in rows]
