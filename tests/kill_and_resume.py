# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of an evaluation, resumed by another number of processes.

    python tests/kill_and_resume.py --kills 20

Every trial starts one to three processes on captioning or retrieval, kills them all when as much is
on disk as was drawn (rows and, for retrieval, files of features) or up to 50 ms later, resumes with
another number, and compares every byte of rows and results with the undisturbed run. Exits with 1
if one differs. Processes are forks of one that has loaded the model, so that kills meet the work
and not the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import eval_models
import torch
from forks import fork

from mmq_evals.rows import Shard
from mmq_evals.run import evaluate, predict_shard

# Untrained models of a few thousand parameters: kind and task.
TASKS = {"caption": "captioning", "retrieval": "retrieval"}
IMAGES = 40


def files_of(out: Path) -> dict[str, Any]:
    """All that a finished run leaves, but for its times."""
    found: dict[str, Any] = {
        path.name: path.read_bytes() for path in out.iterdir() if path.name != "result.json"
    }
    result = json.loads((out / "result.json").read_text())
    for entry in result["tasks"].values():
        del entry["seconds"]
    return found | {"result.json": result}


def wait(processes: list[int]) -> bool:
    """Whether all ended by themselves, without an error."""
    codes = [os.waitpid(process, 0)[1] for process in processes]
    return not any(codes)


def on_disk(out: Path) -> tuple[int, int]:
    """Rows and files of features."""
    rows = sum(path.read_bytes().count(b"\n") for path in out.glob("*.jsonl.part"))
    return rows, len(list(out.rglob("*.safetensors")))


def start(run: tuple[Any, ...], out: Path, count: int, settings: dict[str, Any]) -> list[int]:
    """The processes of a run; a single one scores, too."""
    if count == 1:
        return [fork(lambda: evaluate(*run, out_dir=out, **settings))]
    return [
        fork(lambda rank=rank: predict_shard(*run, Shard(rank, count), out_dir=out, **settings))
        for rank in range(count)
    ]


def trials(
    run: tuple[Any, ...], folder: Path, kills: int, settings: dict[str, Any], seed: int = 0
) -> list[dict[str, Any]]:
    """``kills`` killed and resumed runs: what was there at the kill, and whether the end is equal.

    Args:
        run: model, processor and tasks of `evaluate`. Nothing may have run on the model in this
            process with more than one thread: threads do not survive a fork.
    """
    rng = random.Random(seed)
    assert wait([fork(lambda: predict_shard(*run, Shard(), out_dir=folder / "whole", **settings))])
    everything = sum(on_disk(folder / "whole"))
    assert wait(start(run, folder / "undisturbed", 1, settings))
    expected = files_of(folder / "undisturbed")
    found = []
    for trial in range(kills):
        out = folder / f"killed{trial}"
        before, after = rng.sample((1, 2, 3), 2)
        processes = start(run, out, before, settings)
        target = rng.randrange(everything + 1)
        while sum(on_disk(out)) < target and not (out / "result.json").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        for process in processes:
            os.kill(process, signal.SIGKILL)
        ended = wait(processes)
        rows, features = on_disk(out)
        assert wait(start(run, out, after, settings))
        if after > 1:
            assert wait(start(run, out, 1, settings))
        found.append(
            {
                "tasks": list(run[2]),
                "processes": [before, after],
                "at_work": not ended,
                "rows": rows,
                "features": features,
                "equal": files_of(out) == expected,
            }
        )
        shutil.rmtree(out)
    return found


def main(kills: int) -> int:
    """Half of the kills on either model; prints a line each and JSON last."""
    torch.set_num_threads(1)
    found = []
    for number, (kind, task) in enumerate(TASKS.items()):
        run = (*eval_models.blip2(kind), [task])
        with tempfile.TemporaryDirectory() as folder:
            share = (kills + 1 - number) // 2
            coco = eval_models.karpathy_coco(Path(folder) / "coco", IMAGES + 3, IMAGES)
            settings = {"data": coco, "batch_size": 2}
            for row in trials(run, Path(folder), share, settings, seed=number):
                found.append(row)
                print(
                    f"{row['tasks'][0]}, {row['processes'][0]} process(es) killed at "
                    f"{row['rows']} rows, {row['features']} files of features; "
                    f"resumed by {row['processes'][1]}: "
                    f"{'identical' if row['equal'] else 'DIFFERENT'}"
                )
    equal = sum(row["equal"] for row in found)
    print(f"{equal} of {len(found)} identical; {sum(row['at_work'] for row in found)} were at work")
    print(json.dumps({"trials": found}))
    return 0 if equal == len(found) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    sys.exit(main(parser.parse_args().kills))
