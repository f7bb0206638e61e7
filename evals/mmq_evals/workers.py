# SPDX-License-Identifier: Apache-2.0
"""Several processes on one evaluation: ``mmq eval --workers N``, torchrun, and their progress."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from mmq_evals.errors import EvalError
from mmq_evals.rows import Shard


def shard_of_environment(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """What torchrun and accelerate set, RANK and WORLD_SIZE; None for a single process.

    Raises:
        EvalError: they are no numbers, or the rank is not one of the world.
    """
    rank, world = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    shard = Shard.parse(f"{rank}/{world}")
    return shard if shard.count > 1 else None


def run_workers(arguments: Sequence[str], count: int) -> None:
    """Runs the command line ``arguments`` in ``count`` processes, each with its ``--shard`` and its
    part of the processor's threads; waits for all.

    Raises:
        EvalError: one of them failed; its own message stands on stderr. What all have predicted is
            kept, and the same command goes on from there.
    """
    if count < 1:
        raise EvalError(f"workers: expected at least 1, got {count}")
    threads = max(1, (os.cpu_count() or 1) // count)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "mmq.cli", *arguments, "--shard", f"{rank}/{count}"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    codes = [process.wait() for process in processes]
    failed = [rank for rank, code in enumerate(codes) if code != 0]
    if failed:
        raise EvalError(
            f"workers: {len(failed)} of {count} failed (exit code {codes[failed[0]]}); the rows "
            "that were predicted are kept"
        )


def progress_lines(seconds: float = 5.0) -> Callable[[str, int, int], None]:
    """A progress callback of `evaluate` that writes a line with the time left to stderr, at most
    one every few seconds."""
    started: dict[str, tuple[float, int]] = {}
    written = time.monotonic()

    def report(task: str, done: int, total: int) -> None:
        nonlocal written
        now = time.monotonic()
        begin, first = started.setdefault(task, (now, done))
        if now - written < seconds or done == first:
            return
        written = now
        left = (now - begin) / (done - first) * (total - done)
        print(f"{task}: {done} of {total} rows, {left:.0f} s left", file=sys.stderr, flush=True)

    return report
