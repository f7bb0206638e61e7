# SPDX-License-Identifier: Apache-2.0
"""Loading at size: threads, one copy in memory, and damage that is named whatever it leads to."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from test_memory import mapped
from torch import nn

import mmq
from mmq import hf
from mmq.errors import MmqError
from mmq.linear import QuantLinear
from mmq.models import resolve
from mmq.spec import QuantSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with 37 MB of packed layers, all in its language model."""
    widths = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8}
    model: Any = tiny_models.llava(**widths, num_key_value_heads=8, num_hidden_layers=4)
    spec = QuantSpec(bits=8, group_size=128)
    for unit in resolve(model):
        if unit.component == "language" and unit.block is not None:
            layer = QuantLinear.from_float(model.get_submodule(unit.path), spec)
            model.set_submodule(unit.path, layer)
    return mmq.save(model, tmp_path_factory.mktemp("loading") / "llava")


def layers(count: int) -> nn.ModuleList:
    """Packed layers as a loader leaves them."""
    torch.manual_seed(3)
    spec = QuantSpec(bits=3, group_size=32)
    made = [QuantLinear.from_float(nn.Linear(96, 40 + i), spec) for i in range(count)]
    for layer in made:
        layer.restore()
    return nn.ModuleList(made)


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_threads_prepare_as_one_does(threads: int) -> None:
    together, alone = layers(11), layers(11)
    hf.prepare_layers(together)
    for got, want in zip(together, alone, strict=True):
        assert isinstance(want, QuantLinear)
        want.prepare()
        assert isinstance(got, QuantLinear)
        for name in ("tiles", "affine"):
            assert getattr(want, name).any()
            assert torch.equal(getattr(got, name), getattr(want, name))
    assert torch.get_num_threads() == threads
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads]


def test_the_first_wrong_layer_is_named(threads: int) -> None:
    model = layers(9)
    for index in (7, 4):
        model[index].scales[0, 0] = -1
    with pytest.raises(MmqError, match=r"4.scales: expected finite positive numbers, got -1.0"):
        hf.prepare_layers(model)
    assert torch.get_num_threads() == threads


def growth(folder: Path, monkeypatch: pytest.MonkeyPatch, after: Callable[[Any], None]) -> float:
    """The peak of anonymous memory over the layers that ``mmq.load`` prepares, in packed bytes."""
    prepare, found = hf._prepare, []

    def spy(path: str, layer: QuantLinear) -> None:
        prepare(path, layer)
        after(layer)
        found.append(mapped())

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # What is free in the heap would take up what is to be seen.
    before = mapped()
    with monkeypatch.context() as patch:
        patch.setattr(hf, "_prepare", spy)
        model = mmq.load(folder)
    packed = sum(part.stored_bytes for part in model.modules() if isinstance(part, QuantLinear))
    assert packed > 35e6
    return (max(found) - before) / packed


def test_weights_are_in_memory_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert growth(folder, monkeypatch, lambda layer: None) < 1.5
    kept: list[torch.Tensor] = []  # A loader that keeps what it has read is seen.
    assert growth(folder, monkeypatch, lambda layer: kept.append(layer.packed.qweight)) > 1.8


def test_damage_is_a_changed_file_whatever_it_leads_to(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    copy = tmp_path / "model.safetensors"
    copy.unlink()
    data = (folder / copy.name).read_bytes()
    with safe_open(folder / copy.name, framework="pt") as file:
        names = sorted(file.keys())
    start = 8 + int.from_bytes(data[:8], "little")
    header = data[8:start]

    def offset(end: str) -> int:
        name = next(name for name in names if name.endswith(end))
        entry = header[header.index(f'"{name}"'.encode()) :]
        return start + int(entry.split(b'"data_offsets":[')[1].split(b",")[0])

    places = {
        "codes": offset("up_proj.qweight"),
        "a scale, no number then": offset("up_proj.scales"),
        "a dense tensor": offset("embed_tokens.weight"),
        "the last byte": len(data) - 4,
        "the header's length": 2,
        "a type": 8 + header.index(b'"I32"'),
        "a name": 8 + header.index(b"up_proj"),
        "an offset": 8 + header.index(b"data_offsets") + 16,
    }
    for what, at in places.items():
        changed = bytearray(data)
        changed[at : at + 4] = b"\xff\xff\xff\xff"
        copy.write_bytes(changed)
        with pytest.raises(MmqError) as caught:
            mmq.load(tmp_path)
        assert str(caught.value).startswith(f"{copy}: expected the recorded SHA-256"), what
        assert "\n" not in str(caught.value), what
    copy.write_bytes(data)
    mmq.load(tmp_path)
