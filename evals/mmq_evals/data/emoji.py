# SPDX-License-Identifier: Apache-2.0
"""Emoji in three renderings with their English names, as a retrieval set with one held out.

    make emoji        packs five npm packages and runs this module on them; nothing is shipped

An emoji of two renderings (Google, Twitter) is training data; the test asks for the same emoji as
Microsoft drew them. The folder has the layout of a Karpathy file: ``dataset_emoji.json`` beside
``images/``, and ``no-flags/dataset_emoji.json`` without the flags, whose names are the countries'.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from mmq_evals.errors import EvalError

PIXELS = 64
# Package of names: the key of its content. Flags and families stand in the derived ones.
NAMES = {
    "cldr-annotations-modern-45.0.0.tgz": "annotations",
    "cldr-annotations-derived-modern-45.0.0.tgz": "annotationsDerived",
}
INDEX = "emoji-datasource-google-16.0.0.tgz"
# Rendering: package, folder of its images, their suffix, licence, split.
RENDERINGS: dict[str, tuple[str, str, str, str, str]] = {
    "google": (INDEX, "package/img/google/64/", ".png", "Apache-2.0", "train"),
    "twitter": (
        "emoji-datasource-twitter-16.0.0.tgz",
        "package/img/twitter/64/",
        ".png",
        "CC BY 4.0, Twitter, Inc.",
        "train",
    ),
    "fluent": (
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "package/assets/",
        ".webp",
        "MIT, Microsoft",
        "test",
    ),
}


def build(packages: Path, out: Path) -> dict[str, int]:
    """Write the retrieval set; returns the number of emoji with and without flags.

    Args:
        packages: folder of the five packages, as ``npm pack`` names them.
        out: folder to write, made if missing.

    Raises:
        EvalError: a package is missing or is not what it was when this was written, or no emoji
            has a name and all renderings.
    """
    names = _names(packages)
    codes = _codes(packages)
    images = {key: _images(packages, key) for key in RENDERINGS}
    kept = [
        (code, flag)
        for code, flag in sorted(codes.items())
        if _plain(code) in names and all(_plain(code) in images[key] for key in RENDERINGS)
    ]
    if not kept:
        raise EvalError(f"{packages}: expected emoji with a name and three renderings, got none")
    for key in RENDERINGS:
        folder = out / "images" / key
        folder.mkdir(parents=True, exist_ok=True)
        for code, _ in kept:
            _save(images[key][_plain(code)], folder / f"{code}.png")
    for folder, chosen in ((out, kept), (out / "no-flags", [pair for pair in kept if not pair[1]])):
        folder.mkdir(exist_ok=True)
        prefix = "images" if folder == out else "../images"
        rows = [
            {
                "filepath": f"{prefix}/{key}",
                "filename": f"{code}.png",
                "cocoid": f"{key}-{code}",
                "split": RENDERINGS[key][4],
                "sentences": [{"raw": names[_plain(code)]}],
            }
            for key in RENDERINGS
            for code, _ in chosen
        ]
        text = json.dumps({"dataset": "emoji", "licences": _licences(), "images": rows})
        (folder / "dataset_emoji.json").write_text(text + "\n", encoding="ascii")
    return {"emoji": len(kept), "without flags": sum(not flag for _, flag in kept)}


def _licences() -> dict[str, str]:
    drawn = {key: f"{row[0]}: {row[3]}" for key, row in RENDERINGS.items()}
    return {**drawn, "names": f"{', '.join(NAMES)}: Unicode"}


def _plain(code: str) -> str:
    """The code points without variation selectors, which packages use differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _names(packages: Path) -> dict[str, str]:
    """Short English name by plain code."""
    names: dict[str, str] = {}
    for package, key in NAMES.items():
        data = _json(packages, package, f"package/{key}/en/annotations.json")
        try:
            for text, row in data[key]["annotations"].items():
                if "tts" in row:
                    names[_plain("-".join(f"{ord(c):04x}" for c in text))] = row["tts"][0]
        except (KeyError, TypeError, AttributeError) as error:
            raise EvalError(f"{packages / package}: names are out of form: {error!r}") from None
    return names


def _codes(packages: Path) -> dict[str, bool]:
    """Code of every base emoji, and whether it is a flag."""
    rows = _json(packages, INDEX, "package/emoji.json")
    try:
        return {row["unified"].lower(): row["category"] == "Flags" for row in rows}
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{packages / INDEX}: emoji.json is out of form: {error!r}") from None


def _images(packages: Path, rendering: str) -> dict[str, bytes]:
    """Encoded image by plain code."""
    package, folder, suffix, _, _ = RENDERINGS[rendering]
    images: dict[str, bytes] = {}
    with _opened(packages, package) as archive:
        for member in archive:
            if member.isfile() and member.name.startswith(folder) and member.name.endswith(suffix):
                content = archive.extractfile(member)
                if content is not None:
                    code = member.name[len(folder) : -len(suffix)]
                    images[_plain(code)] = content.read()
    return images


def _save(content: bytes, path: Path) -> None:
    """As PNG on white, `PIXELS` wide and high."""
    with Image.open(io.BytesIO(content)) as image:
        rgba = image.convert("RGBA").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", rgba.size, "white")
    Image.alpha_composite(white, rgba).convert("RGB").save(path)


def _json(packages: Path, package: str, member: str) -> Any:
    with _opened(packages, package) as archive:
        try:
            content = archive.extractfile(member)
            return json.load(content) if content is not None else None
        except (KeyError, ValueError) as error:
            raise EvalError(f"{packages / package}: {member}: {error}") from None


def _opened(packages: Path, package: str) -> tarfile.TarFile:
    try:
        return tarfile.open(packages / package)
    except (OSError, tarfile.TarError) as error:
        raise EvalError(
            f"emoji: expected the npm package {packages / package} ({error}); make emoji packs it"
        ) from None


def main(argv: list[str]) -> int:
    """Build from the first folder into the second one."""
    try:
        if len(argv) != 2:
            raise EvalError("usage: python -m mmq_evals.data.emoji PACKAGES OUT")
        counts = build(Path(argv[0]), Path(argv[1]))
    except EvalError as error:
        print(f"mmq: error: {error}", file=sys.stderr)
        return 2
    print(f"{argv[1]}: {counts['emoji']} emoji, {counts['without flags']} without flags")
    for name, licence in _licences().items():
        print(f"  {name}: {licence}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
