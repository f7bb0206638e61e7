# SPDX-License-Identifier: Apache-2.0
"""The demo on few items and settings: every row from a packed file, every difference paired."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmq_evals import demo, tiny
from mmq_evals.errors import EvalError

KL = {"logit KL", "logit KL, 99th percentile over tokens", "same first token"}


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BITS", (3,))
    monkeypatch.setattr(demo, "METHODS", ("rtn",))
    monkeypatch.setattr(demo, "CALIBRATION_SAMPLES", 2)
    lines: list[str] = []
    models = ("tiny-blip2-retrieval", "tiny-llava")
    report = demo.run_demo(tmp_path / "out", models=models, limit=6, progress=lines.append)

    settings = ["full precision", "rtn", "mixed"]
    tasks = [
        ("tiny-blip2-retrieval", "retrieval"),
        ("tiny-llava", "vqa"),
        ("tiny-llava", "widths"),
        ("tiny-llava", "easy-vqa"),
    ]
    found = [(row.model, row.task, row.method) for row in report.rows]
    assert sorted(found) == sorted((*task, method) for task in tasks for method in settings)
    assert len(lines) == len(models) * len(settings)
    for row in report.rows:
        file = tiny.path(row.model) / "model.safetensors"
        if row.method == "full precision":
            assert row.difference is None
            assert not row.agreement
        else:
            bits = row.bits.replace("/", "-")
            file = tmp_path / "out" / row.model / f"{row.method}-{bits}/packed/model.safetensors"
            assert row.difference == pytest.approx(row.score - row.full_precision, abs=1e-9)
            assert row.difference_low is not None
            assert row.difference_high is not None
            assert row.difference_low <= row.difference <= row.difference_high
            measures = {"rank correlation"} if row.task == "retrieval" else KL
            assert row.agreement.keys() >= measures
            for name in measures:
                found = row.agreement[name]
                assert found["low"] <= found["value"] <= found["high"]
            assert (row.task == "retrieval") == ("logit KL" not in row.agreement)
        assert row.bytes == file.stat().st_size
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(stored["rows"]) == len(report.rows)
    assert "| rtn | 3 |" in report.path.read_text()
    assert "tiny-llava, easy-vqa" in report.table
    assert report.table.count("KL, mnat [95 %]") == 3
    assert report.table.count("rank correlation [95 %]") == 1


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="limit: expected at least 1, got 0"):
        demo.run_demo(tmp_path / "out", limit=0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EvalError, match=r"out: expected a folder, got .*file"):
        demo.run_demo(tmp_path / "file", limit=1)
