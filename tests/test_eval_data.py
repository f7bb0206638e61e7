# SPDX-License-Identifier: Apache-2.0
"""The published dataset layouts, and the refusal of broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import eval_models
import pytest

from mmq_evals.data import layouts
from mmq_evals.data.images import read_image
from mmq_evals.errors import EvalError


def test_karpathy_coco(tmp_path: Path) -> None:
    dataset = layouts.captions(eval_models.karpathy_coco(tmp_path))
    assert (dataset.name, dataset.split) == ("coco-karpathy", "test")
    assert [item.id for item in dataset.items] == ["100", "101", "102", "103"]
    assert dataset.items[1].references == ("A green square.", "the green photo number 1")
    image = read_image("101", dataset.items[1].image)
    assert (image.mode, image.size) == ("RGB", (20, 12))
    assert dataset.train is not None
    assert [item.id for item in dataset.train()] == ["104", "105", "106"]
    retrieval = layouts.retrieval(tmp_path)
    assert retrieval.items[0].captions == dataset.items[0].references


def test_karpathy_flickr30k(tmp_path: Path) -> None:
    eval_models.write_image(tmp_path / "flickr30k-images" / "1000092795.jpg")
    row = {"filename": "1000092795.jpg", "split": "test", "sentences": [{"raw": "Two boys ."}]}
    eval_models.write_json(tmp_path / "dataset_flickr30k.json", {"images": [row]})
    dataset = layouts.captions(tmp_path)
    assert (dataset.name, dataset.split, dataset.train) == ("flickr30k-karpathy", "test", None)
    assert dataset.items[0].id == "1000092795.jpg"
    assert read_image("x", dataset.items[0].image).size == (20, 12)


@pytest.mark.parametrize(
    ("year", "file_name"), [("2017", "000000000139.jpg"), ("2014", "COCO_val2014_000000000139.jpg")]
)
def test_coco_annotations(tmp_path: Path, year: str, file_name: str) -> None:
    for split in (f"val{year}", f"train{year}"):
        eval_models.write_image(tmp_path / split / file_name)
        eval_models.write_json(
            tmp_path / "annotations" / f"captions_{split}.json",
            {
                "images": [{"id": 139, "file_name": file_name}],
                "annotations": [
                    {"image_id": 139, "id": 2, "caption": f"A {split} room."},
                    {"image_id": 139, "id": 1, "caption": "A table."},
                ],
            },
        )
    dataset = layouts.captions(tmp_path, "test")
    assert (dataset.name, dataset.split) == ("coco", f"val{year}")
    assert dataset.items[0].id == "139"
    assert dataset.items[0].references == (f"A val{year} room.", "A table.")
    assert dataset.train is not None
    assert dataset.train()[0].references[0] == f"A train{year} room."
    assert read_image("139", dataset.items[0].image).size == (20, 12)
    assert layouts.captions(tmp_path, f"train{year}").split == f"train{year}"


def test_vqav2(tmp_path: Path) -> None:
    dataset = layouts.vqav2(eval_models.vqav2(tmp_path))
    assert (dataset.name, dataset.split, dataset.train) == ("vqav2", "val2014", None)
    item = dataset.items[0]
    assert (item.id, item.image_id, item.question) == ("420", "42", "what color is it?")
    assert item.answers == ("red",) * 10
    assert (item.question_type, item.answer_type) == ("what color", "other")
    assert read_image(item.id, item.image).size == (20, 12)
    eval_models.vqav2(tmp_path, "train2014")
    dataset = layouts.vqav2(tmp_path)
    assert dataset.train is not None
    assert len(dataset.train()) == 3


def test_gqa_keeps_balanced_questions(tmp_path: Path) -> None:
    dataset = layouts.gqa(eval_models.gqa(tmp_path))
    assert (dataset.name, dataset.split) == ("gqa", "testdev_balanced")
    assert [item.id for item in dataset.items] == ["11", "12"]
    assert dataset.items[0].answers == ("red",)
    assert (dataset.items[0].question_type, dataset.items[0].answer_type) == ("query", "attr")
    assert read_image("11", dataset.items[0].image).size == (20, 12)


def test_what_a_folder_has(tmp_path: Path) -> None:
    assert not layouts.has_captions(tmp_path)
    eval_models.karpathy_coco(tmp_path)
    eval_models.gqa(tmp_path)
    found = (layouts.has_captions, layouts.has_vqav2, layouts.has_gqa)
    assert [has(tmp_path) for has in found] == [True, False, True]


def test_missing_pieces_are_named_with_the_layout(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="expected a dataset folder, got /nonexistent"):
        layouts.captions(Path("/nonexistent"))
    with pytest.raises(EvalError, match=r"(?s)no captions found; .*dataset_flickr30k.json"):
        layouts.captions(tmp_path)
    with pytest.raises(EvalError, match=r"(?s)no VQAv2 files of split 'val2014'; .*v2_OpenEnded"):
        layouts.vqav2(tmp_path)
    with pytest.raises(EvalError, match=r"no testdev_balanced_questions.json"):
        layouts.gqa(tmp_path)
    eval_models.karpathy_coco(tmp_path)
    with pytest.raises(EvalError, match=r"expected a split of \['test', 'train'\], got 'val'"):
        layouts.captions(tmp_path, "val")
    eval_models.gqa(tmp_path / "gqa")
    (tmp_path / "gqa" / "images" / "n1.jpg").unlink()
    (tmp_path / "gqa" / "images").rmdir()
    with pytest.raises(EvalError, match="no image folder images"):
        layouts.gqa(tmp_path / "gqa")


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "dataset_coco.json"
    file.write_text('{"images": [')
    with pytest.raises(EvalError, match=r"dataset_coco.json: not JSON"):
        layouts.captions(tmp_path)
    file.write_text('{"pictures": []}')
    with pytest.raises(EvalError, match="expected a non-empty list under 'images'"):
        layouts.captions(tmp_path)
    file.write_text(json.dumps({"images": [{"split": "test", "filename": "x.jpg"}]}))
    with pytest.raises(EvalError, match="to have the field 'sentences'"):
        layouts.captions(tmp_path)
    eval_models.vqav2(tmp_path)
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    data = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({"annotations": data["annotations"][:2]}))
    with pytest.raises(EvalError, match="no annotation of question 70"):
        layouts.vqav2(tmp_path)
    del data["annotations"][0]["answers"]
    annotations.write_text(json.dumps(data))
    with pytest.raises(EvalError, match="to have the field 'answers'"):
        layouts.vqav2(tmp_path)


def test_images_that_do_not_decode_are_named(tmp_path: Path) -> None:
    items = layouts.captions(eval_models.karpathy_coco(tmp_path)).items
    path = tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(EvalError, match=r"item '101': image .*000001.jpg does not decode"):
        read_image(items[1].id, items[1].image)
    path.write_text("not an image")
    with pytest.raises(EvalError, match=r"item '101': image .*000001.jpg does not decode"):
        read_image(items[1].id, items[1].image)
    path.unlink()
    with pytest.raises(EvalError, match=r"item '101': no image file .*000001.jpg"):
        read_image(items[1].id, items[1].image)
