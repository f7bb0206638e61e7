# SPDX-License-Identifier: Apache-2.0
"""Which of many candidates deserve an exact error: all are ranked with a small stand-in for H.

tr(D H D^T) costs k^2 / 2 multiply-adds per row of D. With H replaced by a matrix of low rank plus a
diagonal it costs RANK * k, and the error of every candidate on every row still shows: the diagonal
carries the channels with large activations, the low rank what channels have in common. The rows of
largest norm, which may make most of the error by themselves, are ranked with H itself. Sampling
rows alone was measured to be worse: a few channels make most of the error, whose rounding is a
lottery per row, and the sample draws other lots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

RANK: Final = 32  # Measured, see DESIGN.md: a diagonal alone misses at times, 64 adds nothing.
FINALISTS: Final = 3  # Candidates with an exact error, and candidate 0.
SMALLEST_WIDTH: Final = 1024  # In-features from which the ranking pays.
LARGEST_SHARE: Final = 64  # One row in so many is ranked with H itself, ...
LEAST_ROWS: Final = 16  # ... but no fewer than these of a matrix.


def stand_in(factor: Tensor, rank: int = RANK, seed: int = 0) -> Tensor:
    """F' float32 [rank + k, k] with F'^T F' close to H = F^T F, for ``factor`` F float32 [rows, k].

    Nystroem's approximation of H on the range of H Omega, Omega normal from ``seed`` (Halko,
    Martinsson and Tropp, arXiv 0909.4061, algorithm 5.5), and the diagonal of what it leaves out,
    which cannot be negative but by rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    k = factor.shape[1]
    omega = torch.randn(k, rank, generator=generator).to(factor.device)
    basis, _ = torch.linalg.qr(factor.T @ (factor @ omega))
    y = factor.T @ (factor @ basis)
    core = (basis.T @ y).double()
    core = (core + core.T) / 2
    values, vectors = torch.linalg.eigh(core)
    kept = values > values[-1:].clamp_min(0) * 1e-6  # Fewer where H has a lower rank.
    roots = (vectors[:, kept] / values[kept].sqrt()).float()
    low_rank = (y @ roots).T
    rest = factor.square().sum(dim=0) - low_rank.square().sum(dim=0)
    return torch.cat([low_rank, torch.diag(rest.clamp_min_(0).sqrt_())])


def largest_rows(weights: Sequence[Tensor]) -> list[Tensor]:
    """Of each weight [n, k] the rows of largest norm, in the order of their size."""
    found = []
    for weight in weights:
        norms = torch.linalg.vector_norm(weight.detach().float(), dim=1)
        order = torch.argsort(norms, descending=True, stable=True)
        found.append(weight[order[: max(LEAST_ROWS, weight.shape[0] // LARGEST_SHARE)]])
    return found


def finalists(errors: Sequence[float]) -> list[int]:
    """The indices to compare exactly, ascending: the FINALISTS least ``errors``, and 0."""
    order = sorted(range(len(errors)), key=lambda i: (math.isnan(errors[i]), errors[i], i))
    return sorted({0, *order[:FINALISTS]})
