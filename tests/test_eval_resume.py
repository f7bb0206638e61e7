# SPDX-License-Identifier: Apache-2.0
"""A run that was killed, wherever and in however many processes, ends as an undisturbed one."""

from __future__ import annotations

import json
import os
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
from kill_and_resume import files_of

from mmq.cli import main
from mmq_evals.errors import EvalError
from mmq_evals.rows import Shard, model_fingerprint
from mmq_evals.run import evaluate, predict_shard
from mmq_evals.workers import shard_of_environment

KINDS = {"caption": ["captioning", "gqa"], "retrieval": ["retrieval"]}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest) -> tuple[Any, Any, list[str]]:
    """A model, its processor and tasks."""
    return *eval_models.blip2(request.param), KINDS[request.param]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    folder: Path = eval_models.karpathy_coco(tmp_path / "coco")
    eval_models.gqa(folder)
    return folder


def test_every_place_of_a_kill(run: tuple[Any, Any, list[str]], coco: Path, tmp_path: Path) -> None:
    """A kill leaves the first bytes of what would have been written, whatever their number."""
    settings: dict[str, Any] = {"data": coco, "batch_size": 2}
    evaluate(*run, out_dir=tmp_path / "full", **settings)
    expected = files_of(tmp_path / "full")
    predict_shard(*run, Shard(), out_dir=tmp_path / "whole", **settings)
    parts = sorted((tmp_path / "whole").glob("*.jsonl.part"))
    written = {path.name: path.read_bytes() for path in parts}
    assert list(written) == [f"{task}.0-of-1.jsonl.part" for task in run[2]]
    rng = random.Random(0)
    for trial in range(20):
        out = tmp_path / f"killed{trial}"
        out.mkdir()
        # The tasks run in turn: the second is begun when the first is done.
        cut = rng.randrange(sum(map(len, written.values())) + 1)
        for name, content in written.items():
            (out / name).write_bytes(content[: max(cut, 0)])
            cut -= len(content)
        evaluate(*run, out_dir=out, **settings)
        assert files_of(out) == expected


def test_any_number_of_processes(
    run: tuple[Any, Any, list[str]], coco: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"data": coco, "batch_size": 1}
    evaluate(*run, out_dir=tmp_path / "full", **settings)
    out, first = tmp_path / "shared", run[2][0]
    assert not predict_shard(*run, Shard(1, 2), out_dir=out, **settings)
    rows = (out / f"{first}.1-of-2.jsonl.part").read_text().splitlines()
    assert [json.loads(row)["id"].removeprefix("image ") for row in rows] == ["101", "103"]
    # The other went away; three go on, each with what is left of its share.
    done = [predict_shard(*run, Shard(r, 3), out_dir=out, **settings) for r in range(3)]
    assert done[-1]
    assert len((out / f"{first}.0-of-3.jsonl.part").read_text().splitlines()) == 1
    seen: list[tuple[str, int, int]] = []
    evaluate(*run, out_dir=out, progress=lambda *e: seen.append(e), **settings)
    assert not seen  # nothing was left to predict
    assert files_of(out) == files_of(tmp_path / "full")


def test_logits_resume_too(coco: Path, tmp_path: Path) -> None:
    full, processor = eval_models.blip2("caption")
    model, _ = eval_models.blip2("caption")
    with torch.no_grad():
        model.language_projection.weight.mul_(1.5)
    run = (model, processor, ["captioning"])
    settings: dict[str, Any] = {"data": coco, "batch_size": 1}
    evaluate(full, *run[1:], out_dir=tmp_path / "full", **settings)
    settings |= {"reference": tmp_path / "full", "reference_model": full}
    evaluate(*run, out_dir=tmp_path / "a", **settings)
    expected, out = files_of(tmp_path / "a"), tmp_path / "b"
    assert "captioning.logits.jsonl" in expected
    assert not predict_shard(*run, Shard(1, 2), out_dir=out, **settings)
    part = out / "captioning-logits.1-of-2.jsonl.part"
    assert len(part.read_text().splitlines()) == 2
    part.write_bytes(part.read_bytes()[:-30])  # killed in the second
    assert [predict_shard(*run, Shard(r, 3), out_dir=out, **settings) for r in range(3)][-1]
    evaluate(*run, out_dir=out, **settings)
    assert files_of(out) == expected


def test_features_serve_other_runs(coco: Path, tmp_path: Path) -> None:
    """A changed Q-Former finds the vision outputs, a changed vision tower or image does not."""
    model, processor = eval_models.blip2("retrieval")
    seen: list[int] = []
    model.vision_model.register_forward_hook(lambda *_: seen.append(1))
    kept = tmp_path / "features"

    def run(name: str) -> dict[str, Any]:
        seen.clear()
        settings: dict[str, Any] = {"data": coco, "batch_size": 2, "features": kept}
        return evaluate(model, processor, None, out_dir=tmp_path / name, **settings)

    first = run("a")
    assert len(seen) == 2
    assert not (tmp_path / "a" / "features.part").exists()
    run("again")
    assert not seen
    assert files_of(tmp_path / "a") == files_of(tmp_path / "again")
    with torch.no_grad():
        model.qformer.encoder.layer[0].attention.attention.query.weight.mul_(-3)
        model.itm_head.weight.neg_()
    changed = run("qformer")
    assert not seen
    rows = [(tmp_path / n / "retrieval.jsonl").read_text() for n in ("a", "qformer")]
    assert rows[0] != rows[1]
    assert changed["tasks"]["retrieval"]["counts"] == first["tasks"]["retrieval"]["counts"]
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    run("vision")
    assert len(seen) == 2
    eval_models.write_image(coco / "val2014" / "COCO_val2014_000000000001.jpg", "blue")
    os.utime(coco / "val2014" / "COCO_val2014_000000000001.jpg", ns=(1, 1))
    run("image")
    assert len(seen) == 2
    for file in kept.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EvalError, match=r"features: .*safetensors is broken, remove it"):
        run("broken")


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


def test_random_kills(tmp_path: Path) -> None:
    """tests/kill_and_resume.py with fewer kills than the twenty that it makes by itself."""
    script = Path(__file__).with_name("kill_and_resume.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4"], capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout.decode().splitlines()[-1])["trials"]
    assert [row["equal"] for row in found] == [True] * 4
    assert any(row["at_work"] for row in found)


COMMAND = ["eval", "tiny-llava", "--tasks", "vqa", "--limit", "64", "--batch-size", "4"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of one process's run of the command."""
    out = tmp_path_factory.mktemp("command") / "full"
    assert main([*COMMAND, "--out", str(out)]) == 0
    return files_of(out)


def test_the_command_is_killed_and_goes_on_with_workers(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmq.cli", *COMMAND, "--out", str(out)], stderr=subprocess.DEVNULL
    )
    part = out / "vqa.0-of-1.jsonl.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    assert main([*COMMAND, "--out", str(out), "--workers", "2"]) == 0
    assert files_of(out) == undisturbed


LAUNCHERS = {
    "torch": ["torch.distributed.run", "--nproc-per-node", "2"],
    # Its own option for a CPU alone starts one process.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("package", LAUNCHERS)
def test_launchers_divide_the_command(
    undisturbed: dict[str, Any], package: str, tmp_path: Path
) -> None:
    """torchrun and ``accelerate launch`` start two processes; the first one scores."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    launcher = [sys.executable, "-m", *LAUNCHERS[package], "--module", "mmq.cli"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*launcher, *COMMAND, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "shard 1 of 2 is done" in done.stdout
    assert done.stdout.count("Scores times 100") == 1
    assert files_of(out) == undisturbed
