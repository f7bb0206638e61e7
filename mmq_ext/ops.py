# SPDX-License-Identifier: Apache-2.0
"""The operators: one typed function per op, its checks, its fake and its CPU implementation.

Every op is registered with ``torch.library`` under ``torch.ops.mmq``, so that it works under
``torch.compile`` and ``opcheck``. The checks run in the fake and in the real implementation alike;
the compiled module then gets raw pointers and sizes. Shapes: n out-features, k in-features, m rows
of activations, G = ceil(k / group_size) groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from mmq_ext import _C

GRID_KINDS: Final = {"integer": 0, "float": 1, "symmetric": 2, "restricted": 3}
SCALE_TYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2}
GEMM_MODES: Final = {"exact": 0, "int8": 1}

_LIBRARY: Final = torch.library.Library("mmq", "DEF")  # type: ignore[no-untyped-call]


def _require(ok: bool, op: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{op}: expected {expected}, got {got}")


def _check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Refuses a tensor whose dtype, rank or sizes (None = any) are not the expected ones."""
    # Messages are made on failure only: these checks run at every call of a kernel.
    if tensor.dtype != dtype:
        _require(False, op, f"{name} of {dtype}", tensor.dtype)
    sizes = tensor.shape
    if len(sizes) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, sizes, strict=True)
    ):
        wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        _require(False, op, f"{name} of shape {wanted}", list(sizes))


def _choice(op: str, name: str, value: str, table: dict[str, int]) -> int:
    if value not in table:
        _require(False, op, f"{name} as one of {', '.join(table)}", repr(value))
    return table[value]


def _check_bits(op: str, bits: int) -> None:
    _require(2 <= bits <= 8, op, "bits from 2 to 8", bits)


def row_words(cols: int, bits: int) -> int:
    """Number of 32-bit words that ``cols`` codes of width ``bits`` occupy."""
    return -(-cols * bits // 32)


def group_count(k: int, group_size: int) -> int:
    """Number of groups in a row of ``k`` codes; the last one may be shorter."""
    return -(-k // group_size)


def _register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mmq::{name}", fake, lib=_LIBRARY)


# --- pack, unpack -----------------------------------------------------------------------------


def _pack_out(codes: Tensor, bits: int) -> Tensor:
    _check_bits("pack", bits)
    _check("pack", "codes", codes, torch.uint8, None, None)
    rows, cols = codes.shape
    return codes.new_empty((rows, row_words(cols, bits)), dtype=torch.int32)


def _pack_cpu(codes: Tensor, bits: int) -> Tensor:
    words = _pack_out(codes, bits)
    if codes.numel():
        top = int(codes.max())
        _require(top < 1 << bits, "pack", f"codes below {1 << bits}", top)
    codes = codes.contiguous()
    _C.pack(codes.data_ptr(), codes.shape[0], codes.shape[1], bits, words.data_ptr())
    return words


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes [rows, cols] into the little-endian bit stream, int32 [rows, words].

    words = ceil(cols * bits / 32); the unused bits of each row's last word are zero.
    Raises ValueError for a code that does not fit ``bits``.
    """
    return torch.ops.mmq.pack(codes, bits)  # type: ignore[no-any-return]


def _unpack_out(words: Tensor, bits: int, cols: int) -> Tensor:
    _check_bits("unpack", bits)
    _require(cols >= 0, "unpack", "cols of 0 or more", cols)
    _check("unpack", "words", words, torch.int32, None, row_words(cols, bits))
    return words.new_empty((words.shape[0], cols), dtype=torch.uint8)


def _unpack_cpu(words: Tensor, bits: int, cols: int) -> Tensor:
    codes = _unpack_out(words, bits, cols)
    words = words.contiguous()
    _C.unpack(words.data_ptr(), words.shape[0], cols, bits, codes.data_ptr())
    return codes


def unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of :func:`pack`: int32 [rows, ceil(cols * bits / 32)] to uint8 [rows, cols]."""
    return torch.ops.mmq.unpack(words, bits, cols)  # type: ignore[no-any-return]


def check_unused_bits(words: Tensor, bits: int, cols: int) -> None:
    """Refuses packed rows whose last word has a bit set beyond the last code.

    The kernels ignore such bits, but a file that has them was not written by :func:`pack`: read
    files strictly. Raises ValueError that names the first such row.
    """
    _unpack_out(words, bits, cols)
    used = cols * bits % 32
    if used and words.shape[0]:
        dirty = (words[:, -1].to(torch.int64) & 0xFFFFFFFF) >> used != 0
        if bool(dirty.any()):
            row = int(dirty.nonzero()[0])
            wanted = f"zero bits from bit {used} on in the last word of each row"
            _require(
                False, "unpack", wanted, f"{int(words[row, -1]) & 0xFFFFFFFF:#010x} in row {row}"
            )


_register("pack(Tensor codes, int bits) -> Tensor", _pack_cpu, _pack_out)
_register("unpack(Tensor words, int bits, int cols) -> Tensor", _unpack_cpu, _unpack_out)


# --- repack -----------------------------------------------------------------------------------

TILE_ROWS: Final = 8  # output rows interleaved in the kernels' layout (csrc/cpu/layout.h)
BLOCK_COLS: Final = 32  # in-features of a block; a block of width b takes 32 * b bytes


def tiles_bytes(n: int, k: int, bits: int) -> int:
    """Bytes of the kernels' layout of [n, k] codes: rows padded to 8, columns to 32."""
    return -(-n // TILE_ROWS) * -(-k // BLOCK_COLS) * BLOCK_COLS * bits


def affine_floats(n: int, groups: int) -> int:
    """Number of float32 values that :func:`repack_affine` makes of [n, groups] scales."""
    return -(-n // TILE_ROWS) * TILE_ROWS * groups * 2


def _repack_out(qweight: Tensor, bits: int, k: int) -> Tensor:
    _check_bits("repack", bits)
    _require(k >= 0, "repack", "k of 0 or more", k)
    _check("repack", "qweight", qweight, torch.int32, None, row_words(k, bits))
    return qweight.new_empty((tiles_bytes(qweight.shape[0], k, bits),), dtype=torch.uint8)


def _repack_cpu(qweight: Tensor, bits: int, k: int) -> Tensor:
    tiles = _repack_out(qweight, bits, k)
    qweight = qweight.contiguous()
    _C.repack(qweight.data_ptr(), qweight.shape[0], k, bits, tiles.data_ptr())
    return tiles


def repack(qweight: Tensor, bits: int, k: int) -> Tensor:
    """Canonical stream, int32 [n, ceil(k * bits / 32)], to the layout that the kernels read.

    Returns uint8 [:func:`tiles_bytes`]: 8 rows interleaved, bit planes (csrc/cpu/layout.h).
    """
    return torch.ops.mmq.repack(qweight, bits, k)  # type: ignore[no-any-return]


def _unrepack_out(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    _check_bits("unrepack", bits)
    _require(n >= 0, "unrepack", "n of 0 or more", n)
    _require(k >= 0, "unrepack", "k of 0 or more", k)
    _check("unrepack", "tiles", tiles, torch.uint8, tiles_bytes(n, k, bits))
    return tiles.new_empty((n, row_words(k, bits)), dtype=torch.int32)


def _unrepack_cpu(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    words = _unrepack_out(tiles, bits, n, k)
    tiles = tiles.contiguous()
    _C.unrepack(tiles.data_ptr(), n, k, bits, words.data_ptr())
    return words


def unrepack(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of :func:`repack`, bitwise: back to int32 [n, ceil(k * bits / 32)]."""
    return torch.ops.mmq.unrepack(tiles, bits, n, k)  # type: ignore[no-any-return]


_register("repack(Tensor qweight, int bits, int k) -> Tensor", _repack_cpu, _repack_out)
_register("unrepack(Tensor tiles, int bits, int n, int k) -> Tensor", _unrepack_cpu, _unrepack_out)


def repack_affine(scales: Tensor, minima: Tensor) -> Tensor:
    """Scales and minima, float32 [n, G] each (w = code * scale + minimum), in the kernels' order.

    For an integer zero z the minimum is -z * scale, which fp32 holds exactly for fp16 and bf16
    scales. Returns float32 [:func:`affine_floats`], ordered [tile][group][scale, minimum][8 rows];
    rows beyond n are zero.
    """
    _check("repack_affine", "scales", scales, torch.float32, None, None)
    _check("repack_affine", "minima", minima, torch.float32, *scales.shape)
    n, groups = scales.shape
    both = torch.stack((scales, minima), dim=1)
    both = torch.nn.functional.pad(both, (0, 0, 0, 0, 0, -n % TILE_ROWS))
    return both.view(-1, TILE_ROWS, 2, groups).permute(0, 3, 2, 1).reshape(-1)


def unrepack_affine(affine: Tensor, n: int, groups: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`repack_affine`: (scales, minima), float32 [n, groups] each."""
    _check("unrepack_affine", "affine", affine, torch.float32, affine_floats(n, groups))
    both = affine.view(-1, groups, 2, TILE_ROWS).permute(2, 0, 3, 1).reshape(2, -1, groups)
    return both[0, :n].contiguous(), both[1, :n].contiguous()


# --- packed_gemm ------------------------------------------------------------------------------


def _packed_gemm_out(
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
    op = "packed_gemm"
    _check_bits(op, bits)
    _require(
        x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        op,
        "x of float32, float16 or bfloat16",
        x.dtype,
    )
    if x.dim() != 2:
        _require(False, op, "x of shape [m, k]", list(x.shape))
    k = x.shape[1]
    _require(group_size > 0, op, "a positive group size", group_size)
    _choice(op, "mode", mode, GEMM_MODES)
    _require(n >= 0, op, "n of 0 or more", n)
    _check(op, "tiles", tiles, torch.uint8, tiles_bytes(n, k, bits))
    _check(op, "affine", affine, torch.float32, affine_floats(n, group_count(k, group_size)))
    if bias is not None:
        _check(op, "bias", bias, bias.dtype, n)
    if perm is not None:
        _check(op, "perm", perm, torch.int32, k)
    if in_scale is not None:
        _check(op, "in_scale", in_scale, in_scale.dtype, k)
    return x.new_empty((x.shape[0], n))


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
    y = _packed_gemm_out(x, tiles, affine, bias, perm, in_scale, n, bits, group_size, mode)
    dtype = x.dtype
    tiles, affine = tiles.contiguous(), affine.contiguous()
    if dtype != torch.float32:
        x, y = x.float(), y.new_empty(y.shape, dtype=torch.float32)
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
        y.data_ptr(),
        x.shape[0],
        n,
        x.shape[1],
        group_size,
        bits,
        GEMM_MODES[mode],
    )
    return y if dtype == torch.float32 else y.to(dtype)


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
      x: [m, k], float32, float16 or bfloat16.
      tiles: uint8, what :func:`repack` returned for the codes of [n, k].
      affine: float32, what :func:`repack_affine` returned.
      n: out-features.
      bits: 2..8.
      group_size: positive; the last group may be partial.
      bias: [n] or None.
      perm: int32 [k] or None; packed position j reads in-feature perm[j].
      in_scale: [k] or None; divides x before the permutation.
      mode: "exact" (fp32 activations) or "int8" (activations quantized per row and group).

    Returns [m, n]. Raises ValueError for any dtype or shape that does not fit.
    """
    return torch.ops.mmq.packed_gemm.default(  # type: ignore[no-any-return]
        x, tiles, affine, bias, perm, in_scale, n, bits, group_size, mode
    )


_register(
    "packed_gemm(Tensor x, Tensor tiles, Tensor affine, Tensor? bias, Tensor? perm, "
    "Tensor? in_scale, int n, int bits, int group_size, str mode) -> Tensor",
    _packed_gemm_cpu,
    _packed_gemm_out,
)


# --- gptq_block -------------------------------------------------------------------------------


def _gptq_block_out(
    w: Tensor,
    u: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    float_zero: bool,
    min_code: int,
) -> tuple[Tensor, Tensor]:
    op = "gptq_block"
    _check_bits(op, bits)
    _require(min_code in (0, 1), op, "a min_code of 0 or 1", min_code)
    _check(op, "w", w, torch.float32, None, None)
    n, cols = w.shape
    _check(op, "u", u, torch.float32, cols, cols)
    _check(op, "scales", scales, torch.float32, n, None)
    _check(op, "zeros", zeros, torch.float32, *scales.shape)
    _check(op, "group_of", group_of, torch.int32, cols)
    return w.new_empty((n, cols), dtype=torch.uint8), w.new_empty((n, cols))


def _gptq_block_cpu(
    w: Tensor,
    u: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_of: Tensor,
    bits: int,
    float_zero: bool,
    min_code: int,
) -> tuple[Tensor, Tensor]:
    codes, errors = _gptq_block_out(w, u, scales, zeros, group_of, bits, float_zero, min_code)
    w, u, scales, zeros = w.contiguous(), u.contiguous(), scales.contiguous(), zeros.contiguous()
    group_of = group_of.contiguous()
    _C.gptq_block(
        w.data_ptr(),
        u.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        group_of.data_ptr(),
        codes.data_ptr(),
        errors.data_ptr(),
        w.shape[0],
        w.shape[1],
        scales.shape[1],
        bits,
        float_zero,
        min_code,
    )
    return codes, errors


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
    """The column recursion of GPTQ inside one block (arXiv 2210.17323, algorithm 1).

    For each column i: q_i = grid(w_i), e_i = (w_i - dequantized(q_i)) / u_ii, and
    w_j -= e_i * u_ij for the later columns j.

    Args:
      w: float32 [n, cols], compensated weights of the block; not changed.
      u: float32 [cols, cols], upper triangular with H^-1 = U^T U; the lower part is not read.
      scales, zeros: float32 [n, groups]; zeros are integers, or minima if ``float_zero``.
      group_of: int32 [cols], the column of ``scales`` that each column uses.
      bits: 2..8.
      float_zero: the grid is w = q * scale + zero instead of (q - zero) * scale.
      min_code: 0, or 1 for the restricted symmetric grid, which leaves code 0 unused.

    Returns (codes uint8 [n, cols], errors float32 [n, cols]), bit-identical in all
    implementations. Rows do not influence each other; a row with a NaN gets code ``min_code`` and
    NaN errors from there on. Raises ValueError for a dtype or shape that does not fit, a group
    index that is out of range, or a diagonal of u that is not positive and finite.
    """
    return torch.ops.mmq.gptq_block(  # type: ignore[no-any-return]
        w, u, scales, zeros, group_of, bits, float_zero, min_code
    )


_register(
    "gptq_block(Tensor w, Tensor u, Tensor scales, Tensor zeros, Tensor group_of, int bits, "
    "bool float_zero, int min_code) -> (Tensor, Tensor)",
    _gptq_block_cpu,
    _gptq_block_out,
)


# --- awq_errors -------------------------------------------------------------------------------


def _awq_errors_out(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
) -> Tensor:
    op = "awq_errors"
    _check_bits(op, bits)
    _check(op, "w", w, torch.float32, None, None)
    k = w.shape[1]
    _check(op, "candidates", candidates, torch.float32, None, k)
    _check(op, "factor", factor, torch.float32, None, k)
    _require(group_size > 0, op, "a positive group size", group_size)
    _choice(op, "kind", kind, GRID_KINDS)
    _choice(op, "scale_dtype", scale_dtype, SCALE_TYPES)
    return w.new_empty((candidates.shape[0],), dtype=torch.float64)


def _awq_errors_cpu(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
) -> Tensor:
    errors = _awq_errors_out(w, candidates, factor, bits, group_size, kind, scale_dtype)
    usable = bool((torch.isfinite(candidates) & (candidates > 0)).all())
    _require(usable, "awq_errors", "positive, finite candidates", "others")
    w, candidates, factor = w.contiguous(), candidates.contiguous(), factor.contiguous()
    _C.awq_errors(
        w.data_ptr(),
        candidates.data_ptr(),
        factor.data_ptr(),
        errors.data_ptr(),
        w.shape[0],
        w.shape[1],
        factor.shape[0],
        candidates.shape[0],
        group_size,
        bits,
        GRID_KINDS[kind],
        SCALE_TYPES[scale_dtype],
    )
    return errors


def awq_errors(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    *,
    bits: int,
    group_size: int,
    kind: str = "integer",
    scale_dtype: str = "float16",
) -> Tensor:
    """||(W - Q(W s) / s) F^T||_F^2 for every candidate scale s (arXiv 2306.00978, eq. 4).

    Args:
      w: float32 [n, k]; linears that share an input are stacked along n.
      candidates: float32 [count, k], positive.
      factor: float32 [rows, k]: the inputs X [tokens, k], or L^T with H = L L^T.
      kind: "integer", "float", "symmetric" or "restricted"; the min-max grid of each group.
      scale_dtype: the storage type that scales are rounded to first.

    Returns float64 [count]; NaN where a weight is NaN or a scale overflows. The sums do not depend
    on the number of threads. Raises ValueError for a dtype or shape that does not fit and for
    candidates that are not positive and finite.
    """
    return torch.ops.mmq.awq_errors(  # type: ignore[no-any-return]
        w, candidates, factor, bits, group_size, kind, scale_dtype
    )


_register(
    "awq_errors(Tensor w, Tensor candidates, Tensor factor, int bits, int group_size, str kind, "
    "str scale_dtype) -> Tensor",
    _awq_errors_cpu,
    _awq_errors_out,
)


# --- grid_search ------------------------------------------------------------------------------


def _grid_search_out(
    w: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
    steps: int,
    shrink: float,
    exponent: float,
) -> tuple[Tensor, Tensor]:
    op = "grid_search"
    _check_bits(op, bits)
    _check(op, "w", w, torch.float32, None, None)
    n, k = w.shape
    if importance is not None:
        _check(op, "importance", importance, torch.float32, k)
    _require(group_size > 0, op, "a positive group size", group_size)
    _choice(op, "kind", kind, GRID_KINDS)
    _choice(op, "scale_dtype", scale_dtype, SCALE_TYPES)
    shape = (n, group_count(k, group_size))
    return w.new_empty(shape), w.new_empty(shape)


def _grid_search_cpu(
    w: Tensor,
    importance: Tensor | None,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
    steps: int,
    shrink: float,
    exponent: float,
) -> tuple[Tensor, Tensor]:
    scales, zeros = _grid_search_out(
        w, importance, bits, group_size, kind, scale_dtype, steps, shrink, exponent
    )
    w = w.contiguous()
    importance = None if importance is None else importance.contiguous()
    _C.grid_search(
        w.data_ptr(),
        0 if importance is None else importance.data_ptr(),
        scales.data_ptr(),
        zeros.data_ptr(),
        w.shape[0],
        w.shape[1],
        group_size,
        bits,
        GRID_KINDS[kind],
        SCALE_TYPES[scale_dtype],
        steps,
        shrink,
        exponent,
    )
    return scales, zeros


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
    """Scale and zero of every row and group of w, float32 [n, k].

    ``steps=0`` takes the range from min and max. Otherwise the ranges p * [min, max] with
    p = 1, 1 - 1/steps, ... down to 1 - shrink are tried, and the one with the least
    sum importance * |w - w_hat| ** exponent is kept (importance: float32 [k], default ones).

    Returns (scales, zeros), float32 [n, G], rounded to ``scale_dtype``: zeros are integers
    (2**(bits-1) for symmetric kinds), or minima for kind "float". A group with a NaN gets a NaN
    scale; a scale or minimum beyond ``scale_dtype`` is infinite: callers refuse both.
    """
    return torch.ops.mmq.grid_search(  # type: ignore[no-any-return]
        w, importance, bits, group_size, kind, scale_dtype, steps, shrink, exponent
    )


_register(
    "grid_search(Tensor w, Tensor? importance, int bits, int group_size, str kind, "
    "str scale_dtype, int steps, float shrink, float exponent) -> (Tensor, Tensor)",
    _grid_search_cpu,
    _grid_search_out,
)
