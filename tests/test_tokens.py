# SPDX-License-Identifier: Apache-2.0
"""Token weights: what they are, by finite differences and by hand, and what they change."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import samples_for
from torch import Tensor
from torch.nn.functional import cross_entropy

import mmq
from mmq import tokens
from mmq.calibrate import advance, calibrating, capture, run_block
from mmq.errors import MmqError
from mmq.gptq import gptq
from mmq.hessian import Hessian
from mmq.models import architecture_of, blocks_of
from mmq.outputs import predictions
from mmq.prepare import calibration_batches
from mmq.recipe import parse_recipe
from mmq.spec import QuantSpec
from mmq.stored import stored_tensors
from mmq.tokens import (
    block_gradients,
    capped,
    image_tokens,
    modality_weights,
    normalized,
    qig_weights,
)


def tiny(name: str) -> Any:
    return tiny_models.randomize(tiny_models.TINY[name](), seed=1)


def recipe_of(method: str = "gptq", **calibration: Any) -> mmq.Recipe:
    settings = {"method": method, "bits": 3, "group_size": 16}
    return parse_recipe({"all": settings, "calibration": calibration})


def prepared(name: str, count: int = 4) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    model = tiny(name)
    return (
        model,
        architecture_of(model),
        calibration_batches(model, recipe_of(), samples_for(model, count)),
    )


def total_loss(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        found = predictions(model, architecture_of(model), batch)
        return sum(
            float(cross_entropy(p.logits.double(), p.targets, reduction="sum")) for p in found
        )


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_gradients_are_those_of_the_loss_at_the_block(name: str) -> None:
    """Each token's mean |gradient|, by central differences (norms stay in float32 inside)."""
    model, architecture, batches = prepared(name, 1)
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batches[0].items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with calibrating(model):
        found = block_gradients(model, architecture, [batch])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    stack = architecture.stacks[-1]
    block = blocks_of(model, stack)[1]
    (sizes,) = found[stack.name, 1]
    shift: list[Tensor] = []

    def add(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + shift[0]
        return (output[0] + shift[0], *output[1:])

    handle = block.register_forward_hook(add)
    width, step = 32, 1e-2
    for token in (0, sizes.shape[1] - 1):
        gradients = []
        for channel in range(width):
            losses = []
            for sign in (1, -1):
                shift[:] = [torch.zeros(1, sizes.shape[1], width, dtype=torch.float64)]
                shift[0][0, token, channel] = sign * step
                losses.append(total_loss(model, batch))
            gradients.append((losses[0] - losses[1]) / (2 * step))
        expected = sum(abs(g) for g in gradients) / width
        assert float(sizes[0, token]) == pytest.approx(expected, rel=5e-3)
    handle.remove()


def test_blocks_that_no_label_depends_on_are_left_out() -> None:
    model, architecture, batches = prepared("llava")
    with calibrating(model):
        found = block_gradients(model, architecture, batches)
    assert ("vision", 3) not in found
    assert {key for key in found if key[0] == "vision"} == {("vision", i) for i in range(3)}
    assert {key for key in found if key[0] == "decoder"} == {("decoder", i) for i in range(3)}


def test_modality_weights_are_two_values_of_mean_one() -> None:
    gradients = [torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[2.0, 10.0, 12.0]])]
    images = [torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])]
    found = torch.cat(modality_weights(gradients, images))
    assert torch.allclose(found, torch.tensor([[2.0, 2.0, 10.0], [2.0, 10.0, 10.0]]) / 6.0)
    assert float(found.mean()) == pytest.approx(1.0)
    for only in (torch.ones(1, 3).bool(), torch.zeros(1, 3).bool()):
        (same,) = modality_weights(gradients[:1], [only])
        assert torch.equal(same, torch.ones(1, 3))


def test_normalized_and_capped() -> None:
    parts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 10.0]])]
    assert torch.equal(torch.cat(normalized(parts)), torch.tensor([[0.25, 0.5], [0.75, 2.5]]))
    assert torch.equal(normalized([torch.zeros(2, 3)])[0], torch.ones(2, 3))
    values = torch.arange(1.0, 101.0).reshape(4, 25)
    values[3, 24] = 1e6
    low, high = (float(torch.quantile(values.flatten().double(), q)) for q in (0.25, 0.75))
    limit = high + 1.5 * (high - low)
    found = torch.cat(capped([values[:2], values[2:]]))
    assert float(found.max()) == pytest.approx(limit)
    assert torch.equal(found[found < 99], values[values < 99])


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_image_tokens(name: str) -> None:
    model, architecture, batches = prepared(name)
    with calibrating(model):
        for stack in architecture.stacks:
            for call in capture(model, architecture, stack, batches):
                mask = image_tokens(model, stack, call, batches[call.batch])
                assert mask.shape == call.hidden.shape[:2]
                if stack.component != "language":
                    assert bool(mask.all())
                elif name == "blip2-t5" and stack.name == "decoder":
                    assert not bool(mask.any())
                else:
                    ids = batches[call.batch]["input_ids"]
                    assert torch.equal(mask, ids == tiny_models.IMAGE_TOKEN)
                    assert 0 < int(mask.sum()) < mask.numel()


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava"])
def test_integrated_gradients_add_up_to_the_difference_of_the_losses(name: str) -> None:
    """Completeness: over all tokens, signs kept, the integral is loss(full) - loss(quantized)."""
    model, architecture, batches = prepared(name, 1)
    stack, index = architecture.stacks[-1], 1
    block = blocks_of(model, stack)[index]
    with calibrating(model):
        (call,) = capture(model, architecture, stack, batches)
        for each in list(blocks_of(model, stack))[:index]:
            call = advance(stack, call, run_block(each, call))
        end = advance(stack, call, run_block(block, call)).hidden
        noise = torch.randn(end.shape, generator=torch.Generator().manual_seed(0))
        start = end + 0.2 * end.std() * noise
        kept: list[Tensor] = []
        keep, tokens.capped = tokens.capped, lambda weights: kept.extend(weights) or list(weights)
        try:
            (found,) = qig_weights(model, architecture, stack, index, batches, [start], [end], 64)
        finally:
            tokens.capped = keep
        with tokens._returning(block, start):
            quantized = total_loss(model, batches[0])
        full = total_loss(model, batches[0])
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-5)
    assert bool((found >= 0).all())
    signed = signed_parts(model, architecture, stack, index, batches[0], start, end)
    assert torch.allclose(kept[0], signed.abs(), rtol=1e-3, atol=1e-6)
    assert float(signed.sum()) == pytest.approx(full - quantized, rel=0.02, abs=1e-4)


def signed_parts(
    model: Any, architecture: Any, stack: Any, index: int, batch: Any, start: Tensor, end: Tensor
) -> Tensor:
    """The integral per token by plain autograd through the whole model."""
    block, steps = blocks_of(model, stack)[index], 64
    total = torch.zeros_like(start)
    for step in range(steps):
        point = (start + (step + 0.5) / steps * (end - start)).detach().requires_grad_()
        with tokens._returning(block, point):
            loss = sum(p.loss() for p in predictions(model, architecture, batch))
        (gradient,) = torch.autograd.grad(loss, point)
        total += gradient / steps
    return (total * (end - start)).sum(dim=-1)


@pytest.mark.parametrize("kind", ["modality", "qig", "grad"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_change_the_result_and_are_recorded(kind: str, method: str) -> None:
    model, plain = tiny("llava"), tiny("llava")
    samples = samples_for(model, 4)
    manifest = mmq.quantize(model, recipe_of(method, token_weights=kind), samples)
    mmq.quantize(plain, recipe_of(method), samples)
    assert manifest.recipe["calibration"]["token_weights"] == kind
    notes = [note for note in manifest.notes if f"{kind} token weights from" in note]
    assert len(notes) == 6
    decoder = [note for note in notes if "language_model" in note]
    for note in decoder:
        low, high = (float(note.split(word)[1].split()[0]) for word in (" from ", " to "))
        assert 0 <= low < 1 < high
    a, b = stored_tensors(model), stored_tensors(plain)
    different = {key for key in a if key.endswith("qweight") and not torch.equal(a[key], b[key])}
    assert any("language_model" in key for key in different)
    if kind == "modality":  # All vision tokens are of the image.
        assert not any("vision_tower" in key for key in different) or method == "awq"


def test_equal_weights_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda = 1 through the whole path: bit by bit the unweighted result."""
    model, plain = tiny("llava"), tiny("llava")
    samples = samples_for(model, 4)

    def ones(kind: Any, model: Any, architecture: Any, place: Any, *rest: Any) -> list[Tensor]:
        return [torch.ones(call.hidden.shape[:2]) for call in place.calls]

    monkeypatch.setattr(importlib.import_module("mmq.quantize"), "token_weights", ones)
    for calibration in ({"max_tokens": 5}, {}):
        mmq.quantize(model, recipe_of(token_weights="grad", **calibration), samples)
        mmq.quantize(plain, recipe_of(**calibration), samples)
        a, b = stored_tensors(model), stored_tensors(plain)
        assert all(torch.equal(a[key], b[key]) for key in b)
        model, plain = tiny("llava"), tiny("llava")


def test_weight_two_is_a_duplicated_token() -> None:
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    counts = (torch.arange(300) % 4 == 0).float() + 1
    found = []
    for rows, weights in (
        (slice(None), counts),
        (torch.arange(300).repeat_interleave(counts.long()), None),
    ):
        hessian = Hessian(32)
        hessian.add(x[rows], weights)
        found.append(gptq(w, hessian.finish(), QuantSpec(3, 8))[0].codes())
    assert torch.equal(found[0], found[1])


def test_refusals() -> None:
    model = tiny("blip2-retrieval")
    with pytest.raises(MmqError, match=r"calibration.token_weights: expected none for BLIP-2 re"):
        mmq.quantize(model, recipe_of(token_weights="grad"), samples_for(model, 2))
    model = tiny("llava")
    with pytest.raises(MmqError, match=r"token_weights: expected calibration samples, got none"):
        mmq.quantize(model, recipe_of("rtn", token_weights="grad"))
    with pytest.raises(MmqError, match=r"calibration.token_weights: expected 'none'"):
        recipe_of(token_weights="mbq")
