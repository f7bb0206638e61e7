# SPDX-License-Identifier: Apache-2.0
"""How far a ranked AWQ search is from the exhaustive one: python tests/bench/awq_regret.py

Every way of ranking names three exponents (and 0), which are compared exactly; its regret is what
the best of them exceeds the least error of all 21 by. ``rank R``: H replaced by a matrix of rank R
plus a diagonal, but for the largest rows (mmq.ranking); rank 32 is what the search does.
``rows 1/16``: H itself on every 16th row, in the order of the rows' norms, from a seeded first one.
Problems: weights x inputs x bits x seeds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import torch
from torch import Tensor

from mmq.awq import error_factor, scale_candidates
from mmq.hessian import stats_of
from mmq.options import AwqOptions
from mmq.ranking import finalists, largest_rows, stand_in
from mmq_ext import ops

WEIGHTS = ("gaussian", "unequal rows", "heavy tails", "outlier rows")
INPUTS = ("even", "skewed", "outlier channels", "shared directions", "power law")
RANKS = (0, 32, 64)
GROUP = 128


def weights_of(kind: str, n: int, k: int) -> Tensor:
    w = 0.02 * torch.randn(n, k)
    if kind == "unequal rows":
        w *= torch.exp(0.7 * torch.randn(n, 1))
    elif kind == "heavy tails":
        w *= torch.distributions.Chi2(4.0).sample((n, k)).div_(4).rsqrt_()
    elif kind == "outlier rows":
        w[torch.randperm(n)[:5]] *= 30
    return w


def inputs_of(kind: str, tokens: int, k: int) -> Tensor:
    spread = {"even": 0.1, "outlier channels": 1.0}.get(kind, 0.6)
    x = torch.randn(tokens, k) * torch.exp(spread * torch.randn(k))
    if kind == "outlier channels":
        x[:, :3] *= 20
    elif kind == "shared directions":
        x += 1.5 * torch.randn(tokens, 8) @ torch.randn(8, k) + torch.randn(k)
    elif kind == "power law":
        turn, _ = torch.linalg.qr(torch.randn(k, k))
        x = (x * torch.arange(1, k + 1).pow(-0.5)) @ turn * torch.exp(0.5 * torch.randn(k))
    return x @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)


def regrets(w: Tensor, x: Tensor, bits: int, seed: int) -> dict[str, float]:
    stats = stats_of(x)
    factor = error_factor(stats)
    _, candidates = scale_candidates(stats.mean_abs, AwqOptions())

    def errors(rows: Tensor, by: Tensor) -> Tensor:
        return ops.awq_errors(rows, candidates, by, bits=bits, group_size=GROUP)

    def ranked_with(near: Tensor) -> list[float]:
        largest = largest_rows([w])[0]
        return (errors(w, near) - errors(largest, near) + errors(largest, factor)).tolist()

    exact = errors(w, factor).tolist()
    order = torch.argsort(w.square().sum(dim=1))
    ranked = {f"rank {r}": ranked_with(stand_in(factor, r, seed)) for r in RANKS}
    ranked["rows 1/16"] = errors(w[order[seed % 16 :: 16]], factor).tolist()
    return {
        name: min(exact[i] for i in finalists(found)) / min(exact) - 1
        for name, found in ranked.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    problems = itertools.product(WEIGHTS, INPUTS, (3, 4), range(args.seeds))
    for weights, inputs, bits, seed in problems:
        torch.manual_seed(seed)
        x = inputs_of(inputs, 2 * args.k, args.k)
        w = weights_of(weights, args.n, args.k)
        for name, regret in regrets(w, x, bits, seed).items():
            found.setdefault(name, []).append(regret)
    for name, values in found.items():
        above = sum(value > 1e-3 for value in values)
        sys.stdout.write(
            f"{name:<10} worst {max(values):.3%}, mean {sum(values) / len(values):.4%}, "
            f"above 0.1 %: {above} of {len(values)}\n"
        )
    sys.stdout.write(json.dumps(vars(args) | {"regrets": found}) + "\n")


if __name__ == "__main__":
    main()
