# SPDX-License-Identifier: Apache-2.0
"""mmq compare: two runs over the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_models
import pytest

from mmq.cli import main
from mmq_evals.compare import compare, format_comparison
from mmq_evals.errors import EvalError
from mmq_evals.run import evaluate


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """The same run twice, with two answers of the second made wrong by hand."""
    coco = eval_models.karpathy_coco(tmp_path / "coco")
    eval_models.gqa(coco)
    said: list[str] = []
    model, processor = eval_models.blip2("caption")
    for name in ("a", "b"):
        settings: dict[str, Any] = {"out_dir": tmp_path / name, "data": coco}
        evaluate(model, processor, ["captioning"], announce=said.append, **settings)
    assert "captioning, cider: 4 samples show differences of" in said[0]
    file = tmp_path / "b" / "captioning.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:2]:
        row["prediction"] = "a square"
        row["scores"] = dict.fromkeys(row["scores"], -1.0)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a", tmp_path / "b"


def test_changes_are_found(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(*runs)["captioning"]
    assert (found["samples"], found["worse"], found["better"]) == (4, 2, 0)
    assert [row["id"] for row in found["changed"]] == ["100", "101"]
    assert found["changed"][0]["b"] == "a square"
    change = found["differences"]["cider"]
    assert change["value"] < 0
    assert change["low"] <= change["value"] <= change["high"]
    assert found["agreement"]["identical captions"]["count"] == 2
    assert found["differences"]["bleu_1"]["value"] > 0.05
    assert not compare(runs[0], runs[0])["captioning"]["changed"]
    assert main(["compare", *map(str, runs), "--samples", "1"]) == 0
    text = capsys.readouterr().out
    assert "2 of 4 predictions changed; by cider 2 worse, 0 better" in text
    assert "identical captions: 50.00 [0.00, 100.00] (2 of 4)" in text
    assert "... and 1 more" in text


def test_other_protocols_are_refused_unless_forced(runs: tuple[Path, Path]) -> None:
    file = runs[1] / "result.json"
    result = json.loads(file.read_text())
    result["tasks"]["captioning"]["protocol"]["batch_size"] = 7
    file.write_text(json.dumps(result))
    with pytest.raises(EvalError, match=r"two protocols; different: batch_size \(--force"):
        compare(*runs)
    found = compare(*runs, force=True)
    assert found["captioning"]["protocol"] == ["batch_size"]
    assert "the protocols differ in batch_size" in format_comparison(found)


def test_other_samples_and_tasks_are_refused(runs: tuple[Path, Path]) -> None:
    rows = runs[1] / "captioning.jsonl"
    rows.write_text("\n".join(rows.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(EvalError, match=r"same samples, got 4 and 3; in one only: \['100'\]"):
        compare(*runs)
    file = runs[1] / "result.json"
    result = json.loads(file.read_text())
    result["tasks"] = {"vqa": result["tasks"]["captioning"]}
    file.write_text(json.dumps(result))
    with pytest.raises(EvalError, match="no task is in both runs: captioning and vqa"):
        compare(*runs)
