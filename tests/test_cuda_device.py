# SPDX-License-Identifier: Apache-2.0
"""Tensors and models that live on a CUDA device, through torch's own dispatch: streams, several
devices, the command line. `make test-gpu` runs this; the other CUDA tests lend CPU tensors to the
kernels and need no device.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_within
from shapes import Problem, problem
from simulated import missing, on_gpu
from test_gptq_block import problem as gptq_problem
from torch import Tensor

import mmq
from mmq.cli import main as mmq_command
from mmq.linear import QuantLinear
from mmq_ext import ops

pytestmark = pytest.mark.skipif(
    not on_gpu() or bool(missing()), reason=missing() or "needs a CUDA device (make test-gpu)"
)
DEVICE = "cuda"


def moved(value: Any, device: str) -> Any:
    """Tensors, also in a dict, on the device; everything else as it is."""
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def on_device(p: Problem, device: str = DEVICE) -> Problem:
    fields = {field.name: getattr(p, field.name) for field in dataclasses.fields(p)}
    return Problem(**moved(fields, device))


def gemm_problem(m: int) -> Problem:
    return problem(m, 300, 1024, 64, 4, bias=True, perm=True).as_cuda()


@pytest.mark.parametrize("m", [1, 16, 70])
def test_products_of_tensors_on_the_device(m: int) -> None:
    p = gemm_problem(m)
    y = on_device(p).run("exact")
    assert y.device.type == DEVICE
    assert_within(y.cpu(), p.reference("exact"), p.cuda_bound())


def test_codes_of_tensors_on_the_device() -> None:
    arguments = gptq_problem(33, 128)
    found = ops.gptq_block(*[moved(argument, DEVICE) for argument in arguments])
    for on_cuda, on_cpu in zip(found, ops.gptq_block(*arguments), strict=True):
        assert torch.equal(on_cuda.cpu(), on_cpu)


@pytest.mark.parametrize("m", [5, 16, 70])
def test_streams_that_overlap(m: int) -> None:
    """Each has a workspace of its own: the same bits as one call alone, in any stream."""
    p = on_device(gemm_problem(m))
    tiles = p.tiles()
    alone = p.run("exact", tiles)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for stream in streams * 8:
        with torch.cuda.stream(stream):
            results.append(p.run("exact", tiles))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result, alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    p = gemm_problem(16)
    y = on_device(p, "cuda:1").run("exact")
    assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda:1")
    assert_within(y.cpu(), p.reference("exact"), p.cuda_bound())


def predictions(folder: Path) -> list[str]:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    return [json.loads(line)["prediction"] for line in lines]


@pytest.mark.parametrize("name", ["tiny-blip2-caption", "tiny-llava"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_command_line(name: str, method: str, tmp_path: Path) -> None:
    """Quantized there, evaluated there and on the CPU: the same answers, and the same folder after
    a way to the device and back. Torch's own products differ, so codes are not compared."""
    packed = tmp_path / "packed"
    settings = ["--method", method, "--bits", "4", "--group-size", "64", "--dtype", "bfloat16"]
    command = ["quantize", name, *settings, "--out", str(packed), "--quiet", "--device", DEVICE]
    assert mmq_command(command) == 0
    for device in (DEVICE, "cpu"):
        out = tmp_path / device
        command = ["eval", str(packed), "--limit", "16", "--out", str(out), "--device", device]
        assert mmq_command(command) == 0
    found, expected = predictions(tmp_path / DEVICE), predictions(tmp_path / "cpu")
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    assert equal >= 0.8 * len(expected), f"{equal} of {len(expected)} answers are equal"

    model, other = mmq.load(packed, device=DEVICE), mmq.load(packed)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers
    assert all(layer.state_dict()["qweight"].device.type == DEVICE for layer in layers)
    there_and_back = model.to("cpu").state_dict()
    for key, tensor in other.state_dict().items():
        assert torch.equal(there_and_back[key], tensor), key
