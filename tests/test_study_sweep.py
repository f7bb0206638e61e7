# SPDX-License-Identifier: Apache-2.0
"""Sweeps: rows equal ordinary evaluations, finished runs are skipped, kills lose little."""

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
import yaml
from forks import fork

import mmq
from mmq.cli import main
from mmq.recipe import parse_recipe
from mmq_evals.calibration import calibration_samples
from mmq_evals.errors import EvalError
from mmq_evals.run import evaluate
from mmq_evals.study.bench import scores_of
from mmq_evals.study.grid import parse_study
from mmq_evals.study.runs import load_model, plan_study, write_plan
from mmq_evals.study.store import Store
from mmq_evals.study.sweep import work

SETTINGS: dict[str, Any] = {"group_size": 8, "zero": "integer", "clip": "none"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random captioning model and a dataset of four test and four training images."""
    root = tmp_path_factory.mktemp("sweep")
    eval_models.karpathy_coco(root / "coco", 8)
    model, processor = eval_models.blip2("caption")
    mmq.save(model, root / "model", processor)
    return root


def study_of(folder: Path, upstream: str = "full", **axes: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "models": [str(folder / "model")],
        "tasks": ["captioning"],
        "data": str(folder / "coco"),
        "limits": 3,
        "batch_size": 2,
        "recipe": {"calibration": {"samples": 3, "upstream": upstream}},
        "methods": {"rtn": SETTINGS, "gptq": SETTINGS, "awq": {**SETTINGS, "awq": {"clip": False}}},
        "grids": [{"axes": axes or {"method": ["rtn", "awq"], "vision": [3, 16], "language": [3]}}],
    }


def write(study: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(study))
    return path


def table(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = {row["run_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def without_times(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        key: {name: value for name, value in row.items() if not name.startswith("seconds.")}
        for key, row in rows.items()
    }


def sweep(study: Path, out: Path, *more: str) -> int:
    return main(["sweep", str(study), "--out", str(out), "--threads", "1", *more])


@pytest.mark.parametrize(
    ("upstream", "option"),
    [("full", "none"), ("quantized", "none"), ("quantized", "grad")],
)
def test_a_row_is_an_ordinary_evaluation(
    folder: Path, tmp_path: Path, upstream: str, option: str
) -> None:
    axes: dict[str, Any] = {"method": ["rtn", "awq"], "vision": [3, 16], "language": [3]}
    if option != "none":
        axes = {"method": ["gptq"], "bits": [2], "calibration.token_weights": [option]}
    study = write(study_of(folder, upstream, **axes), tmp_path / "grid.yaml")
    assert sweep(study, tmp_path / "out") == 0
    rows = table(tmp_path / "out")
    assert len(rows) == (5 if option == "none" else 2)
    (full,) = [row for row in rows.values() if row["method"] == "none"]
    assert (full["bits.vision"], full["bits.language"], full["mode"]) == (16, 16, None)
    assert "diff.captioning.cider" not in full
    dense, _ = load_model(full["model"])
    mode = {"full": "independent", "quantized": "sequential"}[upstream]
    for row in rows.values():
        assert row["status"] == "done"
        if row is full:
            continue
        assert row["mode"] == mode
        model, processor = load_model(row["model"])
        recipe = parse_recipe(row["recipe"])
        samples = calibration_samples(model, processor, data=folder / "coco", count=3)
        manifest = mmq.quantize(model, recipe, [sample.inputs for sample in samples])
        packed = mmq.save(model, tmp_path / row["run_id"], processor)
        result = evaluate(
            mmq.load(packed),
            processor,
            ["captioning"],
            out_dir=tmp_path / "eval" / row["run_id"],
            data=folder / "coco",
            limit=3,
            batch_size=2,
            reference=tmp_path / "out" / full["rows"],
            reference_model=dense,
        )
        assert 0.0 < row["agreement_low.captioning.kl"] <= row["agreement.captioning.kl"]
        assert row["agreement.captioning.kl_p99"] <= row["agreement_high.captioning.kl_p99"]
        assert {name: row[name] for name in scores_of(result)} == scores_of(result)
        ours = tmp_path / "out" / row["rows"] / "captioning.jsonl"
        theirs = tmp_path / "eval" / row["run_id"] / "captioning.jsonl"
        assert ours.read_bytes() == theirs.read_bytes()
        assert row["bytes"] == manifest.payload_bytes
        assert row["bpw_linears"] == manifest.bits_per_weight
        errors = [record.relative_error for record in manifest.linears]
        assert row["layer_error"] == pytest.approx(sum(map(float, errors)) / len(errors))


def test_finished_runs_are_skipped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write(study_of(folder, method=["rtn"], vision=[3]), tmp_path / "small.yaml")
    large = write(study_of(folder, method=["rtn"], vision=[3, 4, 16]), tmp_path / "large.yaml")
    out = tmp_path / "out"
    assert sweep(small, out) == 0
    assert "2 runs in" in capsys.readouterr().out
    before = (out / "results.jsonl").read_bytes()
    assert sweep(small, out) == 0
    assert "0 runs in" in capsys.readouterr().out
    assert (out / "results.jsonl").read_bytes() == before
    assert sweep(large, out) == 0
    captured = capsys.readouterr()
    assert "1 runs in" in captured.out
    assert "2 of 3 runs are done" in captured.err
    assert (out / "results.jsonl").read_bytes().startswith(before)


def test_without_logits_the_runs_are_the_same(folder: Path, tmp_path: Path) -> None:
    study = study_of(folder, method=["rtn"], vision=[3])
    path, out = write({**study, "logits": False}, tmp_path / "grid.yaml"), tmp_path / "out"
    assert sweep(path, out) == 0
    rows = table(out)
    assert rows.keys() == {run.run_id for run in plan_study(parse_study(study)).runs}
    columns = {name for row in rows.values() for name in row}
    assert "agreement.captioning.identical_captions" in columns
    assert not any(".kl" in name or "first_token" in name for name in columns)


def test_settings_of_equal_tensors_run_once(folder: Path) -> None:
    study = study_of(folder, method=["rtn"], vision=[16, 4], language=[16])
    halves = {"vision.attention": [4], "vision.mlp": [4]}
    study["grids"].append({"axes": {"method": ["rtn"], **halves}})
    planned = plan_study(parse_study(study))
    assert planned.settings == 3
    assert planned.shared == 1
    assert len(planned.runs) == 2
    other = plan_study(parse_study({**study, "limits": 2}))
    assert {run.run_id for run in planned.runs}.isdisjoint(run.run_id for run in other.runs)


def test_a_failing_run_does_not_stop_the_rest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(folder, method=["rtn"], vision=[3], language=[4])
    study["grids"].append(
        {"runs": [{"method": "rtn", "vision": 4, "calibration.samples": 1000}, {"bits": 8}]}
    )
    path, out = write(study, tmp_path / "grid.yaml"), tmp_path / "out"
    assert sweep(path, out) == 1
    rows = table(out)
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert len(rows) == 4
    assert len(failed) == 1
    assert "at least 1000 training items, got 4" in failed[0]["error"]
    assert "failed: " + failed[0]["run_id"] in capsys.readouterr().out
    assert sweep(path, out) == 1  # not tried again
    assert table(out) == rows
    assert sweep(path, out, "--retry") == 1
    assert len(table(out)) == 4


def test_a_torn_line_is_cut_off(folder: Path, tmp_path: Path) -> None:
    study = write(study_of(folder, method=["rtn"], vision=[3]), tmp_path / "grid.yaml")
    out = tmp_path / "out"
    assert sweep(study, out) == 0
    whole = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(whole[:-7])
    assert sweep(study, out) == 0
    assert without_times(table(out)).keys() == {json.loads(x)["run_id"] for x in whole.splitlines()}


def test_two_processes_share_a_folder_and_a_killed_one_is_made_up_for(
    folder: Path, tmp_path: Path
) -> None:
    axes = {"method": ["rtn"], "vision": [3, 4, 16], "language": [2, 3, 4, 16]}
    study = write(study_of(folder, **axes), tmp_path / "grid.yaml")
    assert sweep(study, tmp_path / "alone") == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mmq.cli", "sweep", str(study), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    second = subprocess.Popen([*command, "--shard", "1/2"], env=environment)
    while not (out / "results.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=300) == 0
    assert sweep(study, out) == 0
    rows = table(out)
    expected = without_times(table(tmp_path / "alone"))
    assert without_times(rows) == expected
    assert len(rows) == 12


def test_kills_anywhere_lose_the_run_in_hand_at_most(folder: Path, tmp_path: Path) -> None:
    axes = {"method": ["rtn"], "vision": [3, 16], "language": [2, 3, 16]}
    planned = plan_study(parse_study(study_of(folder, **axes)))
    (tmp_path / "alone").mkdir()
    (tmp_path / "out").mkdir()
    started = time.monotonic()
    assert work(write_plan(planned, tmp_path / "alone")) == len(planned.runs) == 6
    step = (time.monotonic() - started) / 8  # However fast the machine, the first kill comes early.
    plan_file = write_plan(planned, tmp_path / "out")
    results = tmp_path / "out" / "results.jsonl"
    rng = random.Random(0)
    done: set[str] = set()
    kills = 0
    while len(done) < len(planned.runs):
        child = fork(lambda: work(plan_file))
        time.sleep(rng.uniform(0.0, step) + step * (kills // 4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        content = results.read_bytes() if results.exists() else b""
        found = {json.loads(line)["run_id"] for line in content.split(b"\n")[:-1]}
        assert found >= done
        done = found
    assert kills > 1
    assert without_times(table(tmp_path / "out")) == without_times(table(tmp_path / "alone"))


@pytest.mark.skipif("MMQ_TEST_RAY" not in os.environ, reason="MMQ_TEST_RAY=1 starts a cluster")
def test_two_ray_workers_give_the_table_of_one_process(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    axes = {"method": ["rtn", "awq"], "vision": [3, 16], "language": [3, 16]}
    study = write(study_of(folder, **axes), tmp_path / "grid.yaml")
    assert sweep(study, tmp_path / "one") == 0
    assert sweep(study, tmp_path / "ray", "--ray", "local", "--workers", "2") == 0
    ours, theirs = table(tmp_path / "ray"), table(tmp_path / "one")
    assert without_times(ours) == without_times(theirs)
    assert len(ours) == 7


def test_claims_exclude_other_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mmq_evals.study.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "with store.claim('00ff00ff00ff00ff') as mine: print(mine)\n"
        "with store.claim('00ff00ff00fe00ff') as mine: print(mine)\n"
    )
    store = Store(tmp_path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    with store.claim("00ff00ff00ff00ff") as mine:
        assert mine
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stdout.split() == ["False", "True"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "True"]
    store.close()


def test_rows_are_checked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    row = {"run_id": "00000000000000aa", "status": "done"}
    store.append(row)
    with pytest.raises(EvalError, match="00000000000000aa twice"):
        store.append(row)
    store.close()
    (tmp_path / "results.jsonl").write_text("[1]\n")
    store = Store(tmp_path)
    with pytest.raises(EvalError, match="expected rows with a run_id"):
        store.refresh()
    store.close()


def test_a_table_that_another_process_cut_is_read_again(tmp_path: Path) -> None:
    here, there = Store(tmp_path), Store(tmp_path)
    for number, status in enumerate(("done", "failed", "failed")):
        there.append({"run_id": f"{number:016x}", "status": status})
    here.refresh()
    assert there.forget_failed() == 2
    here.append({"run_id": f"{9:016x}", "status": "done"})
    assert list(here.rows) == [f"{0:016x}", f"{9:016x}"]
    there.refresh()
    assert there.rows == here.rows
    here.close()
    there.close()


def test_parquet_and_slurm(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    study = write(study_of(folder, method=["rtn"], vision=[3]), tmp_path / "grid.yaml")
    out = tmp_path / "out"
    assert sweep(study, out, "--parquet") == 0
    read = parquet.read_table(out / "results.parquet").to_pylist()
    assert {row["run_id"] for row in read} == set(table(out))
    script = tmp_path / "job.sh"
    assert sweep(study, out, "--slurm", str(script), "--workers", "4") == 0
    text = script.read_text()
    assert "#SBATCH --array=0-3\n" in text
    assert text.endswith(f'sweep {study} --out {out} --shard "$SLURM_ARRAY_TASK_ID/4"\n')
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "3", "OMP_NUM_THREADS": "1"}
    job = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert job.returncode == 0
    assert "0 runs in" in job.stdout
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["nowhere"]}, "model: expected a folder with a config.json"),
        ({"models": []}, "expected models, got none"),
        ({"tasks": ["retrieval"]}, "task 'retrieval' does not fit"),
        ({"data": "nowhere"}, "nowhere"),
        ({"grids": [{"axes": {"connector.attention": [9]}}]}, "expected 2 to 8"),
        ({"grids": [{"axes": {"language.front": [4], "head": [2]}}]}, "axis 'head'"),
    ],
)
def test_what_is_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    study = write({**study_of(folder), **change}, tmp_path / "grid.yaml")
    assert sweep(study, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
