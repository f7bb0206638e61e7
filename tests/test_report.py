# SPDX-License-Identifier: Apache-2.0
"""The report's output error: from GPTQ's own sum where that is exact, else by a product."""

import pytest
import torch
from problems import generator, layer, mean_error

import mmq.report
from mmq import QuantSpec, gptq
from mmq.hessian import stats_of
from mmq.options import GptqOptions
from mmq.report import output_error, undamped_error

TOLERANCE = 1e-3


@pytest.fixture
def products(monkeypatch):
    """The matrices whose error was measured by a product; W itself always is."""
    seen = []

    def counted(difference, hessian):
        seen.append(difference)
        return output_error(difference, hessian)

    monkeypatch.setattr(mmq.report, "output_error", counted)
    return seen


@pytest.mark.parametrize(
    ("order", "static"), [("none", False), ("none", True), ("group", True), ("act", True)]
)
@pytest.mark.parametrize("dead", ["keep", "zero"])
@pytest.mark.parametrize("damp", [0.001, 0.01])
def test_gptqs_sum_is_the_output_error(order, static, dead, damp, products):
    w, x = layer(40, 96, 300, skew=2.0)
    x[:, [5, 50]] = 0
    options = GptqOptions(order=order, static_groups=static, dead=dead, damp=damp, block=40)
    packed, report = gptq(w, stats_of(x).hessian, QuantSpec(3, 25), options)
    want = mean_error(packed.dequantize() - w, x)
    assert report.output_error == pytest.approx(want, rel=TOLERANCE)
    assert report.gptq.loss > want * (1 + 2 * TOLERANCE)  # The damping's part was taken off.
    assert len(products) == 1


def test_other_units_of_the_input_scale_the_ridge():
    """With ``in_scale`` D is that of the scaled problem."""
    w, x = layer(20, 64, 200)
    s = torch.logspace(-1, 1, 64)
    packed, report = gptq(
        w * s, stats_of(x / s).hessian, QuantSpec(4, 32), in_scale=s, method="awq+gptq"
    )
    want = mean_error(packed.dequantize() - w * s, x / s)
    assert report.output_error == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.parametrize("correction", ["gptaq", "retarget"])
def test_corrected_weights_are_measured(correction, products):
    """There the loop's sum is about another problem."""
    w, x = layer(20, 64, 200)
    moved = x + 0.3 * torch.randn(x.shape, generator=generator(5))
    asymmetry = 2 * (moved - x).T @ x / x.shape[0]
    packed, report = gptq(
        w,
        stats_of(x).hessian,
        QuantSpec(4, 32),
        GptqOptions(correction=correction),
        asymmetry=asymmetry,
    )
    assert len(products) == 2
    want = mean_error(packed.dequantize() - w, x)
    assert report.output_error == pytest.approx(want, rel=1e-4)
    assert abs(report.gptq.loss - want) > TOLERANCE * want


def test_little_damping_is_measured(products):
    w, x = layer(20, 64, 400)
    gptq(w, stats_of(x).hessian, QuantSpec(4, 32), GptqOptions(damp=1e-4))
    assert len(products) == 2


def test_what_cancels_is_measured(products):
    """One token: nearly all of the damped error is the damping's, and D x nearly nothing."""
    w, x = layer(30, 64, 1)
    packed, report = gptq(w, stats_of(x).hessian, QuantSpec(2, 32), GptqOptions(damp=1.0))
    assert len(products) == 2
    want = mean_error(packed.dequantize() - w, x)
    assert report.output_error == pytest.approx(want, rel=TOLERANCE)


def test_undamped_error_by_hand():
    """D = [[1, 2]], H = diag(3, 0): tr(D (H + I) D^T) / 2 over the live column is 2."""
    difference, hessian = torch.tensor([[1.0, 2.0]]), torch.diag(torch.tensor([3.0, 0.0]))
    assert undamped_error(2.0, 1.0, difference, hessian) == pytest.approx(1.5, rel=1e-6)
    assert undamped_error(0.6, 1.0, difference, hessian) is None
    assert undamped_error(0.0, 0.0, difference, hessian) == 0.0
