# SPDX-License-Identifier: Apache-2.0
"""Arguments and action of ``mmq sweep``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from mmq_evals.errors import EvalError
from mmq_evals.rows import Shard
from mmq_evals.run import make_folder

REPORT_SECONDS: Final = 5.0
INTERRUPTED: Final = 130
FAILED: Final = 1  # The exit code where runs failed or remain.


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mmq sweep``."""
    parser.add_argument("grid", help="a study as YAML or JSON, or the name of a shipped one")
    parser.add_argument("--out", default="out/sweep", help="folder of the table; goes on there")
    parser.add_argument("--models", help="comma-separated; in place of the study's")
    parser.add_argument("--tasks", help="comma-separated; in place of the study's")
    parser.add_argument("--data", help="tiny, or a dataset folder; in place of the study's")
    parser.add_argument("--limit", type=int, help="items per task; in place of the study's limits")
    parser.add_argument("--dry-run", action="store_true", help="count the runs, run none")
    parser.add_argument("--retry", action="store_true", help="try failed runs again")
    parser.add_argument("--parquet", action="store_true", help="write results.parquet, too")
    parser.add_argument("--workers", type=int, default=1, help="processes; default: 1")
    parser.add_argument("--threads", type=int, help="per process; default: processors by workers")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="run on this Ray cluster; local starts one (mmq[ray])"
    )
    parser.add_argument(
        "--slurm", metavar="FILE", help="write a Slurm array script of --workers jobs, run nothing"
    )
    parser.add_argument(
        "--shard", metavar="RANK/COUNT", help="as one process of several on the same folder"
    )


def run_sweep(args: argparse.Namespace) -> tuple[str, int]:
    """Runs a sweep; its summary, and the exit code: 1 where runs failed or remain, 128 and its
    number after a signal. What remains is told on stderr.

    Raises EvalError for bad input, before any run.
    """
    from mmq_evals.study import executors
    from mmq_evals.study.runs import plan_study, write_plan
    from mmq_evals.study.stopping import Stopped, stoppable
    from mmq_evals.study.store import RESULTS_NAME, Store, write_parquet
    from mmq_evals.study.sweep import remaining, rows_of

    threads = _threads(args)
    out = Path(args.out)
    study = _study(args)
    started = time.monotonic()
    planned = plan_study(study)
    print(f"{study.name}: {planned.summary()}", file=sys.stderr)
    if args.slurm is not None:
        script = executors.slurm_script(_without_slurm(args), args.workers, threads)
        Path(args.slurm).write_text(script, encoding="utf-8")
        return f"wrote {args.slurm}; sbatch {args.slurm} runs it", 0
    if args.dry_run:
        return f"{study.name}: {planned.summary()}", 0
    make_folder(out)
    store = Store(out)
    try:
        if args.retry:
            print(f"{store.forget_failed()} failed runs are tried again", file=sys.stderr)
        store.refresh()
        skipped = len(rows_of(planned, store))
    finally:
        store.close()
    if skipped:
        print(f"{skipped} of {len(planned.runs)} runs are done", file=sys.stderr)
    plan_file = write_plan(planned, out)
    report = _reporter(planned, args.workers)
    lost: list[str] = []
    stopped = 0
    try:
        with stoppable():
            if args.shard is not None:
                shard = Shard.parse(args.shard)
                executors.run_shard(plan_file, shard, threads, report)
            elif args.ray is not None:
                lost = executors.run_on_ray(plan_file, args.ray, args.workers, threads, report)
            else:
                lost = executors.run_here(plan_file, args.workers, threads, report)
    except KeyboardInterrupt as signal:
        stopped = signal.exit_code if isinstance(signal, Stopped) else INTERRUPTED
        lost = [f"stopped by {signal}" if isinstance(signal, Stopped) else "interrupted"]
    store = Store(out)
    try:
        store.refresh()
        rows = rows_of(planned, store)
        if args.parquet:
            write_parquet({row["run_id"]: row for row in rows}, out / "results.parquet")
    finally:
        store.close()
    left = remaining(planned, store)
    for line in (*lost, left):
        if line:
            print(f"mmq: {line}", file=sys.stderr)
    failed = [row for row in rows if row["status"] == "failed"]
    lines = [f"  failed: {row['run_id']} ({row['model']}): {row['error']}" for row in failed[:10]]
    if len(failed) > 10:
        lines.append(f"  ... and {len(failed) - 10} more")
    lines.append(
        f"{len(rows) - skipped} runs in {time.monotonic() - started:.0f} s, {skipped} were done "
        f"before, {len(failed)} failed: {out / RESULTS_NAME}"
    )
    return "\n".join(lines), stopped or (FAILED if failed or left else 0)


def _study(args: argparse.Namespace) -> Any:
    from mmq_evals.study.grid import load_study, parse_study

    study = load_study(args.grid)
    changed: dict[str, Any] = {}
    for name in ("models", "tasks"):
        value = getattr(args, name)
        if value is not None:
            changed[name] = [word for word in value.split(",") if word]
    if args.data is not None:
        changed["data"] = args.data
    if args.limit is not None:
        changed["limits"] = args.limit
    if not changed:
        return study
    plain = study.model_dump(mode="json", exclude_none=True)
    for grid in plain["grids"]:
        for name in ("models", "tasks"):
            if name in changed:
                grid.pop(name, None)
    return parse_study({**plain, **changed})


def _threads(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise EvalError(f"workers: expected at least 1, got {args.workers}")
    if args.threads is not None and args.threads < 1:
        raise EvalError(f"threads: expected at least 1, got {args.threads}")
    given = [name for name in ("ray", "slurm", "shard") if getattr(args, name) is not None]
    if len(given) > 1:
        raise EvalError(f"expected one of --ray, --slurm and --shard, got {', '.join(given)}")
    if args.threads is not None:
        return int(args.threads)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(limit) if limit.isdecimal() else (os.cpu_count() or 1)
    return max(1, cores if limit.isdecimal() else cores // args.workers)


def _without_slurm(args: argparse.Namespace) -> list[str]:
    """The command's arguments for a job: all but those of the array itself."""
    words = args.arguments[1:]
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.partition("=")[0]
        if skip:
            skip = False
        elif name in ("--slurm", "--workers", "--threads"):
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def _reporter(planned: Any, workers: int) -> Any:
    """Prints how far the sweep is and the time left, at most one line every few seconds."""
    from mmq_evals.study.sweep import rows_of, seconds_left

    written = [0.0]

    def report(store: Any) -> None:
        now = time.monotonic()
        if now - written[0] < REPORT_SECONDS:
            return
        written[0] = now
        rows = rows_of(planned, store)
        left = seconds_left(planned, rows, workers)
        failed = sum(row["status"] == "failed" for row in rows)
        line = f"{len(rows)} of {len(planned.runs)} runs"
        line += f", {failed} failed" if failed else ""
        # A pipe that nobody reads any more ends the progress, not the sweep.
        with contextlib.suppress(OSError):
            print(
                line + ("" if left is None else f", {left:.0f} s left"),
                file=sys.stderr,
                flush=True,
            )

    return report
