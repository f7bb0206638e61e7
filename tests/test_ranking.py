# SPDX-License-Identifier: Apache-2.0
"""The ranked AWQ search: the stand-in for H, who gets an exact error, and what it may cost."""

import importlib
import itertools
import json
import math
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import samples_for
from problems import generator

from mmq.awq import AwqSearch, awq, awq_scales, error_factor
from mmq.hessian import stats_of
from mmq.manifest import Manifest
from mmq.options import AwqOptions
from mmq.quantize import quantize
from mmq.ranking import FINALISTS, RANK, SMALLEST_WIDTH, finalists, stand_in
from mmq.recipe import Recipe
from mmq.spec import QuantSpec

MODULE: Any = importlib.import_module("mmq.awq")  # ``mmq.awq`` is the function.
K = SMALLEST_WIDTH
EXHAUSTIVE = AwqOptions(search="exhaustive")


def factor_of(rank: int, k: int) -> torch.Tensor:
    return torch.randn(rank, k, generator=generator(rank))


def gram(factor: torch.Tensor) -> torch.Tensor:
    return factor.double().T @ factor.double()


@pytest.mark.parametrize("rank", [1, 20, 64])
def test_stand_in_of_low_rank_is_exact(rank):
    factor = factor_of(rank, 200)
    found = gram(stand_in(factor, rank=64))
    assert float((found - gram(factor)).abs().max()) <= 1e-4 * float(gram(factor).abs().max())


def test_stand_in_keeps_the_diagonal_and_the_largest_directions():
    factor = factor_of(300, 200) * torch.logspace(1, -2, 300)[:, None]
    exact, found = gram(factor), gram(stand_in(factor, rank=32))
    assert torch.allclose(found.diagonal(), exact.diagonal(), rtol=1e-4)
    diagonal_only = (exact - torch.diag(exact.diagonal())).norm()
    assert float((found - exact).norm()) < 0.3 * float(diagonal_only)
    assert torch.equal(stand_in(factor, seed=3), stand_in(factor, seed=3))
    assert not torch.equal(stand_in(factor, seed=3), stand_in(factor, seed=4))


def test_finalists_are_the_least_and_0():
    assert finalists([9.0, 5.0, 4.0, 3.0, 4.0, 6.0]) == [0, 2, 3, 4]
    assert finalists([1.0, 1.0, 1.0, 1.0, 1.0]) == [0, 1, 2]
    assert finalists([math.nan, 2.0, math.nan, 1.0, 3.0]) == [0, 1, 3, 4]
    assert FINALISTS == 3


def layers():
    """Weights [64, K] and inputs: heavy tails, rows of unequal size, outlier channels, shared
    directions, a slowly falling spectrum."""
    for seed, kind in itertools.product(range(2), ("channels", "shared", "spectrum")):
        g = generator(10 * seed)
        w = 0.02 * torch.randn(64, K, generator=g) * torch.exp(torch.randn(64, 1, generator=g))
        x = torch.randn(1500, K, generator=g) * torch.exp(0.8 * torch.randn(K, generator=g))
        if kind == "channels":
            x[:, :3] *= 20
        elif kind == "shared":
            x += 2 * torch.randn(1500, 8, generator=g) @ torch.randn(8, K, generator=g) + 0.5
        else:
            mix, _ = torch.linalg.qr(torch.randn(K, K, generator=g))
            x = (x * torch.arange(1, K + 1).pow(-0.5)) @ mix
            x *= torch.exp(0.5 * torch.randn(K, generator=g))
        yield w, x


def both(w: torch.Tensor, x: torch.Tensor, bits: int) -> tuple[AwqSearch, AwqSearch]:
    stats = stats_of(x)
    factor, spec = error_factor(stats), QuantSpec(bits, 128)
    return (
        awq_scales([w], stats.mean_abs, factor, spec),
        awq_scales([w], stats.mean_abs, factor, spec, EXHAUSTIVE),
    )


def worst_regret(bits: int) -> float:
    """How much the exact error of the choice exceeds the least, at most, over all layers."""
    found = []
    for w, x in layers():
        ranked, full = both(w, x, bits)
        chosen = min(ranked.exact, key=lambda i: ranked.errors[i])
        found.append(full.errors[chosen] / min(full.errors) - 1)
    return max(found)


@pytest.mark.parametrize("bits", [3, 4])
def test_ranking_finds_the_best_or_one_within_a_thousandth(bits):
    assert worst_regret(bits) <= 1e-3


def test_a_stand_in_of_other_inputs_would_show(monkeypatch):
    monkeypatch.setattr(MODULE, "stand_in", lambda factor, seed: torch.eye(factor.shape[1]))
    assert worst_regret(4) > 1e-3


def test_ranked_errors_are_exact_where_it_says_so():
    w, x = next(iter(layers()))
    ranked, full = both(w, x, 4)
    assert full.exact == tuple(range(21))
    assert full.approximation == ""
    assert 0 in ranked.exact
    assert len(ranked.exact) <= FINALISTS + 1
    for i in range(21):
        same = ranked.errors[i] == pytest.approx(full.errors[i], rel=1e-12)
        assert same == (i in ranked.exact)
    named = ", ".join(f"{i / 20:g}" for i in ranked.exact)
    assert ranked.approximation.endswith(f"rank {RANK} plus diagonal; exact for {named}")
    assert ranked.alpha in [i / 20 for i in ranked.exact]


def test_the_report_names_the_approximation():
    w, x = next(iter(layers()))
    _, report = awq(w, x, QuantSpec(4, 128), AwqOptions(clip=False))
    assert report.awq.approximation.startswith("21 exponents ranked")
    _, report = awq(w, x, QuantSpec(4, 128), AwqOptions(clip=False, search="exhaustive"))
    assert report.awq.approximation == ""


def test_few_in_features_are_searched_exhaustively():
    g = generator(1)
    w, x = torch.randn(4096, 32, generator=g), torch.randn(100, 32, generator=g)
    search = awq_scales([w], stats_of(x).mean_abs, error_factor(x), QuantSpec(4))
    assert search.exact == tuple(range(21))
    assert search.approximation == ""


@pytest.mark.parametrize("search", ["ranked", "exhaustive"])
def test_the_manifest_names_the_approximation(monkeypatch, search):
    monkeypatch.setattr(MODULE, "SMALLEST_WIDTH", 1)
    model = tiny_models.llava()
    recipe = Recipe.model_validate(
        {"all": {"method": "awq", "group_size": 32, "awq": {"search": search}}, "seed": 7}
    )
    manifest = quantize(model, recipe, samples_for(model, 2))
    words = {record.approximation for record in manifest.linears}
    assert all(record.options["seed"] == 7 for record in manifest.linears)
    assert ("approximation" in manifest.summary()) == (search == "ranked")
    if search == "ranked":
        assert all(text.startswith("21 exponents ranked") for text in words)
    else:
        assert words == {""}
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest
    older = manifest.to_dict()
    for record in older["linears"]:
        del record["approximation"]
    assert Manifest.from_dict(older).linears[0].approximation == ""
