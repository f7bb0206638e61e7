# SPDX-License-Identifier: Apache-2.0
"""Quantizing whole tiny models: selection, propagation, folds, records, refusals."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import padded, samples_for
from torch import Tensor, nn

import mmq
from mmq.calibrate import advance, calibrating, capture, gather, run_block
from mmq.errors import MmqError
from mmq.hessian import Hessian
from mmq.linear import QuantLinear
from mmq.manifest import Manifest
from mmq.models import architecture_of, blocks_of, resolve
from mmq.quantize import ProgressEvent
from mmq.recipe import Recipe, parse_recipe
from mmq.samples import micro_batches, split_samples
from mmq.stored import stored_tensors

MODULE: Any = importlib.import_module("mmq.quantize")  # ``mmq.quantize`` is the function.
NAMES = sorted(tiny_models.TINY)


def tiny(name: str) -> Any:
    return tiny_models.randomize(tiny_models.TINY[name](), seed=1)


def simple(method: Any, bits: int = 4, **more: Any) -> Recipe:
    group_size = None if method == "uniform" else 16
    return Recipe.simple(method, bits, group_size=group_size, **more)


def skewed(model: Any) -> Any:
    """The model with a few strong channels in every norm, as real models have."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter[:2] *= 12.0
    return model


def mean_error(manifest: Manifest) -> float:
    errors = [record.relative_error for record in manifest.linears]
    return sum(error for error in errors if error is not None) / len(errors)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("blip2-opt", "uniform"),
        ("blip2-opt", "gptq"),
        ("blip2-t5", "awq"),
        ("blip2-retrieval", "rtn"),
        ("blip2-retrieval", "awq"),
        ("llava", "gptq"),
        ("llava-gqa", "awq"),
    ],
)
def test_changed_modules_are_the_selected_ones(name: str, method: str) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reference = tiny_models.outputs(model)
    manifest = mmq.quantize(model, simple(method, 8), samples_for(model))
    expected = {unit.path for unit in resolve(model) if unit.block is not None}
    if "llava" in name:
        expected -= {path for path in expected if ".vision_tower.encoder.layers.3." in path}
    packed = {path for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert packed == expected == {record.path for record in manifest.linears}
    if method != "awq":  # AWQ also writes norms.
        after = model.state_dict()
        kept = {key for key in before if key.rpartition(".")[0] not in packed}
        assert all(torch.equal(after[key], before[key]) for key in kept)
    for got, want in zip(tiny_models.outputs(model), reference, strict=True):
        assert float((got - want).norm() / want.norm()) < 0.1
    assert all(record.tokens for record in manifest.linears)
    assert all(record.method == method for record in manifest.linears)


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-retrieval", "llava"])
def test_gptq_and_awq_beat_rounding_at_three_bits(name: str) -> None:
    errors = {}
    for method in ("rtn", "gptq", "awq"):
        model = skewed(tiny(name))
        errors[method] = mean_error(mmq.quantize(model, simple(method, 3), samples_for(model)))
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]


def test_sixteen_bits_leave_the_model_bitwise() -> None:
    model = tiny("llava")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reference = tiny_models.outputs(model)
    manifest = mmq.quantize(model, Recipe.simple("gptq", 16), samples_for(model))
    assert manifest.linears == []
    assert manifest.bits_per_weight is None
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(tiny_models.outputs(model)[0], reference[0])


@pytest.mark.parametrize("name", ["blip2-t5", "blip2-retrieval", "llava"])
def test_block_inputs_come_from_the_quantized_blocks_before(name: str) -> None:
    """A Hessian of the last block, seen by GPTQ, is that of a forward pass through packed blocks.

    The last block alone is quantized on top of a model whose other blocks are packed: its codes are
    those of quantizing everything at once.
    """
    whole, parts = tiny(name), tiny(name)
    samples = samples_for(whole)
    mmq.quantize(whole, simple("gptq", 3), samples)
    architecture = architecture_of(parts)
    stack = architecture.stacks[-1]
    last = len(blocks_of(parts, stack)) - 1
    for path, module in whole.named_modules():
        if isinstance(module, QuantLinear) and not path.startswith(f"{stack.path}.{last}."):
            parts.set_submodule(path, copy.deepcopy(module))
    batches = micro_batches(split_samples(samples, encoder_decoder="t5" in name), 8)
    units = [u for u in resolve(parts) if u.stack == stack.name and u.block == last]
    first = [u for u in units if u.stage == 0]
    hooks = {parts.get_submodule(u.path): Hessian(u.k, name=u.path) for u in first}
    with calibrating(parts):
        calls = capture(parts, architecture, stack, batches)
        for block in list(blocks_of(parts, stack))[:-1]:
            calls = [advance(stack, call, run_block(block, call)) for call in calls]
        gather(blocks_of(parts, stack)[last], calls, hooks)
    for unit in first:
        linear = parts.get_submodule(unit.path)
        spec = mmq.QuantSpec(3, 16, clip="mse")
        packed, _ = mmq.gptq(linear.weight.detach(), hooks[linear].finish(), spec)
        got = whole.get_submodule(unit.path)
        assert torch.equal(got.packed.qweight, packed.qweight), unit.path


def test_upstream_full_sees_the_unquantized_model() -> None:
    """With ``upstream: full`` a linear's result does not depend on what else is quantized."""
    alone, whole = tiny("blip2-opt"), tiny("blip2-opt")
    samples = samples_for(alone)
    calibration = {"upstream": "full"}
    settings = {"method": "gptq", "bits": 3, "group_size": 16}
    mmq.quantize(whole, parse_recipe({"all": settings, "calibration": calibration}), samples)
    only = {"overrides": [{"match": "*decoder.layers.2.fc2", **settings}]}
    manifest = mmq.quantize(alone, parse_recipe({**only, "calibration": calibration}), samples)
    (record,) = manifest.linears
    a, b = (m.get_submodule(record.path).packed for m in (alone, whole))
    assert torch.equal(a.qweight, b.qweight)
    quantized = tiny("blip2-opt")
    mmq.quantize(quantized, parse_recipe({"all": settings}), samples)
    assert not torch.equal(a.qweight, quantized.get_submodule(record.path).packed.qweight)


def test_heads_two_outputs_and_sequence() -> None:
    model = tiny("blip2-retrieval")
    settings = {"method": "gptq", "bits": 4, "group_size": 16}
    recipe = parse_recipe({"all": settings, "heads": ["itm_head", "vision_projection"]})
    manifest = mmq.quantize(model, recipe, samples_for(model))
    assert model.itm_head.packed.n == 2
    assert not isinstance(model.text_projection, QuantLinear)
    assert {r.path for r in manifest.linears if r.block is None} == {
        "itm_head",
        "vision_projection",
    }
    llava = tiny("llava")
    recipe = parse_recipe(
        {"connector": {"method": "awq", "bits": 3, "group_size": 8}, "heads": ["*linear_?"]}
    )
    manifest = mmq.quantize(llava, recipe, samples_for(llava))
    assert [r.path.rpartition(".")[2] for r in manifest.linears] == ["linear_1", "linear_2"]
    assert all(r.in_scale == (r.alpha != 0) and r.fold is None for r in manifest.linears)


@pytest.mark.parametrize("name", NAMES)
def test_awq_scales_preserve_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds and run-time divisors of all blocks, before rounding: outputs within 1e-5 relative."""
    model = skewed(tiny(name))
    reference = tiny_models.outputs(model)
    scaled: list[str] = []

    def keep(self: Any, unit: Any, layer: Any, stats: Any, scaling: Any, *rest: Any) -> None:
        linear = self.model.get_submodule(unit.path)
        self.records.append(None)
        if scaling is not None and scaling.in_scale is not None:
            with torch.no_grad():
                linear.weight.mul_(scaling.in_scale)
            linear.register_forward_pre_hook(lambda m, args: (args[0] / scaling.in_scale,))
        if scaling is not None and scaling.search.alpha > 0:
            scaled.append("in_scale" if scaling.fold is None else "fold")

    monkeypatch.setattr(MODULE._Run, "_pack", keep)
    monkeypatch.setattr(MODULE._Run, "_keep", lambda self, packed: None)
    monkeypatch.setattr(MODULE, "_manifest", lambda *args: None)
    mmq.quantize(model, simple("awq", 3), samples_for(model))
    assert scaled.count("fold") > 5
    assert scaled.count("in_scale") > 1
    for got, want in zip(tiny_models.outputs(model), reference, strict=True):
        assert float((got - want).norm() / want.norm()) < 1e-5


def test_awq_does_not_fold_into_what_stays_dense() -> None:
    """v_proj is left alone by the recipe, so out_proj keeps its scale; q without k, v likewise."""
    model = skewed(tiny("llava"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    awq = {"method": "awq", "bits": 3, "group_size": 16}
    recipe = parse_recipe(
        {"overrides": [{"match": ["*.o_proj", "*.q_proj"], "stack": "decoder", **awq}]}
    )
    manifest = mmq.quantize(model, recipe, samples_for(model))
    packed = {record.path for record in manifest.linears}
    assert len(packed) == 6
    assert all(record.fold is None for record in manifest.linears)
    assert any(record.in_scale for record in manifest.linears)
    after = model.state_dict()
    kept = {key for key in before if key.rpartition(".")[0] not in packed}
    assert all(torch.equal(after[key], before[key]) for key in kept)


def test_awq_beats_exponent_zero_on_skewed_inputs() -> None:
    manifest = mmq.quantize(
        skewed(tiny("llava")), simple("awq", 3), samples_for(tiny_models.llava())
    )
    alphas = [record.alpha for record in manifest.linears]
    assert sum(alpha is not None and alpha > 0 for alpha in alphas) > len(alphas) / 2
    assert {record.fold is not None for record in manifest.linears} == {True, False}


def test_awq_result_does_not_depend_on_sample_order_but_on_every_sample() -> None:
    samples = samples_for(tiny_models.llava(), 6)
    results = []
    changed = [*samples[:-1], {**samples[-1], "pixel_values": 30 * samples[-1]["pixel_values"]}]
    for given in (samples, samples[::-1], changed):
        manifest = mmq.quantize(skewed(tiny("llava")), simple("awq", 3), given)
        results.append([record.alpha for record in manifest.linears])
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_query_and_key_rows_of_a_fused_linear_are_not_clipped() -> None:
    settings = {"method": "awq", "bits": 3, "group_size": 8}
    clipped, plain = skewed(tiny("blip2-opt")), skewed(tiny("blip2-opt"))
    samples = samples_for(clipped)
    only = {"match": "*.layers.0.self_attn.qkv", "stack": "vision"}
    mmq.quantize(clipped, parse_recipe({"overrides": [{**only, **settings}]}), samples)
    no_clip = {**settings, "awq": {"clip": False}}
    mmq.quantize(plain, parse_recipe({"overrides": [{**only, **no_clip}]}), samples)
    path = "vision_model.encoder.layers.0.self_attn.qkv"
    a, b = (m.get_submodule(path).packed.grid().scales for m in (clipped, plain))
    third = a.shape[0] // 3
    assert torch.equal(a[: 2 * third], b[: 2 * third])
    assert bool((a[2 * third :] < b[2 * third :]).any())


def test_padded_batch_gives_the_same_codes_as_single_samples() -> None:
    one, other = tiny("llava"), tiny("llava")
    singles = samples_for(one, 5)
    mmq.quantize(one, simple("gptq", 4), singles)
    mmq.quantize(other, simple("gptq", 4), [padded(singles, "left")])
    a, b = stored_tensors(one), stored_tensors(other)
    same = [torch.equal(a[key], b[key]) for key in a if key.endswith("qweight")]
    assert all(same)


def test_mixed_bits_orders_and_methods_are_recorded() -> None:
    model = tiny("llava")
    recipe = parse_recipe(
        {
            "vision": {"method": "rtn", "bits": 8, "group_size": 16},
            "language": {"method": "gptq", "bits": 4, "group_size": 16, "gptq": {"order": "act"}},
            "overrides": [
                {"component": "language", "third": "end", "bits": 2},
                {"match": "*layers.0.mlp.down_proj", "stack": "decoder", "method": "awq"},
                {"match": "*.layers.1.self_attn.o_proj", "stack": "decoder", "bits": 16},
            ],
            "seed": 7,
        }
    )
    samples = samples_for(model)
    ids = [f"image-{index}" for index in range(len(samples))]
    manifest = mmq.quantize(model, recipe, samples, sample_ids=ids)
    for record in manifest.linears:
        packed = model.get_submodule(record.path).packed
        assert (packed.bits, packed.method) == (record.bits, record.method)
        assert record.spec["bits"] == record.bits
    bits = {record.path: record.bits for record in manifest.linears}
    assert bits["model.language_model.layers.2.mlp.up_proj"] == 2
    assert bits["model.language_model.layers.0.mlp.up_proj"] == 4
    assert bits["model.vision_tower.encoder.layers.0.mlp.fc1"] == 8
    assert any(record.perm for record in manifest.linears)
    reasons = {record.path: record.reason for record in manifest.dense}
    assert reasons["model.language_model.layers.1.self_attn.o_proj"] == "16 bits"
    assert reasons["model.vision_tower.encoder.layers.3.mlp.fc1"] == "no output depends on it"
    assert reasons["lm_head"] == "head, not selected"
    assert manifest.sample_ids == ids
    assert manifest.seed == 7
    assert parse_recipe(manifest.recipe) == recipe
    assert manifest.coverage["matches"]
    assert any("block 3" in note for note in manifest.notes)
    again = Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    assert again == manifest
    assert "linears packed" in manifest.summary()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_stored_tensors(name: str) -> None:
    model = tiny(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    manifest = mmq.quantize(model, simple("gptq", 3), samples_for(model))
    tensors = stored_tensors(model)
    payload = sum(t.numel() * t.element_size() for t in tensors.values())
    assert manifest.parameters == parameters
    assert manifest.payload_bytes == payload
    packed = {
        f"{record.path}.{part}"
        for record in manifest.linears
        for part in ("qweight", "scales", "qzeros", "mins", "perm", "in_scale")
    }
    packed_bytes = sum(t.numel() * t.element_size() for n, t in tensors.items() if n in packed)
    assert packed_bytes == manifest.packed_bytes == sum(r.stored_bytes for r in manifest.linears)
    assert sum(c.packed_bytes for c in manifest.components.values()) == packed_bytes
    assert manifest.bits_per_weight == 8 * packed_bytes / manifest.packed_weights
    assert manifest.model_bits_per_weight == 8 * payload / parameters


def test_tied_head_is_refused_or_untied() -> None:
    settings = {"method": "rtn", "bits": 4, "group_size": 16}
    recipe = {"all": settings, "heads": ["*lm_head"]}
    model = tiny("blip2-opt")
    embedding = model.get_input_embeddings().weight
    assert model.language_model.lm_head.weight.data_ptr() == embedding.data_ptr()
    with pytest.raises(MmqError, match="expected untie_heads: true"):
        mmq.quantize(model, parse_recipe(recipe))
    before = embedding.detach().clone()
    manifest = mmq.quantize(model, parse_recipe({**recipe, "untie_heads": True}))
    assert manifest.untied == ["language_model.lm_head"]
    assert isinstance(model.language_model.lm_head, QuantLinear)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert "language_model.lm_head.qweight" in stored_tensors(model)
    model = tiny("blip2-opt")
    mmq.quantize(model, simple("rtn"))
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(MmqError, match="can be untied"):
        mmq.quantize(tiny("blip2-t5"), parse_recipe({**recipe, "untie_heads": True}))


def test_rounding_needs_no_samples_and_then_has_no_errors() -> None:
    with_samples, without = tiny("llava"), tiny("llava")
    mmq.quantize(with_samples, simple("rtn"), samples_for(without))
    manifest = mmq.quantize(without, simple("rtn"))
    assert all(record.relative_error is None for record in manifest.linears)
    a, b = stored_tensors(with_samples), stored_tensors(without)
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(MmqError, match=r"samples: expected calibration samples for gptq of .*qkv"):
        mmq.quantize(tiny("blip2-opt"), simple("gptq"))


def test_progress_reports_every_linear() -> None:
    events: list[ProgressEvent] = []
    model = tiny("llava")
    manifest = mmq.quantize(model, simple("rtn"), samples_for(model, 2), progress=events.append)
    assert [event.path for event in events] == [record.path for record in manifest.linears]
    assert [event.done for event in events] == list(range(1, len(events) + 1))
    assert {event.total for event in events} == {len(events)}
    assert all(event.error is not None and event.eta >= 0 for event in events)
    order = [event.component for event in events]
    assert order == sorted(order, key=["vision", "connector", "language"].index)


def assert_untouched(model: Any, recipe: Recipe, samples: Any, message: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MmqError, match=message):
        mmq.quantize(model, recipe, samples)
    after = model.state_dict()
    assert all(
        torch.equal(after[key], before[key]) or bool(before[key].isnan().any()) for key in before
    )


def test_bad_input_is_refused_before_anything_changes() -> None:
    model = tiny("blip2-opt")
    samples = samples_for(model, 2)
    assert_untouched(model, simple("gptq"), [], "at least one calibration sample, got none")
    bad = [samples[0], {**samples[1], "pixel_values": torch.full((1, 3, 28, 28), torch.nan)}]
    assert_untouched(model, simple("gptq"), bad, r"samples\[1\].pixel_values: expected finite")
    nothing = parse_recipe({"all": {"bits": 4}, "overrides": [{"match": "*.nothing", "bits": 3}]})
    assert_untouched(model, nothing, samples, "expected at least one linear, it selects none")
    with torch.no_grad():
        model.qformer.encoder.layer[1].intermediate_query.dense.weight[0, 0] = torch.inf
    assert_untouched(
        model, simple("rtn"), None, r"layer.1.intermediate_query.dense: expected finite weights"
    )
    with pytest.raises(MmqError, match="sample_ids: expected one per sample"):
        mmq.quantize(tiny("llava"), simple("rtn"), samples, sample_ids=["a"])
    with pytest.raises(MmqError, match="model: expected one of"):
        mmq.quantize(nn.Linear(2, 2), simple("rtn"))
    done = tiny("llava")
    mmq.quantize(done, simple("rtn"))
    with pytest.raises(MmqError, match="expected a dense linear, got QuantLinear"):
        mmq.quantize(done, simple("rtn"))


def test_a_linear_that_no_token_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("blip2-retrieval")
    architecture = architecture_of(model)
    image_only = tuple(
        call for call in architecture.passes if not dict(call)["use_image_text_matching_head"]
    )
    limited = dataclasses.replace(architecture, passes=image_only)
    monkeypatch.setattr(MODULE, "architecture_of", lambda model: limited)
    recipe = parse_recipe(
        {"overrides": [{"match": "itm_head", "bits": 4, "method": "gptq"}], "heads": ["itm_head"]}
    )
    with pytest.raises(MmqError, match="itm_head: expected at least 1 calibration token, got none"):
        mmq.quantize(model, recipe, samples_for(model, 2))


def test_an_interrupt_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llava")

    def stop(event: ProgressEvent) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mmq.quantize(model, simple("rtn"), samples_for(model, 2), progress=stop)
    assert "stopped with 3 of 39 linears packed" in caplog.text
    assert not hasattr(model, "mmq_manifest")


def test_gptq_result_lies_on_each_groups_own_grid() -> None:
    model = tiny("llava")
    samples = samples_for(model)
    mmq.quantize(model, simple("gptq", 3), samples)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            packed = module.packed
            grid = packed.grid().rows(packed.n)
            weight: Tensor = packed.dequantize()
            for group in range(packed.groups):
                part = weight[:, 16 * group : 16 * (group + 1)]
                steps = part / grid.scales[:, group : group + 1]
                torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4, msg=path)
            assert int(packed.codes().max()) <= 7
