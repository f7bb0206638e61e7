# SPDX-License-Identifier: Apache-2.0
"""The study's three dialects: sizes of the sweep, thirds, coverage, forgiving and strict
reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn

from mmq.errors import MmqError
from mmq.formats.study import (
    import_study_config,
    load_study_config,
    uniform_files,
    uniform_grid,
)
from mmq.options import AwqOptions, GptqOptions
from mmq.plan import LayerPlan, plan
from mmq.presets import build_meta
from mmq.recipe import Recipe
from mmq.spec import QuantSpec


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: build() for name, build in tiny.TINY.items()}


def quantized(recipe: Recipe, model: nn.Module) -> dict[str, LayerPlan]:
    return {unit.path: layer for unit, layer in plan(recipe, model).quantized()}


def entry(part: str, group: str = "ALL", kind: str = "BOTH", bits: int = 4) -> dict[str, Any]:
    return {"model_part": part, "layer_group": group, "layer_type": kind, "num_bits": bits}


def test_the_sweep_has_the_sizes_of_the_study() -> None:
    grid, files = uniform_grid(), uniform_files()
    per_setting: dict[tuple[int, str], int] = {}
    for entries in grid:
        key = (entries[0]["num_bits"], entries[0]["layer_type"])
        per_setting[key] = per_setting.get(key, 0) + 1
    assert list(per_setting.values()) == [93] * 18
    assert list(per_setting)[:4] == [(16, "MLP"), (16, "ATTENTION"), (16, "BOTH"), (8, "MLP")]
    assert (len(grid), len(files)) == (1674, 1728)
    assert len({json.dumps(entries) for entries in files}) == 1621
    assert sum(not entries for entries in files) == 1


def test_every_file_of_the_sweep_imports() -> None:
    for entries in uniform_files()[::7]:
        for semantics in ("corrected", "as-executed"):
            import_study_config(entries, semantics)  # type: ignore[arg-type]


def test_thirds_of_the_published_model() -> None:
    model = build_meta("blip2-opt-2.7b")
    sizes = {"VIT": (13, 13, 13), "QFORMER": (4, 4, 4), "LLM": (10, 11, 11)}
    for part, expected in sizes.items():
        for group, count in zip(("FIRST", "MIDDLE", "LAST"), expected, strict=True):
            result = plan(import_study_config([entry(part, group)]).recipe, model)
            blocks = {unit.block for unit, _ in result.quantized()}
            assert len(blocks) == count, (part, group)


def test_corrected_selectors_mean_what_they_say(models: dict[str, nn.Module]) -> None:
    model = models["blip2-opt"]
    made = quantized(import_study_config([entry("LLM", kind="ATTENTION")]).recipe, model)
    assert len(made) == 3 * 4
    assert all(".decoder.layers." in path and "self_attn" in path for path in made)
    assert {layer.spec for layer in made.values()} == {QuantSpec(4, -1, "float", per_tensor=True)}
    made = quantized(import_study_config([entry("QFORMER")]).recipe, model)
    assert any("crossattention" in path for path in made)
    assert any("output_query" in path for path in made)
    assert len(made) == 3 * 6 + 2 * 4


def test_as_executed_covers_what_the_code_changed(models: dict[str, nn.Module]) -> None:
    model = models["blip2-opt"]

    def executed(*entries: dict[str, Any]) -> dict[str, LayerPlan]:
        return quantized(import_study_config(list(entries), "as-executed").recipe, model)

    assert executed(entry("LLM", kind="ATTENTION")) == {}
    assert executed(entry("QFORMER", kind="MLP")) == {}
    assert all(path.endswith(("fc1", "fc2")) for path in executed(entry("LLM")))
    made = executed(entry("QFORMER", "LAST"))
    assert len(made) == 4
    assert all(".layer.2.attention." in path for path in made)
    corrected = quantized(import_study_config([entry("VIT")]).recipe, model)
    assert executed(entry("VIT")) == corrected
    notes = import_study_config([entry("LLM", kind="ATTENTION")], "as-executed").notes
    assert "entry 0: left out, the original changes none of these linears" in notes
    assert notes[-1].startswith("nothing is quantized")


def test_sixteen_bits_are_untouched_and_noted(models: dict[str, nn.Module]) -> None:
    imported = import_study_config([entry("VIT", bits=16), entry("LLM", bits=8)])
    made = quantized(imported.recipe, models["blip2-opt"])
    assert all(".decoder." in path for path in made)
    assert imported.notes[0].startswith("entry 0.num_bits: 16 bits are imported as untouched")


def test_overlapping_entries_are_noted(models: dict[str, nn.Module]) -> None:
    imported = import_study_config([entry("VIT", bits=8), entry("VIT", "FIRST", "MLP", bits=4)])
    assert imported.notes[0].startswith("entry 1: overlaps an earlier entry and wins")
    made = quantized(imported.recipe, models["blip2-opt"])
    bits = [layer.spec.bits for path, layer in made.items() if layer.spec and "mlp" in path]
    assert bits == [4, 4, 8, 8, 8, 8, 8, 8]


def test_gptq(models: dict[str, nn.Module]) -> None:
    data = {
        "vision": {"bits": 8, "group_size": 64, "use_symmetric": False, "use_act_order": True},
        "qformer": {"bits": 16},
        "language": {"bits": 3, "percent_dampening": 0.02, "use_static_groups": True},
    }
    imported = import_study_config(data)
    made = quantized(imported.recipe, models["blip2-opt"])
    vision = made["vision_model.encoder.layers.0.mlp.fc1"]
    assert vision.spec == QuantSpec(8, 64, "integer")
    assert vision.gptq == GptqOptions("act", block=32)
    language = made["language_model.model.decoder.layers.0.fc1"]
    assert language.spec == QuantSpec(3, -1, "symmetric")
    assert language.gptq == GptqOptions("none", damp=0.02, block=32, static_groups=True)
    assert not any("qformer" in path or "lm_head" in path for path in made)
    assert any("act-order implies static groups here" in note for note in imported.notes)


def test_gptq_as_executed_adds_the_heads(models: dict[str, nn.Module]) -> None:
    data = {"vision": {"bits": 8}, "qformer": {"bits": 16}, "language": {"bits": 3}}
    corrected = quantized(import_study_config(data).recipe, models["blip2-opt"])
    executed = quantized(import_study_config(data, "as-executed").recipe, models["blip2-opt"])
    heads = {"language_model.lm_head", "language_projection"}
    assert set(executed) - set(corrected) == heads
    assert {executed[head].spec for head in heads} == {QuantSpec(3, -1, "symmetric")}
    assert executed["language_projection"].gptq.dead == "zero"
    without = import_study_config({"vision": {"bits": 4}, "language": {"bits": 4}}, "as-executed")
    assert "lm_head" in quantized(without.recipe, models["llava"])


BLIP2_AWQ: dict[str, dict[str, int]] = {
    "vit_layers": {"self_attn": 3, "self_attn_output": 4, "fc1": 5, "fc2": 6},
    "qformer_layers": {
        "self_attn": 2,
        "self_attn_output": 3,
        "intermediate_query": 4,
        "output_query": 5,
        "cross_attn": 6,
        "cross_attn_output": 7,
    },
    "llm_layers": {"self_attn": 8, "self_attn_output": 3, "fc1": 4, "fc2": 5},
}


def test_awq_for_blip2(models: dict[str, nn.Module]) -> None:
    made = quantized(import_study_config(BLIP2_AWQ).recipe, models["blip2-opt"])
    assert len(made) == 4 * 4 + (3 * 6 + 2 * 4) + 3 * 6
    bits = {path: layer.spec.bits for path, layer in made.items() if layer.spec}
    assert {layer.awq for layer in made.values()} == {AwqOptions()}
    assert bits["vision_model.encoder.layers.3.self_attn.qkv"] == 3
    assert bits["vision_model.encoder.layers.3.mlp.fc2"] == 6
    layer = "qformer.encoder.layer.2"
    assert bits[f"{layer}.attention.attention.value"] == 2
    assert bits[f"{layer}.attention.output.dense"] == 3
    assert bits[f"{layer}.crossattention.attention.key"] == 6
    assert bits[f"{layer}.crossattention.output.dense"] == 7
    assert bits[f"{layer}.intermediate_query.dense"] == 4
    decoder = "language_model.model.decoder.layers.1"
    assert bits[f"{decoder}.self_attn.q_proj"] == 8
    assert bits[f"{decoder}.self_attn.out_proj"] == 3


def test_awq_selects_all_blocks_of_the_published_model() -> None:
    """Two-digit block indices too."""
    made = quantized(import_study_config(BLIP2_AWQ).recipe, build_meta("blip2-opt-2.7b"))
    assert len(made) == 156 + 96 + 192


def test_partial_awq_and_retrieval_text_parts(models: dict[str, nn.Module]) -> None:
    data = {"qformer_layers": {"intermediate_txt": 3, "output_txt": 4}, "vit_layers": {}}
    made = quantized(import_study_config(data).recipe, models["blip2-retrieval"])
    assert len(made) == 6
    assert all(".intermediate.dense" in path or ".output.dense" in path for path in made)
    assert not any("attention" in path for path in made)
    with pytest.raises(MmqError, match="selects none"):
        plan(import_study_config(data).recipe, models["blip2-opt"])


def test_awq_for_llava(models: dict[str, nn.Module]) -> None:
    data = {"vision_layers": {"self_attn": 4, "mlp": 8}, "llm_layers": {"mlp": 3}}
    made = quantized(import_study_config(data).recipe, models["llava"])
    bits = {path: layer.spec.bits for path, layer in made.items() if layer.spec}
    assert bits["model.vision_tower.encoder.layers.0.self_attn.q_proj"] == 4
    assert bits["model.language_model.layers.0.mlp.up_proj"] == 3
    assert len(bits) == 3 * 6 + 3 * 3
    alone = import_study_config({"llm_layers": {"self_attn": 4, "mlp": 4}})
    assert len(quantized(alone.recipe, models["llava"])) == 3 * 7


def test_trailing_commas_are_accepted_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"llm_layers": {"fc1": 4, "fc2": 4,}, }')
    imported = load_study_config(path)
    assert imported.notes[0].startswith("warning: the file has trailing commas")
    assert imported.recipe == import_study_config({"llm_layers": {"fc1": 4, "fc2": 4}}).recipe
    text = json.dumps([entry("a,]b")]).replace("}]", "},]")
    with pytest.raises(MmqError, match=r"part: expected one of .*got 'a,\]b'"):
        import_study_config(text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "expected JSON, got"),
        ("{}", "expected a list or a non-empty mapping, got {}"),
        ("3", "expected a list or a non-empty mapping, got 3"),
        ({"vit": {}}, r"expected keys of one dialect: vision, qformer, .* got vit"),
        ([{"model_part": "VIT"}], "entry 0: expected the keys model_part, layer_group"),
        ([entry("VITT")], r"entry 0\.model_part: expected one of VIT, QFORMER, LLM, got 'VITT'"),
        ([entry("VIT", "FRONT")], r"layer_group: expected one of FIRST, MIDDLE, LAST, ALL"),
        ([entry("VIT", bits=1)], r"entry 0\.num_bits: expected 2 to 8, or 16, got 1"),
        ({"vision": {"group_size": 1}}, "vision: expected a mapping with bits"),
        ({"vision": {"bits": 4, "damp": 1}}, "vision: expected keys of bits, .* got damp"),
        ({"vit_layers": {"fc3": 4}}, "vit_layers: expected one of self_attn, .* got 'fc3'"),
        ({"vit_layers": {"fc1": "4"}}, r"vit_layers\.fc1: expected 2 to 8, or 16, got '4'"),
        ({"vit_layers": 4}, "vit_layers: expected a mapping of kinds to bits, got 4"),
    ],
)
def test_bad_configurations_give_one_clear_line(source: Any, message: str) -> None:
    with pytest.raises(MmqError, match=message) as caught:
        import_study_config(source)
    assert "\n" not in str(caught.value)


def test_bad_files_and_semantics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MmqError, match=r"absent\.json: expected a readable file"):
        load_study_config(tmp_path / "absent.json")
    with pytest.raises(MmqError, match="expected corrected or as-executed, got 'x'"):
        import_study_config([], "x")  # type: ignore[arg-type]
