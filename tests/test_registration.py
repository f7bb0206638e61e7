# SPDX-License-Identifier: Apache-2.0
"""``import mmq`` is enough for transformers to read packed folders, and does not import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

import mmq

LOAD = """
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
packed = [m for m in model.modules() if isinstance(m, mmq.QuantLinear)]
assert len(packed) == 21, len(packed)
assert all(m.is_ready for m in packed)
import tiny_models, torch
torch.save(tiny_models.outputs(model.eval()), sys.argv[2])
"""
ORDERS = {
    "mmq first": "import sys, mmq\nassert 'transformers' not in sys.modules\n",
    "transformers first": "import sys, transformers, mmq\n",
    "its quantizers first": "import sys, transformers.quantizers.auto, mmq\n",
    "twice": "import sys, importlib, mmq, mmq.registration\n"
    "mmq.registration.register_with_transformers(); importlib.reload(mmq)\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.randomize(tiny_models.llava(), seed=1)
    mmq.quantize(model, mmq.parse_recipe({"language": {"method": "rtn", "group_size": 16}}))
    return mmq.save(model, tmp_path_factory.mktemp("registration") / "packed")


@pytest.mark.parametrize("order", ORDERS)
def test_from_pretrained_after_import_mmq(folder: Path, tmp_path: Path, order: str) -> None:
    code = ORDERS[order] + LOAD
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "outputs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "outputs.pt")
    want = tiny_models.outputs(mmq.load(folder))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
