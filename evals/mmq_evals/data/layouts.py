# SPDX-License-Identifier: Apache-2.0
"""COCO captions, Flickr30k, VQAv2 and GQA in the folder layouts they are published in.

Nothing is downloaded. A missing piece is an error that names the file and the layout expected.
``split="test"`` means the split on which results are published; the one taken is in the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmq_evals.data.images import image_file
from mmq_evals.data.items import CaptionItem, RetrievalItem, VqaItem
from mmq_evals.errors import EvalError

T = TypeVar("T")

CAPTION_LAYOUT = """one of
  dataset_coco.json (Karpathy) with val2014/ and train2014/
  dataset_flickr30k.json (Karpathy) with flickr30k-images/
  annotations/captions_val2017.json with val2017/
  annotations/captions_val2014.json with val2014/"""
VQAV2_LAYOUT = """
  v2_OpenEnded_mscoco_val2014_questions.json
  v2_mscoco_val2014_annotations.json
  val2014/COCO_val2014_000000000042.jpg"""
GQA_LAYOUT = """
  testdev_balanced_questions.json
  images/n161313.jpg"""

_FLICKR_FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


@dataclass(frozen=True)
class Dataset(Generic[T]):
    """Items of one split. ``train`` gives items to choose baselines from, where there are any."""

    name: str
    split: str
    items: Sequence[T]
    train: Callable[[], Sequence[T]] | None = None


def captions(root: Path, split: str = "test") -> Dataset[CaptionItem]:
    """Images with their reference captions from a COCO or Flickr30k folder.

    A Karpathy file is preferred: splits train, restval (COCO), val, test. With the annotations of
    2014 or 2017 the splits are train2014, val2014, train2017, val2017, and ``test`` and ``val``
    mean val2017 if it is there, else val2014.

    Raises:
        EvalError: a file or folder is missing, unreadable or empty, or the split is unknown.
    """
    _check_folder(root)
    if _karpathy_file(root, "coco") is not None:
        return coco_karpathy(root, split)
    if _karpathy_file(root, "flickr30k") is not None:
        return flickr30k(root, split)
    if _karpathy_file(root, "emoji") is not None:
        # What mmq_evals.data.emoji makes.
        return _karpathy(root, "emoji", split)
    return coco_annotations(root, split)


def coco_karpathy(root: Path, split: str = "test") -> Dataset[CaptionItem]:
    """Captions of ``dataset_coco.json``; same errors as `captions`."""
    return _karpathy(root, "coco", split)


def flickr30k(root: Path, split: str = "test") -> Dataset[CaptionItem]:
    """Captions of ``dataset_flickr30k.json``; same errors as `captions`."""
    return _karpathy(root, "flickr30k", split)


def retrieval(root: Path, split: str = "test") -> Dataset[RetrievalItem]:
    """The images of `captions` with their captions as retrieval sets; same errors."""
    dataset = captions(root, split)
    items = [RetrievalItem(item.id, item.image, item.references) for item in dataset.items]
    return Dataset(dataset.name, dataset.split, items)


def vqav2(root: Path, split: str = "test") -> Dataset[VqaItem]:
    """Questions with ten answers each from a VQAv2 folder.

    Splits train2014 and val2014; ``test`` and ``val`` mean val2014, ``train`` train2014.

    Raises:
        EvalError: as `captions`, or a question without annotation.
    """
    _check_folder(root)
    year_split = {"test": "val2014", "val": "val2014", "train": "train2014"}.get(split, split)
    items = _vqav2_items(root, year_split)
    has_train = year_split != "train2014" and _vqav2_files(root, "train2014") is not None
    train = partial(_vqav2_items, root, "train2014") if has_train else None
    return Dataset("vqav2", year_split, items, train)


def gqa(root: Path, split: str = "test") -> Dataset[VqaItem]:
    """Balanced questions of a GQA folder; question type is structural, answer type semantic.

    ``test`` means testdev_balanced, ``val`` val_balanced, ``train`` train_balanced.

    Raises:
        EvalError: as `captions`.
    """
    _check_folder(root)
    full = {"test": "testdev_balanced", "val": "val_balanced", "train": "train_balanced"}
    split = full.get(split, split)
    items = _gqa_items(root, split)
    has_train = split != "train_balanced" and _gqa_file(root, "train_balanced") is not None
    train = partial(_gqa_items, root, "train_balanced") if has_train else None
    return Dataset("gqa", split, items, train)


def has_captions(root: Path) -> bool:
    """Whether `captions` would find its file."""
    karpathy = ("dataset_coco.json", "dataset_flickr30k.json", "dataset_emoji.json")
    names = (*karpathy, *_annotation_names())
    return any(find_file(root, name, ("", "annotations", "karpathy")) for name in names)


def has_vqav2(root: Path) -> bool:
    """Whether `vqav2` would find its files of val2014."""
    return _vqav2_files(root, "val2014") is not None


def has_gqa(root: Path) -> bool:
    """Whether `gqa` would find the questions of testdev_balanced."""
    return _gqa_file(root, "testdev_balanced") is not None


# ---- captions ------------------------------------------------------------------------------------


def _karpathy_file(root: Path, name: str) -> Path | None:
    return find_file(root, f"dataset_{name}.json", ("", "annotations", "karpathy"))


def _karpathy(root: Path, name: str, split: str) -> Dataset[CaptionItem]:
    _check_folder(root)
    file = _karpathy_file(root, name)
    if file is None:
        raise EvalError(f"{root}: no dataset_{name}.json; expected {CAPTION_LAYOUT}")
    rows = _read(file, "images", list)
    splits = sorted({row.get("split", "") for row in rows})
    if split not in splits:
        raise EvalError(f"{file}: expected a split of {splits}, got {split!r}")
    folder = root
    if name == "flickr30k":
        folder = _image_folder(root, _FLICKR_FOLDERS, CAPTION_LAYOUT)
    elif not any((root / row["filepath"]).is_dir() for row in rows if "filepath" in row):
        folder = root / "images"

    def items(wanted: str) -> list[CaptionItem]:
        return [_karpathy_item(file, folder, row) for row in rows if row["split"] == wanted]

    train = partial(items, "train") if split != "train" and "train" in splits else None
    return Dataset(f"{name}-karpathy", split, items(split), train)


def _karpathy_item(file: Path, folder: Path, row: dict[str, Any]) -> CaptionItem:
    with _fields_of(file):
        path = folder / row.get("filepath", "") / row["filename"]
        references = tuple(sentence["raw"] for sentence in row["sentences"])
        item_id = str(row.get("cocoid", row["filename"]))
    if not references:
        raise EvalError(f"{file}: image {item_id}: expected captions, got none")
    return CaptionItem(item_id, image_file(path), references)


def _annotation_names() -> list[str]:
    return [f"captions_{split}.json" for split in ("val2017", "val2014", "train2017", "train2014")]


def coco_annotations(root: Path, split: str = "test") -> Dataset[CaptionItem]:
    """Captions of COCO's own annotations, such as split val2017; same errors as `captions`."""
    _check_folder(root)
    wanted = ["val2017", "val2014"] if split in ("test", "val") else [split]
    for name in wanted:
        file = find_file(root, f"captions_{name}.json", ("annotations", ""))
        if file is not None:
            train_name = name.replace("val", "train")
            train_file = find_file(root, f"captions_{train_name}.json", ("annotations", ""))
            train = None
            if train_file is not None and train_file != file:
                train = partial(_annotated, root, train_file, train_name)
            return Dataset("coco", name, _annotated(root, file, name), train)
    if has_captions(root):
        raise EvalError(f"{root}: no captions of split {split!r}; expected {CAPTION_LAYOUT}")
    raise EvalError(f"{root}: no captions found; expected {CAPTION_LAYOUT}")


def _annotated(root: Path, file: Path, split: str) -> list[CaptionItem]:
    texts: dict[int, list[str]] = {}
    with _fields_of(file):
        names = {row["id"]: row["file_name"] for row in _read(file, "images", list)}
        for row in _read(file, "annotations", list):
            texts.setdefault(row["image_id"], []).append(row["caption"])
    folder = _image_folder(root, (split, f"images/{split}"), CAPTION_LAYOUT)
    lacking = [image_id for image_id in names if image_id not in texts]
    if lacking:
        raise EvalError(f"{file}: {len(lacking)} images without captions, first {lacking[0]}")
    return [
        CaptionItem(str(image_id), image_file(folder / name), tuple(texts[image_id]))
        for image_id, name in names.items()
    ]


# ---- questions -----------------------------------------------------------------------------------


def _vqav2_files(root: Path, split: str) -> tuple[Path, Path] | None:
    folders = ("", "questions", "Questions", "annotations", "Annotations")
    asked = find_file(root, f"v2_OpenEnded_mscoco_{split}_questions.json", folders)
    answered = find_file(root, f"v2_mscoco_{split}_annotations.json", folders)
    return None if asked is None or answered is None else (asked, answered)


def _vqav2_items(root: Path, split: str) -> list[VqaItem]:
    files = _vqav2_files(root, split)
    if files is None:
        raise EvalError(f"{root}: no VQAv2 files of split {split!r}; expected{VQAV2_LAYOUT}")
    folder = _image_folder(root, (split, f"images/{split}"), VQAV2_LAYOUT)
    questions = _read(files[0], "questions", list)
    with _fields_of(files[1]):
        annotations = {row["question_id"]: row for row in _read(files[1], "annotations", list)}
    items = []
    with _fields_of(files[0]):
        for row in questions:
            key = row["question_id"]
            if key not in annotations:
                raise EvalError(f"{files[1]}: no annotation of question {key}")
            image = folder / f"COCO_{split}_{row['image_id']:012d}.jpg"
            items.append(_vqav2_item(files[1], row, annotations[key], image))
    return items


def _vqav2_item(
    file: Path, row: dict[str, Any], annotation: dict[str, Any], image: Path
) -> VqaItem:
    with _fields_of(file):
        return VqaItem(
            id=str(row["question_id"]),
            image_id=str(row["image_id"]),
            image=image_file(image),
            question=row["question"],
            answers=tuple(answer["answer"] for answer in annotation["answers"]),
            question_type=annotation["question_type"],
            answer_type=annotation["answer_type"],
        )


def _gqa_file(root: Path, split: str) -> Path | None:
    return find_file(root, f"{split}_questions.json", ("", "questions", "questions1.2"))


def _gqa_items(root: Path, split: str) -> list[VqaItem]:
    file = _gqa_file(root, split)
    if file is None:
        raise EvalError(f"{root}: no {split}_questions.json; expected{GQA_LAYOUT}")
    folder = _image_folder(root, ("images",), GQA_LAYOUT)
    with _fields_of(file):
        items = [
            VqaItem(
                id=str(key),
                image_id=str(row["imageId"]),
                image=image_file(folder / f"{row['imageId']}.jpg"),
                question=row["question"],
                answers=(row["answer"],),
                question_type=row.get("types", {}).get("structural") or "",
                answer_type=row.get("types", {}).get("semantic") or "",
            )
            for key, row in _read(file, None, dict).items()
            if row.get("isBalanced", True)
        ]
    if not items:
        raise EvalError(f"{file}: expected balanced questions, got none")
    return items


# ---- files ---------------------------------------------------------------------------------------


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise EvalError(f"data: expected a dataset folder, got {root}")


def find_file(root: Path, name: str, folders: Sequence[str]) -> Path | None:
    """The file called ``name`` in the first of ``folders`` of ``root`` that has it."""
    return next((path for sub in folders if (path := root / sub / name).is_file()), None)


def _image_folder(root: Path, names: Sequence[str], layout: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise EvalError(f"{root}: no image folder {' or '.join(names)}; expected {layout.strip()}")


@contextmanager
def _fields_of(file: Path) -> Iterator[None]:
    """Turns a missing or mistyped field into an error that names the file."""
    try:
        yield
    except KeyError as error:
        raise EvalError(f"{file}: expected every entry to have the field {error}") from None
    except (TypeError, AttributeError) as error:
        raise EvalError(f"{file}: an entry is not as published: {error}") from None


def _read(file: Path, key: str | None, kind: type) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvalError(f"{file}: not JSON: {error}") from None
    if key is not None:
        data = data.get(key) if isinstance(data, dict) else None
    if not isinstance(data, kind) or not data:
        what = f"a non-empty {kind.__name__}" + (f" under {key!r}" if key else "")
        raise EvalError(f"{file}: expected {what}")
    return data
