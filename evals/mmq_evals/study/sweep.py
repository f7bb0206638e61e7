# SPDX-License-Identifier: Apache-2.0
"""A sweep: every run of a study once, by any number of processes, killed and started at will.

Every process works through the whole list from a place of its own and takes what is neither done
nor claimed (store.py), so that processes need no master: those on this machine, on a Ray cluster
and in a Slurm array do the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from mmq.errors import MmqError
from mmq_evals.errors import EvalError
from mmq_evals.study.bench import PARTS_NAME, ROWS_NAME, Bench
from mmq_evals.study.runs import Planned, Run, read_plan
from mmq_evals.study.store import Row, Store

# A failing run is recorded and the others go on; what is not listed stops the sweep, as a full disk
# or a bug of the sweep itself should.
RUN_ERRORS: Final = (
    MmqError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
)
POLL_SECONDS: Final = 0.5


def work(
    plan_file: Path,
    rank: int = 0,
    count: int = 1,
    report: Callable[[Store], None] = lambda store: None,
) -> int:
    """Does what is left of a plan, from the ``rank``-th of ``count`` equal places on.

    Returns when every run is done, with how many this process did. While the last ones are in other
    processes' hands it waits, and takes over what one that dies lets go of. ``report`` is called
    after every run of this process, and now and then while it waits.
    """
    planned, folder = read_plan(plan_file), plan_file.parent
    for name in (PARTS_NAME, ROWS_NAME):
        (folder / name).mkdir(exist_ok=True)
    store, bench = Store(folder), Bench(planned.study, folder)
    known = {run.run_id: run for run in planned.runs}
    first = rank * len(planned.runs) // count
    ordered = planned.runs[first:] + planned.runs[:first]
    done = 0
    try:
        while True:
            before = done
            store.refresh()
            for run in ordered:
                if run.run_id not in store.rows and _take(store, bench, known, run, report):
                    done += 1
                    report(store)
            if known.keys() <= store.rows.keys():
                return done
            if done == before:
                _wait(store, report)
    finally:
        store.close()


def _wait(store: Store, report: Callable[[Store], None]) -> None:
    time.sleep(POLL_SECONDS)
    store.refresh()
    report(store)


def _take(
    store: Store,
    bench: Bench,
    known: dict[str, Run],
    run: Run,
    report: Callable[[Store], None],
) -> bool:
    """Does a run unless another process has it or has done it; its reference before it."""
    if run.reference is not None:
        while run.reference not in store.rows:
            if not _take(store, bench, known, known[run.reference], report):
                _wait(store, report)  # another process is at it
    with store.claim(run.run_id) as mine:
        if not mine:
            return False
        store.refresh()
        if run.run_id in store.rows:
            return False
        store.append(_row(store, bench, run))
        return True


def _row(store: Store, bench: Bench, run: Run) -> Row:
    columns = {name: value for name, value in run.columns.items() if name != "added"}
    modes = {"full": "independent", "quantized": "sequential", None: None}
    known: dict[str, Any] = {
        "run_id": run.run_id,
        "status": "done",
        "error": None,
        "model": run.model,
        **columns,
        "mode": modes[columns["upstream"]],
        "recipe": run.recipe,
    }
    try:
        reference = None
        if run.reference is not None:
            found = store.rows[run.reference]
            if found["status"] != "done":
                raise EvalError(f"the full-precision run failed: {found['error']}")
            reference = store.folder / found["rows"]
        return {**known, **bench.row(run, reference)}
    except RUN_ERRORS as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return {**known, "status": "failed", "error": text}


def rows_of(planned: Planned, store: Store) -> list[Row]:
    """The rows of a plan that are there, in its order."""
    return [store.rows[run.run_id] for run in planned.runs if run.run_id in store.rows]


def remaining(planned: Planned, store: Store) -> str:
    """What to say of a sweep that ends before its time, empty where nothing is left to do."""
    left, total = len(planned.runs) - len(rows_of(planned, store)), len(planned.runs)
    return f"{left} of {total} runs remain; the same command goes on with them" if left else ""


def seconds_left(planned: Planned, rows: Sequence[Row], workers: int) -> float | None:
    """An estimate of the time for what is not done, from the mean time of a run of each model; of
    all models for one of which no run is done. None before the first run."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["status"] == "done":
            times.setdefault(row["model"], []).append(row["seconds.quantize"] + row["seconds.eval"])
    every = [value for values in times.values() for value in values]
    if not every:
        return None
    done = {row["run_id"] for row in rows}
    total = 0.0
    for run in planned.runs:
        if run.run_id not in done:
            mine = times.get(run.model, every)
            total += sum(mine) / len(mine)
    return total / workers
