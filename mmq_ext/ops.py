# SPDX-License-Identifier: Apache-2.0
"""The operators: one typed function per op, its checks, its fake, its CPU and CUDA functions.

Every op is registered with ``torch.library`` under ``torch.ops.mmq``, so that it works under
``torch.compile`` and ``opcheck``. The checks run in the fake and in the real implementation alike;
the compiled module then gets raw pointers and sizes. Shapes: n out-features, k in-features, m rows
of activations, G = ceil(k / group_size) groups.
"""

from mmq_ext import cuda_ops  # noqa: F401  (registers the CUDA implementations)
from mmq_ext.checks import group_count, row_words
from mmq_ext.layouts import affine_floats, tiles_bytes
from mmq_ext.packed_ops import (
    GEMM_MODES,
    pack,
    packed_gemm,
    repack,
    repack_affine,
    unpack,
    unrepack,
    unrepack_affine,
)
from mmq_ext.quantize_ops import (
    GRID_KINDS,
    SCALE_TYPES,
    awq_errors,
    gptq_block,
    grid_search,
    hessian_update,
)

__all__ = [
    "GEMM_MODES",
    "GRID_KINDS",
    "SCALE_TYPES",
    "affine_floats",
    "awq_errors",
    "gptq_block",
    "grid_search",
    "group_count",
    "hessian_update",
    "pack",
    "packed_gemm",
    "repack",
    "repack_affine",
    "row_words",
    "tiles_bytes",
    "unpack",
    "unrepack",
    "unrepack_affine",
]
