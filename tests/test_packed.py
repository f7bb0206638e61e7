# SPDX-License-Identifier: Apache-2.0
"""PackedWeight: exactness, true bytes, strict validation, tensors there and back."""

import dataclasses
from functools import partial

import pytest
import torch

from mmq.errors import MmqError
from mmq.grid import dequantize, find_grid, quantize
from mmq.packed import PackedWeight
from mmq.spec import QuantSpec


def pack(n, k, spec, *, perm=None, in_scale=None, seed=0):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    grid = find_grid(w, spec)
    codes = quantize(w, grid)
    packed = PackedWeight.from_codes(codes, grid, spec, perm=perm, in_scale=in_scale, method="rtn")
    return packed, codes, grid


@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_values_are_the_simulated_values_exactly(zero, scale_dtype, bits):
    spec_of = partial(QuantSpec, zero=zero, scale_dtype=scale_dtype)
    for n, k, group_size in ((2, 33, -1), (1, 1, 1), (7, 129, 32), (3, 31, 7)):
        packed, codes, grid = pack(n, k, spec_of(bits, group_size))
        assert torch.equal(packed.codes(), codes)
        assert torch.equal(packed.dequantize(), dequantize(codes, grid))
        groups, scale_bytes = packed.groups, 4 if scale_dtype == "float32" else 2
        expected = 4 * n * -(-k * bits // 32) + scale_bytes * n * groups
        if zero == "integer":
            expected += 4 * n * -(-groups * bits // 32)
        if zero == "float":
            expected += scale_bytes * n * groups
        assert packed.nbytes == expected
        assert packed.bits_per_weight == 8 * expected / (n * k)


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [(3, 128, 3.15), (3, 64, 3.30), (3, 32, 3.59), (4, 128, 4.16)],
)
def test_effective_bits_of_common_settings(bits, group_size, expected):
    packed, _, _ = pack(4, 4096, QuantSpec(bits, group_size))
    assert packed.bits_per_weight == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
def test_per_tensor_parameters_are_stored_once(zero):
    packed, codes, grid = pack(5, 8, QuantSpec(4, zero=zero, per_tensor=True))
    assert packed.scales.shape == (1, 1)
    assert packed.per_tensor
    assert torch.equal(packed.dequantize(), dequantize(codes, grid))
    assert packed.nbytes == 4 * 5 + 2 + {"integer": 4, "float": 2, "symmetric": 0}[zero]


def test_permutation_is_undone_and_identity_is_not_stored():
    spec = QuantSpec(3, 4)
    perm = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    packed, codes, grid = pack(3, 10, spec, perm=perm)
    assert torch.equal(packed.dequantize()[:, perm], dequantize(codes, grid))
    assert packed.perm is not None
    assert packed.perm.dtype == torch.int32
    plain, _, _ = pack(3, 10, spec, perm=torch.arange(10))
    assert plain.perm is None
    assert packed.nbytes == plain.nbytes + 4 * 10


def test_effective_weight_divides_by_in_scale():
    in_scale = torch.tensor([0.5, 2.0, 1.0, 4.0, 0.25])
    packed, codes, grid = pack(2, 5, QuantSpec(4), in_scale=in_scale)
    assert torch.equal(packed.dequantize(), dequantize(codes, grid))
    assert torch.equal(packed.effective_weight(), packed.dequantize() / in_scale)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    y = (x / in_scale) @ packed.dequantize().T
    assert torch.allclose(y, x @ packed.effective_weight().T, atol=1e-5)


@pytest.mark.parametrize("zero", ["integer", "float", "symmetric"])
def test_tensors_and_metadata_rebuild_the_weight(zero):
    perm = torch.arange(9).flip(0)
    packed, _, _ = pack(4, 9, QuantSpec(5, 4, zero), perm=perm, in_scale=torch.full((9,), 0.5))
    again = PackedWeight.from_tensors(packed.metadata(), packed.tensors())
    assert torch.equal(again.effective_weight(), packed.effective_weight())
    assert again.metadata() == packed.metadata()
    assert sum(t.numel() * t.element_size() for t in again.tensors().values()) == packed.nbytes


def break_(packed, **changes):
    return dataclasses.replace(packed, **changes)


def set_bit(tensor, value):
    tensor = tensor.clone()
    tensor[-1, -1] = value
    return tensor


def full(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda p: {"bits": 9}, "expected bits of"),
        (lambda p: {"group_size": 0}, "positive group size or -1, got 0"),
        (lambda p: {"zero": "none"}, "expected zero of"),
        (lambda p: {"n": -1}, "expected n, k >= 1"),
        (lambda p: {"qweight": p.qweight[:, :-1]}, r"qweight: expected torch.int32 \[4, 2\], got"),
        (lambda p: {"qweight": p.qweight.long()}, "qweight: expected torch.int32"),
        (lambda p: {"qweight": set_bit(p.qweight, 1 << 30)}, "qweight: expected zero bits after"),
        (lambda p: {"qzeros": set_bit(p.qzeros, -1)}, "qzeros: expected zero bits after code 2"),
        (lambda p: {"qzeros": None}, "qzeros: expected one with integer zeros, got none"),
        (lambda p: {"mins": p.scales}, "mins: expected none with integer zeros, got one"),
        (lambda p: {"zero": "float"}, "qzeros: expected none with float zeros, got one"),
        (lambda p: {"scales": p.scales[:, :2]}, r"scales: expected torch.float16 \[4, 3\]"),
        (lambda p: {"scales": p.scales.double()}, "scales: expected float16"),
        (
            lambda p: {"scales": full(p.scales, 0.0)},
            r"scales: expected finite positive .* \[3, 2\]",
        ),
        (lambda p: {"scales": full(p.scales, -1.0)}, "scales: expected finite positive"),
        (lambda p: {"scales": full(p.scales, float("nan"))}, "scales: expected finite positive"),
        (lambda p: {"scales": full(p.scales, float("inf"))}, "scales: expected finite positive"),
        (lambda p: {"perm": p.perm[:-1]}, r"perm: expected torch.int32 \[11\]"),
        (lambda p: {"perm": full(p.perm, 1)}, "perm: expected a permutation"),
        (lambda p: {"in_scale": p.in_scale.float()}, "in_scale: expected torch.float16"),
        (lambda p: {"in_scale": full(p.in_scale, 0)}, "in_scale: expected finite positive"),
        (lambda p: {"group_size": -1}, r"scales: expected torch.float16 \[4, 1\]"),
        (lambda p: {"k": 12}, "expected torch"),
    ],
)
def test_validation_names_the_tensor(changes, message):
    packed, _, _ = pack(
        4, 11, QuantSpec(4, 4), perm=torch.arange(11).flip(0), in_scale=torch.ones(11)
    )
    with pytest.raises(MmqError, match=message) as caught:
        break_(packed, **changes(packed)).validate("layers.0.fc1")
    assert str(caught.value).startswith("layers.0.fc1")
    assert "\n" not in str(caught.value)


def test_float_minima_are_validated():
    packed, _, _ = pack(4, 11, QuantSpec(4, 4, "float"))
    with pytest.raises(MmqError, match="mins: expected finite minima"):
        break_(packed, mins=full(packed.mins, float("nan"))).validate()
    with pytest.raises(MmqError, match=r"mins: expected torch.float16 \[4, 3\]"):
        break_(packed, mins=packed.mins[:1]).validate()


def test_missing_or_unknown_parts_are_refused():
    packed, _, _ = pack(4, 11, QuantSpec(4, 4))
    metadata, tensors = packed.metadata(), packed.tensors()
    with pytest.raises(MmqError, match="fc1: expected metadata field bits"):
        PackedWeight.from_tensors({"n": 4}, tensors, "fc1")
    with pytest.raises(MmqError, match="fc1: expected an integer bits, got '4'"):
        PackedWeight.from_tensors({**metadata, "bits": "4"}, tensors, "fc1")
    with pytest.raises(MmqError, match="fc1: expected a tensor qweight"):
        PackedWeight.from_tensors(metadata, {"scales": packed.scales}, "fc1")
    with pytest.raises(MmqError, match="got \\['g_idx'\\] too"):
        PackedWeight.from_tensors(metadata, {**tensors, "g_idx": packed.scales}, "fc1")


def test_unfit_in_scale_and_perm_are_refused_when_packing():
    with pytest.raises(MmqError, match="in_scale: expected finite positive"):
        pack(2, 4, QuantSpec(4), in_scale=torch.tensor([1.0, 1.0, 0.0, 1.0]))
    with pytest.raises(MmqError, match="in_scale: expected finite positive"):
        pack(2, 4, QuantSpec(4), in_scale=torch.tensor([1.0, 1.0, 1e9, 1.0]))
    with pytest.raises(MmqError, match="perm: expected a permutation"):
        pack(2, 4, QuantSpec(4), perm=torch.tensor([0, 1, 1, 2]))
