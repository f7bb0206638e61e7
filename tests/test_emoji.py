# SPDX-License-Identifier: Apache-2.0
"""The emoji retrieval set, from packages made here in the form of the published ones."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmq_evals.data import emoji, layouts
from mmq_evals.data.images import read_image
from mmq_evals.errors import EvalError

EMOJI = {"1f600": "grinning face", "2764-fe0f": "red heart", "1f1ea-1f1ec": "flag: Egypt"}


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def drawn(color: tuple[int, int, int, int], form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (80, 80), color).save(buffer, form)
    return buffer.getvalue()


def text_of(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-"))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    images = {"google": (255, 0, 0, 255), "twitter": (0, 255, 0, 255), "fluent": (0, 0, 255, 0)}
    for key, color in images.items():
        package, inside, suffix, _, _ = emoji.RENDERINGS[key]
        # The third package leaves variation selectors out.
        codes = [code.replace("-fe0f", "") if key == "fluent" else code for code in EMOJI]
        content = drawn(color, "WEBP" if suffix == ".webp" else "PNG")
        files = {f"{inside}{code}{suffix}": content for code in codes}
        if key == "google":
            rows = [
                {"unified": code.upper(), "category": "Flags" if "1f1ea" in code else "Smileys"}
                for code in [*EMOJI, "1f9ff"]
            ]
            files["package/emoji.json"] = json.dumps(rows).encode()
        pack(folder / package, files)
    for (package, key), codes in zip(
        emoji.NAMES.items(), (["1f600", "2764-fe0f"], ["1f1ea-1f1ec"]), strict=True
    ):
        names = {text_of(code): {"tts": [EMOJI[code]], "default": ["x"]} for code in codes}
        data = json.dumps({key: {"annotations": names}}).encode()
        pack(folder / package, {f"package/{key}/en/annotations.json": data})
    return folder


def test_the_third_rendering_is_held_out(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    assert emoji.build(packages, out) == {"emoji": 3, "without flags": 2}
    dataset = layouts.retrieval(out)
    assert (dataset.name, dataset.split) == ("emoji-karpathy", "test")
    assert {item.captions[0] for item in dataset.items} == set(EMOJI.values())
    assert all(item.id.startswith("fluent-") for item in dataset.items)
    image = read_image("x", dataset.items[0].image)
    # The transparent image lies on white.
    assert (image.size, image.getpixel((5, 5))) == ((64, 64), (255, 255, 255))
    train = layouts.captions(out, "train").items
    assert len(train) == 6
    assert {read_image("x", item.image).getpixel((5, 5)) for item in train} == {
        (255, 0, 0),
        (0, 255, 0),
    }
    plain = layouts.retrieval(out / "no-flags").items
    assert {item.captions[0] for item in plain} == {"grinning face", "red heart"}
    assert read_image("x", plain[0].image).size == (64, 64)
    assert (
        "CC BY 4.0" in json.loads((out / "dataset_emoji.json").read_text())["licences"]["twitter"]
    )


def test_missing_and_broken_packages(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert emoji.main([str(packages), str(tmp_path / "out")]) == 0
    assert "3 emoji, 2 without flags" in capsys.readouterr().out
    pack(packages / emoji.INDEX, {"package/emoji.json": b"[{}]"})
    with pytest.raises(EvalError, match=r"emoji.json is out of form: KeyError"):
        emoji.build(packages, tmp_path / "out")
    (packages / emoji.INDEX).write_bytes(b"no archive")
    with pytest.raises(EvalError, match="expected the npm package"):
        emoji.build(packages, tmp_path / "out")
    (packages / next(iter(emoji.NAMES))).unlink()
    assert emoji.main([str(packages), str(tmp_path / "out")]) == 2
    assert "make emoji packs it" in capsys.readouterr().err
    assert emoji.main([]) == 2
