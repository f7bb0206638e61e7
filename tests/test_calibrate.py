# SPDX-License-Identifier: Apache-2.0
"""Capture, replay and samples, on a tiny model of every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import padded, samples_for
from torch import Tensor, nn

from mmq.calibrate import (
    advance,
    calibrating,
    capture,
    gather,
    gather_from_model,
    run_block,
)
from mmq.errors import MmqError
from mmq.hessian import Hessian
from mmq.models import architecture_of, blocks_of, resolve
from mmq.samples import check_samples, micro_batches, split_samples


@pytest.fixture(params=sorted(tiny_models.TINY))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.randomize(tiny_models.TINY[request.param](), seed=1)


def batches_for(model: Any, count: int = 4) -> list[dict[str, Tensor]]:
    return micro_batches(split_samples(samples_for(model, count)), 8)


def record_calls(model: Any, modules: list[nn.Module], batches: list[dict[str, Tensor]]) -> Any:
    """(input, output) of each call of each module in plain forward passes."""
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in modules}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found[module].append((hidden, output[0] if isinstance(output, tuple) else output))

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    for batch in batches:
        for extra in architecture_of(model).passes:
            model(**batch, **dict(extra))
    for handle in handles:
        handle.remove()
    return found


def test_replay_equals_the_forward_pass(model: Any) -> None:
    """Every block of every stack: the replayed call has the inputs and outputs of a plain run."""
    batches = batches_for(model)
    architecture = architecture_of(model)
    with calibrating(model):
        for stack in architecture.stacks:
            blocks = list(blocks_of(model, stack))
            plain = record_calls(model, blocks, batches)
            calls = capture(model, architecture, stack, batches)
            for block in blocks:
                seen = plain[block]
                assert len(calls) in (len(seen), len(seen) // 2)  # Equal passes are kept once.
                following = []
                for call in calls:
                    output = run_block(block, call)
                    first = output[0] if isinstance(output, tuple) else output
                    assert any(
                        torch.equal(call.hidden, hidden) and torch.equal(first, expected)
                        for hidden, expected in seen
                    )
                    following.append(advance(stack, call, output))
                calls = following


def test_replay_without_the_mask_differs() -> None:
    """The replay test can fail: dropping an argument of a block changes its output."""
    model = tiny_models.randomize(tiny_models.blip2_opt(), seed=1)
    architecture = architecture_of(model)
    stack = architecture.stacks[-1]
    with calibrating(model):
        call = capture(model, architecture, stack, batches_for(model))[0]
        block = blocks_of(model, stack)[0]
        expected = run_block(block, call)
        blind = torch.zeros(1, 1, call.hidden.shape[1], call.hidden.shape[1])
        call.rest["attention_mask"] = blind
        assert not torch.equal(run_block(block, call), expected)


def test_retrieval_sees_three_passes_of_the_qformer() -> None:
    model: Any = tiny_models.randomize(tiny_models.blip2_retrieval(), seed=1)
    architecture = architecture_of(model)
    vision, qformer = architecture.stacks
    batches = batches_for(model, 3)
    with calibrating(model):
        assert len(capture(model, architecture, vision, batches)) == len(batches)
        calls = capture(model, architecture, qformer, batches)
    kinds = {
        (call.rest["query_length"], call.rest.get("encoder_hidden_states") is not None)
        for call in calls
    }
    queries = tiny_models.QUERIES
    assert kinds == {(queries, True), (0, False)}
    joint = [c for c in calls if c.rest["query_length"] and c.hidden.shape[1] > queries]
    assert len(calls) == 3 * len(batches)
    assert len(joint) == len(batches)


def test_every_linear_receives_tokens(model: Any) -> None:
    batches = batches_for(model)
    architecture = architecture_of(model)
    units = resolve(model)
    with calibrating(model):
        for stack in architecture.stacks:
            calls = capture(model, architecture, stack, batches)
            for index, block in enumerate(blocks_of(model, stack)):
                inside = [u for u in units if u.stack == stack.name and u.block == index]
                hooks = {model.get_submodule(u.path): Hessian(u.k, name=u.path) for u in inside}
                gather(block, calls, hooks)
                assert all(hessian.tokens > 0 for hessian in hooks.values())
                calls = [advance(stack, call, run_block(block, call)) for call in calls]


def test_heads_and_token_limit() -> None:
    model: Any = tiny_models.randomize(tiny_models.blip2_retrieval(), seed=1)
    batches = batches_for(model, 4)
    head = model.itm_head
    for limit, expected in ((None, 4 * tiny_models.QUERIES), (2, 4 * 2)):
        hessian = Hessian(24, name="itm_head")
        with calibrating(model):
            gather_from_model(model, architecture_of(model), batches, {head: hessian}, limit)
        assert hessian.tokens == expected


def test_calibrating_restores_training_flags() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    with calibrating(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
    assert model[0].training
    assert not model[1].training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-retrieval"])
def test_padding_is_cut_off(name: str, side: str) -> None:
    model = tiny_models.TINY[name]()
    singles = samples_for(model, 5)
    rows = split_samples([padded(singles, side)])
    assert len(rows) == 5
    for row, single in zip(rows, singles, strict=True):
        assert all(torch.equal(row[key], single[key]) for key in single)


def test_decoder_inputs_have_their_own_padding() -> None:
    sample = {
        "pixel_values": torch.zeros(2, 3, 4, 4),
        "input_ids": torch.tensor([[5, 6, 7], [5, 6, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[8, -100, -100], [8, 9, -100]]),
    }
    first, second = split_samples([sample], encoder_decoder=True)
    assert first["labels"].tolist() == [[8]]
    assert first["input_ids"].tolist() == [[5, 6, 7]]
    assert second["labels"].tolist() == [[8, 9]]
    assert second["input_ids"].tolist() == [[5, 6]]


def test_micro_batches_join_equal_shapes_only() -> None:
    rows = split_samples(samples_for(tiny_models.llava(), 9))
    batches = micro_batches(rows, 2)
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 1, 2, 1, 2, 1]
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)
    several = {"pixel_values": torch.zeros(2, 3, 4, 4), "input_ids": torch.zeros(1, 3)}
    assert micro_batches([several, several], 8) == [several, several]


GOOD = {"input_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 2, 2)}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "expected at least one calibration sample, got none"),
        ([GOOD, {}], r"samples\[1\]: expected a mapping of model inputs"),
        ([{"input_ids": [1, 2]}], r"samples\[0\].input_ids: expected a tensor .* got list"),
        (
            [GOOD, {"pixel_values": torch.full((1, 2), torch.nan)}],
            r"samples\[1\].pixel_values: .*2",
        ),
        ([{"pixel_values": torch.tensor([[torch.inf]])}], "expected finite values, got 1 NaN or"),
        ([{"input_ids": torch.ones(1, 0)}], "expected values, got shape"),
        ([{"input_ids": torch.tensor(3)}], "got a scalar"),
    ],
)
def test_bad_samples_are_named(samples: Any, message: str) -> None:
    with pytest.raises(MmqError, match=message):
        check_samples(samples)


def test_samples_that_do_not_fit_together_are_named() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(MmqError, match=r"samples\[0\].pixel_values: expected a batch of 2, got 3"):
        split_samples([{"input_ids": ids, "pixel_values": torch.zeros(3, 3, 2, 2)}])
    with pytest.raises(MmqError, match=r"attention_mask: expected the shape of input_ids"):
        split_samples([{"input_ids": ids, "attention_mask": torch.ones(2, 4)}])
    with pytest.raises(MmqError, match="expected at least one real token, got none"):
        split_samples([{"input_ids": ids, "attention_mask": torch.zeros(2, 3)}])


def test_a_stack_that_no_sample_reaches_is_named() -> None:
    model: Any = tiny_models.randomize(tiny_models.llava(), seed=1)
    text = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}
    architecture = architecture_of(model)
    with calibrating(model), pytest.raises(MmqError, match=r"vision_tower.*got none"):
        capture(model, architecture, architecture.stacks[0], [text])
