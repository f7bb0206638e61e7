# SPDX-License-Identifier: Apache-2.0
"""Scores per sample behind a grid's cells, so that intervals are over images.

A cell's score is a mean over its rows (that of the two directions' means for ``r_mean`` of
retrieval). Resampling images moves all cells at once: what they share cancels in differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.metrics.agreement import identical_captions
from mmq_evals.metrics.vqa import normalize_always
from mmq_evals.results import read_rows
from mmq_evals.rows import Row
from mmq_evals.stats import FloatArray, bootstrap_weights
from mmq_evals.study.table import Run
from mmq_evals.summary import rank_correlations

RESAMPLES = 1_000
# Scores of a table may be rounded to this many parts.
ROUNDING = 1e-4
# Metrics of a corpus that are means of other metrics' means.
_MEANS_OF = {"r_mean": ("txt_r_mean", "img_r_mean")}

_Score = tuple[str, float]


@dataclass(frozen=True)
class Samples:
    """Sums of a score by run and image.

    ``sums`` and ``counts`` have the shape (P, runs, images); a run's score is the mean over the P
    parts of total sum over total count.
    """

    runs: tuple[str, ...]
    images: tuple[str, ...]
    sums: FloatArray
    counts: FloatArray

    def scores(self) -> FloatArray:
        """Every run's score, shape (runs,)."""
        ratios = self.sums.sum(axis=-1) / self.counts.sum(axis=-1)
        return np.asarray(ratios.mean(axis=0))

    def resampled(self, seed: int = 0, resamples: int = RESAMPLES) -> FloatArray:
        """Every run's score over the same resampled images, shape (resamples, runs)."""
        blocks = []
        for weights in bootstrap_weights(len(self.images), resamples, seed):
            parts = [
                (weights @ sums.T) / (weights @ counts.T)
                for sums, counts in zip(self.sums, self.counts, strict=True)
            ]
            blocks.append(np.mean(parts, axis=0))
        return np.concatenate(blocks)


def read_samples(
    folder: Path, runs: Sequence[Run], target: str, full: Run | None = None
) -> Samples | str:
    """The scores per sample of every run, or why there are none.

    Args:
        folder: that of the table, to which the runs' ``rows`` are relative.
        runs: their column ``rows`` names the folder of an evaluation.
        target: ``score.<task>.<metric>`` or ``agreement.<task>.<measure>``, KL among them.
        full: what agreement is measured against.

    Raises:
        EvalError: rows that are there but not in form, or runs over different samples.
    """
    kind, _, rest = target.partition(".")
    task, dot, metric = rest.partition(".")
    if not dot or kind not in ("score", "agreement"):
        return "the score is no metric of a task"
    without = [run.id for run in runs if not _file(folder, run, task).is_file()]
    if without:
        return f"{len(without)} of {len(runs)} runs have no rows per sample"
    if (kind, metric) == ("agreement", "kl"):
        scored = [_divergence(_file(folder, run, task)) for run in runs]
        if any(each is None for each in scored):
            return "KL is not known, or not finite, for all samples"
        per_run = [[each] for each in scored if each is not None]
    elif kind == "agreement":
        if full is None or metric not in _AGREEMENT:
            return f"{metric} is not known per sample"
        reference = {str(row["id"]): row for row in read_rows(_file(folder, full, task))}
        per_run = [[_agreement(_file(folder, run, task), reference, metric)] for run in runs]
    else:
        wanted = _MEANS_OF.get(metric, (metric,))
        per_run = [_read(_file(folder, run, task), wanted) for run in runs]
    if any(not scores for parts in per_run for scores in parts):
        return f"{metric} is not a mean over samples"
    samples = _stack(runs, per_run)
    stated = np.array([run.values[target] for run in runs])
    if (np.abs(samples.scores() - stated) > ROUNDING * (1.0 + np.abs(stated))).any():
        return f"{metric} is not the mean of its scores per sample"
    return samples


def _file(folder: Path, run: Run, task: str) -> Path:
    rows = run.values.get("rows")
    return folder / str(rows) / f"{task}.jsonl" if rows else folder / "no rows"


def _same_texts(before: Mapping[str, Row], after: Mapping[str, Row]) -> dict[str, float]:
    texts = [{key: row["prediction"] for key, row in run.items()} for run in (before, after)]
    return dict.fromkeys(texts[0], 0.0) | dict.fromkeys(identical_captions(*texts), 1.0)


def _same_answers(before: Mapping[str, Row], after: Mapping[str, Row]) -> dict[str, float]:
    return {
        key: float(
            normalize_always(row["prediction"]) == normalize_always(after[key]["prediction"])
        )
        for key, row in before.items()
    }


_AGREEMENT: dict[str, Callable[[Mapping[str, Row], Mapping[str, Row]], dict[str, float]]] = {
    "identical_captions": _same_texts,
    "same_answers": _same_answers,
    "rank_correlation": rank_correlations,
}


def _agreement(file: Path, reference: Mapping[str, Row], measure: str) -> dict[str, _Score]:
    """By row its image and its agreement with the row of full precision."""
    rows = {str(row["id"]): row for row in read_rows(file)}
    if rows.keys() != reference.keys():
        odd = sorted(rows.keys() ^ reference.keys())
        raise EvalError(f"rows: {file}: expected those of full precision; in one only: {odd[:5]}")
    try:
        found = _AGREEMENT[measure](reference, rows)
        return {key: (str(rows[key]["cluster"]), score) for key, score in found.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise EvalError(f"rows: {file} is out of form: {error!r}") from None


def _divergence(file: Path) -> dict[str, _Score] | None:
    """By row its image and its mean KL over tokens; None where one is missing or not finite."""
    logits = file.with_name(f"{file.stem}.logits.jsonl")
    if not logits.is_file():
        return None
    images = {str(row["id"]): str(row["cluster"]) for row in read_rows(file)}
    try:
        found = {str(row["id"]): row["kl"] for row in read_rows(logits)}
        if any(value is None for values in found.values() for value in values):
            return None
        return {
            key: (images[key], sum(values) / len(values)) for key, values in found.items() if values
        }
    except (KeyError, TypeError, ValueError) as error:
        raise EvalError(f"rows: {logits} is out of form: {error!r}") from None


# By part: row id to image and score.
_Scores = list[dict[str, _Score]]


def _read(file: Path, metrics: Sequence[str]) -> _Scores:
    rows = read_rows(file)
    try:
        return [
            {
                str(row["id"]): (str(row["cluster"]), float(row["scores"][metric]))
                for row in rows
                if metric in row["scores"]
            }
            for metric in metrics
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise EvalError(f"rows: {file} is out of form: {error!r}") from None


def _stack(runs: Sequence[Run], per_run: Sequence[_Scores]) -> Samples:
    first = per_run[0]
    for run, parts in zip(runs, per_run, strict=True):
        for one, two in zip(first, parts, strict=True):
            if one.keys() != two.keys():
                odd = sorted(one.keys() ^ two.keys())
                raise EvalError(
                    f"rows: expected the same samples in {runs[0].id} and {run.id}; in one only: "
                    f"{odd[:5]}"
                )
    images = tuple(sorted({image for part in first for image, _ in part.values()}))
    position = {image: index for index, image in enumerate(images)}
    shape = (len(first), len(runs), len(images))
    sums, counts = np.zeros(shape), np.zeros(shape)
    for index, parts in enumerate(per_run):
        for number, part in enumerate(parts):
            at = [position[image] for image, _ in part.values()]
            np.add.at(sums[number, index], at, [score for _, score in part.values()])
            np.add.at(counts[number, index], at, 1.0)
    return Samples(tuple(run.id for run in runs), images, sums, counts)


def by_run(samples: Samples, values: FloatArray) -> Mapping[str, FloatArray]:
    """The last axis of ``values`` by run id."""
    return {run: values[..., index] for index, run in enumerate(samples.runs)}
