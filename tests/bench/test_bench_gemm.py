# SPDX-License-Identifier: Apache-2.0
"""packed_gemm and its peers under pytest-benchmark: `pytest tests/bench --benchmark-only`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import peers
from gemm_cases import Case, Maker, aten_int4, ours, torch_fp32
from gemm_cells import ROWS, TYPICAL

FOUR_BITS = {"group_size": 128, "bits": 4}

MAKERS = {
    "torch_fp32": torch_fp32,
    "aten_int4": Maker(aten_int4, group_size=128),
    "exact_4b": Maker(ours, **FOUR_BITS, mode="exact"),
    "int8_4b": Maker(ours, **FOUR_BITS, mode="int8"),
    "onnxruntime_exact_4b": Maker(peers.onnxruntime, **FOUR_BITS, int8=False),
    "onnxruntime_int8_4b": Maker(peers.onnxruntime, **FOUR_BITS, int8=True),
    "openvino_4b": Maker(peers.openvino, **FOUR_BITS),
    "ggml_q4_0": Maker(peers.ggml_product, name="Q4_0"),
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
