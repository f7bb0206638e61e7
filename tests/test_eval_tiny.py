# SPDX-License-Identifier: Apache-2.0
"""Every task runs on the built-in data, with the built-in architectures before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmq_evals.run import evaluate, format_result, tasks_for
from mmq_evals.tiny import MODELS, architectures


@pytest.mark.parametrize("name", MODELS)
def test_tasks_on_the_tiny_data(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = architectures.build(name).eval(), architectures.processor(name)
    if name == "tiny-llava":
        pytest.importorskip("easy_vqa")
    tasks = tasks_for(model)
    result = evaluate(model, processor, None, out_dir=tmp_path, limit=3)
    assert list(result["tasks"]) == tasks
    for task in tasks:
        entry = result["tasks"][task]
        assert (tmp_path / f"{task}.jsonl").is_file()
        assert all(entry["primary"] in scores for scores in entry["baselines"].values())
        assert entry["baselines"]
        assert entry["protocol"]["data"]["rows"] == (18 if task == "retrieval" else 3)
    assert all(task in format_result(result) for task in tasks)
