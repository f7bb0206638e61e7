# SPDX-License-Identifier: Apache-2.0
"""Grids of a study: their sizes, the recipes they stand for, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_models
import torch

from mmq.errors import MmqError
from mmq.formats.study import import_study_config, uniform_grid
from mmq.models import resolve
from mmq.plan import Plan, plan_units
from mmq_evals.study.grid import Setting, expand, load_study, parse_study
from mmq_evals.study.runs import choice_of


def settings(study: Any) -> list[Setting]:
    return [setting for _, found in expand(study) for setting in found]


def grid(**keys: Any) -> dict[str, Any]:
    return {"name": "test", "grids": [keys]}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("study-uniform", 1674),
        ("study-gptq", 448),
        ("study-awq", 343),
        ("study-awq-retrieval", 49),
        ("study-awq-llava", 49),
        # Factorials of four methods; seeds; token weights and corrections for GPTQ and AWQ.
        ("tiny-study", 4 * (343 + 49 + 49 + 6) + 2 * 3 * 5 + 2 * 3 * (5 + 3) + 2 * 2),
    ],
)
def test_shipped_grids_have_their_sizes(name: str, count: int) -> None:
    found = settings(load_study(name))
    assert len(found) == count
    assert len({str(setting.recipe.to_dict()) for setting in found}) <= count


def choices(decided: Plan) -> str:
    return str(sorted((unit.path, choice_of(layer)) for unit, layer in decided.quantized()))


def test_the_uniform_grid_is_the_study_s() -> None:
    found = settings(load_study("study-uniform"))
    blocks = Counter((s.levels["bits"], s.levels["layer_type"]) for s in found)
    assert set(blocks.values()) == {93}
    assert len(blocks) == 18
    with torch.device("meta"):
        units = resolve(tiny_models.blip2_opt())
    # Each in turn: 1,674 files of the study and 1,674 settings give the same tensors the same.
    ours = Counter(choices(plan_units(setting.recipe, units)) for setting in found)
    theirs = Counter(
        choices(plan_units(import_study_config(entries).recipe, units))
        for entries in uniform_grid()
    )
    assert ours == theirs


def test_axes_lists_zips_and_samples() -> None:
    study = parse_study(
        {
            "name": "test",
            "methods": {"rtn": {"group_size": 64}},
            "grids": [
                {
                    "axes": {"method": ["rtn", "uniform"], "vision": [2, 16]},
                    "zip": [{"connector": [4, 8], "seed": [1, 2]}],
                },
                {"runs": [{"method": "rtn", "language": {"bits": 4, "method": "gptq"}}]},
            ],
        }
    )
    found = settings(study)
    assert len(found) == 9
    first = found[0].recipe
    assert first.vision is not None
    assert (first.vision.method, first.vision.bits, first.vision.group_size) == ("rtn", 2, 64)
    assert first.connector is not None
    assert (first.connector.bits, first.seed, first.language) == (4, 1, None)
    assert found[3].recipe.vision is not None
    assert found[3].recipe.vision.bits == 16
    last = found[-1].recipe.language
    assert last is not None
    assert (last.method, last.bits, last.group_size) == ("gptq", 4, None)


def test_finer_axes_become_overrides() -> None:
    study = parse_study(
        grid(axes={"method": ["rtn"], "language.end.mlp": [3], "language.end.mlp:group_size": [32]})
    )
    (found,) = settings(study)
    (override,) = found.recipe.overrides
    assert override.selectors() == {"component": "language", "third": "end", "layer_type": "mlp"}
    assert (override.method, override.bits, override.group_size) == ("rtn", 3, 32)
    study = parse_study(grid(axes={"bits": [4], "layer_type": ["mlp", "both"], "vision": [True]}))
    narrowed, whole = settings(study)
    assert narrowed.recipe.overrides[0].selectors() == {"component": "vision", "layer_type": "mlp"}
    assert whole.recipe.vision is not None
    assert whole.recipe.vision.bits == 4
    (everything,) = settings(parse_study(grid(axes={"bits": [4]})))
    assert everything.recipe.all is not None


def test_a_sample_is_drawn_by_its_seed() -> None:
    axes = {"vision": [2, 3, 4, 8], "language": [2, 3, 4, 8]}

    def drawn(seed: int) -> list[Any]:
        return [s.levels for s in settings(parse_study(grid(axes=axes, sample=5, seed=seed)))]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 5


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"name": "x", "grids": []}, "grids"),
        (grid(), "expected axes, zip or runs, got none"),
        (grid(axes={"vision": []}), "vision: expected at least one level, got none"),
        (grid(axes={"vision": [4, 4]}), "vision: expected different levels"),
        (grid(axes={"vision": [4], "mlp": [3]}), "axes vision and mlp overlap"),
        (grid(axes={"vision.front": [4], "vision.mlp": [3]}), "overlap"),
        (grid(axes={"eyes": [4]}), "axis 'eyes': expected a selector of vision"),
        (grid(axes={"vision:colour": [4], "vision": [4]}), "axis 'vision:colour'"),
        (grid(axes={"vision:method": ["rtn"]}), "expected an axis vision, too"),
        (grid(axes={"vision": ["four"]}), "vision: expected a width, on, off"),
        (grid(axes={"layer_type": ["norms"]}), "layer_type: expected one of attention, mlp, both"),
        (grid(axes={"vision": [{"bit": 4}]}), "bit: unknown key, did you mean 'bits'?"),
        (grid(axis={"vision": [4]}), "unknown key, did you mean 'axes'?"),
        (grid(axes={"vision": [4]}, tasks=["ocr"]), "task: expected one of captioning"),
        (grid(axes={"vision": [2, 4]}, sample=3), "sample: expected at most 2, got 3"),
        (grid(zip=[{"vision": [2], "language": [2, 3]}]), "zip: expected equally many levels"),
        (grid(axes={"vision": [9]}), "expected 2 to 8, or 16, got 9"),
        (grid(axes={"vision": [True]}), "expected an axis bits beside the level on"),
        (grid(axes={"method": ["uniform"], "group_size": [64], "bits": [4]}), "expected none with"),
    ],
)
def test_what_is_refused(study: dict[str, Any], message: str) -> None:
    with pytest.raises(MmqError) as caught:
        settings(parse_study(study))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
