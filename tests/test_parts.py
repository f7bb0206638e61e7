# SPDX-License-Identifier: Apache-2.0
"""Parts put together are, bit by bit, what one quantization of the whole recipe makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import samples_for
from torch import nn

import mmq
from mmq.architectures import COMPONENTS
from mmq.errors import MmqError
from mmq.parts import (
    Part,
    assembled,
    load_part,
    looks_back,
    quantize_part,
    quantize_parts,
    save_part,
)
from mmq.plan import plan
from mmq.stored import account

MODELS = {
    "opt": tiny_models.blip2_opt,
    "t5": tiny_models.blip2_t5,
    "retrieval": tiny_models.blip2_retrieval,
    "llava": tiny_models.llava,
}


def model_of(kind: str) -> nn.Module:
    return tiny_models.randomize(MODELS[kind](), seed=3).eval()


def recipe_of(upstream: str, method: str = "awq") -> mmq.Recipe:
    return mmq.parse_recipe(
        {
            "all": {"method": method, "bits": 3, "group_size": 8},
            "overrides": [{"layer_type": "mlp", "method": "gptq", "bits": 4}],
            "calibration": {"samples": 4, "upstream": upstream},
        }
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def parts_of(model: nn.Module, recipe: mmq.Recipe) -> list[Part]:
    decided, samples = plan(recipe, model), samples_for(model)
    sequential = recipe.calibration.upstream == "quantized"
    parts: list[Part] = []
    present = {unit.component for unit, _ in decided.quantized()}
    for component in COMPONENTS:
        if component in present:
            behind = parts if sequential else []
            parts.append(quantize_part(model, decided, component, samples, behind))
    return parts


@pytest.mark.parametrize("upstream", ["full", "quantized"])
@pytest.mark.parametrize("kind", MODELS)
def test_parts_equal_the_whole(kind: str, upstream: str, tmp_path: Path) -> None:
    recipe = recipe_of(upstream)
    whole = model_of(kind)
    manifest = mmq.quantize(whole, recipe, samples_for(whole))
    model = model_of(kind)
    before = state(model)
    parts = parts_of(model, recipe)
    assert_equal_states(state(model), before)
    assert any(part.dense for part in parts) or kind == "retrieval"
    stored = []
    for part in parts:
        save_part(part, tmp_path / part.component)
        stored.append(load_part(tmp_path / part.component))
    for given in (parts, stored):
        with assembled(model, given):
            assert_equal_states(state(model), state(whole))
            assert account(model) == account(whole)
            for ours, theirs in zip(
                tiny_models.outputs(model), tiny_models.outputs(whole), strict=True
            ):
                assert torch.equal(ours, theirs)
        records = [record for part in given for record in part.records]
        by_path = {record.path: record for record in manifest.linears}
        assert {record.path: record for record in records} == by_path
    assert_equal_states(state(model), before)


def test_parts_behind_another_upstream_are_other_parts() -> None:
    model = model_of("opt")
    decided = plan(recipe_of("quantized"), model)
    samples = samples_for(model)
    vision = quantize_part(model, decided, "vision", samples)
    behind = quantize_part(model, decided, "connector", samples, [vision])
    alone = quantize_part(model, decided, "connector", samples)
    equal = [
        torch.equal(behind.packed[path].packed.qweight, alone.packed[path].packed.qweight)
        for path in behind.packed
    ]
    assert not all(equal)


@pytest.mark.parametrize(
    ("options", "calibration"),
    [
        ({"gptq": {"correction": "gptaq", "alpha": 1.0}}, {}),
        ({"gptq": {"correction": "retarget", "alpha": 1.0}}, {}),
        ({}, {"token_weights": "grad"}),
        ({}, {"token_weights": "qig"}),
    ],
)
def test_parts_that_look_at_full_precision_are_made_at_once(
    options: dict[str, Any], calibration: dict[str, Any]
) -> None:
    recipe = mmq.parse_recipe(
        {
            "all": {"method": "gptq", "bits": 2, "group_size": 8, **options},
            "calibration": {"upstream": "quantized", **calibration},
        }
    )
    whole, model = model_of("llava"), model_of("llava")
    samples = [sample for seed in range(5) for sample in samples_for(model, seed=seed)]
    mmq.quantize(whole, recipe, samples)
    before = state(model)
    decided = plan(recipe, model)
    assert looks_back(decided)
    parts = quantize_parts(model, decided, samples)
    assert_equal_states(state(model), before)
    with assembled(model, parts):
        assert_equal_states(state(model), state(whole))
    with pytest.raises(MmqError, match="quantize_parts makes all at once"):
        quantize_part(model, decided, "language", samples, parts[:1])
    plain = mmq.parse_recipe({"all": {"bits": 2}, "calibration": {"upstream": "quantized"}})
    assert not looks_back(plan(plain, model))


def test_what_is_refused(tmp_path: Path) -> None:
    model, other = model_of("opt"), model_of("llava")
    decided = plan(recipe_of("full", "rtn"), model)
    part = quantize_part(model, decided, "vision", samples_for(model))
    twice = pytest.raises(MmqError, match="expected one of each component, got vision, vision")
    with twice, assembled(model, [part, part]):
        pass
    with pytest.raises((MmqError, AttributeError)), assembled(other, [part]):
        pass
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(MmqError, match="broken: expected a stored part"):
        load_part(tmp_path / "broken")
