# SPDX-License-Identifier: Apache-2.0
"""Scoring from files: every accepted form, offline re-scoring, one clear error per bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmq.cli import main
from mmq_evals.errors import EvalError
from mmq_evals.metrics import bleu, cider, document_frequency, rouge_l
from mmq_evals.predictions import Question, read_predictions, read_questions, read_references
from mmq_evals.score import score_captions, score_gqa, score_retrieval, score_vqa

REFS = {"1": ["A man rides a horse.", "a man on a horse"], "2": ["two dogs"], "3": ["a red kite"]}
HYPS = {"1": "a man\u2028on a horse", "2": "", "3": "a blue kite"}


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    # Not escaped: a line separator inside of a prediction must not end the line.
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_forms_of_predictions(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    assert read_predictions(write(file, HYPS)) == HYPS
    assert read_predictions(write(file, list(HYPS.values()))) == dict(
        zip("012", HYPS.values(), strict=True)
    )
    for key, text in (("image_id", "caption"), ("question_id", "answer"), ("id", "prediction")):
        rows = [{key: int(i), text: caption} for i, caption in HYPS.items()]
        assert read_predictions(write(file, rows)) == HYPS
        assert read_predictions(write(file, {"predictions": rows})) == HYPS
        assert read_predictions(lines(tmp_path / "p.jsonl", rows)) == HYPS


def test_the_format_of_the_study(tmp_path: Path) -> None:
    rows = [{"image_id": int(i), "caption": text} for i, text in HYPS.items()]
    data = {"predictions": rows, "references": list(REFS.values())}
    file = write(tmp_path / "result.json", data)
    assert (read_predictions(file), read_references(file)) == (HYPS, REFS)
    data["references"].pop()
    with pytest.raises(EvalError, match="references for every prediction, got 2 for 3"):
        read_references(write(file, data))


def test_forms_of_references(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert read_references(write(file, REFS)) == REFS
    assert read_references(write(file, {"references": list(REFS.values())})).keys() == set("012")
    rows = [{"image_id": int(i), "caption": text} for i in REFS for text in REFS[i]]
    assert read_references(write(file, {"images": [], "annotations": rows})) == REFS
    images = [
        {"cocoid": int(i), "split": "test", "sentences": [{"raw": text} for text in REFS[i]]}
        for i in REFS
    ]
    assert read_references(write(file, {"images": images})) == REFS
    with pytest.raises(EvalError, match="expected images of split 'val', got none"):
        read_references(file, "val")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"1": 5}, "expected predictions to be strings, got 5 of '1'"),
        ([], "expected predictions by id or a list"),
        ("text", "expected predictions by id or a list"),
        ([{"image_id": 1, "caption": "a"}] * 2, "expected every id once, got '1' twice"),
        ([{"caption": "a"}], "expected a field id or image_id"),
        ([{"image_id": 1}], "expected a field prediction or caption"),
    ],
)
def test_bad_predictions(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=f"p.json: {message}"):
        read_predictions(write(tmp_path / "p.json", data))


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    with pytest.raises(EvalError, match=r"expected a JSON file, got .*p\.json"):
        read_predictions(file)
    file.write_text("[1,")
    with pytest.raises(EvalError, match=r"p\.json: not JSON"):
        read_predictions(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(EvalError, match=r"p\.json: expected UTF-8"):
        read_predictions(file)
    with pytest.raises(EvalError, match="expected a list of reference captions"):
        read_references(write(file, {"1": "one"}))
    with pytest.raises(EvalError, match="expected a list of objects"):
        read_questions(write(file, {"annotations": [5]}))


def test_captions_equal_the_functions() -> None:
    report = score_captions(REFS, HYPS)
    assert report["scores"]["cider"]["value"] == pytest.approx(cider(REFS, HYPS).corpus)
    assert report["scores"]["rouge_l"]["value"] == pytest.approx(rouge_l(REFS, HYPS).corpus)
    assert report["scores"]["bleu_4"]["value"] == pytest.approx(bleu(REFS, HYPS).corpus[3])
    assert report["per_sample"]["1"]["cider"] == cider(REFS, HYPS).per_image["1"]
    assert report["protocol"]["document_frequency"]["images"] == 3
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    with pytest.raises(EvalError, match=r"metrics: expected some of cider.*got \['rouge'\]"):
        score_captions(REFS, HYPS, metrics=["rouge"])


def test_a_subset_keeps_the_frequencies_of_all() -> None:
    some = {key: HYPS[key] for key in ("1", "3")}
    report = score_captions(REFS, some, subset=True)
    full = cider(REFS, HYPS)
    assert {key: row["cider"] for key, row in report["per_sample"].items()} == {
        key: full.per_image[key] for key in some
    }
    with pytest.raises(EvalError, match="expected equal ids"):
        score_captions(REFS, some)


def vqa_annotations() -> dict[str, Any]:
    def row(key: int, image: int, answers: list[str], kind: str) -> dict[str, Any]:
        return {
            "question_id": key,
            "image_id": image,
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
            "answer_type": kind,
            "question_type": "what",
        }

    return {
        "annotations": [
            row(10, 1, ["black"] * 10, "other"),
            row(11, 1, ["yes"] * 3 + ["no"] * 7, "yes/no"),
            row(12, 2, ["2"] * 10, "number"),
        ]
    }


def test_vqa_by_answer_type_and_question_type(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "a.json", vqa_annotations()))
    report = score_vqa(questions, {"10": "Black.", "11": "yes", "12": "two"})
    values = {name: score["value"] for name, score in report["scores"].items()}
    assert values["accuracy_always"] == pytest.approx((1 + 0.9 + 1) / 3)
    assert values["accuracy_official-2021"] == pytest.approx(0.3)
    assert report["scores"]["accuracy_always"]["clusters"] == 2
    assert report["groups"]["answer_type"]["yes/no"]["accuracy_always"] == pytest.approx(0.9)
    assert report["groups"]["answer_type"]["other"]["accuracy_official-2021"] == 0.0
    assert report["groups"]["question_type"]["what"]["samples"] == 3
    with pytest.raises(EvalError, match=r"got 2 for 3; in one only: \['12'\]"):
        score_vqa(questions, {"10": "a", "11": "b"})
    with pytest.raises(EvalError, match=r"protocols: expected some of .*got \['lavis'\]"):
        score_vqa(questions, {}, protocols=["lavis"])
    with pytest.raises(EvalError, match="all or none to have one answer alone"):
        score_vqa({**questions, "x": Question("1", ("a",), {})}, {})


def test_gqa_keeps_balanced_questions_and_all_of_them(tmp_path: Path) -> None:
    data = {
        "7": {"imageId": "n1", "question": "q", "answer": "yes", "isBalanced": True,
              "types": {"structural": "verify", "semantic": "attr"}},
        "8": {"imageId": "n1", "question": "q", "answer": "dog", "isBalanced": True,
              "types": {"structural": "query", "semantic": "obj"}},
        "9": {"imageId": "n2", "question": "q", "answer": "no", "isBalanced": False, "types": {}},
    }  # fmt: skip
    questions = read_questions(write(tmp_path / "q.json", data))
    report = score_gqa(questions, {"7": "Yes", "8": "dog", "9": "yes"})
    assert report["scores"]["accuracy_official"]["value"] == 0.5
    assert report["scores"]["accuracy_llava"]["value"] == 1.0
    assert report["groups"]["form"]["binary"]["accuracy_official"] == 0.0
    assert report["groups"]["form"]["open"]["samples"] == 1
    assert set(report["groups"]) == {"form", "structural", "semantic"}
    with pytest.raises(EvalError, match=r"a prediction for every question.*\['8'\]"):
        score_gqa(questions, {"7": "yes"})


def test_retrieval_rows() -> None:
    rows = [
        {"id": "i", "cluster": "i", "direction": "txt", "of": 4, "positives": [1, 2],
         "candidates": [0, 1], "prediction": [1.0, 1.0]},
        {"id": "t", "cluster": "i", "direction": "img", "of": 2, "positives": [0],
         "candidates": [1, 0], "prediction": [None, 0.5]},
    ]  # fmt: skip
    report = score_retrieval(rows)
    assert report["scores"]["txt_r1"]["value"] == 0.0
    assert report["scores"]["img_r1"]["value"] == 1.0
    assert score_retrieval(rows, ties="average")["scores"]["txt_r1"]["value"] == 1.0
    with pytest.raises(EvalError, match="a row is out of form: KeyError"):
        score_retrieval([{"id": "i"}])


def test_command_scores_plain_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(tmp_path / "P.json", list(HYPS.values()))
    references = write(tmp_path / "R.json", list(REFS.values()))
    files = ["--predictions", str(predictions), "--references", str(references)]
    out = tmp_path / "S.json"
    assert main(["score", "captions", *files, "--out", str(out)]) == 0
    assert "captions: 3 samples" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["scores"]["cider"]["value"] == pytest.approx(cider(REFS, HYPS).corpus)
    document_frequency(REFS).save(tmp_path / "df.json")
    assert main(["score", "captions", *files, "--df", f"table:{tmp_path / 'df.json'}"]) == 0
    assert f"{100 * cider(REFS, HYPS).corpus:.2f}" in capsys.readouterr().out
    write(predictions, ["a"])
    assert main(["score", "captions", *files]) == 2
    assert "expected equal ids" in capsys.readouterr().err
    assert main(["score", "captions", "--predictions", str(predictions), "--metrics", "x"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_command_scores_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write(tmp_path / "A.json", vqa_annotations())
    answers = {"10": "Black.", "11": "yes", "12": "two"}
    rows = [{"question_id": int(key), "answer": text} for key, text in answers.items()]
    predictions = write(tmp_path / "P.json", rows)
    argv = ["score", "vqa", "--predictions", str(predictions), "--annotations", str(annotations)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "accuracy_always            96.67" in printed
    assert "yes/no (1): official-2021 90.00" in printed
    assert main([*argv, "--protocols", "m4c"]) == 0
    assert "always" not in capsys.readouterr().out


def test_a_result_is_scored_anew_without_model_or_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, task in (("tiny-blip2-caption", "captioning"), ("tiny-llava", "vqa"),
                        ("tiny-blip2-retrieval", "retrieval")):  # fmt: skip
        folder = tmp_path / model
        argv = [model, "--tasks", task, "--limit", "6", "--out", str(folder)]
        assert main(["eval", *argv]) == 0
        out = folder / "again.json"
        assert main(["score", "result", str(folder), "--out", str(out)]) == 0
        before = json.loads((folder / "result.json").read_text())["tasks"][task]["scores"]
        after = json.loads(out.read_text())[task]["scores"]
        assert after.keys() == before.keys()
        for name, score in after.items():
            assert score["value"] == pytest.approx(before[name]["value"], abs=1e-12), name
            assert score["low"] == pytest.approx(before[name]["low"], abs=1e-12), name
    capsys.readouterr()
    assert main(["score", "result", str(tmp_path)]) == 2
    assert "no file" in capsys.readouterr().err
