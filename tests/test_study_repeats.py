# SPDX-License-Identifier: Apache-2.0
"""Calibration seeds and options of the methods: spreads and differences whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from study_tables import additive, factorial, record, with_samples, write_jsonl

from mmq.cli import main
from mmq_evals.errors import EvalError
from mmq_evals.study.analyze import Options, analyze
from mmq_evals.study.places import options_of
from mmq_evals.study.repeat_tables import options_table, seeds_table

OPTION = {"gptq": {"correction": "gptaq", "alpha": 1.0}}
SCORES = {0: 0.60, 1: 0.66, 2: 0.72}
GAINS = {0: 0.10, 1: 0.04, 2: 0.10}


def row(seed: int, score: float, width: float = 3, **levels: Any) -> dict[str, Any]:
    bits = {"vision": width, "language": width}
    found = record("gptq", bits, score, seed=seed, upstream="quantized", mode="sequential")
    found["levels"] = {"method": "gptq", "bits": width, "seed": seed, **levels}
    found["run_id"] += f"-{seed}-{len(levels)}"
    return found


def study() -> list[dict[str, Any]]:
    """A factorial, repeated runs behind a quantized upstream, and the same with an option."""
    full = additive({"vision": 0.3, "language": 0.4})
    main_rows = [
        {**found, "upstream": "full", "mode": "independent", "seed": 0}
        for found in factorial(full, levels=(2, 3, 4, 16))
    ]
    plain = [row(seed, score) for seed, score in SCORES.items()]
    changed = [row(seed, SCORES[seed] + gain, **OPTION) for seed, gain in GAINS.items()]
    return [*main_rows, *plain, *changed]


def repeats_of(path: Path) -> dict[str, Any]:
    (model,) = analyze(path, Options())["models"]
    found: dict[str, Any] = model
    return found


def test_seeds_and_options_are_what_was_put_in(tmp_path: Path) -> None:
    model = repeats_of(write_jsonl(tmp_path / "t.jsonl", study()))
    # Neither the repeated runs nor those with the option are among the study's own grids.
    (target,) = model["targets"]
    assert [(grid["label"], grid["cells"]) for grid in target["grids"]] == [("gptq", 16)]
    (repeats,) = model["repeats"]
    (plain,) = repeats["seeds"]
    assert plain["grid"] == "gptq, upstream quantized"
    assert (plain["widths"], plain["seeds"]) == ("3/3", 3)
    assert plain["mean"] == pytest.approx(0.66)
    assert plain["deviation"] == pytest.approx(0.06)
    assert (plain["lowest"], plain["highest"], plain["sampling"]) == (0.60, 0.72, None)
    (option,) = repeats["options"]
    assert option["base"] == plain["grid"]
    assert option["grid"] == "gptq, upstream quantized, correction gptaq, alpha 1.0"
    assert option["value"] == pytest.approx(0.08)
    assert option["lowest"] == pytest.approx(0.04)
    assert option["highest"] == pytest.approx(0.10)
    assert (option["low"], option["adjusted"]) == (None, None)  # there are no scores per sample


def test_differences_are_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    rows = [found for found in study() if found["run_id"] != "gptq-3-3-0-0"]
    (option,) = repeats_of(write_jsonl(tmp_path / "t.jsonl", rows))["repeats"][0]["options"]
    assert option["seeds"] == 2
    assert option["value"] == pytest.approx(0.07)


def test_intervals_are_paired_over_items(tmp_path: Path) -> None:
    model = repeats_of(with_samples(tmp_path, study()))
    (repeats,) = model["repeats"]
    (option,) = repeats["options"]
    assert 0.02 < option["low"] < option["value"] < option["high"] < 0.15
    assert option["adjusted"] < 0.05
    plain = repeats["seeds"][0]
    assert 0.0 < plain["sampling"] < 0.06
    head, (line,) = options_table(model)
    assert head == ["grid", "widths", "seeds", "vqa accuracy"]
    assert line[:3] == [option["grid"], "3/3", "3"]
    assert f"{100 * option['value']:+.1f} [" in line[3]
    assert "]* {" in line[3]
    assert len(seeds_table(model)[1]) == 1


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    again = {**row(0, 0.6), "run_id": "again"}
    with pytest.raises(EvalError, match="gptq-3-3-0-0 and again are both"):
        repeats_of(write_jsonl(tmp_path / "t.jsonl", [*study(), again]))


def test_options_without_a_plain_run_are_grids_of_the_study(tmp_path: Path) -> None:
    rows = [row(0, 0.6, gptq={"damp": 0.1}), row(0, 0.7, gptq={"damp": 0.2})]
    for number, found in enumerate(rows):
        found["run_id"] = str(number)
    model = repeats_of(write_jsonl(tmp_path / "t.jsonl", rows))
    assert [grid["label"] for grid in model["targets"][0]["grids"]] == [
        "gptq, damp 0.1",
        "gptq, damp 0.2",
    ]
    assert model["repeats"][0]["options"] == []


def test_defaults_are_no_options() -> None:
    assert options_of({"gptq": {"correction": "none"}, "calibration.token_weights": "none"}) == ()
    levels = {"gptq": {"correction": "gptaq", "alpha": 0.25}, "calibration.token_weights": "qig"}
    assert options_of(levels) == ("token weights qig", "correction gptaq")
    assert options_of({"vision": 3, "bits": 2, "seed": 4, "gptq": None}) == ()
    assert options_of({"vision": 3, "vision:gptq": {"damp": 0.1}}) == ("vision damp 0.1",)


def test_every_form_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_samples(tmp_path, study())
    assert main(["analyze", str(path)]) == 0
    text = capsys.readouterr().out
    assert "=== tiny: calibration seeds ===" in text
    assert "=== tiny: options ===" in text
    assert main(["analyze", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["repeats"][0]["options"]
    page = tmp_path / "page.html"
    assert main(["report", str(path), "--out", str(page), "--data", "none"]) == 0
    html = page.read_text()
    assert '<h2 id="r0">' in html
    assert 'href="#r0"' in html
    assert "correction gptaq, alpha 1.0" in html
    assert "<td class=best>" in html
    capsys.readouterr()


def test_kl_of_logits_has_its_place(tmp_path: Path) -> None:
    """By the means of single samples; without its rows there is no interval."""
    rows = study()
    for found in rows:
        if found["method"] != "none":
            found["agreement.vqa.kl"] = 0.02 if "gptq" in found.get("levels", {}) else 0.03
    path = with_samples(tmp_path, rows)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    for found in written:
        if found["method"] == "none":
            continue
        place = tmp_path / found["rows"]
        ids = [json.loads(line)["id"] for line in (place / "vqa.jsonl").read_text().splitlines()]
        half = found["agreement.vqa.kl"] / 2  # two tokens a sample, whose mean is the value
        write_jsonl(
            place / "vqa.logits.jsonl",
            [{"id": key, "kl": [half, 3 * half], "same_first": [True, True]} for key in ids],
        )
    score, kl = repeats_of(path)["repeats"]
    assert (score["unit"], kl["unit"]) == ("points", "nats")
    (option,) = kl["options"]
    assert option["value"] == pytest.approx(-0.01)
    assert (option["low"], option["high"]) == pytest.approx((-0.01, -0.01))
    (tmp_path / written[-1]["rows"] / "vqa.logits.jsonl").unlink()
    (option,) = repeats_of(path)["repeats"][1]["options"]
    assert option["value"] == pytest.approx(-0.01)
    assert option["low"] is None
