# SPDX-License-Identifier: Apache-2.0
"""mmq data prepare and verify: counts, hashes, what is missing and where it is published."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import eval_models
import pytest

from mmq.cli import main
from mmq_evals.data import check, layouts
from mmq_evals.data.published import DATASETS, present
from mmq_evals.errors import EvalError
from mmq_evals.metrics import DocumentFrequency, document_frequency


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["data", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def coco_annotations(root: Path, split: str) -> Path:
    name = "000000000139.jpg" if "2017" in split else f"COCO_{split}_000000000139.jpg"
    eval_models.write_image(root / split / name)
    rows = [{"image_id": 139, "id": n, "caption": f"Caption {n}."} for n in range(5)]
    images = [{"id": 139, "file_name": name}]
    data = {"images": images, "annotations": rows}
    eval_models.write_json(root / "annotations" / f"captions_{split}.json", data)
    return root


def flickr30k(root: Path) -> Path:
    eval_models.write_image(root / "flickr30k-images" / "1.jpg")
    row = {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "Two boys ."}] * 5}
    eval_models.write_json(root / "dataset_flickr30k.json", {"images": [row]})
    return root


def test_published_counts_add_up() -> None:
    by_name = {dataset.name: dataset for dataset in DATASETS}
    coco = by_name["coco-karpathy"].splits.values()
    assert (sum(s.images for s in coco), sum(s.texts for s in coco)) == (123_287, 616_767)
    flickr = by_name["flickr30k-karpathy"].splits.values()
    assert all(split.texts == 5 * split.images for split in flickr)
    years = (by_name["coco-2014"].splits, by_name["coco-2017"].splits)
    assert [sum(s.images for s in splits.values()) for splits in years] == [123_287, 123_287]
    assert [sum(s.texts for s in splits.values()) for splits in years] == [616_767, 616_767]
    assert by_name["vqav2"].splits["val2014"].texts == 214_354
    assert by_name["gqa"].splits["testdev_balanced"].texts == 12_578


def test_every_layout_is_found_and_counted(tmp_path: Path) -> None:
    eval_models.karpathy_coco(tmp_path)
    flickr30k(tmp_path)
    coco_annotations(tmp_path, "val2017")
    coco_annotations(tmp_path, "val2014")
    eval_models.vqav2(tmp_path)
    eval_models.gqa(tmp_path)
    assert list(present(tmp_path)) == list(DATASETS)
    reports = check.inspect_folder(tmp_path, partial=True, decode=True)
    assert [report["problems"] for report in reports] == [[]] * 6
    counts = {report["dataset"]: tuple(report["counts"].values()) for report in reports}
    assert counts == {
        "coco-karpathy": (4, 8),
        "flickr30k-karpathy": (1, 5),
        "coco-2017": (1, 5),
        "coco-2014": (1, 5),
        "vqav2": (2, 3),
        "gqa": (1, 2),
    }
    file = tmp_path / "dataset_coco.json"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert reports[0]["files"] == {
        "dataset_coco.json": {"bytes": file.stat().st_size, "sha256": digest}
    }
    assert reports[0]["ids_sha256"] == hashlib.sha256(b"100\n101\n102\n103").hexdigest()


def test_prepare_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_models.karpathy_coco(tmp_path)
    folder = str(tmp_path)
    line = refused(capsys, "prepare", folder)
    assert "expected the published 5,000 images and 25,010 captions, got 4 images and 8" in line
    assert not (tmp_path / check.MANIFEST).exists()
    assert main(["data", "prepare", folder, "--partial"]) == 0
    assert "4 images and 8 captions (published: 5,000" in capsys.readouterr().out
    entry = check.read_manifest(tmp_path)["coco-karpathy test"]
    assert entry["complete"] is False
    table = DocumentFrequency.load(tmp_path / entry["document_frequency"]["file"])
    references = [item.references for item in layouts.captions(tmp_path).items]
    assert table == document_frequency(references)
    assert main(["data", "verify", folder, "--partial"]) == 0
    # Another split is added to the manifest, the first one stays.
    assert main(["data", "prepare", folder, "--partial", "--split", "train"]) == 0
    assert set(check.read_manifest(tmp_path)) == {"coco-karpathy test", "coco-karpathy train"}
    capsys.readouterr()

    image = tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:200])
    assert "image_sizes_sha256 changed" in refused(capsys, "verify", folder, "--partial")
    assert "does not decode" in refused(capsys, "verify", folder, "--partial", "--decode")
    image.unlink()
    line = refused(capsys, "verify", folder, "--partial")
    assert "1 of 4 images missing, first 101; published at http://images.cocodataset.org" in line
    image.write_bytes(content)
    (tmp_path / entry["document_frequency"]["file"]).write_text("{}")
    assert "missing or changed; prepare again" in refused(capsys, "verify", folder, "--partial")


def test_a_changed_annotation_is_found(tmp_path: Path) -> None:
    eval_models.gqa(tmp_path)
    reports = check.inspect_folder(tmp_path, partial=True)
    check.prepare(tmp_path, reports)
    assert check.differences(tmp_path, reports) == []
    file = tmp_path / "testdev_balanced_questions.json"
    data = json.loads(file.read_text())
    del data["11"]
    file.write_text(json.dumps(data))
    lines = check.differences(tmp_path, check.inspect_folder(tmp_path, partial=True))
    assert [line.split(": ")[1].split()[0] for line in lines] == ["files", "counts", "ids_sha256"]


def test_missing_pieces_are_named_with_where_they_are_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "verify", str(tmp_path))
    for source in ("caption_datasets.zip", "visualqa.org", "questions1.2.zip", "Denotation"):
        assert source in line
    eval_models.vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    line = refused(capsys, "verify", str(tmp_path))
    assert "no v2_mscoco_val2014_annotations.json; published at https://visualqa.org" in line
    flickr30k(tmp_path / "f")
    (tmp_path / "f" / "flickr30k-images" / "1.jpg").unlink()
    (tmp_path / "f" / "flickr30k-images").rmdir()
    line = refused(capsys, "prepare", str(tmp_path / "f"))
    assert "no image folder" in line
    assert "published at https://shannon.cs.illinois.edu" in line


def test_complete_data_needs_no_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eval_models.gqa(tmp_path)
    gqa = DATASETS[-1]
    split = dataclasses.replace(gqa.splits["testdev_balanced"], images=1, texts=2)
    small = dataclasses.replace(gqa, splits={"testdev_balanced": split})
    monkeypatch.setattr(check, "present", lambda root: [small])
    (report,) = check.inspect_folder(tmp_path)
    assert (report["complete"], report["problems"]) == (True, [])
    assert "as published" in check.format_reports([report])


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a dataset folder" in refused(capsys, "verify", str(tmp_path / "no"))
    eval_models.gqa(tmp_path)
    folder = str(tmp_path)
    assert "dataset: expected one of" in refused(capsys, "verify", folder, "--dataset", "x")
    assert "expected a split of testdev" in refused(capsys, "verify", folder, "--split", "x")
    (tmp_path / check.MANIFEST).write_text("[]")
    assert "is not a data manifest" in refused(capsys, "verify", folder, "--partial")
    (tmp_path / check.MANIFEST).write_text("{")
    with pytest.raises(EvalError, match="is not JSON"):
        check.read_manifest(tmp_path)
