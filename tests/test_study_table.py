# SPDX-License-Identifier: Apache-2.0
"""Reading tables of results: JSON lines, CSV and Parquet, and every way in which they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import study_tables

from mmq_evals.errors import EvalError
from mmq_evals.study.nominal import with_nominal_size
from mmq_evals.study.table import grids, read_table

PUBLISHED = """vit_bits,qformer_bits,llm_bits,model_size,cider,Bleu_4
2,2,3,1.5,0.01,0.02
2,2,16,1.5,0.02,0.02
16,16,16,9.0,1.25,0.4
"""


def rows() -> list[dict[str, Any]]:
    return study_tables.factorial(study_tables.additive({"vision": 0.5, "language": 0.2}))


def test_a_published_table_is_read_by_its_column_names(tmp_path: Path) -> None:
    file = tmp_path / "gptq.csv"
    file.write_text(PUBLISHED)
    table = read_table(file)
    assert table.factors == ("vit_bits", "qformer_bits", "llm_bits")
    assert table.targets == ("cider", "Bleu_4")
    (grid,) = grids(table)
    assert grid.names == ("vit", "qformer", "llm")
    assert grid.label == "gptq"
    assert grid.full is not None
    assert grid.scored("cider")[16.0, 16.0, 16.0] == 1.25
    chosen = read_table(file, bits=["llm_bits"], scores=["model_size"])
    assert (chosen.factors, chosen.targets) == (("llm_bits",), ("model_size",))


def test_parquet_and_json_lines_hold_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    study_tables.write_jsonl(tmp_path / "results.jsonl", rows())
    parquet.write_table(pyarrow.Table.from_pylist(rows()), tmp_path / "t.parquet")
    one, two = read_table(tmp_path), read_table(tmp_path / "t.parquet")
    assert one.factors == two.factors == ("bits.vision", "bits.language")
    assert [(run.id, run.places) for run in one.runs] == [(run.id, run.places) for run in two.runs]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(EvalError, match="is not Parquet"):
        read_table(tmp_path / "broken.parquet")


def test_grids_share_full_precision_and_part_by_method_model_and_factors(tmp_path: Path) -> None:
    gptq = rows()
    awq = [
        r
        for r in study_tables.factorial(
            study_tables.additive({"vision": 0.1, "language": 0.1}), method="awq"
        )
        if r["method"] != "none"
    ]
    other = [{**row, "run_id": f"o{i}", "model": "other"} for i, row in enumerate(rows())]
    for row in other:
        row["bits.language"] = None
    other = [row for row in other if row["run_id"] in ("o0", "o7", "o48")]
    table = read_table(study_tables.write_jsonl(tmp_path / "t.jsonl", [*gptq, *awq, *other]))
    found = grids(table)
    assert [grid.label for grid in found] == ["gptq", "gptq", "awq"]  # by method
    assert [len(grid.cells) for grid in found] == [49, 3, 49]
    assert found[0].full is found[2].full
    assert found[1].names == ("vision",)
    assert found[0].levels()[0] == [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 16.0]


def test_equal_widths_need_a_column_that_tells_them_apart(tmp_path: Path) -> None:
    twice = [*rows(), {**rows()[0], "run_id": "again", "draw": 1}]
    file = study_tables.write_jsonl(tmp_path / "t.jsonl", twice)
    with pytest.raises(EvalError, match=r"gptq-2-2 and again are both .*gptq with widths 2/2"):
        grids(read_table(file))
    assert len(grids(read_table(file), by=("model", "method", "draw"))) == 2


def test_what_a_killed_or_failing_run_leaves_is_told(tmp_path: Path) -> None:
    failed = {"run_id": "bad", "status": "failed", "error": "no memory", "bits.vision": 2}
    file = study_tables.write_jsonl(tmp_path / "t.jsonl", [*rows(), failed])
    with file.open("a") as stream:
        stream.write('{"run_id": "torn"')
    table = read_table(file)
    assert len(table.runs) == 49
    assert len(table.failed) == 1
    assert len(table.notes) == 2
    study_tables.write_jsonl(file, [failed])
    with pytest.raises(EvalError, match="expected a finished run, got 1 failed"):
        read_table(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": "gptq-2-3"}, "one row for every run_id, got several for gptq-2-3"),
        (
            {"bits.vision": "four"},
            "a finite number in column 'bits.vision' of gptq-2-2, got 'four'",
        ),
        ({"bits.vision": True}, "a finite number in column 'bits.vision'"),
        ({"bits.vision": 64}, "a width from 1 to 32 in column 'bits.vision' of gptq-2-2, got 64"),
        ({"score.vqa.accuracy_always": "high"}, "column 'score.vqa.accuracy_always' of gptq-2-2"),
        ({"score.vqa.accuracy_always": float("nan")}, "a finite number in column 'score"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = rows()
    data[0] |= change
    with pytest.raises(EvalError, match=message):
        read_table(study_tables.write_jsonl(tmp_path / "t.jsonl", data))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(EvalError, match=r"expected one of results\.jsonl"):
        read_table(tmp_path)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(EvalError, match=r"expected \.jsonl, \.csv"):
        read_table(tmp_path / "t.txt")
    cases = {
        "a.jsonl": ("{\n", "line 1 is not JSON"),
        "b.jsonl": ("[1]\n", "line 1: expected an object"),
        "c.jsonl": ("", "has no rows"),
        "d.csv": ("", "has no rows"),
        "e.csv": ("bits,cider\n4\n", "line 2: expected 2 values, got 1"),
        "f.csv": ("bits,cider,cider\n4,1,1\n", "different column names"),
        "g.csv": ("width,cider\n4,1\n", "no column of widths .* name them with --bits"),
        "h.csv": ("bits,quality\n4,1\n", "no column of scores .* name them with --scores"),
        "i.csv": ("bits,cider\n4,\n", "'cider' has no value in any finished run"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(EvalError, match=message):
            read_table(tmp_path / name)
    (tmp_path / "j.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(EvalError, match="is not UTF-8"):
        read_table(tmp_path / "j.jsonl")


def test_unknown_columns_are_refused_with_those_that_are_there(tmp_path: Path) -> None:
    file = study_tables.write_jsonl(tmp_path / "t.jsonl", rows())
    with pytest.raises(EvalError, match=r"--bits: no column bits\.text; the table has run_id, "):
        read_table(file, bits=["bits.text"])
    with pytest.raises(EvalError, match="--scores: no column cider"):
        read_table(file, scores=["cider"])


def test_full_precision_alone_is_no_study(tmp_path: Path) -> None:
    full = [row for row in rows() if row["method"] == "none"]
    file = study_tables.write_jsonl(tmp_path / "t.jsonl", full)
    with pytest.raises(EvalError, match="quantized runs, got full precision alone"):
        grids(read_table(file))
    second = {**full[0], "run_id": "second"}
    with file.open("a") as stream:
        stream.write(json.dumps(second) + "\n")
    with pytest.raises(EvalError, match="full precision of 'tiny' stands there twice"):
        grids(read_table(file))


def test_nominal_sizes_are_the_published_ones(tmp_path: Path) -> None:
    """The study's bits per weight of BLIP-2 OPT-2.7B with all linears at 3, 4 and 8 bits."""
    file = tmp_path / "t.csv"
    lines = [f"{b},{b},{b},0.{b}" for b in (3, 4, 8)]
    file.write_text("\n".join(["vit_bits,qformer_bits,llm_bits,cider", *lines]) + "\n")
    table = with_nominal_size(read_table(file), "blip2-opt-2.7b")
    sizes = [run.number("bpw_nominal") for run in table.runs]
    assert sizes == pytest.approx([3.483, 4.446, 8.297], abs=5e-4)
    with pytest.raises(EvalError, match=r"preset: expected one of blip2-opt-2.7b, .*got 'x'"):
        with_nominal_size(table, "x")
    file.write_text("head_bits,cider\n4,0.5\n")
    with pytest.raises(EvalError, match=r"expected factors named vision, .*got 'head_bits'"):
        with_nominal_size(read_table(file), "llava-1.5-7b")


def sweep_row(run: str, levels: dict[str, Any], **columns: Any) -> dict[str, Any]:
    widths = {"bits.vision": 16, "bits.language": 16, **columns}
    return {
        "run_id": run,
        "model": "tiny",
        "method": "rtn" if levels else "none",
        "levels": levels,
        "score.vqa.accuracy": 0.5,
        **widths,
    }


def test_runs_on_parts_of_components_have_grids_of_their_own(tmp_path: Path) -> None:
    parts = {"vision.front": True, "vision.end": False, "bits": 4}
    rows = [
        sweep_row("full", {}),
        sweep_row(
            "a",
            {"method": "rtn", "vision": 4, "language": 3},
            **{
                "bits.vision": 4,
                "bits.language": 3,
            },
        ),
        # Half of vision: its own width is a mean, and 10 bits are no level of the first grid.
        sweep_row(
            "b",
            parts,
            **{
                "bits.vision": 10,
                "bits.vision.front": 4,
                "bits.vision.end": 16,
            },
        ),
        # All of vision in parts belongs to both grids.
        sweep_row(
            "c",
            parts | {"vision.end": True},
            **{
                "bits.vision": 4,
                "bits.vision.front": 4,
                "bits.vision.end": 4,
            },
        ),
        # One type of layer, all of vision: 4 bits of the matrices that it has, 11 on the whole.
        sweep_row("d", {"vision": True, "layer_type": "mlp", "bits": 4}, **{"bits.vision": 11}),
        sweep_row("e", {"vision": 4, "gptq.order": "act"}, **{"bits.vision": 4}),
    ]
    table = read_table(study_tables.write_jsonl(tmp_path / "t.jsonl", rows))
    found = {(grid.label, grid.names): grid for grid in grids(table)}
    coarse = found["rtn", ("vision", "language")]
    assert {bits: run.id for bits, run in coarse.cells.items()} == {
        (4.0, 3.0): "a",
        (4.0, 16.0): "c",
        (16.0, 16.0): "full",
    }
    halves = found["rtn", ("vision.front", "vision.end")]
    assert {bits: run.id for bits, run in halves.cells.items()} == {
        (4.0, 16.0): "b",
        (4.0, 4.0): "c",
        (16.0, 16.0): "full",
    }
    assert found["rtn", ("vision.mlp",)].cells[4.0,].id == "d"
    assert found["rtn, gptq.order act", ("vision", "language")].cells[4.0, 16.0].id == "e"
    assert len(found) == 4
