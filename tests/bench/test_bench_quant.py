# SPDX-License-Identifier: Apache-2.0
"""Times of the quantization ops and of the torch loops: pytest --benchmark-only tests/bench"""

import pytest
from bench.quant_cases import CASES, SHAPES


@pytest.mark.parametrize("side", ["native", "torch"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("op", CASES)
def test_quant(benchmark, op, k, n, side):
    benchmark.group = f"{op} {k} -> {n}"
    run = CASES[op](k, n)[side == "torch"]
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
