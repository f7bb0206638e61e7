# SPDX-License-Identifier: Apache-2.0
"""The command line on the built-in models: the main path, and every refusal with exit code 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmq.cli import main
from mmq_evals import tiny

SMALL_RECIPE = """
all: {method: gptq, bits: 4, group_size: 64}
calibration: {samples: 4}
"""


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs the command, checks exit code 2 and a single line on stderr, and returns that line."""
    assert main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmq:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA, quantized by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = folder / "recipe.yaml"
    recipe.write_text(SMALL_RECIPE)
    out = folder / "packed"
    assert main(["quantize", "tiny-llava", "--recipe", str(recipe), "--out", str(out)]) == 0
    return out


def test_inspect_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "blip2-opt-2.7b"]) == 0
    assert "3,744,761,856" in capsys.readouterr().out
    assert main(["inspect", "tiny-llava", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert {"vision", "connector", "language"} <= set(json.dumps(parts).replace('"', " ").split())


def test_quantize_writes_a_packed_folder(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["sample_count"] == 4
    assert len(set(manifest["sample_ids"])) == 4
    dense = (tiny.path("tiny-llava") / "model.safetensors").stat().st_size
    assert (packed / "model.safetensors").stat().st_size < 0.5 * dense


def test_a_study_configuration_is_quantized_with_its_notes(tmp_path: Path) -> None:
    config = tmp_path / "uniform.json"
    config.write_text(
        '[{"model_part": "LLM", "layer_group": "LAST", "layer_type": "MLP", "num_bits": 4},]'
    )
    out = tmp_path / "packed"
    argv = ["--study-config", str(config), "--out", str(out), "--quiet"]
    assert main(["quantize", "tiny-llava", *argv]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    records = manifest["linears"]
    assert {record["component"] for record in records} == {"language"}
    assert {(record["third"], record["layer_type"]) for record in records} == {("end", "mlp")}
    assert any("comma" in note for note in manifest["notes"])


def test_eval_of_the_packed_folder_against_full_precision(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--tasks", "vqa", "--limit", "16"]
    assert main(["eval", "tiny-llava", *limit, "--out", str(tmp_path / "full")]) == 0
    given = ["--out", str(tmp_path / "4bit"), "--reference", str(tmp_path / "full")]
    assert main(["eval", str(packed), *limit, *given]) == 0
    assert "vqa: 16 rows" in capsys.readouterr().out
    result = json.loads((tmp_path / "4bit" / "result.json").read_text())
    agreement = result["tasks"]["vqa"]["against_reference"]["agreement"]
    # The reference's model was found where the reference run says.
    assert agreement["logit KL"]["value"] > 0.0
    assert agreement["flipped answers"]["samples"] == 16
    assert len((tmp_path / "4bit" / "vqa.jsonl").read_text().splitlines()) == 16


def test_doctor_says_what_the_kernels_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["cpu"]["kernels"] == "ok"
    assert diagnosis["cpu"]["isa"] in diagnosis["cpu"]["isas"]


@pytest.mark.parametrize("argv", [("--bits", "9"), ("--bits", "1"), ("--group-size", "0")])
def test_quantize_refuses_bad_numbers(
    argv: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = {"--method": "rtn", "--bits": "4", argv[0]: argv[1]}
    flags = [part for pair in given.items() for part in pair]
    line = refused(capsys, "quantize", "tiny-llava", *flags, "--out", str(out))
    assert argv[1] in line
    assert not out.exists()


def test_quantize_refuses_a_recipe_with_a_misspelt_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("language: {methd: gptq}\n")
    argv = ("quantize", "tiny-llava", "--recipe", str(recipe), "--out", str(tmp_path / "out"))
    assert "did you mean 'method'" in refused(capsys, *argv)


def test_quantize_refuses_a_component_that_matches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("language: {method: rtn}\ncalibration: {samples: 1}\n")
    argv = ("--recipe", str(recipe), "--out", str(tmp_path / "out"))
    assert "language" in refused(capsys, "quantize", "tiny-blip2-retrieval", *argv)
    assert not (tmp_path / "out").exists()


def test_quantize_refuses_two_recipes_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--recipe", "r.yaml", "--method", "rtn", "--bits", "4", "--out", str(tmp_path / "out"))
    assert "expected one of" in refused(capsys, "quantize", "tiny-llava", *argv)


def test_quantize_keeps_an_existing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("kept")
    argv = ("--method", "rtn", "--bits", "4", "--out", str(tmp_path))
    assert "expected a new folder" in refused(capsys, "quantize", "tiny-llava", *argv)
    assert (tmp_path / "precious.txt").read_text() == "kept"


def test_unknown_model_and_unknown_model_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "got 'no-such-model'" in refused(capsys, "eval", "no-such-model")
    folder = tmp_path / "bert"
    shutil.copytree(tiny.path("tiny-llava"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "BertModel" in refused(capsys, "eval", str(folder), "--out", str(tmp_path / "out"))


def test_eval_refuses_missing_data_and_unfit_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    line = refused(capsys, "eval", "tiny-llava", "--tasks", "captioning", *out)
    assert "does not fit" in line
    data = ("--tasks", "vqa", "--data", str(tmp_path / "nowhere"))
    assert "nowhere" in refused(capsys, "eval", "tiny-llava", *data, *out)
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    tensors = broken / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert "model.safetensors" in refused(capsys, "eval", str(broken))
