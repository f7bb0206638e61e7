# SPDX-License-Identifier: Apache-2.0
"""hessian_update in torch's own calls, for CUDA tensors.

There is no native CUDA kernel, because there is nothing for it to win: it is one matrix product per
2,048 tokens, which cuBLAS runs at the device's rate in full fp32 (unless TF32 was asked for; leave
it off here). Block rows skip what lies below the diagonal. On the CPU the same calls reach 0.6 to
0.75 of the rate of BLAS for that half: their products are narrow, and the sums are moved apart.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK_TOKENS: Final = 2048  # Tokens per fp32 product; the products are summed in float64.
BLOCK_ROWS: Final = 256  # Rows of H per product: narrower ones do less, but BLAS slows down.


def hessian_update(total: Tensor, x: Tensor) -> None:
    """Arguments as :func:`mmq_ext.ops.hessian_update`; fp32 sums of up to BLOCK_TOKENS tokens."""
    k = x.shape[1]
    for block in torch.split(x, BLOCK_TOKENS):
        for a in range(0, k, BLOCK_ROWS):
            b = min(a + BLOCK_ROWS, k)
            product = (block[:, a:b].T @ block[:, a:]).triu()
            total[a:b, a:] += product
