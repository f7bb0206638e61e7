# SPDX-License-Identifier: Apache-2.0
"""Options of the two calibrated methods, apart from the grid (which is a QuantSpec)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mmq.errors import MmqError
from mmq.spec import QuantSpec

Order = Literal["none", "act", "group"]
OrderOption = Literal["auto", "none", "act", "group"]
Dead = Literal["keep", "zero"]
Correction = Literal["none", "gptaq", "retarget"]
TokenWeights = Literal["none", "modality", "qig", "grad"]
Search = Literal["ranked", "exhaustive"]


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ walks the columns of one weight matrix (Frantar et al., arXiv 2210.17323).

    - ``order``: ``"none"`` is left to right; ``"act"`` sorts all columns by the diagonal of the
      Hessian, descending, and stores a permutation; ``"group"`` sorts columns inside each group and
      the groups by their largest diagonal entry, and needs no permutation in the stored layout.
      ``"auto"`` is ``"group"`` when a row has more than one group, else ``"none"``.
    - ``damp``: share of the diagonal's mean that is added to the diagonal, first attempt.
    - ``block``: columns updated together before the trailing product.
    - ``static_groups``: group parameters from the original weights before the loop. None means
      static with the orders that need it (``"act"``, ``"group"``) and dynamic otherwise.
    - ``dead``: a column whose inputs were all zero is rounded to nearest (``"keep"``) or set to 0
      (``"zero"``, as the reference does).
    - ``correction``: towards the outputs of the full-precision model, see ``mmq.correction``;
      ``alpha`` is its share.

    Raises MmqError for any value outside these rules.
    """

    order: OrderOption = "auto"
    damp: float = 0.01
    block: int = 128
    static_groups: bool | None = None
    dead: Dead = "keep"
    correction: Correction = "none"
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if self.order not in get_args(OrderOption):
            expected = ", ".join(get_args(OrderOption))
            raise MmqError(f"gptq.order: expected one of {expected}, got {self.order!r}")
        if self.dead not in get_args(Dead):
            raise MmqError(f"gptq.dead: expected keep or zero, got {self.dead!r}")
        if self.correction not in get_args(Correction):
            expected = ", ".join(get_args(Correction))
            raise MmqError(f"gptq.correction: expected one of {expected}, got {self.correction!r}")
        if not 0.0 <= self.alpha <= 1.0:
            raise MmqError(f"gptq.alpha: expected a number in [0, 1], got {self.alpha!r}")
        if not 0.0 <= self.damp <= 1.0:
            raise MmqError(f"gptq.damp: expected a number in [0, 1], got {self.damp!r}")
        if self.block < 1:
            raise MmqError(f"gptq.block: expected at least 1 column, got {self.block!r}")
        if self.static_groups is False and self.order in ("act", "group"):
            raise MmqError(f"gptq.static_groups: order {self.order} needs static groups, got false")

    def resolve_order(self, spec: QuantSpec, k: int) -> Order:
        """The order for a matrix of ``k`` in-features on the grid ``spec``; never ``"auto"``."""
        if self.order != "auto":
            return self.order
        if self.static_groups is False:
            return "none"
        return "group" if spec.groups(k) > 1 else "none"

    def resolve_static_groups(self, spec: QuantSpec, k: int) -> bool:
        """Whether group parameters are fixed before the loop."""
        if self.static_groups is not None:
            return self.static_groups
        return self.resolve_order(spec, k) != "none"


@dataclass(frozen=True)
class AwqOptions:
    """How AWQ searches its input scales (Lin et al., arXiv 2306.00978).

    - ``steps``: the exponents tried are 0, 1/steps, ..., 1.
    - ``weight_aware``: divide by the mean relative weight magnitude to the power 1 - alpha.
    - ``clip``: search each group's range on the scaled inputs afterwards.
    - ``fold``: put 1/s into the producer where the architecture allows; otherwise, and with
      ``fold=False`` everywhere, s is the run-time divisor of the input.
    - ``search``: ``"ranked"`` ranks the exponents with a stand-in for the Hessian and compares the
      best exactly (from 1,024 in-features on; fewer are searched exhaustively);
      ``"exhaustive"`` computes every exponent's exact error.
    - ``seed``: of the stand-in; in a run that of the recipe.

    Raises MmqError when ``steps`` is below 1 or ``search`` is unknown.
    """

    steps: int = 20
    weight_aware: bool = False
    clip: bool = True
    fold: bool = True
    search: Search = "ranked"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise MmqError(f"awq.steps: expected at least 1, got {self.steps!r}")
        if self.search not in get_args(Search):
            expected = ", ".join(get_args(Search))
            raise MmqError(f"awq.search: expected one of {expected}, got {self.search!r}")
