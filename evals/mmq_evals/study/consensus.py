# SPDX-License-Identifier: Apache-2.0
"""The importance analysis of arXiv 2601.15287, for comparison with its Table 1.

A random forest learns the score from the widths; impurity, permutation and mean |SHAP| are each
normalised to 100 and averaged. The forest is a model of the grid and depends on its split: the
spread over seeds and R^2 over folds stand beside the figures. `importance` needs neither.
Needs `mmq[study]` (scikit-learn, shap).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from mmq_evals.errors import EvalError
from mmq_evals.stats import FloatArray
from mmq_evals.study.table import Grid

TREES = 100
SEED = 42
TEST_SHARE = 0.2
REPEATS = 10
FOLDS = 5
SEEDS = 8
MIN_CELLS = 10


def consensus(grid: Grid, target: str, *, seeds: int = SEEDS) -> dict[str, Any]:
    """Impurity, permutation, mean |SHAP| and their average by factor, each in percent.

    Args:
        seeds: splits and forests of the spread, beside the one with seed 42 that is reported.

    Returns:
        ``factors``: by name ``impurity``, ``permutation``, ``shap``, ``consensus`` and the
        ``lowest`` and ``highest`` consensus of all seeds; ``fold_r2``: R^2 of every fold; ``r2``
        on the 20 % test cells; ``cells`` and ``test_cells``.

    Raises:
        EvalError: scikit-learn or shap is missing, or the grid has under `MIN_CELLS` cells.
    """
    check_installed()
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold, cross_val_score

    cells = grid.scored(target)
    if len(cells) < MIN_CELLS:
        raise EvalError(f"consensus: expected at least {MIN_CELLS} cells, got {len(cells)}")
    # The split depends on the order of the rows: that of the table.
    widths, scores = np.array(list(cells)), np.array(list(cells.values()))
    if np.ptp(scores) == 0.0:
        raise EvalError("consensus: all cells have the same score")
    impurity, permutation, shap, r2, tested = _fit(widths, scores, SEED)
    average = (impurity + permutation + shap) / 3.0
    others = [average]
    for seed in range(seeds):
        others.append(np.mean(_fit(widths, scores, seed)[:3], axis=0))
    folds = KFold(FOLDS, shuffle=True, random_state=SEED)
    forest = RandomForestRegressor(n_estimators=TREES, random_state=SEED)
    fold_r2 = cross_val_score(forest, widths, scores, cv=folds, scoring="r2")
    return {
        "cells": len(cells),
        "test_cells": tested,
        "r2": r2,
        "fold_r2": [float(value) for value in fold_r2],
        "seeds": seeds,
        "factors": [
            {
                "factor": name,
                "impurity": float(impurity[axis]),
                "permutation": float(permutation[axis]),
                "shap": float(shap[axis]),
                "consensus": float(average[axis]),
                "lowest": float(min(other[axis] for other in others)),
                "highest": float(max(other[axis] for other in others)),
            }
            for axis, name in enumerate(grid.names)
        ],
    }


def check_installed() -> None:
    """Raises EvalError where scikit-learn or shap is missing."""
    missing = [name for name in ("sklearn", "shap") if find_spec(name) is None]
    if missing:
        raise EvalError(f"consensus: needs mmq[study]; not installed: {', '.join(missing)}")


def _fit(
    widths: FloatArray, scores: FloatArray, seed: int
) -> tuple[FloatArray, FloatArray, FloatArray, float, int]:
    """The three attributions of one split, each summing to 100, R^2 and size of its test cells."""
    from shap import TreeExplainer
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import train_test_split

    x_train, x_test, y_train, y_test = train_test_split(
        widths, scores, test_size=TEST_SHARE, random_state=seed
    )
    forest = RandomForestRegressor(n_estimators=TREES, random_state=seed).fit(x_train, y_train)
    permuted = permutation_importance(
        forest, x_test, y_test, n_repeats=REPEATS, random_state=seed
    ).importances_mean
    attributed = np.abs(TreeExplainer(forest).shap_values(widths)).mean(axis=0)
    return (
        _percent(forest.feature_importances_),
        _percent(permuted),
        _percent(attributed),
        float(forest.score(x_test, y_test)),
        len(y_test),
    )


def _percent(values: Sequence[float] | FloatArray) -> FloatArray:
    """Normalised to sum 100; a negative permutation importance keeps its sign."""
    array = np.asarray(values, dtype=np.float64)
    total = float(array.sum())
    return 100.0 * array / total if total != 0.0 else np.full_like(array, np.nan)
