# SPDX-License-Identifier: Apache-2.0
"""GPTQ against a plain float64 version of the algorithm, its orders, blocks, damping, fallbacks."""

import logging
from dataclasses import replace

import pytest
import torch
from problems import generator, layer, mean_error

from mmq.errors import MmqError
from mmq.gptq import FACTOR_BLOCK, blocks, column_order, damps, gptq, inverse, upper_factor
from mmq.grid import dequantize, find_grid, quantize
from mmq.hessian import Hessian, stats_of
from mmq.options import GptqOptions
from mmq.rtn import rtn
from mmq.spec import QuantSpec

NONE, ACT, GROUP = (GptqOptions(order=order) for order in ("none", "act", "group"))
STATIC = GptqOptions(order="none", static_groups=True)
ORDERS = pytest.mark.parametrize("options", [NONE, STATIC, ACT, GROUP], ids=repr)


def plain_gptq(w, hessian, spec, options):
    """Algorithm 1, one column at a time over the whole row, float64, U = chol(H^-1)^T.

    Returns (w_hat [n, k] in the original order, sum e^2).
    """
    k = w.shape[1]
    g = spec.row_group_size(k)
    order = options.resolve_order(spec, k)
    diagonal = hessian.diagonal()
    perm = column_order(order, diagonal, g)
    h = hessian.double()[perm][:, perm]
    h += options.damp * float(diagonal.double().mean()) * torch.eye(k).double()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = w.double()[:, perm]
    static = options.resolve_static_groups(spec, k)
    if static:
        source = w if order == "act" else w[:, torch.argsort(perm)]
        grid = find_grid(source.float(), spec)
        group_of = torch.arange(k) // g if order == "act" else perm // g
    w_hat, loss = torch.empty_like(w), 0.0
    for i in range(k):
        if static:
            cell = grid_column(grid, int(group_of[i]))
        elif i % g == 0:
            cell = find_grid(w[:, i : i + g].float(), spec)
        column = w[:, i : i + 1]
        w_hat[:, i : i + 1] = dequantize(quantize(column, cell), cell)
        e = (column - w_hat[:, i : i + 1]) / u[i, i]
        loss += float(e.square().sum())
        w[:, i:] -= e * u[i, i:]
    return w_hat[:, torch.argsort(perm)].float(), loss


def grid_column(grid, g):
    column = slice(g, g + 1)
    return replace(grid, scales=grid.scales[:, column], zeros=grid.zeros[:, column], group_size=-1)


@ORDERS
@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
@pytest.mark.parametrize("group_size", [32, 25, -1, 100])
def test_agrees_with_the_plain_algorithm(options, zero, group_size):
    """g below, at and above the block of 32; last groups short; every order and zero."""
    options = GptqOptions(options.order, block=32, static_groups=options.static_groups)
    w, x = layer(24, 128, 1024)
    hessian, spec = stats_of(x).hessian, QuantSpec(3, group_size, zero)
    packed, report = gptq(w, hessian, spec, options)
    expected, loss = plain_gptq(w, hessian, spec, options)
    equal = (packed.dequantize() - expected).abs() <= 1e-6
    assert float(equal.double().mean()) >= 0.999
    assert report.gptq.loss == pytest.approx(loss / 2, rel=1e-4)


@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
def test_per_tensor_agrees_with_the_plain_algorithm(zero):
    w, x = layer(8, 64, 512)
    hessian, spec = stats_of(x).hessian, QuantSpec(4, zero=zero, per_tensor=True)
    packed, report = gptq(w, hessian, spec)
    grid = find_grid(w, spec)
    h = hessian.double() + 0.01 * float(hessian.diagonal().mean()) * torch.eye(64).double()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rest, w_hat = w.double(), torch.empty(8, 64)
    for i in range(64):
        w_hat[:, i : i + 1] = dequantize(quantize(rest[:, i : i + 1], grid), grid)
        rest -= ((rest[:, i] - w_hat[:, i]) / u[i, i])[:, None] * u[i]
    assert packed.scales.shape == (1, 1)
    assert float(((packed.dequantize() - w_hat).abs() < 1e-6).double().mean()) >= 0.999
    assert report.output_error < rtn(w, spec, hessian=hessian)[1].output_error


def test_toy_check_orders_improve_on_each_other():
    """3 bits, g = 32, k = 128: rounding, GPTQ, group-aware and full act-order, in this order."""
    w, x = layer(64, 128, 1024)
    hessian, spec = stats_of(x).hessian, QuantSpec(3, 32)
    plain = rtn(w, spec, hessian=hessian)[1].output_error
    none, group, act = (gptq(w, hessian, spec, o)[1].output_error for o in (NONE, GROUP, ACT))
    assert none < 0.65 * plain
    assert group < 0.65 * none
    assert act < 0.65 * group


@ORDERS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_on_correlated_inputs(options, bits):
    w, x = layer(16, 96, 768, seed=3)
    hessian, spec = stats_of(x).hessian, QuantSpec(bits, 32)
    packed, report = gptq(w, hessian, spec, options)
    plain = rtn(w, spec, hessian=hessian)[1]
    assert report.output_error < 0.95 * plain.output_error
    assert report.output_error == pytest.approx(mean_error(packed.dequantize() - w, x), rel=1e-3)


@pytest.mark.parametrize("options", [NONE, STATIC, GROUP], ids=repr)
@pytest.mark.parametrize("group_size", [-1, 16])
def test_equals_rounding_when_inputs_are_uncorrelated(options, group_size):
    w, _ = layer(8, 40, 4)
    hessian = torch.diag(torch.linspace(0.5, 3.0, 40))
    spec = QuantSpec(3, group_size)
    packed, _ = gptq(w, hessian, spec, options)
    assert torch.equal(packed.codes(), rtn(w, spec)[0].codes())


@ORDERS
@pytest.mark.parametrize("group_size", [-1, 24, 48])
def test_independent_of_the_block_size(options, group_size):
    w, x = layer(32, 128, 1024, seed=1)
    hessian, spec = stats_of(x).hessian, QuantSpec(3, group_size)
    results = []
    for block in (1, 7, 32, 128, 500):
        option = GptqOptions(options.order, block=block, static_groups=options.static_groups)
        results.append(gptq(w, hessian, spec, option))
    reference, report = results[-1]
    for packed, other in results[:-1]:
        same = packed.dequantize() == reference.dequantize()
        assert float(same.double().mean()) >= 0.999
        assert other.gptq.loss == pytest.approx(report.gptq.loss, rel=1e-4)


def test_the_factor_of_the_hessian_changes_no_code():
    w, x = layer(8, 48, 300)
    hessian = stats_of(x).hessian
    one, _ = gptq(w, hessian, QuantSpec(3, 16))
    other, _ = gptq(w, 4 * hessian, QuantSpec(3, 16))
    assert torch.equal(one.codes(), other.codes())


@pytest.mark.parametrize("k", [1, 2, 7, 64, FACTOR_BLOCK, 2 * FACTOR_BLOCK + 3])
def test_the_factor_is_that_of_the_hessian_and_of_its_inverse(k):
    _, x = layer(1, k, 8 * k + 8)
    h = stats_of(x).hessian.double() + 1e-3 * torch.eye(k).double()
    factor, single = h.clone(), h.float()
    assert upper_factor(factor)
    assert upper_factor(single)
    r = factor.triu()
    assert bool((r.diagonal() > 0).all())
    assert torch.allclose(r @ r.T, h, rtol=1e-10, atol=1e-12 * float(h.abs().max()))
    direct = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    assert torch.allclose(inverse(factor), direct, rtol=1e-8, atol=1e-10)
    assert float((single.triu() - r).abs().max()) <= 1e-4 * float(r.abs().max())
    assert torch.equal(factor.tril(-1), h.tril(-1))  # For the next attempt.


@pytest.mark.parametrize("at", [0, FACTOR_BLOCK + 1])
def test_no_factor_of_an_indefinite_matrix(at):
    h = torch.eye(FACTOR_BLOCK + 3)
    h[at, at + 1] = h[at + 1, at] = 2.0
    assert not upper_factor(h)
    assert not upper_factor(torch.full((2, 2), float("nan")))


def test_orders_are_stable_and_groups_keep_their_members():
    diagonal = torch.tensor([1.0, 3.0, 3.0, 0.0, 9.0, 1.0, 5.0])
    assert column_order("none", diagonal, 3).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert column_order("act", diagonal, 3).tolist() == [4, 6, 1, 2, 0, 5, 3]
    assert column_order("group", diagonal, 3).tolist() == [4, 5, 3, 6, 1, 2, 0]


def test_blocks_of_dynamic_groups_end_with_the_group():
    assert list(blocks(10, 4, None)) == [(0, 4), (4, 8), (8, 10)]
    assert list(blocks(10, 4, 3)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(blocks(10, 4, 6)) == [(0, 4), (4, 6), (6, 10)]


def test_damping_steps():
    assert damps(0.01) == pytest.approx([0.01, 0.1, 1.0])
    assert damps(0.0) == pytest.approx([0.0, 0.01, 0.1, 1.0])
    assert damps(0.3) == pytest.approx([0.3, 1.0])
    assert damps(1.0) == [1.0]


@pytest.mark.parametrize("order", ["act", "group"])
def test_stored_order_reproduces_the_loop(order):
    """The plain loop's weights, column by column in the original order; only act stores perm."""
    w, x = layer(12, 50, 400)
    hessian, spec = stats_of(x).hessian, QuantSpec(4, 16)
    options = GptqOptions(order=order)
    packed, _ = gptq(w, hessian, spec, options)
    expected, _ = plain_gptq(w, hessian, spec, options)
    assert (packed.perm is not None) == (order == "act")
    assert float(((packed.dequantize() - expected).abs() < 1e-6).double().mean()) >= 0.999


def test_act_order_of_one_group_needs_no_permutation():
    w, x = layer(12, 50, 400)
    packed, report = gptq(w, stats_of(x).hessian, QuantSpec(4), ACT)
    assert packed.perm is None
    assert report.gptq.order == "act"
    assert float((packed.dequantize() - w).abs().max()) < 0.2


def test_auto_is_group_aware_with_groups_only():
    w, x = layer(4, 32, 100)
    hessian = stats_of(x).hessian
    assert gptq(w, hessian, QuantSpec(4, 8))[1].gptq.order == "group"
    assert gptq(w, hessian, QuantSpec(4))[1].gptq.order == "none"


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_singular_hessian_finishes_with_a_record(tokens, damp):
    w, x = layer(6, 64, tokens)
    packed, report = gptq(w, stats_of(x).hessian, QuantSpec(3, 16), GptqOptions(damp=damp))
    assert bool(torch.isfinite(packed.dequantize()).all())
    assert report.gptq.damp >= damp
    if damp == 0.0:
        assert "damping raised from 0" in " ".join(report.notes)
    assert report.fallback == packed.fallback == ""
    assert (
        report.output_error < rtn(w, QuantSpec(3, 16), hessian=stats_of(x).hessian)[1].output_error
    )


def test_hopeless_hessian_falls_back_to_rounding_and_says_so(caplog):
    w, _ = layer(4, 8, 4)
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = 50.0  # Not positive definite with any damping up to 1.
    with caplog.at_level(logging.WARNING, logger="mmq.gptq"):
        packed, report = gptq(w, hessian, QuantSpec(4), name="blocks.7.fc2")
    assert packed.fallback == report.fallback == "rtn: no factorization of H"
    assert torch.equal(packed.codes(), rtn(w, QuantSpec(4))[0].codes())
    assert "blocks.7.fc2" in caplog.text
    assert report.gptq.damp is None
    assert report.gptq.loss is None


@pytest.mark.parametrize("order", ["none", "act", "group"])
@pytest.mark.parametrize("dead", ["keep", "zero"])
def test_dead_columns(order, dead, caplog):
    w, x = layer(6, 40, 300)
    x[:, [3, 17]] = 0
    spec = QuantSpec(4, 8)
    options = GptqOptions(order=order, dead=dead)
    with caplog.at_level(logging.WARNING, logger="mmq.gptq"):
        packed, report = gptq(w, stats_of(x).hessian, spec, options, name="fc1")
    assert report.gptq.dead_columns == 2
    assert any("2 of 40 input columns" in note for note in report.notes)
    assert "fc1: 2 of 40" in caplog.text  # Above 1 %.
    columns = packed.dequantize()[:, [3, 17]]
    if dead == "zero":
        assert not columns.any()
    else:
        step = float(packed.scales.max())
        assert float((columns - w[:, [3, 17]]).abs().max()) <= 0.51 * step


def test_dead_columns_add_nothing_to_the_problem_of_the_others():
    w, x = layer(6, 40, 300)
    w[:, [3, 17]] *= 0.1  # The ranges of the rows come from the other columns.
    x[:, [3, 17]] = 0
    live = [i for i in range(40) if i not in (3, 17)]
    spec, options = QuantSpec(3), GptqOptions(damp=0.0)
    packed, report = gptq(w, stats_of(x).hessian, spec, options)
    alone, other = gptq(w[:, live], stats_of(x[:, live]).hessian, spec, options)
    assert report.gptq.damp == 0.0
    assert torch.equal(packed.dequantize()[:, live], alone.dequantize())
    assert report.gptq.loss == pytest.approx(other.gptq.loss, rel=1e-4)


def test_few_dead_columns_do_not_warn(caplog):
    w, x = layer(2, 128, 300)
    x[:, 5] = 0
    with caplog.at_level(logging.WARNING, logger="mmq.gptq"):
        _, report = gptq(w, stats_of(x).hessian, QuantSpec(4))
    assert report.gptq.dead_columns == 1
    assert caplog.text == ""


def test_weighted_clip_search_uses_the_hessian():
    w, x = layer(32, 128, 1024)
    hessian = stats_of(x).hessian
    spec = QuantSpec(2, 32, clip="mse")
    plain = gptq(w, hessian, spec)[1].output_error
    weighted = gptq(w, hessian, spec, importance=hessian.diagonal())[1].output_error
    assert weighted < plain


@pytest.mark.parametrize("options", [NONE, ACT], ids=repr)
def test_importance_follows_the_columns(options):
    """Importance 0 outside one column: that column's error decides, wherever order moves it."""
    w, x = layer(4, 32, 256)
    importance = torch.zeros(32)
    importance[9] = 1.0
    spec = QuantSpec(2, 32, clip="mse", scale_dtype="float32")
    packed, _ = gptq(w, stats_of(x).hessian, spec, options, importance=importance)
    expected = find_grid(w, spec, importance)
    assert torch.equal(packed.scales, expected.scales)


@pytest.mark.parametrize("shape", [(2, 96), (1, 1), (3, 33), (5, 200)])
@ORDERS
def test_awkward_shapes(shape, options):
    w, x = layer(*shape, 300)
    packed, report = gptq(w, stats_of(x).hessian, QuantSpec(3, 64), options)
    packed.validate()
    assert packed.dequantize().shape == shape
    assert report.relative_error < 0.2


def test_inputs_are_not_changed():
    w, x = layer(4, 20, 100)
    x[:, 2] = 0
    hessian = stats_of(x).hessian
    before = (w.clone(), hessian.clone())
    gptq(w, hessian, QuantSpec(3, 8), GptqOptions(dead="zero"))
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])


def test_duplicated_tokens_equal_weight_two():
    w, x = layer(16, 32, 64)
    weights = 1 + (torch.rand(64, generator=generator(4)) < 0.5).float()
    weighted, duplicated = Hessian(32), Hessian(32)
    weighted.add(x, weights)
    duplicated.add(torch.cat((x, x[weights == 2])))
    one, _ = gptq(w, weighted.finish(), QuantSpec(3, 16))
    other, _ = gptq(w, duplicated.finish(), QuantSpec(3, 16))
    assert float((one.codes() == other.codes()).double().mean()) >= 0.999


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (torch.full((2, 4), float("inf")), torch.eye(4), "fc2: expected finite weights"),
        (torch.ones(2, 4), torch.eye(5), r"fc2: expected a floating-point Hessian \[4, 4\]"),
        (torch.ones(2, 4), torch.zeros(4, 4), "fc2: expected a Hessian of at least 1 non-zero"),
        (torch.ones(2, 4), torch.full((4, 4), float("nan")), "fc2: expected a finite Hessian"),
    ],
)
def test_bad_input_is_refused_by_name(weight, hessian, message):
    with pytest.raises(MmqError, match=message):
        gptq(weight, hessian, QuantSpec(4), name="fc2")


def test_in_scale_of_another_size_is_refused():
    with pytest.raises(MmqError, match=r"in_scale of shape \[4\], got \[3\]"):
        gptq(torch.ones(2, 4), torch.eye(4), QuantSpec(4), in_scale=torch.ones(3))
