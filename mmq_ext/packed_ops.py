# SPDX-License-Identifier: Apache-2.0
"""Operators on packed weights: pack, unpack, repack, packed_gemm. See :mod:`mmq_ext.ops`."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from mmq_ext import _C
from mmq_ext.checks import (
    FLOATS,
    check,
    check_bits,
    choice,
    group_count,
    register,
    require,
    row_words,
)
from mmq_ext.device import check_one_device, on_cuda
from mmq_ext.dispatcher import needs_dispatcher
from mmq_ext.layouts import (
    check_cpu_affine,
    check_cuda_affine,
    cpu_affine,
    cpu_affine_kind,
    cpu_unaffine,
    cuda_affine,
    cuda_unaffine,
    tiles_bytes,
)
from mmq_ext.memory import empty_bytes

GEMM_MODES: Final = {"exact": 0, "int8": 1}


# --- pack, unpack -----------------------------------------------------------------------------


def pack_out(codes: Tensor, bits: int) -> Tensor:
    check_bits("pack", bits)
    check("pack", "codes", codes, torch.uint8, None, None)
    rows, cols = codes.shape
    return codes.new_empty((rows, row_words(cols, bits)), dtype=torch.int32)


def _pack_cpu(codes: Tensor, bits: int) -> Tensor:
    words = pack_out(codes, bits)
    if codes.numel():
        top = int(codes.max())
        require(top < 1 << bits, "pack", f"codes below {1 << bits}", top)
    codes = codes.contiguous()
    _C.pack(codes.data_ptr(), codes.shape[0], codes.shape[1], bits, words.data_ptr())
    return words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes [rows, cols] into the little-endian bit stream, int32 [rows, words].

    words = ceil(cols * bits / 32); the unused bits of each row's last word are zero.
    Raises ValueError for a code that does not fit ``bits``.
    """
    return torch.ops.mmq.pack(codes, bits)  # type: ignore[no-any-return]


def unpack_out(words: Tensor, bits: int, cols: int) -> Tensor:
    check_bits("unpack", bits)
    require(cols >= 0, "unpack", "cols of 0 or more", cols)
    check("unpack", "words", words, torch.int32, None, row_words(cols, bits))
    return words.new_empty((words.shape[0], cols), dtype=torch.uint8)


def _unpack_cpu(words: Tensor, bits: int, cols: int) -> Tensor:
    codes = unpack_out(words, bits, cols)
    words = words.contiguous()
    _C.unpack(words.data_ptr(), words.shape[0], cols, bits, codes.data_ptr())
    return codes


def unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of :func:`pack`: int32 [rows, ceil(cols * bits / 32)] to uint8 [rows, cols]."""
    return torch.ops.mmq.unpack(words, bits, cols)  # type: ignore[no-any-return]


register("pack(Tensor codes, int bits) -> Tensor", _pack_cpu, pack_out)
register("unpack(Tensor words, int bits, int cols) -> Tensor", _unpack_cpu, unpack_out)


# --- repack -----------------------------------------------------------------------------------


def _repack_size(qweight: Tensor, bits: int, k: int) -> int:
    check_bits("repack", bits)
    require(k >= 0, "repack", "k of 0 or more", k)
    check("repack", "qweight", qweight, torch.int32, None, row_words(k, bits))
    return tiles_bytes(qweight.shape[0], k, bits, cuda=on_cuda(qweight))


def repack_out(qweight: Tensor, bits: int, k: int) -> Tensor:
    return qweight.new_empty((_repack_size(qweight, bits, k),), dtype=torch.uint8)


def _repack_cpu(qweight: Tensor, bits: int, k: int) -> Tensor:
    tiles = empty_bytes(_repack_size(qweight, bits, k))
    qweight = qweight.contiguous()
    _C.repack(qweight.data_ptr(), qweight.shape[0], k, bits, tiles.data_ptr())
    return tiles


def repack(qweight: Tensor, bits: int, k: int) -> Tensor:
    """Canonical stream, int32 [n, ceil(k * bits / 32)], to the layout that the kernels read.

    Returns uint8 [:func:`tiles_bytes`], in the order of the device: 16 rows interleaved, bit planes
    (csrc/cpu/layout.h), or the fragment order of CUDA's tensor cores (csrc/cuda/tiles.h).
    """
    return torch.ops.mmq.repack(qweight, bits, k)  # type: ignore[no-any-return]


def unrepack_out(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    check_bits("unrepack", bits)
    require(n >= 0, "unrepack", "n of 0 or more", n)
    require(k >= 0, "unrepack", "k of 0 or more", k)
    check("unrepack", "tiles", tiles, torch.uint8, tiles_bytes(n, k, bits, cuda=on_cuda(tiles)))
    return tiles.new_empty((n, row_words(k, bits)), dtype=torch.int32)


def _unrepack_cpu(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    words = unrepack_out(tiles, bits, n, k)
    tiles = tiles.contiguous()
    _C.unrepack(tiles.data_ptr(), n, k, bits, words.data_ptr())
    return words


def unrepack(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of :func:`repack`, bitwise: back to int32 [n, ceil(k * bits / 32)]."""
    return torch.ops.mmq.unrepack(tiles, bits, n, k)  # type: ignore[no-any-return]


register("repack(Tensor qweight, int bits, int k) -> Tensor", _repack_cpu, repack_out)
register("unrepack(Tensor tiles, int bits, int n, int k) -> Tensor", _unrepack_cpu, unrepack_out)


def repack_affine(scales: Tensor, zeros: Tensor | None, bits: int, float_zero: bool) -> Tensor:
    """Scales and zeros [n, G] in the order of the kernels of their device.

    Args:
      scales: in their storage type.
      zeros: integers from 0 to 255 of any type, minima if ``float_zero``, or None: the zero is
        2**(bits-1).
      bits: 2..8.
      float_zero: w = code * scale + zero instead of (code - zero) * scale.

    Both layouts are torch calls: scales are small, and reordered once per layer. 16-bit scales
    stay so, symmetric ones without zeros (AffineKind in csrc/quant_types.h); the order is that of
    :func:`mmq_ext.layouts.cpu_affine` or :func:`mmq_ext.layouts.cuda_affine`.
    """
    op = "repack_affine"
    check_bits(op, bits)
    require(scales.dtype in FLOATS, op, "scales of float32, float16 or bfloat16", scales.dtype)
    check(op, "scales", scales, scales.dtype, None, None)
    if zeros is None:
        require(not float_zero, op, "minima with float_zero", None)
    else:
        check_one_device(op, {"scales": scales, "zeros": zeros})
        check(op, "zeros", zeros, zeros.dtype, *scales.shape)
        if not float_zero and zeros.numel():
            low, high = (int(end) for end in zeros.aminmax())
            require(low >= 0 and high < 256, op, "integer zeros from 0 to 255", f"{low} to {high}")
    layout = cuda_affine if on_cuda(scales) else cpu_affine
    return layout(scales, zeros, bits, float_zero)


def unrepack_affine(affine: Tensor, n: int, groups: int) -> tuple[Tensor, Tensor | None]:
    """What :func:`repack_affine` laid out: scales, and zeros or minima, [n, groups] each.

    For 16-bit scales zeros in their type, None if symmetric; else minima.
    """
    if on_cuda(affine):
        return cuda_unaffine(affine, n)
    check_cpu_affine("unrepack_affine", affine, n, groups)
    return cpu_unaffine(affine, n, groups)


# --- packed_gemm ------------------------------------------------------------------------------


def _check_cuda_gemm(x: Tensor, mode: str) -> None:
    """What the CUDA kernel does not have, with what to do instead."""
    require(
        x.dtype != torch.float32,
        "packed_gemm",
        "x of float16 or bfloat16 on CUDA (model.to(torch.bfloat16), or QuantLinear.to_dense())",
        x.dtype,
    )
    require(
        mode != "int8",
        "packed_gemm",
        "mode exact on CUDA (int8 activations are for the CPU)",
        repr(mode),
    )


def packed_gemm_out(
    x: Tensor,
    tiles: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    perm: Tensor | None,
    in_scale: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    mode: str,
) -> Tensor:
    # These checks run at every call of the kernel: what is right costs one comparison.
    op = "packed_gemm"
    check_bits(op, bits)
    dtype = x.dtype
    if dtype not in FLOATS:
        require(False, op, "x of float32, float16 or bfloat16", dtype)
    cuda = on_cuda(x)
    if cuda:
        _check_cuda_gemm(x, mode)
    shape = x.shape
    if len(shape) != 2:
        require(False, op, "x of shape [m, k]", list(shape))
    m, k = shape
    if group_size <= 0:
        require(False, op, "a positive group size", group_size)
    choice(op, "mode", mode, GEMM_MODES)
    if n < 0:
        require(False, op, "n of 0 or more", n)
    check(op, "tiles", tiles, torch.uint8, tiles_bytes(n, k, bits, cuda=cuda))
    check_affine = check_cuda_affine if cuda else check_cpu_affine
    check_affine(op, affine, n, group_count(k, group_size))
    if bias is not None:
        check(op, "bias", bias, bias.dtype, n)
    if perm is not None:
        check(op, "perm", perm, torch.int32, k)
    if in_scale is not None:
        check(op, "in_scale", in_scale, in_scale.dtype, k)
    return x.new_empty(m, n)


def _packed_gemm_cpu(
    x: Tensor,
    tiles: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    perm: Tensor | None,
    in_scale: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    mode: str,
) -> Tensor:
    y = packed_gemm_out(x, tiles, affine, bias, perm, in_scale, n, bits, group_size, mode)
    dtype = x.dtype
    m, k = x.shape
    tiles, affine = tiles.contiguous(), affine.contiguous()
    out = y
    # Other 16-bit activations, and what a division makes of them, go through float32 here.
    bfloat16 = dtype == torch.bfloat16 and in_scale is None
    if dtype != torch.float32 and not bfloat16:
        x, out = x.float(), y.new_empty((m, n), dtype=torch.float32)
    if in_scale is not None:
        x = x / in_scale.float()
    if perm is not None:
        x = x.index_select(1, perm)
    x = x.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    _C.packed_gemm(
        x.data_ptr(),
        tiles.data_ptr(),
        affine.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        k,
        group_size,
        bits,
        GEMM_MODES[mode],
        cpu_affine_kind(affine, n, group_count(k, group_size)),
        FLOATS[affine.dtype],
        bfloat16,
    )
    return y if out is y else y.copy_(out)


def packed_gemm(
    x: Tensor,
    tiles: Tensor,
    affine: Tensor,
    *,
    n: int,
    bits: int,
    group_size: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    in_scale: Tensor | None = None,
    mode: str = "exact",
) -> Tensor:
    """y = (x / in_scale)[:, perm] @ dequantized(tiles).T + bias, in fp32, returned in x's dtype.

    Args:
      x: [m, k], float32, float16 or bfloat16; on CUDA not float32.
      tiles: uint8, what :func:`repack` returned for the codes of [n, k].
      affine: what :func:`repack_affine` returned.
      n: out-features.
      bits: 2..8.
      group_size: positive; the last group may be partial.
      bias: [n] or None.
      perm: int32 [k] or None; packed position j reads in-feature perm[j].
      in_scale: [k] or None; divides x before the permutation.
      mode: "exact" (activations as they are, sums in fp32) or "int8" (activations quantized per
        row and group; on the CPU only).

    Returns [m, n]. Raises ValueError for any dtype or shape that does not fit, and on CUDA for
    groups that its kernel does not have, with what to do instead.
    """
    call = _packed_gemm_cpu
    if on_cuda(x) or needs_dispatcher(x, tiles, affine, bias, perm, in_scale):
        call = torch.ops.mmq.packed_gemm.default
    return call(x, tiles, affine, bias, perm, in_scale, n, bits, group_size, mode)


register(
    "packed_gemm(Tensor x, Tensor tiles, Tensor affine, Tensor? bias, Tensor? perm, "
    "Tensor? in_scale, int n, int bits, int group_size, str mode) -> Tensor",
    _packed_gemm_cpu,
    packed_gemm_out,
)
