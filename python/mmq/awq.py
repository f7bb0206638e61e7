# SPDX-License-Identifier: Apache-2.0
"""AWQ: scaling the input channels that carry large activations before rounding.

Lin et al., arXiv 2306.00978: W becomes Q(W diag(s)) and x becomes x / s, with
s = mean|x|^alpha and alpha by search (equations 4 and 5); then the range of each group is searched
on the scaled inputs. The division is folded into what produces x where that is linear, and is
otherwise done at run time (``in_scale``).

The objective is the summed output error of the linears that read x. It depends on the tokens only
through H = 2 E[x x^T], so that all of them count and their order does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mmq.clip import awq_clip
from mmq.errors import MmqError
from mmq.finite import all_finite
from mmq.grid import check_weight, find_grid, quantize, spread
from mmq.hessian import InputStats, rescale_hessian, stats_of
from mmq.options import AwqOptions
from mmq.packed import PackedWeight
from mmq.ranking import (
    FINALISTS,
    RANK,
    SMALLEST_WIDTH,
    finalists,
    largest_rows,
    stand_in,
)
from mmq.report import AwqDetails, Report, make_report
from mmq.spec import QuantSpec
from mmq_ext import ops

SMALLEST: Final = 1e-4  # Below it a channel's magnitude counts as this much.
FACTOR_DAMP: Final = 1e-6  # Share of the mean diagonal that makes a singular H factorizable.


@dataclass(frozen=True, eq=False)
class AwqSearch:
    """The winner: ``scale`` float32 [k] with the exponent ``alpha``; the mean over tokens of the
    summed squared output error of every exponent tried, in ascending order. ``exact`` are the
    indices of exact errors; the others are those of a stand-in for H (:mod:`mmq.ranking`), which
    ``approximation`` says in words, "" where all are exact."""

    scale: Tensor
    alpha: float
    errors: tuple[float, ...]
    exact: tuple[int, ...]
    approximation: str = ""


def error_factor(inputs: Tensor | InputStats, *, name: str = "input") -> Tensor:
    """F float32 [rows, k] with F^T F = 2 E[x x^T], so that |D F^T|^2 / 2 is the output error.

    ``inputs`` are X [..., k], or statistics. The rows are the tokens where those are at most
    k / 2, else those of L^T with H = L L^T (k rows, half of them zeros).
    """
    if isinstance(inputs, Tensor):
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if 0 < 2 * x.shape[0] <= x.shape[1]:
            if not all_finite(x):
                raise MmqError(f"{name}: expected finite inputs, got NaN or infinity")
            return x * math.sqrt(2.0 / x.shape[0])
        inputs = stats_of(inputs, name=name)
    h = inputs.hessian
    mean = float(h.diagonal().mean(dtype=torch.float64))
    if not mean > 0:
        raise MmqError(f"{name}: expected at least 1 non-zero input, got all zeros")
    damp = 0.0
    for dtype in (torch.float32, *[torch.float64] * 6):
        attempt = h.to(dtype, copy=True)
        attempt.diagonal().add_(damp * mean)
        lower, info = torch.linalg.cholesky_ex(attempt)
        if int(info) == 0 and all_finite(lower):
            factor: Tensor = lower.T.float().contiguous()
            return factor
        damp = max(10 * damp, FACTOR_DAMP)
    raise MmqError(f"{name}: expected a positive semi-definite Hessian, got one that is not")


def relative_magnitude(weights: Tensor, group_size: int) -> Tensor:
    """Mean over rows of |w| / (max |w| of its row's group), float32 [k], for [n, k] weights."""
    k = weights.shape[1]
    magnitude = weights.abs().float()
    largest = torch.stack(
        [magnitude[:, a : a + group_size].amax(dim=1) for a in range(0, k, group_size)], dim=1
    )
    return (magnitude / spread(largest, k, group_size).clamp_min(SMALLEST**2)).mean(dim=0)


def _relative_magnitude_of_all(weights: Sequence[Tensor], specs: Sequence[QuantSpec]) -> Tensor:
    """The same over the rows of all weights, each with its own groups."""
    rows = sum(weight.shape[0] for weight in weights)
    parts = [
        weight.shape[0] / rows * relative_magnitude(weight, spec.row_group_size(weight.shape[1]))
        for weight, spec in zip(weights, specs, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


def scale_candidates(
    mean_abs: Tensor, options: AwqOptions, relative: Tensor | None = None
) -> tuple[list[float], Tensor]:
    """The exponents 0, 1/steps, ..., 1 and their scales, float32 [steps + 1, k].

    s = clamp(mean|x|^alpha, 1e-4), or with ``relative`` (see :func:`relative_magnitude`)
    mean|x|^alpha / (relative^(1 - alpha) + 1e-4); then s / sqrt(max s * min s), and 1 where that
    is not finite and positive. alpha = 0 is the identity in both forms.
    """
    magnitude = mean_abs.double()
    alphas = [step / options.steps for step in range(options.steps + 1)]
    rows = [torch.ones_like(magnitude)]
    for alpha in alphas[1:]:
        s = magnitude.pow(alpha)
        if relative is None:
            s = s.clamp_min(SMALLEST)
        else:
            s = (s / (relative.double().pow(1 - alpha) + SMALLEST)).clamp_min(SMALLEST)
        s = s / (s.max() * s.min()).sqrt()
        rows.append(torch.where(torch.isfinite(s) & (s > 0), s, 1.0))
    return alphas, torch.stack(rows).float()


def awq_scales(
    weights: Sequence[Tensor],
    mean_abs: Tensor,
    factor: Tensor,
    spec: QuantSpec | Sequence[QuantSpec],
    options: AwqOptions | None = None,
    *,
    source_rows: Tensor | None = None,
    name: str = "weight",
) -> AwqSearch:
    """Searches the scale that linears reading one input share.

    Args:
      weights: floating point [n_i, k] each; their output errors are summed.
      mean_abs: float [k], mean |x| over all real tokens.
      factor: float32 [rows, k], see :func:`error_factor`.
      spec: the grid of all weights, or one per weight; the search uses ranges from min to max.
      options: the exponents and the form of the candidates.
      source_rows: int64 [k], the producer's channel that each in-feature copies, where several
        copy one (value heads shared by query heads): those get one scale. None is one to one.
      name: of the linears, for messages.

    With ``options.search`` "ranked" only the best of a ranking get exact errors, see
    :mod:`mmq.ranking`; the winner and exponent 0 in any case.

    Ties go to the smaller exponent. Raises MmqError for weights or statistics that are not
    finite or do not fit, and for one scale per tensor, which channel scales cannot help.
    """
    options = AwqOptions() if options is None else options
    specs = [spec] * len(weights) if isinstance(spec, QuantSpec) else list(spec)
    if not weights or len(specs) != len(weights):
        raise MmqError(f"{name}: expected a grid per weight, got {len(specs)}, {len(weights)}")
    k = mean_abs.shape[0]
    for weight, grid in zip(weights, specs, strict=True):
        check_weight(weight, name)
        if grid.per_tensor:
            raise MmqError(f"{name}: expected a scale per channel or group for AWQ, got per_tensor")
        if weight.shape[1] != k or factor.shape[-1] != k:
            raise MmqError(
                f"{name}: expected statistics of {weight.shape[1]} in-features, got mean_abs "
                f"{list(mean_abs.shape)} and factor {list(factor.shape)}"
            )
    if not all_finite(mean_abs) or not all_finite(factor):
        raise MmqError(f"{name}: expected finite input statistics, got NaN or infinity")
    relative = _relative_magnitude_of_all(weights, specs) if options.weight_aware else None
    if source_rows is not None:
        mean_abs = shared_mean(mean_abs, source_rows)
        relative = None if relative is None else shared_mean(relative, source_rows)
    alphas, candidates = scale_candidates(mean_abs, options, relative)

    def errors_of(matrices: Sequence[Tensor], chosen: Tensor, by: Tensor) -> Tensor:
        total = torch.zeros(chosen.shape[0], dtype=torch.float64, device=chosen.device)
        for weight, grid in zip(matrices, specs, strict=True):
            total += ops.awq_errors(
                weight.detach().float(),
                chosen,
                by,
                bits=grid.bits,
                group_size=grid.row_group_size(k),
                kind=grid.kind,
                scale_dtype=grid.scale_dtype,
            )
        return total / 2

    count = len(alphas)
    if options.search == "exhaustive" or k < SMALLEST_WIDTH or count <= FINALISTS + 1:
        exact, errors = list(range(count)), errors_of(weights, candidates, factor).tolist()
    else:
        near, largest = stand_in(factor, seed=options.seed), largest_rows(weights)
        ranked = errors_of(weights, candidates, near) - errors_of(largest, candidates, near)
        errors = (ranked + errors_of(largest, candidates, factor)).tolist()
        exact = finalists(errors)
        checked = errors_of(weights, candidates[exact], factor).tolist()
        for i, error in zip(exact, checked, strict=True):
            errors[i] = error
    best = 0
    for i in exact[1:]:  # Not argmin: ties, and NaN, must not win.
        if errors[i] < errors[best]:
            best = i
    words = ""
    if len(exact) < count:
        named = ", ".join(f"{alphas[i]:g}" for i in exact)
        words = f"{count} exponents ranked with H of rank {RANK} plus diagonal; exact for {named}"
    return AwqSearch(candidates[best], alphas[best], tuple(errors), tuple(exact), words)


def shared_mean(values: Tensor, source_rows: Tensor) -> Tensor:
    """``values`` [k], each replaced by the mean over the entries of equal ``source_rows`` [k]."""
    source_rows = source_rows.to(values.device)
    channels = int(source_rows.max()) + 1
    sums = values.new_zeros(channels).index_add_(0, source_rows, values)
    counts = torch.bincount(source_rows, minlength=channels).clamp_min(1)
    return (sums / counts)[source_rows]


def quantize_scaled(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    options: AwqOptions | None = None,
    *,
    search: AwqSearch | None = None,
    in_scale: Tensor | None = None,
    clip_rows: Tensor | None = None,
    name: str = "weight",
) -> tuple[PackedWeight, Report]:
    """Clips and rounds a matrix whose columns have been scaled: the step after a fold.

    Args:
      weight: W diag(s), floating point [n, k].
      hessian: of x / s, float32 [k, k].
      spec: the grid. ``options.clip`` replaces ``spec.clip`` for the clipped rows.
      options: whether to clip.
      search: for the report.
      in_scale: [k], s where it was not folded; its values must be exact in the scale type.
      clip_rows: bool [n], see :func:`mmq.clip.awq_clip`; the other rows keep their whole range.
      name: for messages and the report.

    Raises MmqError as :func:`mmq.clip.awq_clip` and :func:`mmq.grid.find_grid`.
    """
    options = AwqOptions() if options is None else options
    if options.clip:
        clip = awq_clip(weight, hessian, spec, rows=clip_rows, name=name)
        grid, mean_shrink = clip.grid, float(clip.shrink.mean())
    else:
        grid, mean_shrink = find_grid(weight, spec, name=name), 1.0
    packed = PackedWeight.from_codes(
        quantize(weight, grid), grid, spec, None, in_scale, method="awq"
    )
    details = AwqDetails(
        alpha=0.0 if search is None else search.alpha,
        errors=() if search is None else search.errors,
        mean_shrink=mean_shrink,
        approximation="" if search is None else search.approximation,
    )
    return packed, make_report(name, weight, packed, hessian, awq=details)


def stored_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """``scale`` rounded to its storage type, as float32: what codes are chosen with."""
    return scale.to(spec.torch_scale_dtype).float()


def awq(
    weight: Tensor,
    inputs: Tensor | InputStats,
    spec: QuantSpec,
    options: AwqOptions | None = None,
    *,
    clip_rows: Tensor | None = None,
    name: str = "weight",
) -> tuple[PackedWeight, Report]:
    """Searches the scale of one matrix, clips, rounds; the scale stays a run-time divisor.

    Args:
      weight: floating point [n, k]; not changed.
      inputs: X, floating point [..., k], or the statistics of :meth:`mmq.hessian.Hessian.stats`.
      spec: the grid.
      options: exponents and clipping (``fold`` does not apply to a matrix alone).
      clip_rows: bool [n], which rows may be clipped; None is all.
      name: of the module, for messages and the report.

    Returns the packed weight, with ``in_scale`` unless exponent 0 won, and a report. Folding and
    shared scales: :func:`awq_scales`, the fold functions, :func:`quantize_scaled`.
    Raises MmqError, naming the module, for weights or inputs that are not finite or do not fit.
    """
    options = AwqOptions() if options is None else options
    factor = error_factor(inputs, name=name)
    stats = inputs if isinstance(inputs, InputStats) else stats_of(inputs, name=name)
    search = awq_scales([weight], stats.mean_abs, factor, spec, options, name=name)
    w, hessian, in_scale = weight.detach().float(), stats.hessian, None
    if search.alpha > 0:
        in_scale = stored_scale(search.scale, spec)
        w = w * in_scale
        hessian = rescale_hessian(hessian, in_scale)
    return quantize_scaled(
        w,
        hessian,
        spec,
        options,
        search=search,
        in_scale=in_scale,
        clip_rows=clip_rows,
        name=name,
    )
