# SPDX-License-Identifier: Apache-2.0
"""packed_gemm and its peers under pytest-benchmark: `pytest tests/bench --benchmark-only`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import peers
from gemm_cases import Case, aten_int4, ours, torch_fp32
from gemm_cells import ROWS, TYPICAL

GROUP_SIZE = 128

MAKERS = {
    "torch_fp32": torch_fp32,
    "aten_int4": lambda m, k, n: aten_int4(m, k, n, GROUP_SIZE),
    "exact_4b": lambda m, k, n: ours(m, k, n, GROUP_SIZE, 4, "exact"),
    "int8_4b": lambda m, k, n: ours(m, k, n, GROUP_SIZE, 4, "int8"),
    "onnxruntime_exact_4b": lambda m, k, n: peers.onnxruntime(m, k, n, GROUP_SIZE, 4, int8=False),
    "onnxruntime_int8_4b": lambda m, k, n: peers.onnxruntime(m, k, n, GROUP_SIZE, 4, int8=True),
    "openvino_4b": lambda m, k, n: peers.openvino(m, k, n, GROUP_SIZE, 4),
    "ggml_q4_0": lambda m, k, n: peers.ggml_product("Q4_0", m, k, n),
}
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "ggml": "llama-cpp-python"}


@pytest.mark.parametrize("kernel", MAKERS)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("k", "n"), TYPICAL)
def test_packed_gemm(benchmark, kernel, m, k, n):
    package = NEEDS.get(kernel.split("_")[0])
    if package in peers.missing():
        pytest.skip(f"{package} is not installed")
    benchmark.group = f"{k}->{n} M={m}"
    case: Case = MAKERS[kernel](m, k, n)
    y = benchmark.pedantic(case.run, rounds=20 if m <= 64 else 5, warmup_rounds=2)
    if isinstance(y, torch.Tensor):
        assert y.shape == torch.Size((m, n))
