# SPDX-License-Identifier: Apache-2.0
"""``mmq data prepare | verify``: what a local dataset folder holds, counted and hashed.

`prepare` writes ``mmq-data.json``, with the counts and hashes of every split, and the document
frequencies of every caption split, which limited runs and shards need. `verify` looks again and
compares with it and with the published counts. Neither fetches or changes a published file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmq_evals.data.images import path_of, read_image
from mmq_evals.data.items import CaptionItem, VqaItem
from mmq_evals.data.published import DATASETS, Published, present
from mmq_evals.errors import EvalError
from mmq_evals.metrics.caption import document_frequency

FORMAT = "mmq-data"
FORMAT_VERSION = 1
MANIFEST = "mmq-data.json"

_SHOWN = 3


def inspect_split(
    dataset: Published, root: Path, split: str, *, decode: bool = False
) -> dict[str, Any]:
    """Counts and hashes of one split, JSON-ready; its ``problems`` are one line each.

    Args:
        root: the dataset's folder.
        split: a name of the dataset's ``splits``.
        decode: also decode every image.

    Raises:
        EvalError: the split is unknown.
    """
    if split not in dataset.splits:
        raise EvalError(
            f"{dataset.name}: expected a split of {', '.join(dataset.splits)}, got {split!r}"
        )
    found = dataset.find(root, split)
    report: dict[str, Any] = {"dataset": dataset.name, "split": split, "problems": []}
    for name, path in found.items():
        if path is None:
            report["problems"].append(
                f"{dataset.name} {split}: no {name}; published at {dataset.file_source}"
            )
    if report["problems"]:
        return report
    report["files"] = {
        path.relative_to(root).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _file_sha256(path),
        }
        for path in found.values()
        if path is not None
    }
    published = dataset.splits[split]
    try:
        items = dataset.load(root, split).items
    except EvalError as error:
        text = " ".join(str(error).split())
        where = f"; published at {published.image_source}" if "image folder" in text else ""
        report["problems"].append(f"{dataset.name} {split}: {text}{where}")
        return report
    images = _images(items)
    missing = [key for key, path in images.items() if not path.is_file()]
    report["counts"] = {"images": len(images), dataset.text: _n_texts(items)}
    report["ids_sha256"] = _sha256(item.id for item in items)
    report["image_sizes_sha256"] = _sha256(
        f"{path.name} {path.stat().st_size}" for path in images.values() if path.is_file()
    )
    if missing:
        report["problems"].append(
            f"{dataset.name} {split}: {len(missing)} of {len(images)} images missing, first "
            f"{', '.join(missing[:_SHOWN])}; published at {published.image_source}"
        )
    expected = {"images": published.images, dataset.text: published.texts}
    report["published"] = expected
    report["complete"] = report["counts"] == expected and not missing
    if decode:
        report["problems"] += _undecodable(items)
    return report


def _images(items: Sequence[CaptionItem | VqaItem]) -> dict[str, Path]:
    """Image id to file, each once."""
    result: dict[str, Path] = {}
    for item in items:
        path = path_of(item.image)
        if path is not None:
            result[item.image_id if isinstance(item, VqaItem) else item.id] = path
    return result


def _n_texts(items: Sequence[CaptionItem | VqaItem]) -> int:
    return sum(len(item.references) if isinstance(item, CaptionItem) else 1 for item in items)


def _undecodable(items: Sequence[CaptionItem | VqaItem]) -> list[str]:
    problems, seen = [], set()
    for item in items:
        path = path_of(item.image)
        if path in seen or path is None or not path.is_file():
            continue
        seen.add(path)
        try:
            read_image(item.id, item.image)
        except EvalError as error:
            problems.append(str(error))
    return problems


def inspect_folder(
    root: Path,
    *,
    dataset: str | None = None,
    split: str | None = None,
    decode: bool = False,
    partial: bool = False,
) -> list[dict[str, Any]]:
    """`inspect_split` of every dataset found in ``root``, or of one, in one split each.

    Args:
        dataset: a name of `DATASETS`; default: all of which a file is there.
        split: default: the one that results are published on; "all": every one.
        partial: accept another number of images or texts than published.

    Raises:
        EvalError: no such folder, dataset or split, or no dataset in the folder.
    """
    if not root.is_dir():
        raise EvalError(f"data: expected a dataset folder, got {root}")
    chosen = [known for known in DATASETS if known.name == dataset] if dataset else present(root)
    if not chosen:
        names = ", ".join(known.name for known in DATASETS)
        if dataset:
            raise EvalError(f"dataset: expected one of {names}, got {dataset!r}")
        pieces = "; ".join(
            f"{known.name}: {' and '.join(known.find(root, known.default))} from "
            f"{known.file_source}, images from {known.splits[known.default].image_source}"
            for known in DATASETS
        )
        raise EvalError(f"{root}: no dataset found; expected the files of one of: {pieces}")
    reports = []
    for known in chosen:
        for name in known.splits if split == "all" else [split or known.default]:
            report = inspect_split(known, root, name, decode=decode)
            if not partial and report.get("counts") != report.get("published"):
                report["problems"].append(
                    f"{known.name} {name}: expected the published {_counts(report['published'])}, "
                    f"got {_counts(report['counts'])}"
                )
            reports.append(report)
    return reports


def prepare(root: Path, reports: Sequence[dict[str, Any]]) -> Path:
    """Write the manifest, and the document frequencies of caption splits, into ``root``.

    Splits of an earlier manifest that ``reports`` does not hold are kept.

    Raises:
        EvalError: a report has problems, an earlier manifest is broken, or ``root`` cannot be
            written.
    """
    problems = [problem for report in reports for problem in report["problems"]]
    if problems:
        raise EvalError(f"data: {len(problems)} problems, first: {problems[0]}")
    splits = {} if not (root / MANIFEST).exists() else read_manifest(root)
    by_name = {dataset.name: dataset for dataset in DATASETS}
    try:
        for report in reports:
            dataset, split = by_name[report["dataset"]], report["split"]
            entry = {key: value for key, value in report.items() if key != "problems"}
            if dataset.text == "captions":
                table = f"mmq-df-{dataset.name}-{split}.json"
                items = dataset.load(root, split).items
                references = {i.id: i.references for i in items if isinstance(i, CaptionItem)}
                document_frequency(references).save(root / table)
                entry["document_frequency"] = {
                    "file": table,
                    "sha256": _file_sha256(root / table),
                }
            splits[_key(report)] = entry
        text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "splits": splits}, indent=1)
        (root / MANIFEST).write_text(text + "\n", encoding="ascii")
    except OSError as error:
        raise EvalError(f"data: cannot write {error.filename}: {error.strerror}") from None
    return root / MANIFEST


def read_manifest(root: Path) -> dict[str, dict[str, Any]]:
    """The splits that `prepare` wrote down, by "dataset split".

    Raises:
        EvalError: there is none, or it is out of form.
    """
    file = root / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="ascii"))
    except FileNotFoundError:
        raise EvalError(f"data: no {file}; run mmq data prepare first") from None
    except ValueError as error:
        raise EvalError(f"data: {file} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or "splits" not in data:
        raise EvalError(f"data: {file} is not a data manifest")
    if data.get("version") != FORMAT_VERSION:
        raise EvalError(
            f"data: {file}: expected version {FORMAT_VERSION}, got {data.get('version')}"
        )
    return dict(data["splits"])


def differences(root: Path, reports: Sequence[dict[str, Any]]) -> list[str]:
    """Where ``reports`` differ from the manifest in ``root``, if there is one; one line each."""
    if not (root / MANIFEST).exists():
        return []
    manifest = read_manifest(root)
    lines = []
    for report in reports:
        entry = manifest.get(_key(report), {})
        for field in ("files", "counts", "ids_sha256", "image_sizes_sha256"):
            if field in entry and field in report and entry[field] != report[field]:
                lines.append(
                    f"{_key(report)}: {field} changed since mmq data prepare: expected "
                    f"{_short(entry[field])}, got {_short(report[field])}"
                )
        table = entry.get("document_frequency")
        if table is not None:
            path = root / table["file"]
            if not path.is_file() or _file_sha256(path) != table["sha256"]:
                lines.append(f"{_key(report)}: {path} is missing or changed; prepare again")
    return lines


def format_reports(reports: Sequence[dict[str, Any]]) -> str:
    """One line a split, then its files with their hashes."""
    lines = []
    for report in reports:
        if "counts" not in report:
            lines.append(f"{_key(report)}: incomplete")
            continue
        state = (
            "as published" if report["complete"] else f"published: {_counts(report['published'])}"
        )
        lines.append(f"{_key(report)}: {_counts(report['counts'])} ({state})")
        for name, file in report["files"].items():
            lines.append(f"  {name}: {file['bytes']:,} bytes, sha256 {file['sha256']}")
        lines.append(f"  ids sha256 {report['ids_sha256']}")
    return "\n".join(lines)


def _key(report: dict[str, Any]) -> str:
    return f"{report['dataset']} {report['split']}"


def _counts(counts: dict[str, int]) -> str:
    return " and ".join(f"{number:,} {what}" for what, number in counts.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 90 else f"{text[:90]}..."


def _sha256(lines: Iterable[str]) -> str:
    """Hash of the sorted lines, so that the order of files and entries does not matter."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
