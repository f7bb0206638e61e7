# SPDX-License-Identifier: Apache-2.0
"""Bad input, one test per kind: one line that names it, exit code 2, and nothing half-written.

Every command writes into a folder of its own, which must be as it was before; what lies beside it
(a temporary folder of a writer) must be gone, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_models
import pytest
import torch
from safetensors.torch import load_file, save_file

import mmq
from mmq.cli import main

SETTINGS = "{method: gptq, bits: 4, group_size: 8}"
RECIPE = f"all: {SETTINGS}\ncalibration: {{samples: 2}}\n"
FC1 = "vision_model.encoder.layers.1.mlp.fc1"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense captioner, and a packed one of the same and of another class."""
    root = tmp_path_factory.mktemp("models")
    model, processor = eval_models.blip2("caption")
    mmq.save(model, root / "dense", processor)
    for name, (source, beside) in {
        "packed": (model, processor),
        "other": eval_models.llava(),
    }.items():
        mmq.quantize(source, mmq.Recipe.simple("rtn", 4, group_size=8))
        mmq.save(source, root / name, beside)
    return root


@pytest.fixture
def work(folders: Path, tmp_path: Path) -> Path:
    """Copies of the models, a dataset, a recipe; commands write to ``out`` below it."""
    for folder in folders.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    eval_models.karpathy_coco(tmp_path / "coco")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def listing(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def quantize(work: Path, *more: str) -> list[str]:
    given = ["quantize", str(work / "dense"), "--data", str(work / "coco"), "--quiet"]
    given += ["--out", str(work / "out"), "--overwrite"]
    return given + (list(more) or ["--recipe", str(work / "recipe.yaml")])


def evaluate(work: Path, model: str = "packed") -> list[str]:
    given = ["--data", str(work / "coco"), "--out", str(work / "out")]
    return ["eval", str(work / model), *given, "--tasks", "captioning"]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def set_weight(work: Path, value: float) -> None:
    path = work / "dense" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{FC1}.weight"][2, 3] = value
    save_file(tensors, path, metadata={"format": "pt"})
    (work / "dense" / "checksums.json").unlink()


def change_recipe(work: Path, text: str) -> None:
    (work / "recipe.yaml").write_text(text)


def break_images(work: Path) -> None:
    for path in (work / "coco" / "val2014").iterdir():
        path.write_bytes(path.read_bytes()[:40])


def no_training_images(data: Any) -> None:
    data["images"] = [image for image in data["images"] if image["split"] == "test"]


def other_model(work: Path) -> None:
    """The packed folder of another class keeps its tensors and takes this one's configuration."""
    shutil.copy(work / "packed" / "config.json", work / "other" / "config.json")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(work / "packed" / name, work / "other" / name)


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], list[str]], str]] = {
    "unknown model type": (
        lambda w: edit_json(
            w / "dense" / "config.json", lambda c: c.update(architectures=["BertModel"])
        ),
        quantize,
        "BertModel",
    ),
    "component without a linear": (
        lambda w: change_recipe(w, RECIPE + f"overrides: [{{match: '*.nothing', {SETTINGS[1:]}]\n"),
        quantize,
        "expected at least one linear, it selects none",
    ),
    "9 bits": (lambda w: None, lambda w: quantize(w, "--method", "rtn", "--bits", "9"), "9"),
    "1 bit": (
        lambda w: change_recipe(w, RECIPE.replace("bits: 4", "bits: 1")),
        quantize,
        "all.bits: expected 2 to 8, or 16",
    ),
    "group size 0": (
        lambda w: change_recipe(w, RECIPE.replace("group_size: 8", "group_size: 0")),
        quantize,
        "group_size",
    ),
    "misspelt key": (
        lambda w: change_recipe(w, RECIPE.replace("bits", "bist")),
        quantize,
        "did you mean 'bits'",
    ),
    "NaN weight": (
        lambda w: set_weight(w, torch.nan),
        quantize,
        f"{FC1}: expected finite weights",
    ),
    "infinite weight": (
        lambda w: set_weight(w, torch.inf),
        quantize,
        f"{FC1}: expected finite weights",
    ),
    "NaN weight, evaluated": (
        lambda w: set_weight(w, torch.nan),
        lambda w: evaluate(w, "dense"),
        FC1,
    ),
    "no calibration samples": (
        lambda w: change_recipe(w, RECIPE.replace("samples: 2", "samples: 0")),
        quantize,
        "calibration.samples",
    ),
    "empty calibration split": (
        lambda w: edit_json(w / "coco" / "dataset_coco.json", no_training_images),
        quantize,
        "training",
    ),
    "calibration image that does not decode": (break_images, quantize, "does not decode"),
    "missing calibration folder": (
        lambda w: shutil.rmtree(w / "coco"),
        quantize,
        "coco",
    ),
    "missing annotations": (
        lambda w: (w / "coco" / "dataset_coco.json").unlink(),
        evaluate,
        "dataset_coco.json",
    ),
    "broken annotations": (
        lambda w: (w / "coco" / "dataset_coco.json").write_text('{"images": ['),
        evaluate,
        "dataset_coco.json",
    ),
    "checkpoint of another model": (other_model, lambda w: evaluate(w, "other"), "another model"),
    "truncated checkpoint": (
        lambda w: (w / "packed" / "model.safetensors").write_bytes(
            (w / "packed" / "model.safetensors").read_bytes()[:-9]
        ),
        evaluate,
        "model.safetensors: expected",
    ),
    "future version": (
        lambda w: edit_json(
            w / "packed" / "config.json",
            lambda c: c["quantization_config"].update(format_version=7),
        ),
        evaluate,
        "format version 1 or older, got 7",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, command, message = CASES[case]
    spoil(work)
    argv = command(work)
    if argv[0] == "quantize":  # an earlier result must survive, even if it may be replaced
        (work / "out").mkdir()
        (work / "out" / "precious.txt").write_text("kept")
    before = listing(work)
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("mmq: error: ")]
    assert errors == lines[-1:], lines
    assert message in errors[0]
    assert not any("Traceback" in line for line in lines)
    assert listing(work) == before


def test_the_same_commands_work_unspoilt(work: Path) -> None:
    """What the cases spoil is the only thing wrong with them."""
    assert main(quantize(work)) == 0
    assert (work / "out" / "model.safetensors").is_file()
    shutil.rmtree(work / "out")
    assert main(evaluate(work)) == 0
    assert (work / "out" / "result.json").is_file()
