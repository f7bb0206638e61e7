# SPDX-License-Identifier: Apache-2.0
"""packed_gemm under pytest-benchmark: `pytest tests/bench --benchmark-only`. Times nothing else."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from gemm_cases import ROWS, SHAPES, Case, aten_int4, ours, torch_fp32

GROUP_SIZE = 128

MAKERS = {
    "torch_fp32": torch_fp32,
    "aten_int4": lambda m, k, n: aten_int4(m, k, n, GROUP_SIZE),
    "exact_4b": lambda m, k, n: ours(m, k, n, GROUP_SIZE, 4, "exact"),
    "int8_4b": lambda m, k, n: ours(m, k, n, GROUP_SIZE, 4, "int8"),
}


@pytest.mark.parametrize("kernel", MAKERS)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_packed_gemm(benchmark, kernel, m, k, n):
    benchmark.group = f"{k}->{n} M={m}"
    case: Case = MAKERS[kernel](m, k, n)
    y = benchmark.pedantic(case.run, rounds=20 if m <= 64 else 5, warmup_rounds=2)
    assert y.shape == torch.Size((m, n))
