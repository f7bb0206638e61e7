# SPDX-License-Identifier: Apache-2.0
"""The operators again in plain torch: what every native kernel is compared with.

The grid arithmetic is float32 everywhere, in the order of operations of csrc/grid.h, because
codes and grids are compared bit by bit; sums that kernels may reorder are float64 here. Shapes as
in :mod:`mmq_ext.ops`: n out-features, k in-features, G = ceil(k / group_size) groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

EPS: Final = 2.0**-24  # largest relative error of one float32 rounding
SCALE_DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# --- pack, unpack, repack ---------------------------------------------------------------------


def _bits_of(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., cols] to their bits, low bit first: bool [..., cols, bits]."""
    return (codes.to(torch.int64).unsqueeze(-1) >> torch.arange(bits)) & 1 == 1


def _number_of(bits: Tensor) -> Tensor:
    """The inverse of :func:`_bits_of`, int64 [...]."""
    return (bits.to(torch.int64) << torch.arange(bits.shape[-1])).sum(-1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, cols] to the little-endian bit stream, int32 [rows, words]."""
    stream = _bits_of(codes, bits).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32))
    words = _number_of(stream.view(codes.shape[0], -1, 32))
    return (words - ((words >> 31) << 32)).to(torch.int32)


def unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of :func:`pack`: int32 [rows, words] to uint8 [rows, cols]."""
    stream = _bits_of(words, 32).flatten(1)[:, : cols * bits]
    return _number_of(stream.reshape(words.shape[0], cols, bits)).to(torch.uint8)


def repack(qweight: Tensor, bits: int, k: int) -> Tensor:
    """Canonical stream to the layout of csrc/cpu/layout.h, spelled out bit by bit.

    Byte i of a 32-byte vector belongs to row i // 4 of the tile and column i % 4 of a quad. A
    plane of width p keeps bits [low, low + p) of quad j in vector j // (8 // p), at bit
    p * (j % (8 // p)).
    """
    n = qweight.shape[0]
    codes = unpack(qweight, bits, k)
    codes = torch.nn.functional.pad(codes, (0, -k % 32, 0, -n % 8))
    tiles, blocks = codes.shape[0] // 8, codes.shape[1] // 32
    # [tile, row, block, quad, column] -> [tile, block, quad, byte of the vector, bit of the code]
    quads = codes.view(tiles, 8, blocks, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, blocks, 8, 32)
    code_bits = _bits_of(quads, bits)
    vectors = torch.zeros(tiles, blocks, bits, 32, 8, dtype=torch.bool)
    low = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            for quad in range(8):
                vector, at = low + quad // (8 // width), width * (quad % (8 // width))
                vectors[:, :, vector, :, at : at + width] = code_bits[
                    :, :, quad, :, low : low + width
                ]
            low += width
    return _number_of(vectors).to(torch.uint8).flatten()


# --- packed_gemm ------------------------------------------------------------------------------

CHAIN_COLS: Final = 256  # kChainCols: the longest chain of fp32 additions along columns
# The kernels sum integers over at most so many columns before they scale.
SEGMENT_COLS: Final = 2**14
# Absolute rounding error of one product in the range of subnormal numbers, per unit of scale: a
# code of 2^8 times an activation that was rounded to a multiple of 2^-149 / 2 at 2^16 its size.
TINY: Final = 2.0**-126
# Relative and, below the smallest normal number, absolute error of rounding to the output type.
OUTPUT_EPS: Final = {
    torch.float32: (0.0, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}


def _used_activations(
    x: Tensor, perm: Tensor | None, in_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x / in_scale)[:, perm] in ``dtype``."""
    x = x.to(dtype)
    if in_scale is not None:
        x = x / in_scale.to(dtype)
    return x if perm is None else x[:, perm.long()]


def quantize_activations(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """float32 [m, k] to (x_q, s_x), per row and group, in the float32 steps of the kernels.

    s_x = max|x| / 127, x_q = round_half_even(x / s_x); zeros give 0 and 0; a maximum that is not
    finite gives NaN as s_x. Both are float32 [m, k]; s_x is repeated over its group.
    """
    m, k = x.shape
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(x, (0, groups * group_size - k)).view(m, groups, group_size)
    largest = padded.abs().amax(-1, keepdim=True)  # NaN if any is NaN
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (padded / scale).round()
    finite = largest.isfinite()
    codes = torch.where(finite, codes, 0.0)
    scale = torch.where(largest == 0, 0.0, scale)
    scale = torch.where(finite, scale, torch.nan).expand_as(padded)
    return codes.flatten(1)[:, :k], scale.flatten(1)[:, :k]


def _spread_groups(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """[n, G] to [n, k] in float64."""
    return _spread(per_group.double(), group_size, k)


def packed_gemm(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minima: Tensor,
    *,
    group_size: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    in_scale: Tensor | None = None,
    mode: str = "exact",
) -> Tensor:
    """(x / in_scale)[:, perm] @ (codes * scales + minima).T + bias, float64 [m, n].

    codes: uint8 [n, k] in packed order; scales, minima: [n, G]. With mode "int8" the activations
    are first replaced by x_q * s_x, see :func:`quantize_activations`.
    """
    k = codes.shape[1]
    weight = codes * _spread_groups(scales, group_size, k) + _spread_groups(minima, group_size, k)
    if mode == "int8":
        x_codes, x_scales = quantize_activations(
            _used_activations(x, perm, in_scale, torch.float32), group_size
        )
        used = x_codes.double() * x_scales.double()
    else:
        used = _used_activations(x, perm, in_scale, torch.float64)
    y = used @ weight.T
    return y if bias is None else y + bias.double()


def packed_gemm_bound(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minima: Tensor,
    *,
    group_size: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    in_scale: Tensor | None = None,
    mode: str = "exact",
    rounding_only: bool = False,
) -> Tensor:
    """Elementwise bound of |kernel - packed_gemm(..., mode="exact")|, float64 [m, n].

    Rounding: c * 2^-24 * (|x| @ A^T + |bias|) + eps_out * |y|, A = codes * |scales| + |minima|,
    because the kernels may sum codes and minima apart. c counts the roundings that one addend can
    pass through. Exact mode: a chain of at most 256 columns, two multiply-adds per group and
    chain, and 8 for scale, minimum, activation, bias and the joining of chains. Int8 mode: integer
    sums are exact, three roundings per segment and 8 as above.

    Int8 mode adds what quantization of activations can change, sum_k s_x / 2 * |w|; with
    ``rounding_only`` it does not, and the bound is around ``packed_gemm(..., mode="int8")``.
    """
    k = codes.shape[1]
    groups = scales.shape[1]
    spread = {"group_size": group_size, "k": k}
    weight = codes * _spread_groups(scales, **spread) + _spread_groups(minima, **spread)
    apart = codes * _spread_groups(scales.abs(), **spread)
    apart += _spread_groups(minima.abs(), **spread)
    used = _used_activations(x, perm, in_scale, torch.float64)
    quantization = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    if mode == "int8":
        x_codes, x_scales = quantize_activations(
            _used_activations(x, perm, in_scale, torch.float32), group_size
        )
        used = x_codes.double() * x_scales.double()
        roundings = 3 * (groups + -(-k // SEGMENT_COLS)) + 8
        if not rounding_only:
            # 2^-15: x / in_scale and x / s_x are rounded, so a tie may fall to the other side.
            quantization = (1 + 2.0**-15) * (x_scales.double() / 2) @ weight.abs().T
    else:
        # Groups shorter than a block are dequantized first and add no steps of their own.
        roundings = min(k, CHAIN_COLS) + 2 * (min(groups, -(-k // 32)) + -(-k // CHAIN_COLS)) + 8
    size = used.abs() @ apart.T
    y = used @ weight.T
    if bias is not None:
        size = size + bias.double().abs()
        y = y + bias.double()
    bound = roundings * EPS * size + TINY * _spread_groups(scales.abs(), **spread).sum(1)
    bound = bound + quantization
    relative, absolute = OUTPUT_EPS[x.dtype]
    return bound + relative * (y.abs() + bound) + absolute


# --- grids ------------------------------------------------------------------------------------


def make_grid(
    low: Tensor, high: Tensor, bits: int, kind: str, scale_dtype: str
) -> tuple[Tensor, Tensor]:
    """Scale and zero of the ranges [low, high] (float32, any shape), as in csrc/grid.h.

    A range of width 0 gets scale 1; other scales are rounded to ``scale_dtype`` and raised to its
    smallest normal number. The zero is an integer code, 2**(bits-1) for the symmetric kinds, or the
    rounded minimum for kind "float". A NaN range gives a NaN scale.
    """
    dtype = SCALE_DTYPES[scale_dtype]
    top, middle = float((1 << bits) - 1), float(1 << (bits - 1))
    if kind == "integer":
        low, high = low.minimum(low.new_zeros(())), high.maximum(high.new_zeros(()))
    elif kind != "float":
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    if kind == "symmetric":
        scale = 2.0 * high / top
    elif kind == "restricted":
        scale = high / (middle - 1.0)
    else:
        scale = (high - low) / top
    scale = torch.clamp_min(scale.to(dtype).float(), torch.finfo(dtype).smallest_normal)
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    if kind == "float":
        return scale, low.to(dtype).float() + 0.0
    if kind != "integer":
        return scale, torch.full_like(scale, middle)
    return scale, torch.nan_to_num(torch.round(-low / scale)).clamp(0.0, top) + 0.0


def codes_of(
    w: Tensor, scale: Tensor, zero: Tensor, bits: int, float_zero: bool, min_code: int = 0
) -> Tensor:
    """Codes of w as float32, round half to even; all tensors broadcast. NaN gets ``min_code``."""
    code = torch.round((w - zero) / scale) if float_zero else torch.round(w / scale) + zero
    return torch.nan_to_num(code, nan=float(min_code)).clamp(min_code, (1 << bits) - 1) + 0.0


def values_of(code: Tensor, scale: Tensor, zero: Tensor, float_zero: bool) -> Tensor:
    """Dequantized codes; all tensors broadcast."""
    return code * scale + zero if float_zero else (code - zero) * scale


def _min_code(kind: str) -> int:
    return 1 if kind == "restricted" else 0


def _spread(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """[n, G] to [n, k]: every column gets the entry of its group."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def _per_group(w: Tensor, group_size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """[n, k] to [n, G]: ``reduce`` over each group of each row."""
    if w.shape[1] == 0:
        return w.new_empty((w.shape[0], 0))
    return torch.stack([reduce(part, dim=1) for part in torch.split(w, group_size, dim=1)], dim=1)


# --- gptq_block -------------------------------------------------------------------------------


def gptq_block(
    w: Tensor,
    u: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    float_zero: bool = False,
    min_code: int = 0,
) -> tuple[Tensor, Tensor]:
    """The column recursion of GPTQ (arXiv 2210.17323, algorithm 1), one torch call per step.

    Computes in the dtype of ``w``. In float32 every product and every difference is rounded on its
    own and a weight takes its updates in column order, so that codes and errors equal those of
    ``ops.gptq_block`` bit by bit. In float64 (all inputs) it is the exact recursion.

    Returns (codes uint8 [n, cols], errors [n, cols]).
    """
    w = w.clone()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    errors = torch.empty_like(w)
    for i in range(w.shape[1]):
        scale, zero = scales[:, group_of[i]], zeros[:, group_of[i]]
        code = codes_of(w[:, i], scale, zero, bits, float_zero, min_code)
        error = (w[:, i] - values_of(code, scale, zero, float_zero)) / u[i, i]
        codes[:, i] = code.to(torch.uint8)
        errors[:, i] = error
        w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    return codes, errors


# --- awq_errors -------------------------------------------------------------------------------


def awq_errors(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
) -> tuple[Tensor, Tensor]:
    """||(W - Q(W s) / s) F^T||_F^2 for every candidate s, and how far a kernel may be from it.

    Scaled weights, grids and codes are float32 (a code is not a continuous function of its input);
    the difference D, the product y = D F^T and the squares are float64.

    The bound, with u = 2**-24 and What = Q(W s) / s: a kernel rounds three times on its way to D
    (value, division, difference: |dD| <= u (2 |What| + |D|), second order left to the factor below)
    and k times along the longest add chain of y, hence per element
    |dy| <= u (k |D| + 2 |What| + |D|) |F|^T, and |d sum y^2| <= sum (2 |y| |dy| + dy^2) plus one
    float64 rounding per term. The whole is widened by 1 % for the second-order terms. For the float
    zero the value takes two roundings, bounded with 2 q scale + |zero| instead of 2 |What| s.

    Returns (errors, bound), float64 [count] each.
    """
    k = w.shape[1]
    float_zero = kind == "float"
    errors, bounds = [], []
    factor64 = factor.double()
    for s in candidates:
        scaled = w * s
        low = _per_group(scaled, group_size, torch.amin)
        high = _per_group(scaled, group_size, torch.amax)
        scale, zero = (
            _spread(part, group_size, k) for part in make_grid(low, high, bits, kind, scale_dtype)
        )
        code = codes_of(scaled, scale, zero, bits, float_zero, _min_code(kind)).double()
        value = values_of(code, scale.double(), zero.double(), float_zero) / s.double()
        d = w.double() - value
        size = (2 * code * scale.double() + zero.double().abs()) / s.double()
        rounding = (size if float_zero else 2 * value.abs()) + d.abs()
        y = d @ factor64.T
        dy = EPS * ((k * d.abs() + rounding) @ factor64.abs().T)
        errors.append(y.square().sum())
        bounds.append(
            1.01 * (2 * y.abs() * dy + dy.square()).sum() + 2.0**-52 * y.numel() * errors[-1]
        )
    if not errors:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
    return torch.stack(errors), torch.stack(bounds)


# --- grid_search ------------------------------------------------------------------------------


def shrink_factors(steps: int, shrink: float) -> Tensor:
    """The range factors p = 1, 1 - 1/steps, ... not below 1 - shrink, float32; 1 if steps is 0."""
    if steps == 0:
        return torch.ones(1)
    count = 1 + int(shrink * steps + 1e-4)
    return 1.0 - torch.arange(count, dtype=torch.float32) / steps


def grid_errors(
    w: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
    importance: Tensor | None = None,
    steps: int = 0,
    shrink: float = 0.8,
    exponent: float = 2.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every shrunk grid of every row and group with its error, P = len(shrink_factors).

    Returns (errors float64, scales float32, zeros float32), [P, n, G] each; the errors are
    sum importance * |w - w_hat| ** exponent over the group.
    """
    k = w.shape[1]
    float_zero = kind == "float"
    low = _per_group(w, group_size, torch.amin)
    high = _per_group(w, group_size, torch.amax)
    weight = torch.ones(k, dtype=torch.float64) if importance is None else importance.double()
    errors, scales, zeros = [], [], []
    for p in shrink_factors(steps, shrink):
        scale, zero = make_grid(p * low, p * high, bits, kind, scale_dtype)
        wide_scale, wide_zero = _spread(scale, group_size, k), _spread(zero, group_size, k)
        code = codes_of(w, wide_scale, wide_zero, bits, float_zero, _min_code(kind))
        miss = (w - values_of(code, wide_scale, wide_zero, float_zero)).abs().double()
        term = weight * (miss * miss if exponent == 2.0 else miss**exponent)
        errors.append(_per_group(term, group_size, torch.sum))
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(errors), torch.stack(scales), torch.stack(zeros)


def grid_search(
    w: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
    importance: Tensor | None = None,
    steps: int = 0,
    shrink: float = 0.8,
    exponent: float = 2.4,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of every row and group: of the range, or of the best shrunk range.

    Ties go to the wider range. Returns (scales, zeros), float32 [n, G].
    """
    errors, scales, zeros = grid_errors(
        w,
        bits=bits,
        group_size=group_size,
        kind=kind,
        scale_dtype=scale_dtype,
        importance=importance,
        steps=steps,
        shrink=shrink,
        exponent=exponent,
    )
    # The first least error; the widest range if its own error is NaN.
    best = torch.zeros(errors.shape[1:], dtype=torch.int64)
    least = errors[0].clone()
    for i in range(1, errors.shape[0]):
        better = errors[i] < least
        best[better] = i
        least[better] = errors[i][better]
    pick = best.unsqueeze(0)
    return scales.gather(0, pick).squeeze(0), zeros.gather(0, pick).squeeze(0)
