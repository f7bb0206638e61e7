# SPDX-License-Identifier: Apache-2.0
"""The published datasets as data: their splits with counts, their files, and where to get them.

Counts are those of the publishers. Nothing here is fetched; the addresses are for a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmq_evals.data import layouts
from mmq_evals.data.items import CaptionItem, VqaItem
from mmq_evals.data.layouts import Dataset

Load = Callable[[Path, str], "Dataset[CaptionItem] | Dataset[VqaItem]"]


@dataclass(frozen=True)
class Split:
    """Published counts of one split, and where its images are published.

    ``texts`` are captions or questions. A split without images of its own lies among others'.
    """

    images: int
    texts: int
    image_source: str


@dataclass(frozen=True)
class Published:
    """One dataset. ``{split}`` in a file's name stands for the split; the first one is default."""

    name: str
    load: Load
    splits: dict[str, Split]
    files: tuple[str, ...]
    folders: tuple[str, ...]
    file_source: str
    text: str = "captions"

    @property
    def default(self) -> str:
        """The split that results are published on."""
        return next(iter(self.splits))

    def find(self, root: Path, split: str) -> dict[str, Path | None]:
        """Where the files of a split are, None for those that are missing."""
        names = [name.replace("{split}", split) for name in self.files]
        return {name: layouts.find_file(root, name, self.folders) for name in names}


def _coco_images(name: str) -> str:
    return f"http://images.cocodataset.org/zips/{name}.zip"


_COCO_2014 = f"{_coco_images('train2014')} and {_coco_images('val2014')}"
_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_FLICKR = "https://shannon.cs.illinois.edu/DenotationGraph/ (on request)"
_GQA_IMAGES = "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"
_VQA_FOLDERS = ("", "questions", "Questions", "annotations", "Annotations")


def _annotations(year: str) -> str:
    return f"http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"


DATASETS: tuple[Published, ...] = (
    Published(
        "coco-karpathy",
        layouts.coco_karpathy,
        {
            "test": Split(5_000, 25_010, _COCO_2014),
            "val": Split(5_000, 25_010, _COCO_2014),
            "restval": Split(30_504, 152_634, _COCO_2014),
            "train": Split(82_783, 414_113, _COCO_2014),
        },
        ("dataset_coco.json",),
        ("", "annotations", "karpathy"),
        _KARPATHY,
    ),
    Published(
        "flickr30k-karpathy",
        layouts.flickr30k,
        {
            "test": Split(1_000, 5_000, _FLICKR),
            "val": Split(1_014, 5_070, _FLICKR),
            "train": Split(29_000, 145_000, _FLICKR),
        },
        ("dataset_flickr30k.json",),
        ("", "annotations", "karpathy"),
        _KARPATHY,
    ),
    Published(
        "coco-2017",
        layouts.coco_annotations,
        {
            "val2017": Split(5_000, 25_014, _coco_images("val2017")),
            "train2017": Split(118_287, 591_753, _coco_images("train2017")),
        },
        ("captions_{split}.json",),
        ("annotations", ""),
        _annotations("2017"),
    ),
    Published(
        "coco-2014",
        layouts.coco_annotations,
        {
            "val2014": Split(40_504, 202_654, _coco_images("val2014")),
            "train2014": Split(82_783, 414_113, _coco_images("train2014")),
        },
        ("captions_{split}.json",),
        ("annotations", ""),
        _annotations("2014"),
    ),
    Published(
        "vqav2",
        layouts.vqav2,
        {
            "val2014": Split(40_504, 214_354, _coco_images("val2014")),
            "train2014": Split(82_783, 443_757, _coco_images("train2014")),
        },
        ("v2_OpenEnded_mscoco_{split}_questions.json", "v2_mscoco_{split}_annotations.json"),
        _VQA_FOLDERS,
        "https://visualqa.org/download.html",
        "questions",
    ),
    Published(
        "gqa",
        layouts.gqa,
        {
            "testdev_balanced": Split(398, 12_578, _GQA_IMAGES),
            "val_balanced": Split(10_234, 132_062, _GQA_IMAGES),
            "train_balanced": Split(72_140, 943_000, _GQA_IMAGES),
        },
        ("{split}_questions.json",),
        ("", "questions", "questions1.2"),
        "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip",
        "questions",
    ),
)


def present(root: Path) -> Sequence[Published]:
    """The datasets of which ``root`` has at least one file of the default split."""
    return [dataset for dataset in DATASETS if any(dataset.find(root, dataset.default).values())]
