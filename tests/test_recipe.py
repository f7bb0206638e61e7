# SPDX-License-Identifier: Apache-2.0
"""The recipe: defaults, precedence, selectors that report their matches, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn

from mmq.errors import MmqError
from mmq.options import AwqOptions, GptqOptions
from mmq.plan import LayerPlan, plan
from mmq.recipe import LayerSettings, Recipe, load_recipe, parse_recipe, spec_of
from mmq.spec import QuantSpec


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: build() for name, build in tiny.TINY.items()}


def decisions(recipe: Recipe | dict[str, Any], model: nn.Module) -> dict[str, LayerPlan]:
    recipe = recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)
    return {unit.path: layer for unit, layer in plan(recipe, model).layers}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, QuantSpec(4, 128, "integer", clip="mse")),
        ({"method": "rtn", "bits": 3}, QuantSpec(3, 128, "integer", clip="mse")),
        ({"method": "awq", "group_size": 64}, QuantSpec(4, 64, "integer")),
        ({"method": "uniform", "bits": 8}, QuantSpec(8, -1, "float", per_tensor=True)),
        ({"zero": "symmetric", "group_size": -1}, QuantSpec(4, -1, "symmetric", clip="mse")),
        ({"clip": "none", "scale_dtype": "float32"}, QuantSpec(4, 128, scale_dtype="float32")),
        ({"bits": 16}, None),
        ({"method": "none"}, None),
    ],
)
def test_defaults_of_each_method(settings: dict[str, Any], expected: QuantSpec | None) -> None:
    assert spec_of(LayerSettings(**settings)) == expected


def test_every_key_may_be_left_out() -> None:
    full: dict[str, Any] = {
        "method": "gptq",
        "bits": 3,
        "group_size": 32,
        "zero": "symmetric",
        "symmetric_range": "restricted",
        "clip": "mse",
        "clip_steps": 50,
        "clip_shrink": 0.5,
        "clip_exponent": 2.0,
        "scale_dtype": "bfloat16",
        "gptq": {"order": "act", "damp": 0.02, "block": 64, "static_groups": True, "dead": "zero"},
        "awq": {"steps": 10, "weight_aware": True, "clip": False, "fold": False},
    }
    assert set(full) == set(LayerSettings.model_fields)
    for left_out in full:
        rest = {key: value for key, value in full.items() if key != left_out}
        assert spec_of(LayerSettings(**rest)) is not None, left_out
    recipe = parse_recipe({"vision": full})
    assert parse_recipe(recipe.to_dict()) == recipe


def test_precedence_is_all_then_component_then_overrides_in_order(
    models: dict[str, nn.Module],
) -> None:
    made = decisions(
        {
            "all": {"method": "rtn", "bits": 4, "gptq": {"damp": 0.05}},
            "language": {"bits": 3, "method": "gptq"},
            "overrides": [
                {"component": "language", "third": "end", "bits": 5, "gptq": {"order": "act"}},
                {"match": "*.2.fc2", "bits": 6},
                {"layer_type": "mlp", "component": "language", "block": "2-2", "group_size": 16},
            ],
        },
        models["blip2-opt"],
    )
    decoder = "language_model.model.decoder.layers"
    assert made["vision_model.encoder.layers.0.mlp.fc1"].method == "rtn"
    first = made[f"{decoder}.0.fc2"]
    assert first.spec == QuantSpec(3, 128, clip="mse")
    assert first.gptq == GptqOptions(damp=0.05)
    last = made[f"{decoder}.2.fc2"]
    assert last.spec == QuantSpec(6, 16, clip="mse")
    assert last.gptq == GptqOptions(order="act", damp=0.05)
    assert made[f"{decoder}.2.self_attn.q_proj"].spec == QuantSpec(5, 128, clip="mse")
    assert made["language_model.lm_head"].reason == "head, not selected"


def test_components_without_a_section_stay_dense(models: dict[str, nn.Module]) -> None:
    result = plan(parse_recipe({"connector": {"bits": 2}}), models["blip2-opt"])
    assert {unit.component for unit, _ in result.quantized()} == {"connector"}
    reasons = {reason for path, reason in result.coverage.dense if path.startswith("vision")}
    assert reasons == {"not in the recipe"}


def test_sixteen_bits_leave_a_linear_untouched(models: dict[str, nn.Module]) -> None:
    result = plan(parse_recipe({"all": {"bits": 4}, "vision": {"bits": 16}}), models["blip2-t5"])
    assert {unit.component for unit, _ in result.quantized()} == {"connector", "language"}
    assert result.layers[0][1] == LayerPlan("none", reason="16 bits")


@pytest.mark.parametrize("name", tiny.TINY)
@pytest.mark.parametrize("method", ["uniform", "rtn", "gptq", "awq"])
def test_the_changed_set_is_the_selected_set(
    models: dict[str, nn.Module], name: str, method: Any
) -> None:
    result = plan(Recipe.simple(method, 3), models[name])
    for unit, layer in result.layers:
        selected = unit.layer_type != "head" and unit.reaches_output
        assert (layer.spec is not None) == selected, unit.path
        assert layer.method == (method if selected else "none")
    counted = sum(sum(methods.values()) for methods in result.coverage.quantized.values())
    assert counted == len(result.quantized())
    assert counted + len(result.coverage.dense) == len(result.layers)
    json.dumps(result.coverage.to_dict())


def test_blocks_that_do_not_reach_the_output_are_skipped_and_named(
    models: dict[str, nn.Module],
) -> None:
    result = plan(Recipe.simple("rtn", 4), models["llava"])
    assert result.coverage.notes == ("skipped, because no output depends on them: vision block 3",)
    recipe = parse_recipe({"all": {}, "skip_unreachable": False})
    assert len(plan(recipe, models["llava"]).quantized()) == len(result.quantized()) + 6


def test_heads_are_selected_by_name_only(models: dict[str, nn.Module]) -> None:
    made = decisions({"connector": {"bits": 8}, "heads": ["*projector*"]}, models["llava"])
    assert [path for path, layer in made.items() if layer.spec is not None] == [
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]
    made = decisions(
        {
            "all": {"bits": 4},
            "heads": ["*itm_head"],
            "overrides": [{"layer_type": "head", "bits": 8}],
        },
        models["blip2-retrieval"],
    )
    assert made["itm_head"].spec == QuantSpec(8, 128, clip="mse")
    assert made["text_projection"].spec is None


def test_a_section_selects_a_component_of_heads_alone(models: dict[str, nn.Module]) -> None:
    """LLaVA's connector is its projector; that of BLIP-2 has a Q-Former, and keeps its head."""
    projector = [f"model.multi_modal_projector.linear_{n}" for n in (1, 2)]

    def packed(recipe: dict[str, Any], name: str) -> list[str]:
        made = decisions(recipe, models[name])
        return [path for path, layer in made.items() if layer.spec is not None]

    assert packed({"connector": {"bits": 8}}, "llava") == projector
    result = plan(parse_recipe({"connector": {"bits": 8}}), models["llava"])
    assert [note.partition(":")[0] for note in result.coverage.notes] == projector
    assert packed({"connector": {"bits": 8}, "heads": ["*linear_2"]}, "llava") == projector[1:]
    assert not set(projector) & set(packed({"all": {"bits": 4}}, "llava"))
    assert packed({"connector": {"bits": 16}}, "llava") == []
    assert "language_projection" not in packed({"connector": {"bits": 8}}, "blip2-opt")


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        (
            "blip2-retrieval",
            {"language": {}},
            "^language: expected a section of a component that the model has, vision or connector$",
        ),
        (
            "llava",
            {"all": {}, "overrides": [{"match": "*.fc3"}]},
            r"overrides.0 \(match=\*.fc3\): expected at least one linear, it selects none",
        ),
        (
            "blip2-opt",
            {"all": {}, "overrides": [{"match": "*lm_head"}]},
            r"selects none; heads are dense unless listed, expected heads: "
            r"\[language_model.lm_head\] beside it",
        ),
        (
            "blip2-opt",
            {"all": {}, "heads": ["*itm_head"]},
            "heads: expected '\\*itm_head' to match",
        ),
        ("blip2-opt", {"all": {}, "heads": ["*lm_head"]}, "expected untie_heads: true"),
        ("blip2-opt", {"vision": {}, "heads": ["*language_projection"]}, "no settings for it"),
        (
            "blip2-opt",
            {"all": {"group_size": 64}, "overrides": [{"third": "end", "method": "uniform"}]},
            r"layers.2.*: group_size: expected none with method uniform",
        ),
    ],
)
def test_selectors_without_effect_and_contradictions_are_refused(
    models: dict[str, nn.Module], name: str, recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(MmqError, match=message) as caught:
        plan(parse_recipe(recipe), models[name])
    assert "\n" not in str(caught.value)


def test_a_tied_head_can_be_asked_for(models: dict[str, nn.Module]) -> None:
    recipe = {"all": {}, "heads": ["*lm_head"], "untie_heads": True}
    assert decisions(recipe, models["blip2-opt"])["language_model.lm_head"].spec is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vison: {bits: 4}", r"^vison: unknown key, did you mean 'vision'\?$"),
        ("vision: {bit: 4}", r"^vision.bit: unknown key, did you mean 'bits'\?$"),
        ("all: {gptq: {dampp: 1}}", r"^all.gptq.dampp: unknown key, did you mean 'damp'\?$"),
        ("overrides: [{mach: '*'}]", r"^overrides.0.mach: unknown key, did you mean 'match'\?"),
        ("calibration: {zzz: 1}", "^calibration.zzz: unknown key, expected one of samples, "),
        ("all: {bits: 1}", "^all.bits: expected 2 to 8, or 16, got 1$"),
        ("all: {bits: 9}", "got 9$"),
        ("all: {bits: four}", '^all.bits: expected a valid integer.*got "four"$'),
        ("all: {group_size: 0}", r"^all.group_size: .*per channel\), got 0$"),
        ("all: {method: gtpq}", r"^all.method: expected 'none', 'uniform', .*got \"gtpq\"$"),
        ("all: {gptq: {damp: 2}}", "^all.gptq.damp: expected less than or equal to 1, got 2$"),
        ("all: {gptq: {order: act, static_groups: false}}", "order act needs static groups"),
        ("all: {method: awq, clip: mse}", "clip: expected none with method awq"),
        ("all: {method: uniform, group_size: 32}", "rtn has groups"),
        ("overrides: [{bits: 3}]", "^overrides: override 0: expected one of match, component"),
        ("overrides: [{block: 7-3}]", "expected an index, a list or a range as 3-7, got '7-3'"),
        ("calibration: {samples: 0}", "^calibration.samples: .* got 0$"),
        ("vision: {bits: 4, bits: 8}", "expected each key once, got 'bits' twice"),
        ("vision:", r"^vision: expected a value or \{\}, got nothing$"),
        ("overrides: [{match: '*', bits: }]", r"^overrides\.0\.bits: expected a value"),
        ("on: {bits: 4}", "Keys should be strings, got true"),
        ("vision: 4", "^vision: expected a valid dictionary.* got 4$"),
        ("heads: itm_head", '^heads: expected a valid tuple, got "itm_head"$'),
        ("[1, 2]", "expected a mapping of sections, got list"),
        ("a: [", "expected YAML or JSON, got while parsing"),
    ],
)
def test_bad_recipes_give_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(MmqError, match=message) as caught:
        parse_recipe(text)
    assert "\n" not in str(caught.value)


def test_files_and_text_forms_agree(tmp_path: Path) -> None:
    data = {
        "all": {"method": "awq", "bits": 3, "awq": {"weight_aware": True}},
        "overrides": [{"match": ["*.fc1", "*.fc2"], "block": [0, 2], "bits": 8}],
        "calibration": {"samples": 16, "upstream": "full", "max_tokens": 64},
        "seed": 7,
    }
    yaml_text = """
        all: {method: awq, bits: 3, awq: {weight_aware: true}}
        overrides:
          - {match: ["*.fc1", "*.fc2"], block: [0, 2], bits: 8}
        calibration: {samples: 16, upstream: full, max_tokens: 64}
        seed: 7
    """
    (tmp_path / "r.yaml").write_text(yaml_text)
    (tmp_path / "r.json").write_text(json.dumps(data))
    recipe = parse_recipe(data)
    assert load_recipe(tmp_path / "r.yaml") == recipe == load_recipe(tmp_path / "r.json")
    assert parse_recipe(recipe.to_dict()) == recipe
    assert parse_recipe("") == Recipe()
    (tmp_path / "r.yaml").write_text("seed: 7")
    with pytest.raises(MmqError, match="expected all, vision, connector, language or overrides"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("vison: {}")
    with pytest.raises(MmqError, match=r"r\.yaml: vison: unknown key"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(MmqError, match="expected a readable recipe"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(MmqError, match=r"expected a recipe in \.yaml"):
        load_recipe(tmp_path / "r.toml")


def test_options_are_validated_and_resolve_the_automatic_order() -> None:
    grouped, channel = QuantSpec(4, 32), QuantSpec(4, -1)
    options = GptqOptions()
    assert options.resolve_order(grouped, 64) == "group"
    assert options.resolve_order(grouped, 32) == "none"
    assert options.resolve_order(channel, 64) == "none"
    assert options.resolve_static_groups(grouped, 64)
    assert not options.resolve_static_groups(channel, 64)
    assert GptqOptions(static_groups=False).resolve_order(grouped, 64) == "none"
    for bad in ({"order": "x"}, {"dead": "x"}, {"damp": -1.0}, {"block": 0}):
        with pytest.raises(MmqError, match=r"gptq\."):
            GptqOptions(**bad)  # type: ignore[arg-type]
    with pytest.raises(MmqError, match=r"awq\.steps"):
        AwqOptions(steps=0)
    with pytest.raises(MmqError, match=r"awq\.search: expected one of ranked, exhaustive, got 'x'"):
        AwqOptions(search="x")  # type: ignore[arg-type]
