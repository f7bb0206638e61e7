# SPDX-License-Identifier: Apache-2.0
"""The public names of ``mmq``, and the price of importing them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import torch

import mmq


def test_public_names_exist_and_are_the_functions() -> None:
    assert sorted(mmq.__all__) == mmq.__all__
    assert all(hasattr(mmq, name) for name in mmq.__all__)
    for name in ("rtn", "gptq", "awq", "quantize"):
        importlib.import_module(f"mmq.{name}")  # Must not put the module in the function's place.
        assert callable(getattr(mmq, name))


def test_import_leaves_transformers_out() -> None:
    code = "import sys, mmq; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_on_one_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator)
    inputs = torch.randn(200, 64, generator=generator) * torch.linspace(0.05, 4, 64)
    inputs[:, 1:] += inputs[:, :-1]
    spec = mmq.QuantSpec(3, group_size=16)
    hessian = 2 * inputs.T @ inputs / inputs.shape[0]
    results = {
        "rtn": mmq.rtn(weight, spec, hessian=hessian),
        "gptq": mmq.gptq(weight, hessian, spec),
        "awq": mmq.awq(weight, inputs, spec),
    }
    exact = inputs @ weight.T
    errors = {}
    for name, (packed, report) in results.items():
        layer = mmq.QuantLinear(packed)
        errors[name] = float((layer(inputs) - exact).norm() / exact.norm()) ** 2
        assert report.relative_error is not None
        assert abs(errors[name] / report.relative_error - 1) < 1e-2
    assert errors["gptq"] < errors["rtn"]
    assert errors["awq"] < errors["rtn"]
