# SPDX-License-Identifier: Apache-2.0
"""Corrections towards full precision: against least squares, plain GPTQ, and in whole models."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import samples_for
from problems import layer
from torch import Tensor

import mmq
from mmq.correction import Asymmetry, gptaq_block, gptaq_matrix, retargeted
from mmq.errors import MmqError
from mmq.gptq import gptq, inverse, upper_factor, walk
from mmq.grid import find_grid
from mmq.hessian import Hessian, stats_of
from mmq.options import GptqOptions
from mmq.recipe import parse_recipe
from mmq.spec import QuantSpec
from mmq_ext import ops

CORRECTIONS = pytest.mark.parametrize("correction", ["gptaq", "retarget"])
ORDERS = pytest.mark.parametrize("order", ["none", "act", "group"])


def problem(n: int = 16, k: int = 64, tokens: int = 700) -> tuple[Tensor, Tensor, Tensor]:
    """W [n, k], what the quantized model has for inputs, what full precision has."""
    w, full = layer(n, k, tokens)
    noise = torch.randn(tokens, k, generator=torch.Generator().manual_seed(9))
    mixing = torch.randn(k, k, generator=torch.Generator().manual_seed(8)) / k**0.5
    return w, full + 0.3 * (noise @ mixing) * full.std(dim=0), full


def moments(x: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    cross = Asymmetry(x.shape[1])
    cross.add(full, x)
    return stats_of(x).hessian, cross.finish()


def target_error(w_hat: Tensor, w: Tensor, x: Tensor, full: Tensor) -> float:
    return float((x @ w_hat.T - full @ w.T).double().square().sum(dim=1).mean())


def test_asymmetry_is_the_weighted_moment() -> None:
    _, x, full = problem(tokens=2500)
    lam = torch.rand(2500, generator=torch.Generator().manual_seed(1))
    for weights in (None, lam):
        cross = Asymmetry(64)
        cross.add(full[:900], x[:900], None if weights is None else weights[:900])
        cross.add(full[900:], x[900:], None if weights is None else weights[900:])
        scale = torch.ones(2500) if weights is None else weights
        expected = 2 / scale.sum().double() * ((full - x).double().T * scale) @ x.double()
        assert torch.allclose(cross.finish().double(), expected, rtol=1e-4, atol=1e-4)
    doubled, twice = Asymmetry(64), Asymmetry(64)
    counts = (torch.arange(2500) % 2 + 1).float()
    doubled.add(full, x, counts)
    again = torch.arange(2500).repeat_interleave(counts.long())
    twice.add(full[again], x[again])
    assert torch.allclose(doubled.finish(), twice.finish(), rtol=1e-4, atol=1e-4)


def test_asymmetry_refuses_what_does_not_pair_up() -> None:
    cross = Asymmetry(4, name="fc1")
    with pytest.raises(MmqError, match=r"fc1: expected full-precision inputs of shape \[3, 4\]"):
        cross.add(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(MmqError, match="fc1: expected finite inputs"):
        cross.add(torch.full((3, 4), float("nan")), torch.ones(3, 4))
    with pytest.raises(MmqError, match="fc1: expected at least 1 calibration token"):
        cross.finish()


def test_p_is_the_least_squares_solution_row_by_row() -> None:
    """Row i: the combination of the inputs behind i that is nearest to dx_i."""
    _, x, full = problem(k=24)
    x, full = x.double(), full.double()
    h, d = 2 / len(x) * x.T @ x, 2 / len(x) * (full - x).T @ x
    r = h.clone()
    assert upper_factor(r)
    p = gptaq_matrix(d, r, 1.0)
    assert torch.equal(p, torch.triu(p, 1))
    assert float(p[-2].abs().max()) > 0
    for i in range(23):
        solution = torch.linalg.lstsq(x[:, i + 1 :], (full - x)[:, i : i + 1]).solution[:, 0]
        assert torch.allclose(p[i, i + 1 :], solution, rtol=1e-6, atol=1e-9)
    assert torch.allclose(gptaq_matrix(d, r, 0.25), 0.25 * p)


def test_retargeted_weights_are_the_least_squares_solution() -> None:
    w, x, full = (part.double() for part in problem(k=24))
    h, d = 2 / len(x) * x.T @ x, 2 / len(x) * (full - x).T @ x
    r = h.clone()
    assert upper_factor(r)
    solution = torch.linalg.lstsq(x, full @ w.T).solution.T
    assert torch.allclose(retargeted(w, d, r, 1.0), solution, rtol=1e-6, atol=1e-9)
    half = retargeted(w, d, r, 0.5)
    assert torch.allclose(half, (w + solution) / 2, rtol=1e-6, atol=1e-9)


@CORRECTIONS
@ORDERS
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
def test_equal_inputs_give_plain_gptq(
    correction: Any, order: Any, group_size: int, zero: Any
) -> None:
    """dX = 0: bit by bit."""
    w, x, _ = problem()
    hessian, d = moments(x, x)
    spec = QuantSpec(3, group_size, zero)
    plain, report = gptq(w, hessian, spec, GptqOptions(order, block=16))
    options = GptqOptions(order, block=16, correction=correction)
    corrected, other = gptq(w, hessian, spec, options, asymmetry=d)
    assert torch.equal(plain.dequantize(), corrected.dequantize())
    assert plain.perm is None or torch.equal(plain.perm, corrected.perm)
    assert other.notes == (*report.notes, f"{correction}, alpha 0.25")


@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
def test_the_block_recursion_is_the_op_and_its_sums(zero: Any) -> None:
    w, x, full = problem(n=5, k=12)
    hessian, d = moments(x, full)
    r = hessian.double() + 0.01 * torch.eye(12).double()
    assert upper_factor(r)
    p, u = gptaq_matrix(d.double(), r, 0.5), inverse(r)
    grid = find_grid(w, QuantSpec(3, zero=zero))
    group_of = torch.zeros(12, dtype=torch.int32)
    codes, errors, values = gptaq_block(w.double(), u, p, grid, group_of)
    for j in range(12):  # w_j - sum e_i U_ij + sum v_i P_ij, all at once
        expected = w[:, j].double() - errors[:, :j] @ u[:j, j] + values[:, :j] @ p[:j, j]
        assert torch.allclose(values[:, j], expected, atol=1e-12)
    u32 = u.float()
    plain, e = ops.gptq_block(
        w, u32, grid.scales, grid.zeros, group_of, 3, grid.float_zero, grid.min_code
    )
    codes, errors, _ = gptaq_block(w, u32, torch.zeros(12, 12), grid, group_of)
    assert torch.equal(codes, plain)
    assert torch.equal(errors, e)


@pytest.mark.parametrize("static", [True, False])
def test_independent_of_the_block_size_in_float64(static: bool) -> None:
    w, x, full = problem(n=12, k=96)
    x, full = x.double(), full.double()
    h, d = 2 / len(x) * x.T @ x, 2 / len(x) * (full - x).T @ x
    r = h + 0.01 * h.diagonal().mean() * torch.eye(96).double()
    assert upper_factor(r)
    p = gptaq_matrix(d, r, 1.0)
    spec = QuantSpec(3, 24)
    grid = find_grid(w, spec)
    fixed = (grid, (torch.arange(96) // 24).to(torch.int32)) if static else None
    results = []
    for block in (1, 7, 32, 96):
        found = walk(w.double(), r, spec, block, torch.ones(96).double(), static=fixed, p=p)
        assert found is not None
        results.append(found)
    assert all(torch.equal(found.codes, results[0].codes) for found in results)
    plain = walk(w.double(), r, spec, 96, torch.ones(96).double(), static=fixed, p=0 * p)
    assert plain is not None
    assert not torch.equal(plain.codes, results[0].codes)


@ORDERS
def test_corrections_come_nearer_to_the_target(order: Any) -> None:
    """The toy check: plain GPTQ, then more alpha, then retarget at alpha 1."""
    w, x, full = problem(n=32, k=96, tokens=1500)
    hessian, d = moments(x, full)
    spec = QuantSpec(4, 32)
    errors = {}
    for correction, alpha in (
        ("none", 0.0),
        ("gptaq", 0.25),
        ("gptaq", 1.0),
        ("retarget", 0.25),
        ("retarget", 1.0),
    ):
        options = GptqOptions(order, correction=correction, alpha=alpha)
        packed, _ = gptq(w, hessian, spec, options, asymmetry=d)
        errors[correction, alpha] = target_error(packed.dequantize(), w, x, full)
    plain = errors["none", 0.0]
    assert errors["gptaq", 1.0] < errors["gptaq", 0.25] < plain
    assert errors["retarget", 1.0] < errors["retarget", 0.25] < plain
    assert errors["retarget", 1.0] < 0.8 * plain


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"correction": "qronos"}, "gptq.correction: expected 'none', 'gptaq' or 'retarget'"),
        ({"alpha": 1.5}, "gptq.alpha: expected less than or equal to 1"),
    ],
)
def test_unknown_options(data: Any, message: str) -> None:
    with pytest.raises(MmqError, match=message):
        parse_recipe({"all": {"method": "gptq", "gptq": data}})
    with pytest.raises(MmqError, match=r"gptq\.(correction|alpha): expected"):
        GptqOptions(**data)


def tiny(name: str) -> Any:
    return tiny_models.randomize(tiny_models.TINY[name](), seed=1)


def corrected_recipe(correction: str, **calibration: Any) -> mmq.Recipe:
    settings = {"method": "gptq", "bits": 2, "group_size": 16}
    settings["gptq"] = {"correction": correction, "alpha": 1.0}
    return parse_recipe({"all": settings, "calibration": {"held_out": 0.5, **calibration}})


@CORRECTIONS
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "blip2-retrieval", "llava"])
def test_whole_models_with_the_guard(name: str, correction: str) -> None:
    """Every block has its verdict; where the correction was left out, linears are plain GPTQ's."""
    model = tiny(name)
    manifest = mmq.quantize(model, corrected_recipe(correction), samples_for(model, 12))
    verdicts = [note for note in manifest.notes if ": correction " in note]
    blocks = {(r.stack, r.block) for r in manifest.linears if r.block is not None}
    assert len(verdicts) == len(blocks)
    kept = [note for note in verdicts if "correction kept" in note]
    for note in verdicts:
        path = note.partition(":")[0]
        error, plain = (
            float(note.split(marker)[0].split()[-1]) for marker in (" with it", " without")
        )
        assert (error < plain) == (note in kept)
        records = [r for r in manifest.linears if r.path.startswith(f"{path}.")]
        assert records
        for record in records:
            noted = any(part.startswith(correction) for part in record.notes)
            assert noted == (note in kept)
            assert record.options["correction"] == (correction if note in kept else "none")
    assert manifest.recipe["all"]["gptq"] == {"correction": correction, "alpha": 1.0}
    assert len(manifest.linears) == len({r.path for r in manifest.linears})


def test_a_rejected_correction_leaves_what_plain_gptq_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the corrected attempt spoilt, the result is plain GPTQ's on the same samples."""
    module: Any = importlib.import_module("mmq.gptq")  # ``mmq.gptq`` is the function.
    good = module.gptaq_matrix
    monkeypatch.setattr(module, "gptaq_matrix", lambda d, u, alpha: 40 * good(d, u, 1.0))
    model = tiny("llava")
    samples = samples_for(model, 12)
    manifest = mmq.quantize(model, corrected_recipe("gptaq"), samples)
    monkeypatch.undo()
    rejected = [note for note in manifest.notes if "correction left out" in note]
    assert len(rejected) >= 3
    first = "model.vision_tower.encoder.layers.0"
    only = {"match": f"{first}.*", "method": "gptq", "bits": 2, "group_size": 16}
    seen = tiny("llava")
    # One held-out batch of two: texts of 4 and 6 tokens are calibrated on.
    lengths = sorted({s["input_ids"].shape[1] for s in samples})
    calibrated = [s for s in samples if s["input_ids"].shape[1] != lengths[1]]
    mmq.quantize(seen, parse_recipe({"overrides": [only]}), calibrated)
    if any(first in note for note in rejected):
        for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            a, b = (m.get_submodule(f"{first}.{name}").packed for m in (model, seen))
            assert torch.equal(a.qweight, b.qweight)


def test_refusals_before_any_work() -> None:
    model = tiny("llava")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    samples = samples_for(model, 6)
    with pytest.raises(MmqError, match="expected upstream: quantized, got full"):
        mmq.quantize(model, corrected_recipe("gptaq", upstream="full"), samples)
    with pytest.raises(MmqError, match="expected at least 4 batches of calibration samples"):
        mmq.quantize(model, corrected_recipe("gptaq", held_out=0.25), samples)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weighted_gptaq_is_that_of_duplicated_tokens() -> None:
    w, x, full = problem()
    counts = (torch.arange(len(x)) % 3 == 0).float() + 1
    again = torch.arange(len(x)).repeat_interleave(counts.long())
    found = []
    for rows, weights in ((slice(None), counts), (again, None)):
        hessian, cross = Hessian(64), Asymmetry(64)
        hessian.add(x[rows], weights)
        cross.add(full[rows], x[rows], weights)
        options = GptqOptions(correction="gptaq")
        packed, _ = gptq(w, hessian.finish(), QuantSpec(3, 16), options, asymmetry=cross.finish())
        found.append(packed.dequantize())
    assert float((found[0] == found[1]).double().mean()) >= 0.999
