# SPDX-License-Identifier: Apache-2.0
"""What an algorithm did to one weight matrix, and the error it left: plain data, JSON-ready."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

import torch
from torch import Tensor

from mmq.packed import PackedWeight

TRACE_BLOCK: Final = 256  # Columns per product of output_error.
LEAST_SHARE: Final = 0.25  # Of GPTQ's loss that undamped_error may leave: digits cancel.


@dataclass(frozen=True)
class GptqDetails:
    """How the columns were walked.

    ``damp`` is the share of the mean diagonal that was added in the end, None if no factorization
    succeeded. ``loss`` is sum e^2 / 2 over all columns, the damped Hessian's output error, in the
    units of :attr:`Report.output_error`; None without a factorization.
    """

    order: str
    static_groups: bool
    damp: float | None
    dead_columns: int
    loss: float | None


@dataclass(frozen=True)
class AwqDetails:
    """The exponent that was chosen, the error of each candidate (in the units of
    :attr:`Report.output_error`, on the min-max grid), and the mean shrink of the clipped ranges
    (1 = no clipping). ``approximation`` says which errors are exact, "" if all are."""

    alpha: float
    errors: tuple[float, ...]
    mean_shrink: float
    approximation: str = ""


@dataclass(frozen=True)
class Report:
    """The result for one matrix W [n, k], W_hat being its effective weight.

    - ``weight_mse``: mean (W_hat - W)^2.
    - ``output_error``: mean over tokens of |(W_hat - W) x|^2, summed over outputs; None if the
      inputs are not known. ``relative_error`` is its ratio to the mean of |W x|^2.
    - ``fallback``: what was done instead of ``method``, empty if nothing.
    - ``notes``: what a reader should know (dead columns, raised damping).
    """

    name: str
    method: str
    n: int
    k: int
    bits: int
    group_size: int
    zero: str
    bits_per_weight: float
    weight_mse: float
    output_error: float | None
    relative_error: float | None
    fallback: str
    notes: tuple[str, ...]
    gptq: GptqDetails | None = None
    awq: AwqDetails | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dicts; details of other methods are left out."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        found["notes"] = list(self.notes)
        return found


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean over tokens of |D x|^2 for D [n, k] and H = 2 E[x x^T] [k, k]: tr(D H D^T) / 2.

    H is symmetric, so half of it is read: tr(D H D^T) is the sum over blocks c of columns of
    <2 D_<c H_<c,c + D_c H_cc, D_c>.
    """
    difference = difference.float()
    total = torch.zeros((), dtype=torch.float64, device=difference.device)
    for a in range(0, difference.shape[1], TRACE_BLOCK):
        b = a + TRACE_BLOCK
        block = difference[:, a:b]
        product = difference[:, :a] @ hessian[:a, a:b]
        product.addmm_(block, hessian[a:b, a:b], beta=2)
        total += product.mul_(block).sum(dim=1).sum(dtype=torch.float64)
    return float(total) / 2


def undamped_error(loss: float, ridge: float, difference: Tensor, hessian: Tensor) -> float | None:
    """:func:`output_error` without its product, from what GPTQ's loop has summed up.

    The loop's errors are E = D U^-1, and with (H + ridge I)^-1 = U^T U, sum e^2 / 2 is
    tr(D (H + ridge I) D^T) / 2 over the columns of positive diagonal; the others have no error.
    None where so little is left without the ridge that rounding would show.
    """
    live = squares(difference) - squares(difference[:, hessian.diagonal() == 0])
    error = loss - ridge / 2 * live
    return error if error >= LEAST_SHARE * loss else None


def squares(matrix: Tensor) -> float:
    """The sum of the squares of ``matrix`` [n, k]: of rows in its precision, then in float64.

    Along columns torch takes thirty times as long.
    """
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def make_report(
    name: str,
    weight: Tensor,
    packed: PackedWeight,
    hessian: Tensor | None,
    *,
    notes: tuple[str, ...] = (),
    gptq: GptqDetails | None = None,
    awq: AwqDetails | None = None,
    ridge: float | None = None,
) -> Report:
    """Measures ``packed`` against the matrix that its ``dequantize()`` stands for.

    Args:
      name: of the module.
      weight: [n, k]; W diag(s) where ``packed.in_scale`` is s.
      packed: the result.
      hessian: float32 [k, k] in the convention of :class:`mmq.hessian.Hessian`, of x / s; or None.
      notes, gptq, awq: recorded as they are.
      ridge: with it ``gptq.loss`` is that of :func:`undamped_error`, which is then used; None
        measures the output error by a product.
    """
    weight = weight.detach().float()
    difference = packed.dequantize().sub_(weight)
    error = relative = None
    if hessian is not None:
        if ridge is not None and gptq is not None and gptq.loss is not None:
            error = undamped_error(gptq.loss, ridge, difference, hessian)
        if error is None:
            error = output_error(difference, hessian)
        total = output_error(weight, hessian)
        relative = error / total if total > 0 else 0.0
    if packed.in_scale is not None:
        difference /= packed.in_scale.float()
    return Report(
        name=name,
        method=packed.method,
        n=packed.n,
        k=packed.k,
        bits=packed.bits,
        group_size=packed.group_size,
        zero=packed.zero,
        bits_per_weight=packed.bits_per_weight,
        weight_mse=squares(difference) / difference.numel(),
        output_error=error,
        relative_error=relative,
        fallback=packed.fallback,
        notes=notes,
        gptq=gptq,
        awq=awq,
    )
