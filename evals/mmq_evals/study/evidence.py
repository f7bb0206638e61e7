# SPDX-License-Identifier: Apache-2.0
"""What is known of one target of one model: scores by run, and how far they may be off.

Where rows per sample are at hand, all intervals come from one set of resampled images, so that any
difference of runs is paired. Elsewhere the table's own intervals are quoted and derived figures
have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmq_evals.stats import FloatArray, percentiles
from mmq_evals.study.samples import RESAMPLES, by_run, read_samples
from mmq_evals.study.table import Run, has


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval, None where there is no evidence for one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Evidence:
    """A target's scores by run id, the same of every resampling, and where these come from.

    ``resampled`` is empty where ``why_none`` says why there are no scores per sample.
    """

    target: str
    scores: Mapping[str, float]
    runs: Mapping[str, Run] = field(repr=False)
    resampled: Mapping[str, FloatArray] = field(repr=False)
    images: int = 0
    why_none: str = ""

    def score(self, run: Run) -> Estimate:
        """A run's score; the interval is the table's own where it has one."""
        value = self.scores[run.id]
        suffix = self.target.partition(".")[2]
        low, high = run.number(f"low.{suffix}"), run.number(f"high.{suffix}")
        if (low is None or high is None) and run.id in self.resampled:
            low, high = percentiles(self.resampled[run.id])
        return Estimate(value, low, high)

    def combination(self, terms: Sequence[tuple[float, Run]]) -> Estimate:
        """A weighted sum of runs' scores, paired over images."""
        value = sum(weight * self.scores[run.id] for weight, run in terms)
        if not all(run.id in self.resampled for _, run in terms):
            return self._stated_difference(terms, value)
        drawn = sum((weight * self.resampled[run.id] for weight, run in terms), start=np.zeros(()))
        return Estimate(value, *percentiles(drawn))

    def _stated_difference(self, terms: Sequence[tuple[float, Run]], value: float) -> Estimate:
        """The paired interval against full precision that the table itself may hold."""
        if len(terms) == 2 and [weight for weight, _ in terms] == [1.0, -1.0]:
            run, other = terms[0][1], terms[1][1]
            suffix = self.target.partition(".")[2]
            stated = run.number(f"diff.{suffix}")
            if stated is not None and abs(stated - value) < 1e-6 and has(other, self.target):
                return Estimate(
                    value, run.number(f"diff_low.{suffix}"), run.number(f"diff_high.{suffix}")
                )
        return Estimate(value)


def gather(
    folder: Path,
    runs: Sequence[Run],
    target: str,
    full: Run | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Evidence:
    """The evidence of the runs that have the target.

    Args:
        folder: that of the table.
        full: the untouched run, for targets of agreement.
        seed: of the bootstrap.

    Raises:
        EvalError: rows per sample that are out of form or over different samples.
    """
    scored = list({run.id: run for run in runs if has(run, target)}.values())
    scores = {run.id: float(run.values[target]) for run in scored}
    runs_by_id = {run.id: run for run in scored}
    samples = read_samples(folder, scored, target, full)
    if isinstance(samples, str):
        return Evidence(target, scores, runs_by_id, {}, 0, samples)
    drawn = by_run(samples, samples.resampled(seed, resamples))
    return Evidence(target, scores, runs_by_id, drawn, len(samples.images))
