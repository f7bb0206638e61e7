# SPDX-License-Identifier: Apache-2.0
"""The operators again in plain torch: what every native kernel is compared with.

Sums that kernels may reorder are float64 here. Shapes as in :mod:`mmq_ext.ops`: n out-features,
k in-features, G = ceil(k / group_size) groups.
"""

from mmq_ext.reference.packed import (
    CHAIN_COLS,
    EPS,
    OUTPUT_EPS,
    SEGMENT_COLS,
    TINY,
    pack,
    packed_gemm,
    packed_gemm_bound,
    quantize_activations,
    repack,
    unpack,
    used_activations,
)
from mmq_ext.reference.quantize import (
    HESSIAN_TOKENS,
    SCALE_DTYPES,
    awq_errors,
    codes_of,
    gptq_block,
    grid_errors,
    grid_search,
    hessian_update,
    make_grid,
    shrink_factors,
    values_of,
)

__all__ = [
    "CHAIN_COLS",
    "EPS",
    "HESSIAN_TOKENS",
    "OUTPUT_EPS",
    "SCALE_DTYPES",
    "SEGMENT_COLS",
    "TINY",
    "awq_errors",
    "codes_of",
    "gptq_block",
    "grid_errors",
    "grid_search",
    "hessian_update",
    "make_grid",
    "pack",
    "packed_gemm",
    "packed_gemm_bound",
    "quantize_activations",
    "repack",
    "shrink_factors",
    "unpack",
    "used_activations",
    "values_of",
]
