# SPDX-License-Identifier: Apache-2.0
"""Inspection without weights: the published parameter counts and nominal bits per weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch

from mmq.errors import MmqError
from mmq.inspect import format_inspection, inspect_model, nominal_bpw
from mmq.models import resolve
from mmq.presets import PRESETS, build_meta

# preset: (total, linear weights per component, the same with biases, bits per weight at 3, 4, 8)
PUBLISHED: dict[str, tuple[int, dict[str, int], dict[str, int], tuple[float, float, float]]] = {
    "blip2-opt-2.7b": (
        3_744_761_856,
        {"vision": 984_023_040, "connector": 104_988_672, "language": 2_516_582_400},
        {"vision": 984_537_216, "connector": 105_090_048, "language": 2_517_319_680},
        (3.483, 4.446, 8.297),
    ),
    "blip2-itm-vit-g-coco": (
        1_172_623_618,
        {"vision": 984_023_040, "connector": 161_611_776},
        {"vision": 984_537_216, "connector": 161_759_232},
        (3.299, 4.276, 8.184),
    ),
    "llava-1.5-7b": (
        7_063_427_072,
        {"vision": 301_989_888, "language": 6_476_005_376},
        {"vision": 301_989_888 + 24 * 9216, "language": 6_476_005_376},
        (3.525, 4.485, 8.323),
    ),
}


@pytest.fixture(scope="module")
def inspections() -> dict[str, dict[str, Any]]:
    return {name: inspect_model(name) for name in PRESETS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(inspections: dict[str, dict[str, Any]], name: str) -> None:
    total, weights, with_biases, bpw = PUBLISHED[name]
    found = inspections[name]
    assert found["parameters"] == total
    counts = {part: data["counts"] for part, data in found["components"].items()}
    linear = {part: kinds["linear"] for part, kinds in counts.items() if kinds["linear"]}
    assert linear == weights
    assert {part: linear[part] + counts[part]["linear_bias"] for part in linear} == with_biases
    assert tuple(round(value, 3) for value in found["nominal_bpw"].values()) == bpw


def test_other_published_totals(inspections: dict[str, dict[str, Any]]) -> None:
    """224 px has 420 position embeddings of width 1408 fewer than 364 px; T5 has one embedding."""
    assert inspections["blip2-itm-vit-g"]["parameters"] == 1_172_623_618 - 420 * 1408
    t5 = inspections["blip2-flan-t5-xl"]
    encoder = 24 * (4 * 2048**2 + 3 * 2048 * 5120)
    decoder = encoder + 24 * 4 * 2048**2
    assert [stack["weights"] for stack in t5["components"]["language"]["stacks"]] == [
        encoder,
        decoder,
    ]
    assert t5["components"]["language"]["counts"]["embedding"] == 32128 * 2048 + 2 * 32 * 32


def test_nominal_bpw_of_a_mixed_setting() -> None:
    """Only vision at 4 bits: (4 n + 16 (total - n)) / total, by hand."""
    model = build_meta("llava-1.5-7b")
    n, total = 301_989_888, 7_063_427_072
    expected = (4 * n + 16 * (total - n)) / total
    assert nominal_bpw(resolve(model), total, {"vision": 4}) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_parts_add_up_and_the_page_prints(
    inspections: dict[str, dict[str, Any]], name: str
) -> None:
    found = json.loads(json.dumps(inspections[name]))
    model = build_meta(name)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["unlisted_linears"] == []
    for part in found["components"].values():
        assert part["parameters"] == sum(part["counts"].values())
        stacks = part["stacks"]
        assert part["counts"]["linear"] == sum(stack["weights"] for stack in stacks)
        for stack in stacks:
            thirds = stack["weights_by_type_and_third"].values()
            assert stack["weights"] == sum(sum(third.values()) for third in thirds)
            assert sum(stack["blocks_per_third"].values()) == stack["blocks"]
    text = format_inspection(found)
    assert text.isascii()
    for part in found["components"]:
        assert f"\n{part}  " in text
    assert f"{found['parameters']:,}" in text


def test_shared_inputs_folds_and_dead_blocks_are_shown(
    inspections: dict[str, dict[str, Any]],
) -> None:
    text = format_inspection(inspections["blip2-opt-2.7b"])
    assert "AWQ scale into self_attn.qkv[2816:4224]" in text
    assert "reads crossattention.kv (one tensor for all blocks), AWQ scale into in_scale" in text
    assert "tied: language_model.model.decoder.embed_tokens.weight = language_model.lm_head" in text
    text = format_inspection(inspections["llava-1.5-7b"])
    assert "blocks from index 23 on do not reach the output" in text
    assert inspections["llava-1.5-7b"]["tied"] == []


def test_a_folder_needs_only_its_configuration(tmp_path: Path) -> None:
    model = tiny.blip2_retrieval()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    from_folder, from_model = inspect_model(tmp_path), inspect_model(model)
    assert from_folder.pop("source") == str(tmp_path)
    assert from_model.pop("source") == "Blip2ForImageTextRetrieval"
    assert from_folder == from_model
    assert all(parameter.is_meta for parameter in build_meta(tmp_path).parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected one of blip2-opt-2\.7b, .* or a folder with a config\.json, got "),
        ("{", r"config\.json: expected JSON"),
        ("{}", r"expected architectures: \[one of Blip2.*\], got None"),
        ('{"architectures": ["BertModel"]}', r"got \['BertModel'\]"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(MmqError, match=message):
        inspect_model(tmp_path)


def test_a_parameter_outside_all_parts_is_refused() -> None:
    model = tiny.llava()
    model.stray = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(MmqError, match="stray: expected a parameter below one of"):
        inspect_model(model)
