# SPDX-License-Identifier: Apache-2.0
"""The CUDA implementations of the operators. See :mod:`mmq_ext.ops` for what they compute.

Every kernel runs in the current stream of its tensors' device. Importing this module registers
them; the library with the kernels is opened at the first call (csrc/cuda_library.h). What the
compiled CPU functions check by looking at values (codes that fit, group indices, the factor's
diagonal, candidates) is checked here by torch, which costs one wait for the device per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmq_ext import _C, grid, hessian
from mmq_ext.checks import FLOATS, register_cuda, require
from mmq_ext.device import ask, check_one_device, launch, stream_of
from mmq_ext.layouts import cuda_affine_kind
from mmq_ext.packed_ops import pack_out, packed_gemm_out, repack_out, unpack_out, unrepack_out
from mmq_ext.quantize_ops import (
    GRID_KINDS,
    SCALE_TYPES,
    awq_errors_out,
    gptq_block_out,
    grid_search_out,
    hessian_update_out,
)

# Scratch memory of packed_gemm by device and stream. It begins with counters, which are zero before
# and after every call, of whatever shape; the rest is written before it is read. Calls in one
# stream follow each other and may share it; those in two streams may overlap and must not. It grows
# to the largest size asked for and is never given back: capture a CUDA graph after such calls.
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _workspace(like: Tensor, size: int) -> Tensor:
    key = (like.device, stream_of(like))
    found = _workspaces.get(key)
    if found is None or found.numel() < size:
        found = like.new_zeros(max(size, 16), dtype=torch.uint8)
        _workspaces[key] = found
    return found


def _pack(codes: Tensor, bits: int) -> Tensor:
    words = pack_out(codes, bits)
    if codes.numel():
        top = int(codes.max())
        require(top < 1 << bits, "pack", f"codes below {1 << bits}", top)
    launch("pack", _C.cuda_pack, {"codes": codes}, {"words": words}, *codes.shape, bits)
    return words


def _unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    codes = unpack_out(words, bits, cols)
    launch("unpack", _C.cuda_unpack, {"words": words}, {"codes": codes}, *codes.shape, bits)
    return codes


def _repack(qweight: Tensor, bits: int, k: int) -> Tensor:
    tiles = repack_out(qweight, bits, k)
    n = qweight.shape[0]
    launch("repack", _C.cuda_repack, {"qweight": qweight}, {"tiles": tiles}, n, k, bits)
    return tiles


def _unrepack(tiles: Tensor, bits: int, n: int, k: int) -> Tensor:
    words = unrepack_out(tiles, bits, n, k)
    launch("unrepack", _C.cuda_unrepack, {"tiles": tiles}, {"words": words}, n, k, bits)
    return words


def _packed_gemm(
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
    m, k = x.shape
    numbers = (
        *(m, n, k, group_size, bits),
        *(FLOATS[x.dtype], cuda_affine_kind(affine), FLOATS[affine.dtype]),
    )
    inputs = {
        "x": x,
        "tiles": tiles,
        "affine": affine,
        "bias": None if bias is None else bias.to(x.dtype),
        "perm": perm,
        "in_scale": None if in_scale is None else in_scale.float(),
    }
    kept = {"workspace": _workspace(x, ask(x, _C.cuda_packed_gemm_workspace, *numbers))}
    launch("packed_gemm", _C.cuda_packed_gemm, inputs, {"y": y}, *numbers, kept=kept)
    return y


def _gptq_block(
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
    inputs = {"w": w, "u": u, "scales": scales, "zeros": zeros, "group_of": group_of}
    check_one_device(op, inputs)
    codes, errors = gptq_block_out(w, u, scales, zeros, group_of, bits, float_zero, min_code)
    n, cols = w.shape
    groups = scales.shape[1]
    if n and cols:
        diagonal = u.diagonal()
        good = torch.stack(
            [
                (group_of >= 0).all() & (group_of < groups).all(),
                (diagonal.isfinite() & (diagonal > 0)).all(),
            ]
        )
        indices, positive = good.tolist()
        require(indices, op, f"group indices below the group count {groups}", "others")
        require(positive, op, "a factor with a positive, finite diagonal", "another")
    outputs = {"codes": codes, "errors": errors}
    numbers = (n, cols, groups, bits, float_zero, min_code)
    launch(op, _C.cuda_gptq_block, inputs, outputs, *numbers)
    return codes, errors


def _awq_errors(
    w: Tensor,
    candidates: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    kind: str,
    scale_dtype: str,
) -> Tensor:
    errors = awq_errors_out(w, candidates, factor, bits, group_size, kind, scale_dtype)
    usable = bool((torch.isfinite(candidates) & (candidates > 0)).all())
    require(usable, "awq_errors", "positive, finite candidates", "others")
    numbers = (
        *(*w.shape, factor.shape[0], candidates.shape[0], group_size, bits),
        *(GRID_KINDS[kind], SCALE_TYPES[scale_dtype]),
    )
    size = max(ask(w, _C.cuda_awq_errors_workspace, *numbers), 16)
    outputs = {"errors": errors, "workspace": w.new_empty(size, dtype=torch.uint8)}
    inputs = {"w": w, "candidates": candidates, "factor": factor}
    launch("awq_errors", _C.cuda_awq_errors, inputs, outputs, *numbers)
    return errors


def _grid_search(
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
    arguments = (w, importance, bits, group_size, kind, scale_dtype, steps, shrink, exponent)
    grid_search_out(*arguments)
    check_one_device(op, {"w": w, "importance": importance})
    require(steps >= 0, op, "0 or more steps", steps)
    require(0 <= shrink < 1, op, "a shrink from 0 to below 1", shrink)
    require(exponent > 0, op, "a positive exponent", exponent)
    return grid.grid_search(*arguments)


def _hessian_update(total: Tensor, x: Tensor) -> None:
    hessian_update_out(total, x)
    check_one_device("hessian_update", {"total": total, "x": x})
    hessian.hessian_update(total, x)


register_cuda("pack", _pack)
register_cuda("unpack", _unpack)
register_cuda("repack", _repack)
register_cuda("unrepack", _unrepack)
register_cuda("packed_gemm", _packed_gemm)
register_cuda("gptq_block", _gptq_block)
register_cuda("awq_errors", _awq_errors)
register_cuda("grid_search", _grid_search)
register_cuda("hessian_update", _hessian_update)
