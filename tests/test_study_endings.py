# SPDX-License-Identifier: Apache-2.0
"""However a sweep ends before its time, it says so and how to go on, and its exit code is not 0."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import eval_models
import pytest
import yaml
from forks import fork

import mmq
from mmq.cli import main
from mmq_evals.study import commands, executors
from mmq_evals.study.grid import load_study
from mmq_evals.study.runs import plan_study, write_plan

WIDTHS = (2, 3, 4, 5, 6, 8)
RUNS = len(WIDTHS) ** 2 + 1  # and full precision


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a random captioning model: more runs than a test waits for."""
    root = tmp_path_factory.mktemp("endings")
    eval_models.karpathy_coco(root / "coco", 8)
    model, processor = eval_models.blip2("caption")
    mmq.save(model, root / "model", processor)
    study = {
        "name": "test",
        "models": [str(root / "model")],
        "data": str(root / "coco"),
        "limits": 3,
        "logits": False,
        "tasks": ["captioning"],
        "recipe": {"calibration": {"samples": 3, "upstream": "full"}},
        "methods": {"rtn": {"group_size": 8}},
        "grids": [{"axes": {"method": ["rtn"], "vision": WIDTHS, "language": WIDTHS}}],
    }
    path = root / "grid.yaml"
    path.write_text(json.dumps(study))
    return path


def sweep(grid: Path, out: Path, *more: str) -> Callable[[], NoReturn]:
    command = ["sweep", str(grid), "--out", str(out), "--threads", "1", *more]
    return lambda: sys.exit(main(command))


def done(out: Path) -> int:
    """Runs in the table."""
    path = out / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_of(process: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left_of(out: Path) -> str:
    return f"{RUNS - done(out)} of {RUNS} runs remain; the same command goes on with them"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_told(grid: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = fork(sweep(grid, out), log)
    wait_for(lambda: done(out) >= 2)
    os.kill(process, number)
    assert exit_code(process) == 128 + number
    assert 2 <= done(out) < RUNS
    assert left_of(out) in log.read_text()
    name = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert f"mmq: {name}\n" in log.read_text()


def test_an_ignored_signal_stays_ignored(grid: Path, tmp_path: Path) -> None:
    """As under nohup."""
    out = tmp_path / "out"

    def ignoring() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sweep(grid, out)()

    process = fork(ignoring, tmp_path / "log")
    wait_for(lambda: done(out) >= 1)
    os.kill(process, signal.SIGHUP)
    before = done(out)
    wait_for(lambda: done(out) > before + 1)
    os.kill(process, signal.SIGTERM)
    assert exit_code(process) == 128 + signal.SIGTERM


def test_the_other_worker_does_what_a_killed_one_had(grid: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = fork(sweep(grid, out, "--workers", "2"), log)
    wait_for(lambda: done(out) >= 2)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert exit_code(process) == 0
    assert done(out) == RUNS
    assert "mmq: worker 1: ended by SIGKILL (out of memory?)\n" in log.read_text()
    assert "remain" not in log.read_text()


def test_no_worker_left_is_told(grid: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = fork(sweep(grid, out, "--workers", "2"), log)
    wait_for(lambda: len(workers_of(process)) == 2)
    for worker, number in zip(workers_of(process), (signal.SIGKILL, signal.SIGTERM), strict=True):
        os.kill(worker, number)
    assert exit_code(process) == 1
    text = log.read_text()
    assert (
        "mmq: worker 0: ended by SIGKILL (out of memory?)\nmmq: worker 1: ended by SIGTERM" in text
    )
    assert left_of(out) in text


def test_workers_end_with_who_started_them(grid: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    plan_file = write_plan(plan_study(load_study(grid)), tmp_path)

    def starting() -> None:
        worker = fork(lambda: executors._main(str(plan_file), 0, 1, 1), log)
        (tmp_path / "worker").write_text(str(worker))
        wait_for(lambda: done(tmp_path) >= 1)

    assert exit_code(fork(starting, tmp_path / "starter")) == 0
    worker = int((tmp_path / "worker").read_text())
    wait_for(lambda: not Path(f"/proc/{worker}").exists() or "gone" in log.read_text())
    assert f"worker 0: the sweep that started it is gone; {left_of(tmp_path)}" in log.read_text()


def test_a_pipe_that_nobody_reads_does_not_end_a_sweep(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmq_evals.study.commands.REPORT_SECONDS", 0.0)
    small = yaml.safe_load(grid.read_text())
    small["grids"][0]["axes"]["language"] = [2]
    few = tmp_path / "few.yaml"
    few.write_text(yaml.safe_dump(small))
    out = tmp_path / "out"

    def unread() -> None:
        read, write = os.pipe()
        os.close(read)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        planned = plan_study(load_study(few))
        sys.stderr = os.fdopen(write, "w", buffering=1)
        executors.run_here(write_plan(planned, out), 1, 1, commands._reporter(planned, 1))

    out.mkdir()
    assert exit_code(fork(unread, tmp_path / "log")) == 0
    assert done(out) == len(WIDTHS) + 1
