# SPDX-License-Identifier: Apache-2.0
"""mmq analyze on synthetic tables whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_tables
from study_tables import LOSS, additive, factorial, write_jsonl

from mmq.cli import main
from mmq_evals.errors import EvalError
from mmq_evals.study.analyze import Options, analyze
from mmq_evals.study.importance import Range

TARGET = "score.vqa.accuracy_always"


def target_of(path: Path, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = analyze(path, Options(**options))["models"][0]["targets"][0]
    return found


def shares(part: dict[str, Any]) -> dict[str, float]:
    return {" x ".join(share["factors"]): share["value"] for share in part["shares"]}


def test_an_additive_table_gives_its_own_shares(tmp_path: Path) -> None:
    sensitivity = {"vision": 0.3, "connector": 0.1, "language": 0.4}
    rows = factorial(additive(sensitivity), names=tuple(sensitivity))
    (grid,) = target_of(write_jsonl(tmp_path / "t.jsonl", rows))["grids"]
    squares = {name: value**2 for name, value in sensitivity.items()}
    for part, name in zip(grid["importance"], ("all", ">=3", ">=4"), strict=True):
        assert (part["range"], part["kind"], part["spread"]) == (name, "exact", "levels")
        found = shares(part)
        assert sum(found.values()) == pytest.approx(1.0)
        for factor, square in squares.items():
            assert found[factor] == pytest.approx(square / sum(squares.values()))
        assert found["vision x language"] == pytest.approx(0.0, abs=1e-12)
        losses = [LOSS[w] for w in study_tables.LEVELS if w >= {"all": 2, ">=3": 3, ">=4": 4}[name]]
        expected = np.sqrt(sum(squares.values())) * np.std(losses)
        assert part["deviation"] == pytest.approx(expected)
    for pair in grid["interactions"]:
        assert pair["mean"]["value"] == pytest.approx(0.0, abs=1e-12)
        assert not pair["tested"]
    assert grid["interactions"][1]["near_floor"] == 2  # 2/16/2 and 3/16/2: below half


def test_importance_of_an_uneven_grid_is_an_artefact_and_told(tmp_path: Path) -> None:
    """Language matters more at every width, but its collapse at 2 bits was not tried."""
    sensitivity = {"vision": 0.5, "language": 0.7}
    levels = {"vision": (2, 3, 4, 16), "language": (3, 4, 16)}
    rows = factorial(additive(sensitivity), levels=levels)
    (grid,) = target_of(write_jsonl(tmp_path / "t.jsonl", rows))["grids"]
    assert grid["warnings"] == [
        "language has no 2 bits, vision has: shares of the whole grid are not comparable between "
        "them"
    ]
    by_range = {part["range"]: shares(part) for part in grid["importance"]}
    assert by_range["all"]["vision"] > 0.8
    assert by_range[">=3"]["language"] == pytest.approx(0.49 / 0.74)


def test_methods_with_other_levels_are_compared_on_common_ones(tmp_path: Path) -> None:
    rows = factorial(additive({"vision": 0.5, "language": 0.5}), levels=(2, 3, 4, 8, 16))
    awq = factorial(additive({"vision": 0.4, "language": 0.4}), method="awq", levels=(2, 4, 16))
    rows += [row for row in awq if row["method"] == "awq"]
    found = target_of(write_jsonl(tmp_path / "t.jsonl", rows))
    first, second = found["grids"]
    assert [part["range"] for part in first["importance"]][-1] == "common levels"
    assert first["importance"][-1]["levels"]["vision"] == [2.0, 4.0, 16.0]
    # The second grid's own levels are the common ones: no range is shown twice.
    assert [part["range"] for part in second["importance"]] == ["all", ">=3"]
    lost = 0.1 * np.mean([LOSS[a] + LOSS[b] for a in (2, 4, 16) for b in (2, 4, 16)][:-1])
    row = found["methods"][0]
    assert (row["a"], row["b"], row["cells"]) == ("gptq", "awq", 8)
    assert row["value"] == pytest.approx(-lost)


def test_ranges_weights_and_incomplete_grids(tmp_path: Path) -> None:
    rows = factorial(additive({"vision": 0.5, "language": 0.7}))
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    span = Range.parse("3-8")
    (part,) = target_of(file, ranges=[span])["grids"][0]["importance"]
    assert part["levels"] == {"vision": [3.0, 4.0, 5.0, 6.0, 8.0], "language": [3, 4, 5, 6, 8]}
    part = target_of(file, ranges=[Range.parse("language >= 3")])["grids"][0]["importance"][0]
    assert part["cells"] == 42
    assert part["levels"]["vision"] == [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0]
    assert part["levels"]["language"] == [3.0, 4.0, 5.0, 6.0, 8.0, 16.0]
    even = target_of(file, ranges=[Range.parse(">=3")])["grids"][0]["importance"][0]
    weights = {2.0: 0.0, 3.0: 1.0, 4.0: 1.0, 5.0: 1.0, 6.0: 1.0, 8.0: 1.0, 16.0: 1.0}
    grid = target_of(file, ranges=[Range.parse("all")], weights=weights)["grids"][0]
    assert shares(grid["importance"][0]) == pytest.approx(shares(even))
    with pytest.raises(EvalError, match="level weights: none for 3, 4"):
        target_of(file, weights={2.0: 1.0})
    for text in ("3", "8-3", ">3", "x"):
        with pytest.raises(EvalError, match="range: expected all, >=3, 3-8 or language>=3"):
            Range.parse(text)
    (refused,) = target_of(file, ranges=[Range.parse("9-12")])["grids"][0]["importance"]
    assert refused["reason"] == "no level of vision, language in this range"

    write_jsonl(file, [row for row in rows if row["run_id"] != "gptq-3-4"])
    part = target_of(file)["grids"][0]["importance"][0]
    assert part["kind"] == "refused"
    assert "1 of 49 cells are missing, the first 3/4" in part["reason"]
    assert target_of(file)["grids"][0]["importance"][2]["kind"] == "exact"
    part = target_of(file, incomplete="regress")["grids"][0]["importance"][0]
    assert part["kind"] == "regression"
    assert part["explained"] == pytest.approx(1.0)
    with pytest.raises(EvalError, match="incomplete: expected refuse or regress"):
        target_of(file, incomplete="guess")


def test_the_complete_part_of_a_grid_is_used(tmp_path: Path) -> None:
    """Two factors vary together, the third on its own: its row is no factorial with the others."""
    names = ("vision", "connector", "language")
    score = additive({"vision": 0.2, "connector": 0.1, "language": 0.4})
    rows = [
        row
        for row in factorial(score, names=names, levels=(2, 3, 4, 16))
        if row["bits.connector"] == 16 or row["bits.vision"] == row["bits.language"] == 16
    ]
    (grid,) = target_of(write_jsonl(tmp_path / "t.jsonl", rows))["grids"]
    part = grid["importance"][0]
    assert (part["kind"], part["cells"], part["fixed"]) == ("exact", 16, ["connector"])
    assert shares(part)["language"] == pytest.approx(0.8)
    assert sorted({row["factor"] for row in grid["dose_response"]}) == sorted(names)
    assert {row["spared"] for row in grid["leave_one_full"]} == {"vision", "language"}


def test_a_factor_that_never_varies_is_left_out(tmp_path: Path) -> None:
    names = ("vision", "connector", "language")
    score = additive({"vision": 0.2, "connector": 0.1, "language": 0.4})
    levels = {"vision": (3, 4, 16), "connector": (16,), "language": (3, 4, 16)}
    rows = factorial(score, names=names, levels=levels)
    (grid,) = target_of(write_jsonl(tmp_path / "t.jsonl", rows))["grids"]
    assert grid["warnings"] == []
    part = grid["importance"][0]
    assert (part["kind"], part["cells"], part["fixed"]) == ("exact", 9, ["connector"])
    assert list(shares(part)) == ["vision", "language", "vision x language"]
    assert {row["spared"] for row in grid["leave_one_full"]} == {"vision", "language"}


def test_tables_of_effects_are_the_cells(tmp_path: Path) -> None:
    rows = factorial(additive({"vision": 0.2, "language": 0.4}))
    found = target_of(write_jsonl(tmp_path / "t.jsonl", rows))
    (grid,) = found["grids"]
    assert found["full"]["value"] == pytest.approx(0.9)
    dose = {
        (row["factor"], row["bits"]): row["difference"]["value"] for row in grid["dose_response"]
    }
    assert dose["language", 3.0] == pytest.approx(-0.4 * LOSS[3])
    assert len(dose) == 12
    spared = {(row["spared"], row["bits"]): row for row in grid["leave_one_full"]}
    assert spared["vision", 2.0]["recovered"]["value"] == pytest.approx(0.2)
    assert spared["vision", 2.0]["share"] == pytest.approx(1 / 3)
    best = {row["low"]: row for row in found["bins"]}
    # 4.5 to 5 bits: 0.4 for embeddings, 0.5 for scales; the language model is 5/8 of the linears.
    inside = [row for row in rows if 4.5 <= row["bpw_model"] < 5.0 and row["method"] != "none"]
    top = max(inside, key=lambda row: row[TARGET])
    assert best[4.5]["run"] == top["run_id"]
    assert best[4.5]["runs"] == len(inside)
    assert best[4.5]["behind"] is None
    reached = {row["goal"]: row for row in grid["reaching"]}
    enough = [r for r in rows if r[TARGET] >= 0.95 * 0.9 and r["method"] != "none"]
    assert reached[0.95]["bpw"] == min(row["bpw_model"] for row in enough)
    assert reached[0.95]["certain"] is None  # there is no interval
    sizes = [found["points"][index]["bpw"] for index in found["front"]]
    scores = [found["points"][index]["score"] for index in found["front"]]
    assert sizes == sorted(sizes)
    assert scores == sorted(scores)
    for point in found["points"]:  # no run is smaller and better than one of the front
        assert any(
            s <= point["bpw"] + 1e-12 and q >= point["score"]
            for s, q in zip(sizes, scores, strict=True)
        )


def superadditive(bits: study_tables.Bits) -> float:
    low = all(width <= 4 for width in bits.values())
    return additive({"vision": 0.1, "language": 0.1})(bits) - (0.15 if low else 0.0)


def test_interactions_have_paired_intervals(tmp_path: Path) -> None:
    study_tables.with_samples(tmp_path, factorial(superadditive, levels=(3, 4, 8, 16)), images=200)
    found = target_of(tmp_path)
    assert (found["images"], found["why_no_samples"]) == (200, "")
    # 0.9 is full precision. A loss of 0.03 is within 5 % of it; its interval is not.
    reached = {row["goal"]: row for row in found["grids"][0]["reaching"]}
    assert reached[0.95]["certain"] > reached[0.95]["bpw"]
    (pair,) = found["grids"][0]["interactions"]
    by_cell = {tuple(cell["bits"]): cell for cell in pair["cells"]}
    assert by_cell[3.0, 3.0]["low"] > 0.05
    assert by_cell[3.0, 3.0]["value"] == pytest.approx(0.15, abs=0.04)
    assert by_cell[8.0, 8.0]["low"] <= 0.0 <= by_cell[8.0, 8.0]["high"]
    assert (pair["more_than_sum"], pair["less_than_sum"]) == (4, 0)
    plain = tmp_path / "plain"
    plain.mkdir()
    study_tables.with_samples(plain, factorial(additive({"vision": 0.2, "language": 0.3})))
    (pair,) = target_of(plain)["grids"][0]["interactions"]
    assert (pair["more_than_sum"], pair["less_than_sum"]) == (0, 0)
    assert pair["mean"]["low"] <= 0.0 <= pair["mean"]["high"]


def test_intervals_come_from_samples_and_cover_the_share(tmp_path: Path) -> None:
    sensitivity = {"vision": 0.3, "language": 0.6}
    study_tables.with_samples(tmp_path, factorial(additive(sensitivity)), images=150)
    part = target_of(tmp_path)["grids"][0]["importance"][0]
    assert part["spread"] == "samples"
    assert 0.0 < part["noise"] < 0.05
    language = next(share for share in part["shares"] if share["factors"] == ["language"])
    assert language["low"] < 0.8 < language["high"]
    assert language["high"] - language["low"] < 0.2
    flat = tmp_path / "flat"
    flat.mkdir()
    rng = np.random.default_rng(0)
    table = factorial(lambda bits: 0.5 + 0.003 * float(rng.normal()))
    study_tables.with_samples(flat, table, images=30)
    assert target_of(flat)["grids"][0]["importance"][0]["noise"] > 0.5


def test_samples_that_do_not_fit_are_told(tmp_path: Path) -> None:
    rows = factorial(additive({"vision": 0.3, "language": 0.6}), levels=(3, 4, 16))
    file = study_tables.with_samples(tmp_path, rows)
    place = tmp_path / "runs" / "gptq-3-4" / "vqa.jsonl"
    text = place.read_text()
    lines = text.splitlines()
    place.write_text("\n".join(reversed(lines)) + "\n")
    shuffled = target_of(tmp_path)["grids"][0]["importance"]
    place.write_text(text)
    assert target_of(tmp_path)["grids"][0]["importance"] == shuffled
    place.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(EvalError, match=r"in gptq-3-3 and gptq-3-4; in one only: \['q0"):
        target_of(tmp_path)
    place.write_text(text.replace('"cluster"', '"image"'))
    with pytest.raises(EvalError, match="is out of form"):
        target_of(tmp_path)
    place.unlink()
    assert target_of(tmp_path)["why_no_samples"] == "1 of 9 runs have no rows per sample"
    place.write_text(text)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[0][TARGET] += 0.01
    write_jsonl(file, records)
    assert "is not the mean of its scores" in target_of(tmp_path)["why_no_samples"]


def test_consensus_for_parity(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("shap")
    rows = factorial(additive({"vision": 0.1, "language": 0.7}))
    found = target_of(write_jsonl(tmp_path / "t.jsonl", rows), with_consensus=True)
    result = found["grids"][0]["consensus"]
    assert (result["cells"], result["test_cells"], len(result["fold_r2"])) == (49, 10, 5)
    for key in ("impurity", "permutation", "shap", "consensus"):
        assert sum(row[key] for row in result["factors"]) == pytest.approx(100.0)
    _, language = result["factors"]
    assert language["consensus"] > 80
    assert language["lowest"] <= language["consensus"] <= language["highest"]
    assert language["lowest"] < language["highest"]
    few = factorial(additive({"vision": 0.1, "language": 0.7}), levels=(4, 8, 16))
    found = target_of(write_jsonl(tmp_path / "t.jsonl", few), with_consensus=True)
    assert "at least 10 cells, got 9" in found["grids"][0]["consensus"]["refused"]


def test_the_command_prints_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = study_tables.with_samples(tmp_path, factorial(superadditive, levels=(2, 3, 4, 16)))
    assert main(["analyze", str(file), "--out", str(tmp_path / "a.json")]) == 0
    text = capsys.readouterr().out
    for piece in (
        "one component at a time, difference to full precision by bits",
        "one component at full precision: recovered",
        "spread over 60 resampled images",
        "Shapley language",
        "vision x language: +",
        "95 % of full precision: ",
        "best per bpw_model",
    ):
        assert piece in text
    written = json.loads((tmp_path / "a.json").read_text())
    assert main(["analyze", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == written
    assert main(["analyze", str(file), "--bits", "nothing"]) == 2
    assert "no column nothing; the table has run_id" in capsys.readouterr().err
    assert main(["analyze", str(file), "--level-weights", "2"]) == 2
    assert "level weights: expected 2:0,3:1" in capsys.readouterr().err
    assert main(["analyze", str(file), "--resamples", "0"]) == 2
    assert main(["analyze", str(file), "--out", str(tmp_path / "no" / "a.json")]) == 2


def test_agreement_is_a_target_with_intervals(tmp_path: Path) -> None:
    """The answers of a run with its own rows agree with themselves; flips count against it."""
    rows = factorial(additive({"vision": 0.3, "language": 0.6}), levels=(3, 4, 16))
    file = study_tables.with_samples(tmp_path, rows)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    full = next(record for record in records if record["method"] == "none")
    for record in records:
        if record is not full:
            # Every wrong answer is the same one, so that answers flip where scores do.
            record["agreement.vqa.flipped_answers"] = full[TARGET] - record[TARGET]
    write_jsonl(file, records)
    score, same = analyze(file)["models"][0]["targets"]
    assert [score["name"], same["name"]] == ["vqa accuracy_always", "vqa same_answers"]
    assert same["full"]["value"] == 1.0
    assert same["images"] == 60
    one, two = (
        {
            (row["factor"], row["bits"]): row["difference"]
            for row in target["grids"][0]["dose_response"]
        }
        for target in (score, same)
    )
    assert one.keys() == two.keys()
    for key, change in one.items():
        assert two[key]["value"] == pytest.approx(change["value"])
        assert two[key]["low"] == pytest.approx(change["low"])
    place = tmp_path / "runs" / "gptq-3-4" / "vqa.jsonl"
    place.write_text("".join(place.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(EvalError, match="in one only: "):
        analyze(file, Options(scores=["agreement.vqa.same_answers"]))
