# SPDX-License-Identifier: Apache-2.0
"""RTN and the study's uniform method: exact formulas, reports, bad input."""

import json

import pytest
import torch
from problems import layer, mean_error

from mmq.errors import MmqError
from mmq.grid import dequantize, find_grid, quantize
from mmq.hessian import stats_of
from mmq.rtn import rtn, uniform
from mmq.spec import QuantSpec


@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_rtn_is_the_grid_plus_rounding(zero, clip):
    w, _ = layer(6, 40, 4)
    spec = QuantSpec(3, 16, zero, clip=clip, clip_steps=10)
    grid = find_grid(w, spec)
    packed, _ = rtn(w, spec)
    assert torch.equal(packed.dequantize(), dequantize(quantize(w, grid), grid))


def test_report_measures_what_was_stored():
    w, x = layer(6, 40, 200)
    packed, report = rtn(w, QuantSpec(3, 16), hessian=stats_of(x).hessian, name="blocks.0.fc1")
    difference = packed.dequantize() - w
    assert report.weight_mse == pytest.approx(float(difference.double().square().mean()))
    assert report.output_error == pytest.approx(mean_error(difference, x), rel=1e-4)
    assert report.relative_error == pytest.approx(
        mean_error(difference, x) / mean_error(w, x), rel=1e-4
    )
    assert (report.name, report.method, report.bits) == ("blocks.0.fc1", "rtn", 3)
    assert report.bits_per_weight == packed.bits_per_weight
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["output_error"] == report.output_error
    assert "gptq" not in loaded


def test_output_error_is_absent_without_inputs():
    w, _ = layer(3, 8, 4)
    _, report = rtn(w, QuantSpec(4))
    assert report.output_error is None
    assert "output_error" not in report.to_dict()


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_is_the_formula_of_the_study(bits):
    w, _ = layer(7, 33, 4)
    packed, report = uniform(w, bits, scale_dtype="float32")
    low, high, top = w.min(), w.max(), (1 << bits) - 1
    expected = (high - low) * torch.round(top * (w - low) / (high - low)) / top + low
    assert torch.allclose(packed.dequantize(), expected, atol=1e-6)
    assert packed.scales.shape == packed.mins.shape == (1, 1)
    assert report.method == packed.method == "uniform"


def test_uniform_of_a_constant_matrix_is_exact():
    packed, report = uniform(torch.full((3, 5), 0.25), 2)
    assert torch.equal(packed.dequantize(), torch.full((3, 5), 0.25))
    assert report.weight_mse == 0.0


def test_weighted_clip_lowers_the_output_error_of_uncorrelated_inputs():
    w, _ = layer(16, 64, 4)
    sizes = torch.logspace(-2, 1, 64)
    hessian = torch.diag(2 * sizes.square())
    spec = QuantSpec(2, 32, clip="mse")
    _, plain = rtn(w, spec, hessian=hessian)
    _, weighted = rtn(w, spec, importance=hessian.diagonal(), hessian=hessian)
    assert weighted.output_error < 0.9 * plain.output_error


@pytest.mark.parametrize("method", ["rtn", "uniform"])
def test_non_finite_weights_are_refused_by_name(method):
    w = torch.full((2, 4), float("nan"))
    with pytest.raises(MmqError, match="lm_head: expected finite weights, got 8"):
        rtn(w, QuantSpec(4), name="lm_head") if method == "rtn" else uniform(w, 4, name="lm_head")


@pytest.mark.parametrize("shape", [(2, 768), (1, 1), (5, 4304)])
def test_awkward_shapes(shape):
    w, _ = layer(*shape, 1)
    packed, _ = rtn(w, QuantSpec(3, 128))
    assert packed.dequantize().shape == shape
