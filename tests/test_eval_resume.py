# SPDX-License-Identifier: Apache-2.0
"""A run that was killed, wherever and in however many processes, ends as an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import eval_models
import pytest
import torch

from mmq.cli import main
from mmq_evals.errors import EvalError
from mmq_evals.rows import Shard, model_fingerprint
from mmq_evals.run import evaluate, predict_shard
from mmq_evals.workers import shard_of_environment

TASKS = ["captioning", "gqa"]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return eval_models.blip2("caption")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder: Path = eval_models.karpathy_coco(tmp_path / "coco")
    eval_models.gqa(folder)
    return folder


def files_of(out: Path) -> dict[str, Any]:
    """All that a run leaves, but for its times."""
    found: dict[str, Any] = {
        path.name: path.read_bytes() for path in out.iterdir() if path.name != "result.json"
    }
    result = json.loads((out / "result.json").read_text())
    for entry in result["tasks"].values():
        del entry["seconds"]
    return found | {"result.json": result}


def test_every_place_of_a_kill(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    """A kill leaves the first bytes of what would have been written, whatever their number."""
    settings: dict[str, Any] = {"data": coco, "batch_size": 2}
    evaluate(*model, TASKS, out_dir=tmp_path / "full", **settings)
    expected = files_of(tmp_path / "full")
    predict_shard(*model, TASKS, Shard(), out_dir=tmp_path / "whole", **settings)
    written = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert sorted(written) == ["captioning.0-of-1.jsonl.part", "gqa.0-of-1.jsonl.part"]
    rng = random.Random(0)
    for trial in range(20):
        out = tmp_path / f"killed{trial}"
        out.mkdir()
        # The tasks run in turn: the second is begun when the first is done.
        cut = rng.randrange(sum(map(len, written.values())) + 1)
        for name, content in written.items():
            (out / name).write_bytes(content[: max(cut, 0)])
            cut -= len(content)
        evaluate(*model, TASKS, out_dir=out, **settings)
        assert files_of(out) == expected


def test_any_number_of_processes(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": coco, "batch_size": 1}
    evaluate(*model, TASKS, out_dir=tmp_path / "full", **settings)
    out = tmp_path / "shared"
    assert not predict_shard(*model, TASKS, Shard(1, 2), out_dir=out, **settings)
    rows = (out / "captioning.1-of-2.jsonl.part").read_text().splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["101", "103"]
    # The other went away; three go on, each with what is left of its share.
    done = [predict_shard(*model, TASKS, Shard(r, 3), out_dir=out, **settings) for r in range(3)]
    assert done[-1]
    assert len((out / "captioning.0-of-3.jsonl.part").read_text().splitlines()) == 1
    seen: list[tuple[str, int, int]] = []
    evaluate(*model, TASKS, out_dir=out, progress=lambda *e: seen.append(e), **settings)
    assert not seen  # nothing was left to predict
    assert files_of(out) == files_of(tmp_path / "full")


def test_retrieval_is_done_by_the_first_process(tmp_path: Path) -> None:
    model, processor = eval_models.blip2("retrieval")
    settings: dict[str, Any] = {"data": eval_models.karpathy_coco(tmp_path / "coco")}
    out = tmp_path / "out"
    assert not predict_shard(model, processor, ["retrieval"], Shard(1, 2), out_dir=out, **settings)
    assert predict_shard(model, processor, ["retrieval"], Shard(0, 2), out_dir=out, **settings)
    evaluate(model, processor, ["retrieval"], out_dir=out, **settings)
    evaluate(model, processor, ["retrieval"], out_dir=tmp_path / "full", **settings)
    assert files_of(out) == files_of(tmp_path / "full")


def test_rows_of_another_configuration_are_refused(coco: Path, tmp_path: Path) -> None:
    model, processor = eval_models.blip2("caption")
    settings: dict[str, Any] = {"out_dir": tmp_path / "out", "data": coco}
    before = model_fingerprint(model)
    predict_shard(model, processor, ["captioning"], Shard(), **settings)
    with pytest.raises(EvalError, match="another model, protocol or device"):
        evaluate(model, processor, ["captioning"], limit=2, **settings)
    with torch.no_grad():
        model.language_projection.weight[1, 2] += 1
    assert model_fingerprint(model) != before
    with pytest.raises(EvalError, match="finish that run, or choose another folder"):
        evaluate(model, processor, ["captioning"], **settings)
    part = tmp_path / "out" / "captioning.0-of-1.jsonl.part"
    part.write_bytes(b'{"id": "100"}\n')
    with pytest.raises(EvalError, match=r"captioning.0-of-1.jsonl.part, line 1 is not a row"):
        evaluate(model, processor, ["captioning"], **settings)


def test_shards_are_checked() -> None:
    assert Shard.parse("2/3") == Shard(2, 3)
    for text in ("3/3", "1", "a/2", "-1/2", "0/0"):
        with pytest.raises(EvalError, match="shard: expected"):
            Shard.parse(text)
    assert shard_of_environment({}) is None
    assert shard_of_environment({"RANK": "1", "WORLD_SIZE": "4"}) == Shard(1, 4)
    with pytest.raises(EvalError, match="rank from 0 to 1, got 2 of 2"):
        shard_of_environment({"RANK": "2", "WORLD_SIZE": "2"})


def test_the_command_is_killed_and_goes_on_with_workers(tmp_path: Path) -> None:
    command = ["eval", "tiny-llava", "--tasks", "vqa", "--limit", "64", "--batch-size", "4"]
    assert main([*command, "--out", str(tmp_path / "full")]) == 0
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmq.cli", *command, "--out", str(out)], stderr=subprocess.DEVNULL
    )
    part = out / "vqa.0-of-1.jsonl.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    assert main([*command, "--out", str(out), "--workers", "2"]) == 0
    assert files_of(out) == files_of(tmp_path / "full")
