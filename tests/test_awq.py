# SPDX-License-Identifier: Apache-2.0
"""AWQ: candidates, search, clip, folds, and the whole method on one matrix."""

import itertools

import pytest
import torch
from problems import generator, layer, mean_error
from torch import nn

from mmq.awq import (
    awq,
    awq_scales,
    error_factor,
    quantize_scaled,
    relative_magnitude,
    scale_candidates,
    shared_mean,
    stored_scale,
)
from mmq.clip import awq_clip
from mmq.errors import MmqError
from mmq.fold import fold_into_linear, fold_into_norm, producer_scale, scale_inputs
from mmq.gptq import gptq
from mmq.grid import dequantize, find_grid, quantize
from mmq.hessian import InputStats, rescale_hessian, stats_of
from mmq.options import AwqOptions
from mmq.rtn import rtn
from mmq.spec import QuantSpec

NO_CLIP = AwqOptions(clip=False)


# --- Candidates ---


def test_candidates_follow_the_formula():
    mean_abs = torch.tensor([0.0, 0.01, 1.0, 25.0])
    alphas, scales = scale_candidates(mean_abs, AwqOptions())
    assert alphas == [i / 20 for i in range(21)]
    assert torch.equal(scales[0], torch.ones(4))
    for alpha, row in zip(alphas[1:], scales[1:], strict=True):
        s = mean_abs.double().pow(alpha).clamp_min(1e-4)
        s /= (s.max() * s.min()).sqrt()
        assert torch.allclose(row, s.float())
        assert float(row.max() * row.min()) == pytest.approx(1.0, rel=1e-5)


def test_weight_aware_candidates_follow_the_formula():
    mean_abs, relative = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.1, 0.9, 0.3])
    _, scales = scale_candidates(mean_abs, AwqOptions(steps=2, weight_aware=True), relative)
    s = mean_abs.sqrt() / (relative.sqrt() + 1e-4)
    assert torch.equal(scales[0], torch.ones(3))
    assert torch.allclose(scales[1], s / (s.max() * s.min()).sqrt())
    assert torch.allclose(scales[2], mean_abs / 2**0.5)  # s / sqrt(4 * 0.5) at alpha = 1.


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_candidates_become_one(bad):
    _, scales = scale_candidates(torch.tensor([1.0, bad, 2.0]), AwqOptions(steps=4))
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())


def test_relative_magnitude_is_per_group():
    w = torch.tensor([[1.0, -2.0, 0.1, 0.05, 0.0]])
    assert torch.allclose(relative_magnitude(w, 2), torch.tensor([0.5, 1.0, 1.0, 0.5, 0.0]))


# --- Search ---


@pytest.mark.parametrize(("tokens", "rows"), [(10, 10), (200, 64), (40, 64)])
def test_factor_gives_the_output_error(tokens, rows):
    w, x = layer(5, 64, tokens)
    factor = error_factor(x)
    assert factor.shape == (rows, 64)
    found = float((w.double() @ factor.double().T).square().sum()) / 2
    assert found == pytest.approx(mean_error(w, x), rel=1e-3)
    from_stats = error_factor(stats_of(x))
    found = float((w.double() @ from_stats.double().T).square().sum()) / 2
    assert found == pytest.approx(mean_error(w, x), rel=1e-3)


@pytest.mark.parametrize("weight_aware", [False, True])
@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
def test_errors_are_those_of_every_candidate(weight_aware, zero):
    """The objective: outputs of all linears that share the input, all tokens."""
    (w, x), (v, _) = layer(6, 48, 256), layer(3, 48, 1, seed=9)
    spec, options = QuantSpec(3, 16, zero), AwqOptions(steps=5, weight_aware=weight_aware)
    stats = stats_of(x)
    search = awq_scales([w, v], stats.mean_abs, error_factor(x), spec, options)
    relative = relative_magnitude(torch.cat((w, v)), 16) if weight_aware else None
    alphas, candidates = scale_candidates(x.abs().mean(dim=0), options, relative)
    for error, s in zip(search.errors, candidates, strict=True):
        expected = sum(mean_error(rtn(m * s, spec)[0].dequantize() / s - m, x) for m in (w, v))
        assert error == pytest.approx(expected, rel=1e-3)
    best = min(range(len(alphas)), key=lambda i: search.errors[i])
    assert search.alpha == alphas[best]
    assert torch.allclose(search.scale, candidates[best])


def test_each_weight_may_have_its_own_grid():
    (w, x), (v, _) = layer(6, 48, 256), layer(3, 48, 1, seed=9)
    mean_abs, factor = stats_of(x).mean_abs, error_factor(x)
    specs = [QuantSpec(2, 16), QuantSpec(4, 24, "symmetric")]
    joint = awq_scales([w, v], mean_abs, factor, specs)
    parts = [awq_scales([m], mean_abs, factor, s) for m, s in zip((w, v), specs, strict=True)]
    for error, one, other in zip(joint.errors, parts[0].errors, parts[1].errors, strict=True):
        assert error == pytest.approx(one + other)
    with pytest.raises(MmqError, match="fc1: expected a grid per weight, got 2, 1"):
        awq_scales([w], mean_abs, factor, specs, name="fc1")


def test_ties_go_to_the_smaller_exponent():
    """Equal channels: every candidate is the identity."""
    w, _ = layer(4, 16, 1)
    search = awq_scales([w], torch.full((16,), 3.0), torch.eye(16), QuantSpec(4))
    assert search.alpha == 0.0
    assert torch.equal(search.scale, torch.ones(16))


@pytest.mark.parametrize("bits", [3, 4])
def test_scaling_beats_exponent_0_on_skewed_inputs(bits):
    """Over 12 layers; on the wrong exponents 0, 1, 2, ... plain rounding won nearly always."""
    alphas, ratios = [], []
    for seed in range(12):
        w, x = layer(16, 64, 512, seed=seed)
        search = awq_scales([w], stats_of(x).mean_abs, error_factor(x), QuantSpec(bits, 32))
        alphas.append(search.alpha)
        ratios.append(min(search.errors) / search.errors[0])
    assert min(alphas) > 0
    assert max(alphas) < 1
    assert len(set(alphas)) > 2
    assert max(ratios) < 0.9
    assert sum(ratios) / 12 < 0.75


def test_search_sees_every_token_and_no_order():
    w, x = layer(8, 32, 300)
    spec = QuantSpec(3, 16)

    def search(inputs):
        return awq_scales([w], stats_of(inputs).mean_abs, error_factor(inputs), spec)

    shuffled = x[torch.randperm(300, generator=generator(1))]
    assert search(x).alpha == search(shuffled).alpha
    assert torch.allclose(search(x).scale, search(shuffled).scale, rtol=1e-4)
    later = x.clone()
    later[200:, :4] *= 100
    assert not torch.allclose(search(x).scale, search(later).scale, rtol=1e-2)


def test_shared_channels_get_one_scale():
    """Grouped-query attention: 2 value heads of 4, each read by 3 query heads."""
    heads = torch.arange(8).view(2, 4).repeat_interleave(3, dim=0).reshape(-1)
    w, x = layer(6, 24, 200)
    stats = stats_of(x)
    search = awq_scales([w], stats.mean_abs, error_factor(x), QuantSpec(3, 8), source_rows=heads)
    assert search.alpha > 0
    per_channel = producer_scale(search.scale, heads, 8)
    assert per_channel.shape == (8,)
    assert torch.equal(per_channel[heads], search.scale)
    with pytest.raises(MmqError, match="one AWQ scale per producer channel"):
        producer_scale(torch.arange(1.0, 25.0), heads, 8)


def test_shared_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert shared_mean(values, torch.tensor([0, 1, 0, 1])).tolist() == [2.0, 4.0, 2.0, 4.0]


def test_bad_search_input_is_refused_by_name():
    w, spec = torch.ones(2, 4), QuantSpec(4)
    ones, factor = torch.ones(4), torch.eye(4)
    with pytest.raises(MmqError, match=r"fc1: .* got per_tensor"):
        awq_scales([w], ones, factor, QuantSpec(4, per_tensor=True), name="fc1")
    with pytest.raises(MmqError, match="fc1: expected statistics of 4 in-features"):
        awq_scales([w], torch.ones(3), factor, spec, name="fc1")
    with pytest.raises(MmqError, match="fc1: expected finite input statistics"):
        awq_scales([w], ones * float("nan"), factor, spec, name="fc1")
    with pytest.raises(MmqError, match="fc1: expected finite weights"):
        awq_scales([w * float("inf")], ones, factor, spec, name="fc1")
    with pytest.raises(MmqError, match="fc1: expected at least 1 calibration token"):
        error_factor(torch.empty(0, 4), name="fc1")
    with pytest.raises(MmqError, match="fc1: expected finite inputs"):
        error_factor(torch.full((1, 4), float("nan")), name="fc1")
    with pytest.raises(MmqError, match="fc1: expected at least 1 non-zero input"):
        error_factor(torch.zeros(9, 4), name="fc1")


# --- Clip ---


@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
@pytest.mark.parametrize("group_size", [8, 10, -1])
def test_clip_is_the_best_of_ten_ranges_per_group(zero, group_size):
    w, x = layer(4, 24, 300)
    spec = QuantSpec(3, group_size, zero, scale_dtype="float32")
    clip = awq_clip(w, stats_of(x).hessian, spec)
    value = dequantize(quantize(w, clip.grid), clip.grid)
    g = spec.row_group_size(24)
    for row, a in itertools.product(range(4), range(0, 24, g)):
        part, inputs = w[row : row + 1, a : a + g], x[:, a : a + g]
        errors = []
        for i in range(10):
            p = 1 - i / 20
            cut = part.clamp(p * part.min(), p * part.max())
            grid = find_grid(cut, QuantSpec(3, zero=zero, scale_dtype="float32"))
            errors.append(mean_error(dequantize(quantize(part, grid), grid) - part, inputs))
        found = mean_error(value[row : row + 1, a : a + g] - part, inputs)
        assert found == pytest.approx(min(errors), rel=1e-3)
        shrink = float(clip.shrink[row, a // g])
        assert errors[round((1 - shrink) * 20)] == pytest.approx(min(errors), rel=1e-3)
    assert float(clip.shrink.min()) < 1.0


def test_clip_leaves_the_rows_of_queries_and_keys_alone():
    w, x = layer(9, 32, 300)
    spec, hessian = QuantSpec(2, 16), stats_of(x).hessian
    rows = torch.arange(9) >= 6
    clip = awq_clip(w, hessian, spec, rows=rows)
    plain, full = find_grid(w, spec), awq_clip(w, hessian, spec)
    assert torch.equal(clip.grid.scales[:6], plain.scales[:6])
    assert torch.equal(clip.grid.zeros[:6], plain.zeros[:6])
    assert torch.equal(clip.grid.scales[6:], full.grid.scales[6:])
    assert bool((clip.shrink[:6] == 1).all())
    assert not torch.equal(full.grid.scales[:6], plain.scales[:6])


def test_clip_uses_the_scaled_inputs():
    """awq() clips on x / s: the grid differs from the one that unscaled inputs give."""
    w, x = layer(8, 32, 300, skew=1.5)
    spec = QuantSpec(2, -1)
    packed, report = awq(w, x, spec)
    assert report.awq.alpha > 0
    s = packed.in_scale.float()
    right = awq_clip(w * s, stats_of(x / s).hessian, spec)
    wrong = awq_clip(w * s, stats_of(x).hessian, spec)
    assert torch.allclose(packed.grid().scales, right.grid.scales)
    assert not torch.allclose(packed.grid().scales, wrong.grid.scales)


def test_clip_lowers_the_output_error():
    w, x = layer(16, 64, 512)
    for zero in ("integer", "symmetric"):
        spec = QuantSpec(2, 32, zero)
        before, after = awq(w, x, spec, NO_CLIP)[1], awq(w, x, spec)[1]
        assert after.output_error < before.output_error
        assert after.awq.mean_shrink < 1.0 == before.awq.mean_shrink


# --- The whole method ---


@pytest.mark.parametrize("zero", ["integer", "symmetric", "float"])
@pytest.mark.parametrize("group_size", [32, 25, -1])
def test_beats_rounding(zero, group_size):
    w, x = layer(16, 64, 512, seed=2)
    spec = QuantSpec(3, group_size, zero)
    packed, report = awq(w, x, spec)
    plain = rtn(w, spec, hessian=stats_of(x).hessian)[1]
    assert report.output_error < 0.8 * plain.output_error
    difference = packed.effective_weight() - w
    assert report.output_error == pytest.approx(mean_error(difference, x), rel=1e-3)
    assert report.weight_mse == pytest.approx(float(difference.square().mean()), rel=1e-3)


def test_inputs_and_their_statistics_give_the_same_codes():
    w, x = layer(8, 32, 200)
    one, _ = awq(w, x.reshape(4, 50, 32), QuantSpec(3, 16))
    other, _ = awq(w, stats_of(x), QuantSpec(3, 16))
    assert float((one.codes() == other.codes()).double().mean()) > 0.99


def test_in_scale_is_rounded_before_codes_are_chosen():
    w, x = layer(8, 32, 200)
    spec = QuantSpec(4, 16, scale_dtype="bfloat16")
    packed, _ = awq(w, x, spec, NO_CLIP)
    s = packed.in_scale.float()
    assert packed.in_scale.dtype == torch.bfloat16
    assert torch.equal(packed.codes(), quantize(w * s, find_grid(w * s, spec)))


def test_exponent_0_stores_no_in_scale():
    w, _ = layer(4, 16, 1)
    stats = InputStats(2 * torch.eye(16), torch.ones(16), 100)
    packed, report = awq(w, stats, QuantSpec(4), NO_CLIP)
    assert packed.in_scale is None
    assert report.awq.alpha == 0.0
    assert torch.equal(packed.codes(), rtn(w, QuantSpec(4))[0].codes())


def test_dead_and_few_inputs_finish():
    w, x = layer(4, 40, 6)
    x[:, 5] = 0
    packed, report = awq(w, x, QuantSpec(3, 16))
    assert bool(torch.isfinite(packed.effective_weight()).all())
    assert report.output_error is not None


def test_awq_then_gptq_on_the_scaled_problem():
    w, x = layer(16, 64, 512)
    spec, stats = QuantSpec(3, 32), stats_of(x)
    search = awq_scales([w], stats.mean_abs, error_factor(x), spec)
    s = stored_scale(search.scale, spec)
    hessian = rescale_hessian(stats.hessian, s)
    packed, report = gptq(w * s, hessian, spec, in_scale=s, method="awq+gptq")
    difference = packed.effective_weight() - w
    assert report.output_error == pytest.approx(mean_error(difference, x), rel=1e-3)
    assert report.output_error < awq(w, x, spec)[1].output_error
    assert packed.method == "awq+gptq"


def test_scaled_matrix_after_a_fold_has_no_in_scale():
    w, x = layer(6, 32, 200)
    s = torch.logspace(-0.5, 0.5, 32)
    packed, report = quantize_scaled(w * s, stats_of(x / s).hessian, QuantSpec(4, 16))
    assert packed.in_scale is None
    found = mean_error(packed.dequantize() - w * s, x / s)
    assert report.output_error == pytest.approx(found, rel=1e-3)


# --- Folds: function preservation, one test per kind of producer in the table ---


def random_scale(k: int, seed: int) -> torch.Tensor:
    """In [0.1, 10], log-uniform."""
    return 10 ** (2 * torch.rand(k, generator=generator(seed), dtype=torch.float64) - 1)


def randomize(*modules: nn.Module) -> None:
    g = generator(11)
    for module in modules:
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)


def linear(k: int, n: int, bias: bool = True) -> nn.Linear:
    module = nn.Linear(k, n, bias=bias)
    randomize(module)
    return module


def close(before: torch.Tensor, after: torch.Tensor) -> bool:
    return bool((before - after).abs().max() <= 1e-10 * before.abs().max())


def tokens(k: int) -> torch.Tensor:
    return torch.randn(7, k, generator=generator(12), dtype=torch.float64)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16)], ids=["layer", "rms"])
@pytest.mark.parametrize("consumers", [1, 3])
def test_fold_into_norm_preserves_the_function(norm, consumers):
    randomize(norm)
    linears, x, s = [linear(16, 5) for _ in range(consumers)], tokens(16), random_scale(16, 1)
    before = [each(norm(x)) for each in linears]
    fold_into_norm(norm, s)
    for each, y in zip(linears, before, strict=True):
        scale_inputs(each, s)
        assert close(y, each(norm(x)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("between", ["nothing", "relu"])
def test_fold_into_linear_preserves_the_function(bias, between):
    first, second, x, s = linear(9, 16, bias), linear(16, 5), tokens(9), random_scale(16, 2)
    act = torch.relu if between == "relu" else nn.Identity()
    before = second(act(first(x)))
    fold_into_linear(first, s)
    scale_inputs(second, s)
    assert close(before, second(act(first(x))))


@pytest.mark.parametrize("act", [nn.functional.gelu, lambda a: a * torch.sigmoid(1.702 * a)])
def test_fold_through_gelu_would_show(act):
    """The check above can fail: GELU and QuickGELU do not commute with a scale."""
    first, second, x, s = linear(9, 16), linear(16, 5), tokens(9), random_scale(16, 2)
    before = second(act(first(x)))
    fold_into_linear(first, s)
    scale_inputs(second, s)
    assert not close(before, second(act(first(x))))


@pytest.mark.parametrize("bias", [False, True])
def test_forgetting_the_producers_bias_would_show(bias):
    first, second, x, s = linear(9, 16, bias), linear(16, 5), tokens(9), random_scale(16, 2)
    before = second(first(x))
    first.weight.data /= s[:, None]
    scale_inputs(second, s)
    assert close(before, second(first(x))) == (not bias)


@pytest.mark.parametrize("bias", [False, True])
def test_fold_into_the_value_third_of_a_fused_qkv(bias):
    qkv, out, x, s = linear(12, 36, bias), linear(12, 12), tokens(12), random_scale(12, 3)
    before, rows = out(attention(qkv(x), 3)), qkv.weight.detach().clone()
    fold_into_linear(qkv, s, slice(24, 36))
    scale_inputs(out, s)
    assert torch.equal(qkv.weight[:24], rows[:24])
    assert close(before, out(attention(qkv(x), 3)))


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    length, width = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = (part.reshape(length, heads, -1).transpose(0, 1) for part in qkv.split(width, dim=1))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, -1)


def test_fold_into_shared_value_heads():
    """Grouped-query attention: 2 value heads of 4, each read by 3 query heads; o reads 24."""
    v, o, x = linear(10, 8), linear(24, 10), tokens(10)
    source_rows = torch.arange(8).view(2, 4).repeat_interleave(3, dim=0).reshape(-1)
    weights = torch.softmax(tokens(7) @ torch.ones(7, 7, dtype=torch.float64), dim=1)

    def forward():
        return o(weights @ v(x)[:, source_rows])

    before, channels = forward(), random_scale(8, 4)
    fold_into_linear(v, producer_scale(channels[source_rows], source_rows, 8))
    scale_inputs(o, channels[source_rows])
    assert close(before, forward())


@pytest.mark.parametrize("act", [nn.functional.silu, nn.functional.gelu])
def test_fold_into_the_linear_branch_of_a_gated_block(act):
    gate, up, down = linear(8, 20, False), linear(8, 20, False), linear(20, 8, False)
    x, s = tokens(8), random_scale(20, 5)
    before = down(act(gate(x)) * up(x))
    fold_into_linear(up, s)
    scale_inputs(down, s)
    assert close(before, down(act(gate(x)) * up(x)))


def test_folds_of_the_wrong_size_are_refused():
    with pytest.raises(MmqError, match=r"norm with weight \[3\], got \[4\]"):
        fold_into_norm(nn.LayerNorm(4), torch.ones(3))
    with pytest.raises(MmqError, match="got None"):
        fold_into_norm(nn.LayerNorm(4, elementwise_affine=False), torch.ones(4))
    with pytest.raises(MmqError, match="expected 2 scales"):
        fold_into_linear(nn.Linear(3, 6), torch.ones(3), slice(4, 6))
    with pytest.raises(MmqError, match="expected 3 scales"):
        scale_inputs(nn.Linear(3, 6), torch.ones(6))
