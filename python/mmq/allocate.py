# SPDX-License-Identifier: Apache-2.0
"""Widths per linear under a budget of stored bytes.

Minimise the sum of predicted errors subject to the sum of stored bytes: a multiple-choice knapsack,
solved by dynamic programming over the frontier of (bytes, error) that the first linears can reach.
The budget is in stored bits per weight *of the linears that the recipe quantizes*: codes with their
padding, scales, zeros, permutations and input scales; a linear that stays at 16 bits counts as
16 per weight. Embeddings, norms, biases and dense heads are outside of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt
import yaml
from torch import nn

from mmq.calibrate import calibrating, replaced_weights
from mmq.error_table import Choice, ErrorTable, Objective, UnitErrors
from mmq.errors import MmqError
from mmq.models import architecture_of
from mmq.outputs import OutputDivergence
from mmq.prepare import calibration_batches
from mmq.recipe import UNTOUCHED_BITS, Recipe, parse_recipe
from mmq.samples import Sample
from mmq.scaling import dense_linear
from mmq.sensitivity import Bank

STATES: Final = 10_000  # Of the frontier; beyond, the range of bytes is cut into so many granules.


@dataclass(frozen=True)
class Option:
    """A choice of one knapsack item: its width, bytes and error."""

    bits: int
    stored_bytes: int
    error: float


@dataclass(frozen=True)
class Frontier:
    """All best trades between bytes and error: ``stored_bytes`` ascending, ``error`` descending.

    ``is_exact`` is False where the frontier was thinned to one state per granule.
    """

    stored_bytes: npt.NDArray[np.int64]
    error: npt.NDArray[np.float64]
    is_exact: bool
    _options: tuple[tuple[Option, ...], ...]
    _parents: tuple[npt.NDArray[np.int32], ...]
    _taken: tuple[npt.NDArray[np.int8], ...]

    def best(self, budget: int) -> tuple[Option, ...]:
        """One option per item: the least error within ``budget`` bytes, the least bytes for it.

        Raises MmqError where even the smallest options exceed the budget.
        """
        state = int(np.searchsorted(self.stored_bytes, budget, side="right")) - 1
        if state < 0:
            raise MmqError(f"budget: expected at least {self.stored_bytes[0]} bytes, got {budget}")
        chosen: list[Option] = []
        steps = zip(self._options, self._parents, self._taken, strict=True)
        for options, parents, taken in reversed(list(steps)):
            chosen.append(options[taken[state]])
            state = int(parents[state])
        return tuple(reversed(chosen))


def frontier(items: Sequence[Sequence[Option]], states: int = STATES) -> Frontier:
    """The frontier over all ways to take one option of every item.

    A state is kept if no other has at most its bytes and at most its error; of equal ones the first
    stays. That is exact. Where more than ``states`` remain, the bytes between the smallest and the
    largest total are cut into ``states`` granules and the state of least error of each is kept,
    with its true bytes, so that a budget is never exceeded; so is the smallest state. The frontier
    does not depend on a budget: a larger one never has a larger error.
    """
    span = sum(max(o.stored_bytes for o in item) for item in items)
    span -= sum(min(o.stored_bytes for o in item) for item in items)
    granule = max(1, -(-span // states))
    cost = np.zeros(1, dtype=np.int64)
    error = np.zeros(1)
    is_exact = True
    parents: list[npt.NDArray[np.int32]] = []
    taken: list[npt.NDArray[np.int8]] = []
    for item in items:
        option_cost = np.array([option.stored_bytes for option in item], dtype=np.int64)
        option_error = np.array([option.error for option in item])
        all_cost = (cost[:, None] + option_cost).ravel()
        all_error = (error[:, None] + option_error).ravel()
        order = np.lexsort((all_error, all_cost))
        least = np.minimum.accumulate(all_error[order])
        order = order[np.r_[True, all_error[order][1:] < least[:-1]]]
        if len(order) > states:
            is_exact = False
            cell = (all_cost[order] - all_cost[order[0]]) // granule
            last = np.r_[cell[1:] != cell[:-1], True]  # The least error of its granule.
            last[0] = True
            order = order[last]
        cost, error = all_cost[order], all_error[order]
        parents.append((order // len(item)).astype(np.int32))
        taken.append((order % len(item)).astype(np.int8))
    return Frontier(cost, error, is_exact, tuple(map(tuple, items)), tuple(parents), tuple(taken))


@dataclass(frozen=True)
class Constraints:
    """What an allocation must respect.

    ``fixed`` and ``minimum`` are pairs of a glob on module paths (in which ``*`` also matches dots)
    and a width; of several globs that match, the last counts. ``tie_inputs`` gives linears that
    read the same tensor inside a block one width.
    """

    fixed: tuple[tuple[str, int], ...] = ()
    minimum: tuple[tuple[str, int], ...] = ()
    tie_inputs: bool = False


@dataclass(frozen=True)
class Allocation:
    """Widths by path, and what they are predicted to do.

    ``bits_per_weight`` is of the allocated linears, at most the budget. ``error`` is the sum of the
    objective over them. ``exact`` says whether the knapsack was solved without granules.
    ``divergence`` and ``first_divergence`` are the measured KL with all linears quantized, after
    and before :func:`refine`; None without it.
    """

    bits: dict[str, int]
    stored_bytes: int
    weights: int
    objective: Objective
    error: float
    exact: bool
    divergence: float | None = None
    first_divergence: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the allocated linears."""
        return 8 * self.stored_bytes / self.weights


def allocate(
    table: ErrorTable,
    bits_per_weight: float,
    objective: Objective = "mixed",
    constraints: Constraints | None = None,
    *,
    states: int = STATES,
) -> Allocation:
    """The widths of least predicted error within the budget; ties go to fewer bytes.

    Args:
      table: what :func:`mmq.sensitivity.measure_errors` found.
      bits_per_weight: the budget, stored bits per weight of the table's linears.
      objective: what is summed: ``relative`` output errors, absolute ``output`` errors, the KL
        divergence estimated by ``fisher`` information, measured one linear at a time (``kl``), or
        measured where errors are large and estimated elsewhere (``mixed``).
      constraints: fixed widths, least widths, ties.
      states: see :func:`frontier`.

    Raises MmqError for a budget outside what the widths can reach (with that range), an objective
    that the table lacks, and a constraint that matches nothing or leaves no choice.
    """
    if objective not in get_args(Objective):
        known = ", ".join(get_args(Objective))
        raise MmqError(f"objective: expected one of {known}, got {objective!r}")
    groups, items = _items(table, objective, constraints or Constraints())
    weights = sum(unit.n * unit.k for unit in table.units)
    smallest, largest = (
        sum(pick(option.stored_bytes for option in item) for item in items) for pick in (min, max)
    )
    budget = budget_bytes(bits_per_weight, weights)
    if not smallest <= budget <= largest:
        low = math.ceil(1e4 * 8 * smallest / weights) / 1e4
        high = math.floor(1e4 * 8 * largest / weights) / 1e4
        raise MmqError(
            f"bpw: expected {low:.4f} to {high:.4f} stored bits per weight of the "
            f"{len(table.units)} linears with these widths, got {bits_per_weight:g}"
        )
    solved = frontier(items, states)
    chosen = solved.best(budget)
    return Allocation(
        bits={
            unit.path: option.bits
            for group, option in zip(groups, chosen, strict=True)
            for unit in group
        },
        stored_bytes=sum(option.stored_bytes for option in chosen),
        weights=weights,
        objective=objective,
        error=sum(option.error for option in chosen),
        exact=solved.is_exact,
    )


def budget_bytes(bits_per_weight: float, weights: int) -> int:
    """Whole bytes of a budget; -1 for one that is negative or not finite."""
    if not 0 <= bits_per_weight < math.inf:
        return -1
    return math.floor(bits_per_weight * weights / 8 + 1e-6)  # 1e-6: a ratio of whole bytes.


def _items(
    table: ErrorTable, objective: Objective, constraints: Constraints
) -> tuple[list[list[UnitErrors]], list[list[Option]]]:
    """The linears that share a width, and the options of each such group, ascending."""
    for name, pairs in (("fixed", constraints.fixed), ("minimum", constraints.minimum)):
        for pattern, bits in pairs:
            if not any(fnmatchcase(unit.path, pattern) for unit in table.units):
                raise MmqError(f"{name}: expected {pattern!r} to match a linear of the table")
            for unit in table.units:
                if name == "fixed" and fnmatchcase(unit.path, pattern):
                    unit.choice(bits)
    groups: dict[str, list[UnitErrors]] = {}
    for unit in table.units:
        key = unit.input_group if constraints.tie_inputs else unit.path
        groups.setdefault(key, []).append(unit)
    items = [_options(group, objective, constraints) for group in groups.values()]
    return list(groups.values()), items


def _options(
    group: list[UnitErrors], objective: Objective, constraints: Constraints
) -> list[Option]:
    widths = set.intersection(*({choice.bits for choice in unit.choices} for unit in group))
    for unit in group:
        least = _last(constraints.minimum, unit.path, 0)
        widths = {width for width in widths if width >= least}
        fixed = _last(constraints.fixed, unit.path, 0)
        widths &= {fixed} if fixed else widths
    if not widths:
        paths = ", ".join(unit.path for unit in group)
        raise MmqError(f"{paths}: expected a width that fixed, minimum and ties allow, got none")
    options = []
    for width in sorted(widths):
        choices = [unit.choice(width) for unit in group]
        errors = [_error(choice, objective, group[0].path) for choice in choices]
        options.append(Option(width, sum(c.stored_bytes for c in choices), sum(errors)))
    return options


def _last(pairs: Sequence[tuple[str, int]], path: str, default: int) -> int:
    found = [bits for pattern, bits in pairs if fnmatchcase(path, pattern)]
    return found[-1] if found else default


def _error(choice: Choice, objective: Objective, path: str) -> float:
    value = choice.error(objective)
    if value is None:
        raise MmqError(f"objective: expected a table with {objective}, got none for {path}")
    return value


def refine(
    model: nn.Module,
    recipe: Recipe,
    samples: Sequence[Sample],
    table: ErrorTable,
    bank: Bank,
    allocation: Allocation,
    bits_per_weight: float,
    constraints: Constraints | None = None,
    *,
    evaluations: int,
    progress: Callable[[int, float], None] | None = None,
) -> Allocation:
    """Exchanges between linears that lower the measured KL divergence, within the same budget.

    Predicted errors add up only roughly; here all linears are quantized at once (each as calibrated
    on the unquantized model) and the KL divergence of the model's predictions is measured. A move
    raises or lowers one linear by a step, lowers others, drawn by the recipe's seed, until the
    budget holds, and raises others while it allows; it is kept if the KL falls.

    Args:
      model, recipe, samples, table: as they were measured; the model is as before on return.
      bank: every linear at every width but 16, see :func:`mmq.sensitivity.measure_errors`. It holds
        the packed weights of all widths at once.
      allocation: where to begin.
      bits_per_weight: the budget, not to be exceeded.
      constraints: as for :func:`allocate`.
      evaluations: how many moves are tried; each costs one pass over the samples.
      progress: called with the number of moves tried and the least KL.
    """
    groups, items = _items(table, "relative", constraints or Constraints())
    budget = budget_bytes(bits_per_weight, allocation.weights)
    widths = [[option.bits for option in item] for item in items]
    sizes = [[option.stored_bytes for option in item] for item in items]
    state = [
        widths[index].index(allocation.bits[group[0].path]) for index, group in enumerate(groups)
    ]
    rng = random.Random(recipe.seed)
    with calibrating(model):
        batches = calibration_batches(model, recipe, samples)
        measure = OutputDivergence(model, architecture_of(model), batches)
        linears = {unit.path: dense_linear(model, unit.path) for unit in table.units}

        def divergence(candidate: Sequence[int]) -> float:
            weights = {
                linears[unit.path]: bank[unit.path, widths[i][c]].effective_weight()
                for i, c in enumerate(candidate)
                if widths[i][c] != UNTOUCHED_BITS
                for unit in groups[i]
            }
            with replaced_weights(weights):
                return measure()

        first = least = divergence(state)
        for tried in range(1, evaluations + 1):
            candidate = _moved(state, sizes, budget, rng)
            if candidate != state:
                found = divergence(candidate)
                if found < least:
                    state, least = candidate, found
            if progress is not None:
                progress(tried, least)
    bits = {unit.path: widths[i][c] for i, c in enumerate(state) for unit in groups[i]}
    return replace(
        allocation,
        bits=bits,
        stored_bytes=sum(sizes[i][c] for i, c in enumerate(state)),
        error=sum(
            _error(unit.choice(bits[unit.path]), allocation.objective, unit.path)
            for unit in table.units
        ),
        divergence=least,
        first_divergence=first,
    )


def _moved(
    state: Sequence[int], sizes: Sequence[Sequence[int]], budget: int, rng: random.Random
) -> list[int]:
    """One step of one item, and the steps of others that the budget then needs or allows."""
    moved = list(state)
    index = rng.randrange(len(moved))
    step = rng.choice((-1, 1))
    if not 0 <= moved[index] + step < len(sizes[index]):
        step = -step
    if not 0 <= moved[index] + step < len(sizes[index]):
        return moved
    moved[index] += step
    others = [i for i in range(len(moved)) if i != index]
    rng.shuffle(others)
    total = sum(size[c] for size, c in zip(sizes, moved, strict=True))
    for i in others:
        if total <= budget:
            break
        if moved[i] > 0:
            total += sizes[i][moved[i] - 1] - sizes[i][moved[i]]
            moved[i] -= 1
    if total > budget:
        return list(state)
    for i in others:
        if moved[i] == state[i] and moved[i] + 1 < len(sizes[i]):
            more = sizes[i][moved[i] + 1] - sizes[i][moved[i]]
            if total + more <= budget:
                total += more
                moved[i] += 1
    return moved


def allocated_recipe(recipe: Recipe, allocation: Allocation) -> Recipe:
    """``recipe`` with one more override per linear, after its own, that sets the width."""
    data: dict[str, Any] = recipe.to_dict()
    widths = [{"match": path, "bits": bits} for path, bits in allocation.bits.items()]
    return parse_recipe({**data, "overrides": [*data.get("overrides", []), *widths]})


def recipe_text(recipe: Recipe, allocation: Allocation, bits_per_weight: float) -> str:
    """The YAML file of ``recipe``, which :func:`allocated_recipe` made, headed by what it is."""
    lines = [
        f"# Widths for at most {bits_per_weight:g} stored bits per weight of these "
        f"{len(allocation.bits)} linears:",
        f"# {allocation.bits_per_weight:.4f} reached, {allocation.stored_bytes} bytes; predicted "
        f"{allocation.objective} error {allocation.error:.6g}"
        + ("." if allocation.exact else ", from a thinned frontier."),
    ]
    if allocation.divergence is not None:
        lines.append(
            f"# Refined: KL divergence on the calibration samples {allocation.first_divergence:.6g}"
            f" before, {allocation.divergence:.6g} after."
        )
    return "\n".join(lines) + "\n" + yaml.safe_dump(recipe.to_dict(), sort_keys=False)
