# SPDX-License-Identifier: Apache-2.0
"""Whole models on CUDA's kernels: quantized, evaluated, and compared with the CPU's.

The built-in tiny BLIP-2 (captioning, float16) and LLaVA (bfloat16) run with every linear packed.
On the interpreter the tensors outside the kernels are the CPU's, so that what differs between the
two runs is the kernels alone:

- Codes. With inputs from the full-precision model both runs see the same Hessians, and gptq_block
  is bit-identical: so are the codes. AWQ's errors differ by rounding, far less than two exponents
  do, so that the same exponent wins, and what follows is torch's own. With inputs from the rounded
  blocks (the default) packed_gemm's rounding moves a few weights to a neighbouring code.
- Logits. Both kernels sum in fp32 and round once to 16 bits. The yardstick is what 16 bits cost
  anyway: the distance between the CPU's run and the same packed model in float32.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from isas import needs_cuda, running
from torch import Tensor

import mmq
from mmq.linear import QuantLinear
from mmq.recipe import Recipe, parse_recipe
from mmq_evals import tiny
from mmq_evals.calibration import calibration_samples
from mmq_evals.run import evaluate

DTYPES = {"tiny-blip2-caption": torch.float16, "tiny-llava": torch.bfloat16}
SAMPLES = 2  # of calibration
ITEMS = 2  # of each task
EXPONENTS = 2  # AWQ tries 0, 1/2 and 1: its search is most of the interpreter's work


def load(name: str, dtype: torch.dtype | None = None) -> Any:
    return mmq.load(tiny.path(name)).to(DTYPES[name] if dtype is None else dtype)


def recipe(method: str, upstream: str) -> Recipe:
    settings: dict[str, Any] = {"method": method, "bits": 4, "group_size": 64}
    if method == "awq":
        settings["awq"] = {"steps": EXPONENTS}
    return parse_recipe(
        {"all": settings, "calibration": {"samples": SAMPLES, "upstream": upstream}}
    )


def packed_layers(model: Any) -> dict[str, QuantLinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}


def inputs_of(name: str, model: Any) -> list[dict[str, Tensor]]:
    processor = mmq.load_processor(tiny.path(name))
    return [s.inputs for s in calibration_samples(model, processor, count=SAMPLES)]


def quantized(name: str, method: str, upstream: str) -> Any:
    """The model with all linears packed, by whichever kernels are in use."""
    model = load(name)
    manifest = mmq.quantize(model, recipe(method, upstream), inputs_of(name, model))
    assert not any(record.fallback for record in manifest.linears)
    return model


def codes_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of every packed layer."""
    return {
        path: (layer.packed.codes(), layer.scales) for path, layer in packed_layers(model).items()
    }


@torch.no_grad()
def logits_of(name: str, model: Any) -> list[Tensor]:
    return [model(**inputs).logits.float() for inputs in inputs_of(name, model)[:1]]


def predictions(name: str, model: Any, out: Path) -> list[str]:
    """Captions or answers on the first items of every task of the model."""
    result = evaluate(
        *(model, mmq.load_processor(tiny.path(name)), None),
        out_dir=out,
        limit=ITEMS,
        batch_size=ITEMS,
    )
    rows = [
        json.loads(line)
        for task in result["tasks"].values()
        for line in (out / task["rows"]).read_text().splitlines()
    ]
    return [row["prediction"] for row in rows]


def share_of_equal_codes(a: Any, b: Any) -> float:
    assert a.keys() == b.keys()
    equal = sum(int((a[path][0] == b[path][0]).sum()) for path in a)
    return equal / sum(codes.numel() for codes, _ in a.values())


@needs_cuda
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_and_evaluated(isa: str, name: str, method: str, tmp_path: Path) -> None:
    with running(isa):
        model = quantized(name, method, "full")
        codes = codes_of(model)
        found = predictions(name, model, tmp_path / "cuda")
        logits = logits_of(name, model)
        for layer in packed_layers(model).values():
            layer.restore()
    # The same on the CPU: every code and scale is the same bit by bit.
    expected = codes_of(quantized(name, method, "full"))
    for path, (layer_codes, scales) in expected.items():
        assert torch.equal(codes[path][0], layer_codes), path
        assert torch.equal(codes[path][1], scales), path
    # The very model that CUDA's kernels made, on the CPU's.
    for layer in packed_layers(model).values():
        layer.prepare()
    assert found == predictions(name, model, tmp_path / "cpu")
    assert all(text.strip() for text in found)
    exact = logits_of(name, copy.deepcopy(model).float())
    assert_as_close(logits, logits_of(name, model), exact)


def assert_as_close(cuda: list[Tensor], cpu: list[Tensor], exact: list[Tensor]) -> None:
    """Every logit is within twice the largest distance of the CPU's 16-bit run from float32."""
    for got, of_cpu, want in zip(cuda, cpu, exact, strict=True):
        allowed = 2 * float((of_cpu - want).abs().max())
        worst = float((got - want).abs().max())
        assert worst <= allowed, f"logits are off by {worst:.4g}, the CPU's by {allowed / 2:.4g}"
        assert allowed < 0.1 * float(want.std()), "the yardstick itself is coarse"


@needs_cuda
def test_the_default_calibration_moves_few_codes(isa: str) -> None:
    """Inputs from rounded blocks differ in the last bits of 16, and so do Hessians: by 2^-11 of an
    activation, which moves a weight only where it lies that near the middle of two codes."""
    settings = {"method": "gptq", "bits": 4, "group_size": 64}
    language = parse_recipe({"language": settings, "calibration": {"samples": SAMPLES}})

    def codes() -> dict[str, tuple[Tensor, Tensor]]:
        model = load("tiny-llava", torch.float16)
        mmq.quantize(model, language, inputs_of("tiny-llava", model))
        return codes_of(model)

    with running(isa):
        on_cuda = codes()
    share = share_of_equal_codes(on_cuda, codes())
    assert share > 0.97, f"{share:.4f} of the codes are equal"


@needs_cuda
def test_a_wrong_code_is_noticed(isa: str) -> None:
    """The comparison of logits can fail: one layer's first group of codes is corrupted."""
    name = "tiny-llava"
    model = quantized(name, "rtn", "full")
    cpu = logits_of(name, model)
    exact = logits_of(name, copy.deepcopy(model).float())
    layer = packed_layers(model)["model.language_model.layers.1.mlp.down_proj"]
    layer.restore()
    assert layer.qweight is not None
    layer.qweight[:, :8] ^= 0x44444444
    for other in packed_layers(model).values():
        other.restore()
    with running(isa):
        for other in packed_layers(model).values():
            other.prepare()
        wrong = logits_of(name, model)
    with pytest.raises(AssertionError, match="logits are off"):
        assert_as_close(wrong, cpu, exact)
