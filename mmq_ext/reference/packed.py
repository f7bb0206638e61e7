# SPDX-License-Identifier: Apache-2.0
"""pack, unpack, repack and packed_gemm in plain torch, and the error bound of packed_gemm."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

EPS: Final = 2.0**-24  # largest relative error of one float32 rounding


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

    Byte i of a 64-byte vector belongs to row i // 4 of the tile and column i % 4 of a quad. A
    plane of width p keeps bits [low, low + p) of quad j in vector j // (8 // p), at bit
    p * (j % (8 // p)).
    """
    n = qweight.shape[0]
    codes = unpack(qweight, bits, k)
    codes = torch.nn.functional.pad(codes, (0, -k % 32, 0, -n % 16))
    tiles, blocks = codes.shape[0] // 16, codes.shape[1] // 32
    # [tile, row, block, quad, column] -> [tile, block, quad, byte of the vector, bit of the code]
    quads = codes.view(tiles, 16, blocks, 8, 4).permute(0, 2, 3, 1, 4).reshape(tiles, blocks, 8, 64)
    code_bits = _bits_of(quads, bits)
    vectors = torch.zeros(tiles, blocks, bits, 64, 8, dtype=torch.bool)
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


def used_activations(
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


def spread(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """[n, G] to [n, k]: every column gets the entry of its group."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :k]


def _spread_groups(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """[n, G] to [n, k] in float64."""
    return spread(per_group.double(), group_size, k)


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
            used_activations(x, perm, in_scale, torch.float32), group_size
        )
        used = x_codes.double() * x_scales.double()
    else:
        used = used_activations(x, perm, in_scale, torch.float64)
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
    used = used_activations(x, perm, in_scale, torch.float64)
    quantization = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64)
    if mode == "int8":
        x_codes, x_scales = quantize_activations(
            used_activations(x, perm, in_scale, torch.float32), group_size
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
