# SPDX-License-Identifier: Apache-2.0
"""Where the processes of a sweep run: here, on a Ray cluster, or in a Slurm array.

All run the same function on the same folder (sweep.py), which every machine must see under the same
path; its file system must know locks (NFS from version 4 on does). A killed process loses the run
it had in hand, which another takes or a later sweep does. Who started the processes is told how
each of those ended that did not get to the end.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from mmq_evals.errors import EvalError
from mmq_evals.rows import WHOLE, Shard
from mmq_evals.study.runs import read_plan
from mmq_evals.study.store import Store
from mmq_evals.study.sweep import remaining, work

POLL_SECONDS: Final = 1.0
Report = Callable[[Store], None]


def run_here(plan_file: Path, workers: int, threads: int, report: Report) -> list[str]:
    """In this process, or in as many new ones as asked for; ``report`` is called now and then.

    Returns a line for every process that did not get to the end. The others go on without it.
    """
    if workers == 1:
        run_shard(plan_file, WHOLE, threads, report)
        return []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "mmq_evals.study.executors", str(plan_file)]
    processes = [
        subprocess.Popen([*command, str(rank), str(workers), str(threads)], env=environment)
        for rank in range(workers)
    ]
    store = Store(plan_file.parent)
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
            store.refresh()
            report(store)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        store.close()
        codes = [process.wait() for process in processes]
    return [f"worker {rank}: {_ending(code)}" for rank, code in enumerate(codes) if code != 0]


def _ending(code: int) -> str:
    """How a process ended, from what `Popen.wait` says."""
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    # The system's own way out of a shortage of memory leaves no other trace.
    return f"ended by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def run_shard(plan_file: Path, shard: Shard, threads: int, report: Report) -> None:
    """In this process, which is one of several that know nothing of each other."""
    _use_threads(threads)
    work(plan_file, shard.rank, shard.count, report)


def run_on_ray(
    plan_file: Path, address: str, workers: int, threads: int, report: Report
) -> list[str]:
    """In ``workers`` tasks of a Ray cluster, each with ``threads`` of its processors.

    ``address`` is the cluster's, or "local" for one that is started here and ends with the sweep.
    Returns as :func:`run_here`. Raises EvalError where Ray is not installed or the cluster does not
    answer.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise EvalError("ray: expected the extra mmq[ray], it is not installed") from None
    settings: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False}
    if address == "local":
        settings |= {"num_cpus": workers * threads}
    else:
        settings = {"address": address, "log_to_driver": False}
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EvalError(f"ray: no cluster at {address}: {error}") from error
    store = Store(plan_file.parent)
    lost: list[str] = []
    try:
        remote = ray.remote(num_cpus=threads, max_retries=0)(_work)
        pending = [remote.remote(str(plan_file), rank, workers, threads) for rank in range(workers)]
        names = {reference: f"worker {rank}" for rank, reference in enumerate(pending)}
        while pending:
            finished, pending = ray.wait(pending, timeout=POLL_SECONDS)
            store.refresh()
            report(store)
            for reference in finished:
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    lost.append(f"{names[reference]}: {str(error).splitlines()[0]}")
    finally:
        store.close()
        ray.shutdown()
    return lost


def slurm_script(arguments: Sequence[str], workers: int, threads: int) -> str:
    """A batch script of an array of ``workers`` jobs that all run the same sweep."""
    command = shlex.join([sys.executable, "-m", "mmq.cli", "sweep", *arguments])
    return (
        "#!/bin/bash\n"
        "#SBATCH --job-name=mmq-sweep\n"
        f"#SBATCH --array=0-{workers - 1}\n"
        f"#SBATCH --cpus-per-task={threads}\n"
        f"export OMP_NUM_THREADS={threads}\n"
        f'exec {command} --shard "$SLURM_ARRAY_TASK_ID/{workers}"\n'
    )


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _work(plan_file: str, rank: int, count: int, threads: int) -> int:
    _use_threads(threads)
    return work(Path(plan_file), rank, count)


def _main(plan_file: str, rank: int, count: int, threads: int) -> None:
    """A process of :func:`run_here`; it ends after its run when the one that started it is gone."""
    parent = os.getppid()

    def check(store: Store) -> None:
        if os.getppid() != parent:
            left = remaining(read_plan(Path(plan_file)), store)
            sys.exit(f"mmq: worker {rank}: the sweep that started it is gone; {left}")

    _use_threads(threads)
    try:
        work(Path(plan_file), rank, count, check)
    except KeyboardInterrupt:  # which the one that started this got, too, and tells
        sys.exit(130)


if __name__ == "__main__":
    _main(sys.argv[1], *map(int, sys.argv[2:]))
