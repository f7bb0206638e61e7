# SPDX-License-Identifier: Apache-2.0
"""Mistakes of earlier implementations, on one matrix: each has a test that it would fail.

Also of this kind, beside the code they test: folds that forget a bias or cross a GELU, clipping on
unscaled inputs or on query and key rows, exponents that make AWQ plain rounding, a scale found on
the first tokens only (test_awq.py); an empty Hessian, padding that counts (test_hessian.py).
"""

import itertools

import pytest
import safetensors.torch
import torch
from problems import layer, mean_error

from mmq.awq import awq
from mmq.errors import MmqError
from mmq.gptq import gptq
from mmq.grid import dequantize, quantize
from mmq.hessian import Hessian, stats_of
from mmq.options import GptqOptions
from mmq.packed import PackedWeight
from mmq.rtn import rtn, uniform
from mmq.spec import QuantSpec
from mmq_ext import ops

METHODS = ("rtn", "gptq", "gptq-act", "awq")


def run(method: str, w: torch.Tensor, x: torch.Tensor, spec: QuantSpec) -> PackedWeight:
    if method == "rtn":
        return rtn(w, spec)[0]
    if method == "awq":
        return awq(w, x, spec)[0]
    options = GptqOptions(order="act" if method == "gptq-act" else "auto")
    return gptq(w, stats_of(x).hessian, spec, options)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_and_zero_groups_and_groups_of_one(method, bits):
    _, x = layer(1, 12, 60)
    w = torch.zeros(3, 12)
    w[1] = 0.5
    w[2, :4] = -0.25
    for zero, group_size in itertools.product(("integer", "float", "symmetric"), (-1, 1, 4)):
        packed = run(method, w, x, QuantSpec(bits, group_size, zero))
        values = packed.effective_weight()
        assert bool(torch.isfinite(values).all())
        assert not values[0].any()


@pytest.mark.parametrize("value", [0.0, 0.5, -1e-9])
@pytest.mark.parametrize("bits", [2, 8])
def test_uniform_of_a_constant(value, bits):
    packed, _ = uniform(torch.full((2, 3), value), bits)
    assert torch.allclose(packed.dequantize(), torch.full((2, 3), value), atol=1e-7)


def test_16_bits_is_never_fake_quantized():
    with pytest.raises(MmqError, match="bits: expected one of"):
        QuantSpec(16)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_stored_scales_are_those_the_codes_were_chosen_with(method, zero, scale_dtype):
    """Packed = simulated: every value lies on the stored grid of its own group, at its code."""
    w, x = layer(6, 50, 300)
    packed = run(method, w, x, QuantSpec(3, 16, zero, scale_dtype=scale_dtype))
    grid, codes = packed.grid(), packed.codes()
    assert torch.equal(quantize(dequantize(codes, grid), grid), codes)
    if method == "rtn":  # With a scale rounded afterwards some codes are not the nearest.
        assert torch.equal(quantize(w, grid), codes)


@pytest.mark.parametrize("method", METHODS)
def test_restricted_symmetric_codes_leave_0_unused(method):
    w, x = layer(6, 50, 300)
    spec = QuantSpec(2, 16, "symmetric", symmetric_range="restricted", clip="mse")
    codes = run(method, w, x, spec).codes()
    assert int(codes.min()) == 1
    assert int(codes.max()) == 3


def test_scales_rounded_after_the_codes_would_show():
    """The check above can fail."""
    w, _ = layer(6, 50, 1)
    exact = rtn(w, QuantSpec(8, 16, scale_dtype="float32"))[0]
    rounded = type(exact.grid())(exact.scales.bfloat16().float(), exact.grid().zeros, 8, 16, False)
    assert not torch.equal(quantize(w, rounded), exact.codes())


def test_gptq_is_not_rounded_again_with_the_last_scale():
    """Groups of very different sizes: one common scale would destroy the small ones."""
    w, x = layer(8, 64, 400)
    w = w * torch.tensor([1.0, 100.0]).repeat_interleave(32)
    x = x / torch.tensor([1.0, 100.0]).repeat_interleave(32)
    hessian = stats_of(x).hessian
    packed, report = gptq(w, hessian, QuantSpec(4, 32))
    assert report.output_error == pytest.approx(mean_error(packed.dequantize() - w, x), rel=1e-3)
    last = type(packed.grid())(
        packed.grid().scales[:, 1:], packed.grid().zeros[:, 1:], 4, -1, False
    )
    again = dequantize(quantize(packed.dequantize(), last), last)
    assert mean_error(again - w, x) > 100 * report.output_error


def test_a_path_without_tokens_is_an_error_not_zero_weights():
    hessian = Hessian(8, name="qformer.layer.0.intermediate")
    with pytest.raises(MmqError, match=r"qformer\.layer\.0\.intermediate"):
        hessian.finish()
    with pytest.raises(MmqError, match="fc1: expected a Hessian of at least 1 non-zero"):
        gptq(torch.ones(2, 8), torch.zeros(8, 8), QuantSpec(4), name="fc1")


@pytest.mark.parametrize("method", METHODS)
def test_any_subset_of_a_spec_runs_and_is_kept(method):
    w, x = layer(3, 20, 100)
    fields = {
        "group_size": 8,
        "zero": "symmetric",
        "symmetric_range": "restricted",
        "clip": "mse",
        "scale_dtype": "bfloat16",
    }
    for count in range(len(fields) + 1):
        for chosen in itertools.combinations(fields, count):
            spec = QuantSpec(5, **{name: fields[name] for name in chosen})
            packed = run(method, w, x, spec)
            assert (packed.bits, packed.group_size) == (5, spec.group_size)
            assert packed.zero == spec.zero
            assert packed.scales.dtype == spec.torch_scale_dtype


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
def test_size_is_the_payload_of_the_file(method, zero, tmp_path):
    w, x = layer(5, 50, 300)
    packed = run(method, w, x, QuantSpec(3, 16, zero))
    path = tmp_path / "weight.safetensors"
    safetensors.torch.save_file({k: t.contiguous() for k, t in packed.tensors().items()}, path)
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert len(data) - 8 - header == packed.nbytes
    again = PackedWeight.from_tensors(packed.metadata(), safetensors.torch.load_file(path))
    assert torch.equal(again.effective_weight(), packed.effective_weight())


@pytest.mark.parametrize("method", METHODS)
def test_kernels_multiply_with_the_measured_matrix(method):
    """y of the packed kernel = x times the effective weight that the report was measured on."""
    w, x = layer(7, 50, 300)
    packed = run(method, w, x, QuantSpec(4, 16))
    grid = packed.grid()
    y = ops.packed_gemm(
        x[:9],
        ops.repack(packed.qweight, 4, 50),
        ops.repack_affine(grid.scales, grid.zeros, grid.bits, float_zero=False),
        n=7,
        bits=4,
        group_size=16,
        perm=packed.perm,
        in_scale=None if packed.in_scale is None else packed.in_scale.float(),
    )
    expected = x[:9].double() @ packed.effective_weight().double().T
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5)
