# SPDX-License-Identifier: Apache-2.0
"""The packed layer: its product, its state, and what torch does to modules."""

from __future__ import annotations

import copy

import pytest
import torch
from isas import needs_cuda, running
from torch import Tensor, nn

from mmq.errors import MmqError
from mmq.gptq import gptq
from mmq.grid import find_grid, quantize
from mmq.hessian import stats_of
from mmq.linear import Layout, QuantLinear
from mmq.options import GptqOptions
from mmq.packed import PackedWeight
from mmq.rtn import rtn
from mmq.spec import QuantSpec, Zero

EPS = torch.finfo(torch.float32).eps
CANONICAL = ("qweight", "scales", "qzeros", "mins", "perm", "in_scale")


def dense(n: int, k: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def act_order_layer(n: int = 9, k: int = 37, group_size: int = 8) -> QuantLinear:
    """A layer with ``perm`` and ``in_scale``, partial last group."""
    linear = dense(n, k)
    generator = torch.Generator().manual_seed(1)
    scale = (0.5 + torch.rand(k, generator=generator)).half().float()
    inputs = torch.randn(64, k, generator=generator) * torch.linspace(0.1, 3, k)
    packed, _ = gptq(
        linear.weight.detach() * scale,
        stats_of(inputs / scale).hessian,
        QuantSpec(3, group_size=group_size),
        GptqOptions(order="act"),
        in_scale=scale,
    )
    assert packed.perm is not None
    assert packed.in_scale is not None
    return QuantLinear.replacing(linear, packed)


def assert_product(layer: QuantLinear, x: Tensor, run: QuantLinear | None = None) -> None:
    """Elementwise |y - y64| <= 2 k eps32 (|x'| |W'|^T + |b|) + eps_out |y64|, and W' = W_hat.

    x' is the divided input; one rounding per product and sum over k terms, and the kernels' split
    of scale and minimum, bound the first part.
    """
    weight = layer.packed.dequantize().double()
    scale = layer.packed.in_scale
    used = x.double() if scale is None else x.double() / scale.double()
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    expected = used @ weight.T + bias.double()
    grid = layer.packed.grid().rows(layer.out_features)
    spread = 2 ** (layer.layout.bits + 1) * grid.scales.amax(dim=1).double()
    magnitude = weight.abs() + grid.zeros.abs().amax(1, keepdim=True) * (
        1.0 if grid.float_zero else 0.0
    )
    bound = (
        2
        * layer.in_features
        * EPS
        * (used.abs() @ (magnitude + spread[:, None]).T + bias.double().abs())
        + torch.finfo(x.dtype).eps * expected.abs()
    )
    got = (run or layer)(x)
    assert got.dtype == x.dtype
    worst = ((got.double() - expected).abs() - bound).max() if got.numel() else torch.tensor(-1.0)
    assert float(worst) <= 0, f"{layer}: {float(worst):.3g} above the bound"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
def test_product_equals_the_dequantized_weight(bits: int, zero: str) -> None:
    for n, k, group_size in ((2, 33, 16), (7, 40, -1), (1, 1, 8)):
        layer = QuantLinear.from_float(dense(n, k), QuantSpec(bits, group_size, zero))
        assert_product(layer, torch.randn(5, k, generator=torch.Generator().manual_seed(2)))


def test_product_with_perm_in_scale_and_a_partial_group() -> None:
    layer = act_order_layer()
    assert_product(layer, torch.randn(6, 37, generator=torch.Generator().manual_seed(3)))
    assert {"perm", "in_scale"} <= set(layer.state_dict())


def test_product_with_one_scale_per_tensor() -> None:
    spec = QuantSpec(4, zero="float", per_tensor=True)
    layer = QuantLinear.from_float(dense(6, 20), spec)
    assert tuple(layer.state_dict()["scales"].shape) == (1, 1)
    assert_product(layer, torch.randn(3, 20, generator=torch.Generator().manual_seed(4)))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "float"])
def test_product_on_cuda(isa: str, zero: Zero, dtype: torch.dtype) -> None:
    for bits in (2, 5, 8):
        for n, k, group_size in ((2, 33, 16), (70, 40, -1), (1, 1, 16)):
            linear = dense(n, k).to(dtype)
            x = torch.randn(3, k, generator=torch.Generator().manual_seed(2)).to(dtype)
            with running(isa):
                assert_product(QuantLinear.from_float(linear, QuantSpec(bits, group_size, zero)), x)


@needs_cuda
def test_a_layer_goes_to_cuda_and_back(isa: str) -> None:
    """What .to() does to a ready layer: canonical in between, bitwise the same tensors after."""
    layer = act_order_layer(9, 48, 16).half()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(8)).half()
    expected = layer(x)
    layer.restore()
    with running(isa):
        layer.prepare()
        on_cuda = layer(x)
        assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)
        layer.restore()
    layer.prepare()
    assert torch.equal(layer(x), expected)
    # A divided activation is rounded to 16 bits on CUDA, and is not on the CPU.
    error = (on_cuda.double() - expected.double()).abs()
    packed = layer.packed
    assert packed.in_scale is not None
    size = (x / packed.in_scale).double().abs() @ packed.dequantize().double().abs().T
    assert bool((error <= 2.0**-10 * (size + expected.double().abs())).all())


def test_product_check_can_fail() -> None:
    layer = QuantLinear.from_float(dense(4, 64), QuantSpec(4, 32))
    packed = layer.packed
    packed.qweight[1, 2] ^= 1 << 4
    wrong = QuantLinear(packed, layer.bias)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    with pytest.raises(AssertionError, match="above the bound"):
        assert_product(layer, x, run=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_leading_dimensions_and_dtypes(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_float(dense(2, 33), QuantSpec(4, 16)).to(dtype)
    for shape in ((33,), (4, 33), (2, 3, 33), (0, 33), (2, 0, 33)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(6)).to(dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 2)
        assert y.dtype == dtype
    assert layer.weight.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype


def test_wrong_width_is_refused() -> None:
    layer = QuantLinear.from_float(dense(2, 33), QuantSpec(4, 16))
    with pytest.raises(MmqError, match=r"expected \[\.\.\., 33\], got \[1, 32\]"):
        layer(torch.zeros(1, 32))


def test_int8_mode_is_close_and_chosen_by_name() -> None:
    linear = dense(16, 128)
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(7))
    exact = QuantLinear.from_float(linear, QuantSpec(4, 32))
    fast = QuantLinear.from_float(linear, QuantSpec(4, 32), mode="int8")
    difference = (fast(x) - exact(x)).norm() / exact(x).norm()
    assert 0 < float(difference) < 0.02
    with pytest.raises(MmqError, match="mode: expected one of exact, int8, got 'fast'"):
        QuantLinear.from_float(linear, QuantSpec(4, 32), mode="fast")  # type: ignore[arg-type]


def test_weight_is_an_empty_property() -> None:
    layer = QuantLinear.from_float(dense(4, 8, bias=False), QuantSpec(4))
    assert layer.weight.numel() == 0
    assert "weight" not in dict(layer.named_parameters()) | dict(layer.named_buffers())
    assert list(layer.parameters()) == []
    assert (layer.in_features, layer.out_features) == (8, 4)
    assert "bits=4" in repr(layer)


def test_memory_holds_the_codes_once() -> None:
    layer = QuantLinear.from_float(dense(64, 256), QuantSpec(4, 128))
    assert layer.qweight is None
    assert "tiles" not in layer.state_dict()
    codes = 64 * 256 // 2
    held = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert codes <= held < 2 * codes


def test_state_dict_is_canonical_and_loads_bitwise() -> None:
    layer = act_order_layer()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    packed = layer.packed
    assert set(state) == {*packed.tensors(), "bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in packed.tensors().items())
    other = QuantLinear.empty(layer.layout, device="cpu")
    with pytest.raises(MmqError, match="expected a prepared layer"):
        other(torch.zeros(1, 37))
    other.load_state_dict(state)
    other.prepare()
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(8))
    assert torch.equal(other(x), layer(x))
    layer.load_state_dict(state)  # A ready layer repacks by itself.
    assert layer.is_ready
    assert torch.equal(other(x), layer(x))


def test_loading_refuses_what_does_not_fit() -> None:
    layer = QuantLinear.from_float(dense(4, 33), QuantSpec(3, 16))
    state = dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"scales: expected torch.float16, got torch.float32"):
        layer.load_state_dict({**state, "scales": state["scales"].float()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**state, "qweight": state["qweight"][:2]})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({name: state[name] for name in state if name != "qzeros"})
    bad = state["scales"].clone()
    bad[1, 1] = float("nan")
    with pytest.raises(RuntimeError, match="expected finite positive numbers"):
        layer.load_state_dict({**state, "scales": bad})


def test_conversions_keep_the_scales_and_the_codes() -> None:
    layer = act_order_layer()
    before = {name: tensor.clone() for name, tensor in layer.packed.tensors().items()}
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(9))
    expected = layer(x)
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.float(),
    ):
        layer = convert(layer)
        assert layer.scales.dtype == torch.float16
        assert layer.affine is not None
        assert layer.affine.dtype == torch.float16
        after = layer.packed.tensors()
        assert all(torch.equal(after[name], before[name]) for name in before)
    # The bias went through bfloat16, everything else came back bitwise.
    bias = layer.bias
    assert bias is not None
    original = act_order_layer().bias
    assert original is not None
    assert torch.equal(bias, original.bfloat16().float())
    layer.load_state_dict({**layer.state_dict(), "bias": original})
    assert torch.equal(layer(x), expected)


def test_deepcopy_is_independent() -> None:
    layer = act_order_layer()
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(10))
    expected = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        assert other.bias is not None
        other.bias.zero_()
    assert torch.equal(layer(x), expected)


def test_meta_then_materialized() -> None:
    layer = act_order_layer()
    empty = QuantLinear.empty(layer.layout)
    assert empty.scales.is_meta
    assert {n: (t.dtype, tuple(t.shape)) for n, t in empty.state_dict().items() if n != "bias"} == (
        layer.layout.tensors()
    )
    empty.load_state_dict(layer.state_dict(), assign=True)
    empty.prepare()
    x = torch.randn(2, 37, generator=torch.Generator().manual_seed(11))
    assert torch.equal(empty(x), layer(x))


def test_compiles_into_one_graph() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = act_order_layer()
            self.second = QuantLinear.from_float(dense(2, 9), QuantSpec(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]

    model = Two().eval()
    x = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(12))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


def test_to_dense_has_the_same_function() -> None:
    layer = act_order_layer()
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(13))
    plain = layer.to_dense()
    assert isinstance(plain, nn.Linear)
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.weight.detach(), layer.dequantize())


def test_layout_round_trip_and_refusals() -> None:
    layout = act_order_layer().layout
    assert Layout.from_dict("x", layout.to_dict()) == layout
    for change, message in (
        ({"bits": 9}, "expected a layout that mmq writes"),
        ({"bits": "4"}, "x.bits: expected int, got '4'"),
        ({"perm": 1}, "x.perm: expected bool, got 1"),
        ({"group_size": 0}, "expected a layout"),
        ({"extra": 1}, r"\['extra'\]"),
    ):
        with pytest.raises(MmqError, match=message):
            Layout.from_dict("x", {**layout.to_dict(), **change})


def test_packed_equals_simulated() -> None:
    """The scale was rounded before codes were chosen: the layer's weight is the grid's, bitwise."""
    linear = dense(8, 48)
    spec = QuantSpec(3, 16, clip="mse")
    grid = find_grid(linear.weight, spec)
    codes = quantize(linear.weight, grid)
    packed = PackedWeight.from_codes(codes, grid, spec, method="rtn")
    layer = QuantLinear.replacing(linear, packed)
    again, _ = rtn(linear.weight, spec)
    assert torch.equal(layer.dequantize(), again.dequantize())
    assert all(getattr(layer, name) is None for name in ("mins", "perm", "in_scale"))
    assert set(layer.packed.tensors()) <= set(CANONICAL)
