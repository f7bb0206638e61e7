# SPDX-License-Identifier: Apache-2.0
"""Folders: what is written, that it comes back equal, and that damage is refused in one line."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import samples_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mmq
from mmq.cli import main
from mmq.errors import MmqError
from mmq.linear import QuantLinear
from mmq.recipe import parse_recipe
from mmq.stored import narrowed, stored_tensors
from mmq_evals import tiny

SETTINGS = {"method": "gptq", "bits": 4, "group_size": 16}
RECIPES: dict[str, dict[str, Any]] = {
    "blip2-opt": {"all": {**SETTINGS, "method": "awq", "bits": 3}},
    "blip2-t5": {"all": {"method": "rtn", "bits": 5, "group_size": -1, "zero": "symmetric"}},
    "blip2-retrieval": {
        "all": {"method": "uniform", "bits": 8},
        "heads": ["itm_head"],
        "overrides": [{"match": "itm_head", "bits": 2}],
    },
    "llava": {
        "all": {**SETTINGS, "gptq": {"order": "act"}},
        "overrides": [
            {"component": "language", "third": third, "bits": bits}
            for third, bits in (("front", 2), ("middle", 6), ("end", 7))
        ],
        "heads": ["lm_head", "*linear_1"],
    },
}


def quantized(name: str) -> Any:
    model = tiny_models.randomize(tiny_models.TINY[name](), seed=1)
    with torch.no_grad():  # As a model that was stored in 16 bits and loaded in 32.
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    mmq.quantize(model, parse_recipe(RECIPES[name]), samples_for(model, 3))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for name in RECIPES:
        model = quantized(name)
        found[name] = (model, mmq.save(model, root / name))
    return found


def copy_folder(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_loaded_logits_equal_those_in_memory(saved: Any, name: str) -> None:
    model, folder = saved[name]
    loaded = mmq.load(folder)
    assert not loaded.training
    got, want = tiny_models.outputs(loaded), tiny_models.outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    packed = {path for path, m in loaded.named_modules() if isinstance(m, QuantLinear)}
    assert packed == {record.path for record in model.mmq_manifest.linears}
    assert all(m.is_ready for m in loaded.modules() if isinstance(m, QuantLinear))
    assert loaded.mmq_manifest == model.mmq_manifest
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_reported_bytes_are_those_of_the_file(saved: Any, name: str) -> None:
    model, folder = saved[name]
    data = (folder / "model.safetensors").read_bytes()
    payload = len(data) - 8 - int.from_bytes(data[:8], "little")
    assert payload == model.mmq_manifest.payload_bytes
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(stored_tensors(model))


def test_save_load_save_writes_equal_files(saved: Any, tmp_path: Path) -> None:
    _, folder = saved["llava"]
    again = mmq.save(mmq.load(folder), tmp_path / "again")
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_narrowing_is_exact() -> None:
    half = torch.randn(9).half().float()
    assert narrowed(half).dtype == torch.float16
    wide = torch.tensor([1e30, 2.0**-100])
    assert narrowed(wide.bfloat16().float()).dtype == torch.bfloat16
    odd = torch.tensor([1.0 + 2.0**-20, 1.0])
    assert narrowed(odd) is odd
    for tensor in (half, wide.bfloat16().float(), odd):
        assert torch.equal(narrowed(tensor).float(), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["blip2-t5", "blip2-retrieval"])
def test_other_compute_dtypes_keep_codes_and_scales(saved: Any, name: str, dtype: Any) -> None:
    model, folder = saved[name]
    loaded = mmq.load(folder, dtype=dtype)
    a = dict(model.named_modules())
    for path, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            tensors, other = module.packed.tensors(), a[path].packed.tensors()
            assert all(torch.equal(tensors[key], other[key]) for key in other)
            assert all(tensors[key].dtype == other[key].dtype for key in other)
    kept = dtype == torch.float16  # transformers keeps T5's wo and the Q-Former in float32 then.
    for path, module in loaded.named_modules():
        if isinstance(module, QuantLinear):
            wide = kept and not {"qformer", "wo"}.isdisjoint(path.split("."))
            assert module.weight.dtype == (torch.float32 if wide else dtype), path
    for got, want in zip(tiny_models.outputs(loaded), tiny_models.outputs(model), strict=True):
        assert float((got.float() - want).norm() / want.norm()) < 0.1


@pytest.mark.parametrize(
    ("name", "dtype"), [("blip2-retrieval", torch.float16), ("llava", torch.bfloat16)]
)
def test_half_precision_models_come_back_equal(tmp_path: Path, name: str, dtype: Any) -> None:
    model = tiny_models.randomize(tiny_models.TINY[name](), seed=1)
    dense = mmq.load(mmq.save(model, tmp_path / "dense"), dtype=dtype)
    mmq.quantize(dense, parse_recipe({"all": {**SETTINGS, "method": "rtn"}}))
    loaded = mmq.load(mmq.save(dense, tmp_path / "packed"))
    assert loaded.config.dtype == dtype
    for got, want in zip(tiny_models.outputs(loaded), tiny_models.outputs(dense), strict=True):
        assert torch.equal(got, want)


def test_dense_linears_are_never_allocated(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved["llava"]
    real = nn.Linear.__init__
    devices: list[str] = []

    def spy(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        devices.append(self.weight.device.type)

    monkeypatch.setattr(nn.Linear, "__init__", spy)
    mmq.load(folder)
    assert set(devices) == {"meta"}


def test_untied_head_round_trip(tmp_path: Path) -> None:
    model: Any = tiny_models.randomize(tiny_models.blip2_opt(), seed=1)
    recipe = {"all": {**SETTINGS, "method": "rtn"}, "heads": ["*lm_head"], "untie_heads": True}
    mmq.quantize(model, parse_recipe(recipe))
    loaded = mmq.load(mmq.save(model, tmp_path / "untied"))
    assert isinstance(loaded.language_model.lm_head, QuantLinear)
    assert torch.equal(tiny_models.outputs(loaded)[0], tiny_models.outputs(model)[0])


def test_generation_of_a_loaded_model(saved: Any) -> None:
    model, folder = saved["llava"]
    sample = samples_for(model, 1)[0]
    arguments = {"max_new_tokens": 4, "do_sample": False}
    got = mmq.load(folder).generate(**sample, **arguments)
    assert torch.equal(got, model.generate(**sample, **arguments))


def test_dense_folders(tmp_path: Path) -> None:
    model: Any = tiny_models.randomize(tiny_models.llava(), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    expected = tiny_models.outputs(model)[0]
    model.half().save_pretrained(tmp_path / "dense")
    loaded = mmq.load(tmp_path / "dense")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(tiny_models.outputs(loaded)[0], expected)
    again = mmq.load(mmq.save(loaded, tmp_path / "again"))
    assert torch.equal(tiny_models.outputs(again)[0], tiny_models.outputs(loaded)[0])
    assert mmq.load_processor(tmp_path / "dense") is None


def test_existing_folders_are_kept_unless_told(saved: Any, tmp_path: Path) -> None:
    model, _ = saved["llava"]
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    with pytest.raises(MmqError, match="expected a new folder"):
        mmq.save(model, target)
    assert (target / "mine.txt").read_text() == "kept"
    mmq.save(model, target, overwrite=True)
    assert not (target / "mine.txt").exists()
    with pytest.raises(MmqError, match="expected an existing parent folder"):
        mmq.save(model, tmp_path / "no" / "where")
    with pytest.raises(MmqError, match="expected a model of class"):
        mmq.save(nn.Linear(2, 2), tmp_path / "linear")


def test_nothing_half_written_is_left(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mmq.save(saved["llava"][0], tmp_path / "out", processor=Broken())
    assert list(tmp_path.iterdir()) == []


def refused(folder: Path, message: str) -> None:
    with pytest.raises(MmqError, match=message) as caught:
        mmq.load(folder)
    assert "\n" not in str(caught.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replaces (or with None removes) tensors, and forgets the checksum."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "checksums.json").unlink()


def renew_checksum(folder: Path) -> None:
    """As a writer with a defect would record it."""
    path = folder / "model.safetensors"
    sums = {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
    (folder / "checksums.json").write_text(json.dumps({path.name: sums}))


LINEAR = "model.language_model.layers.0.mlp.up_proj"


def test_missing_parts_are_named(saved: Any, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "expected a folder with config.json, got none")
    folder = copy_folder(saved["llava"][1], tmp_path / "a")
    (folder / "model.safetensors").unlink()
    refused(folder, "expected a file model.safetensors, got none")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: expected readable JSON")


def test_truncated_and_corrupted_files(saved: Any, tmp_path: Path) -> None:
    folder = copy_folder(saved["llava"][1], tmp_path / "a")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    refused(folder, f"expected {len(data)} bytes, got {len(data) - 5}")
    flipped = bytearray(data)
    flipped[-7] ^= 1
    path.write_bytes(flipped)
    refused(folder, "expected the recorded SHA-256")
    path.write_bytes(bytes(8) + data[8:])  # A header that cannot be read is a changed file first.
    refused(folder, "expected the recorded SHA-256")
    (folder / "checksums.json").unlink()
    path.write_bytes(data[: len(data) // 2])
    refused(folder, "expected a safetensors file")
    path.write_bytes(b"nonsense")
    refused(folder, "expected a safetensors file")


def test_wrong_tensors_without_a_checksum(saved: Any, tmp_path: Path) -> None:
    source = saved["llava"][1]
    tensors = load_file(source / "model.safetensors")
    scales = tensors[f"{LINEAR}.scales"].clone()
    scales[0, 0] = float("nan")
    cases: list[tuple[dict[str, Any], str]] = [
        ({f"{LINEAR}.qweight": None}, f"expected a tensor {LINEAR}.qweight, got none"),
        ({"model.language_model.norm.weight": None}, "expected a tensor model.language_model.norm"),
        ({"stranger": torch.zeros(2)}, "expected the model's tensors only, got stranger"),
        ({f"{LINEAR}.scales": scales}, "up_proj.scales: expected finite positive numbers"),
        ({f"{LINEAR}.scales": scales.float()}, "of type F16, got F32"),
        ({f"{LINEAR}.qweight": torch.zeros(3, 3, dtype=torch.int32)}, r"of shape .* got \[3, 3\]"),
        ({f"{LINEAR}.perm": torch.zeros(32, dtype=torch.int32)}, "expected a permutation"),
    ]
    for index, (changes, message) in enumerate(cases):
        folder = copy_folder(source, tmp_path / str(index))
        edit_tensors(folder, **changes)
        refused(folder, message)


@pytest.mark.parametrize("name", ["qweight", "qzeros"])
def test_bits_after_the_last_code_are_refused(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = saved["blip2-opt"][1]
    tensors = load_file(source / "model.safetensors")
    table = json.loads((source / "config.json").read_text())["quantization_config"]["modules"]
    # A stream with bits to spare in its last word, whose top bit then belongs to no code.
    groups = {path: -(-m["k"] // m["group_size"]) for path, m in table.items()}
    codes = {path: m["k"] if name == "qweight" else groups[path] for path, m in table.items()}
    path = next(path for path, m in table.items() if codes[path] * m["bits"] % 32)
    words = tensors[f"{path}.{name}"].clone()
    words[1, -1] |= -(2**31)
    folder = copy_folder(source, tmp_path / "a")
    edit_tensors(folder, **{f"{path}.{name}": words})
    renew_checksum(folder)
    message = f"{path}.{name}: expected zero bits after code {codes[path] - 1} of each row, got set"
    refused(folder, message)
    assert main(["eval", str(copy_processor(folder))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "expected zero bits" in line] == lines[-1:]


def copy_processor(folder: Path) -> Path:
    """The command line wants a processor beside the model; any serves where loading fails."""
    source = tiny.path("tiny-blip2-caption")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_mislabelled_files(saved: Any, tmp_path: Path) -> None:
    source = saved["llava"][1]
    modules = json.loads((source / "config.json").read_text())["quantization_config"]["modules"]
    wrong_bits = {**modules, LINEAR: {**modules[LINEAR], "bits": 3}}
    wrong_shape = {**modules, LINEAR: {**modules[LINEAR], "k": 33}}
    dense = {path: layout for path, layout in modules.items() if path != LINEAR}
    other = {**dense, "model.language_model.layers.9.mlp.up_proj": modules[LINEAR]}
    for index, (table, message) in enumerate(
        (
            (wrong_bits, r"up_proj.qweight of shape"),
            (wrong_shape, r"expected shape \[48, 32\].*got \[48, 33\].*another model"),
            (dense, f"expected a tensor {LINEAR}.weight, got none"),
            (other, "layers.9.mlp.up_proj: expected a linear of this model, got none"),
            ({}, "expected a table of packed modules"),
        )
    ):
        folder = copy_folder(source, tmp_path / str(index))
        edit_config(folder, modules=table)
        refused(folder, message)
    folder = copy_folder(source, tmp_path / "config")
    opt = json.loads((saved["blip2-opt"][1] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(opt))
    refused(folder, "model.safetensors: expected a tensor")


@pytest.mark.parametrize(
    ("file", "keys", "value", "message"),
    [
        ("config.json", ("text_config", "pad_token_id"), [], "config.json: expected a LlavaConfig"),
        (
            "config.json",
            ("vision_config", "patch_size"),
            "x",
            "config.json: expected a LlavaConfig",
        ),
        ("config.json", ("text_config", "model_type"), {}, "config.json: expected a LlavaConfig"),
        ("config.json", ("text_config", "num_attention_heads"), 0, "expected a LlavaConfig"),
        ("config.json", ("quantization_config",), "mmq", "expected a JSON object, got str"),
        (
            "config.json",
            ("quantization_config", "modules", LINEAR),
            "x",
            "up_proj: expected a table",
        ),
        ("config.json", ("quantization_config", "modules", LINEAR, "bits"), "4", "expected int"),
        ("config.json", ("quantization_config", "modules", LINEAR, "zero"), "x", "that mmq writes"),
        ("generation_config.json", ("pad_token_id",), "x", "expected a LlavaForConditional"),
        ("manifest.json", ("manifest_version",), 9, "expected manifest version 1, got 9"),
        (
            "manifest.json",
            ("linears",),
            [{}],
            r"linears\[0\]: expected the keys path",
        ),
        ("manifest.json", ("linears",), {}, "manifest.json: linears: expected list, got {}"),
        ("manifest.json", ("linears", 1, "bits"), "4", r"linears\[1\].bits: expected int, got '4'"),
        ("manifest.json", ("linears", 0, "perm"), 1, "perm: expected bool, got 1"),
        ("manifest.json", ("linears", 0, "alpha"), [], r"alpha: expected float, got \[\]"),
        ("manifest.json", ("components", "vision", "packed"), None, "vision.packed: expected int"),
        ("manifest.json", ("surprise",), 1, r"missing or unknown: \['surprise'\]"),
        ("manifest.json", ("seconds",), True, "seconds: expected float, got True"),
        ("checksums.json", ("model.safetensors",), None, "expected bytes and sha256"),
    ],
)
def test_json_of_the_wrong_kind(
    saved: Any, tmp_path: Path, file: str, keys: tuple[str | int, ...], value: Any, message: str
) -> None:
    folder = copy_folder(saved["llava"][1], tmp_path / "a")
    data = part = json.loads((folder / file).read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (folder / file).write_text(json.dumps(data))
    refused(folder, message)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "manifest.json", "checksums.json"]
)
def test_truncated_json(saved: Any, tmp_path: Path, file: str) -> None:
    folder = copy_folder(saved["llava"][1], tmp_path / "a")
    text = (folder / file).read_text()
    for size in (0, len(text) // 2, len(text) - 3):
        (folder / file).write_text(text[:size])
        refused(folder, f"{file}: expected (a )?readable JSON")


def test_future_versions_and_other_methods(saved: Any, tmp_path: Path) -> None:
    folder = copy_folder(saved["llava"][1], tmp_path / "a")
    edit_config(folder, format_version=2)
    refused(folder, "expected format version 1 or older, got 2; a newer mmq wrote it")
    edit_config(folder, format_version="1")
    refused(folder, "expected a format version of 1 or more, got '1'")
    edit_config(folder, format_version=1, surprise=1)
    refused(folder, r"expected keys of version 1, got \['surprise'\] too")
    edit_config(folder, quant_method="gptq")
    refused(folder, "expected quant_method mmq, got 'gptq'")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "expected a model of class .*, got LlamaForCausalLM")
