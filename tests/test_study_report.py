# SPDX-License-Identifier: Apache-2.0
"""mmq report: one HTML file that needs nothing else, and Markdown with charts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import study_tables
from study_tables import additive, factorial

from mmq.cli import main
from mmq_evals.errors import EvalError
from mmq_evals.study.analyze import Options, analyze
from mmq_evals.study.report import charts, svg
from mmq_evals.study.report.browser import samples_of
from mmq_evals.study.report.build import write_report
from mmq_evals.study.report.heat import heat_class
from mmq_evals.study.report.verdict import shown_sign
from mmq_evals.study.table import grids, read_table
from mmq_evals.tiny import data as tiny_data

VOID = {"meta", "link", "img", "br"}
OPTIONAL_END = {"td", "th", "tr", "li", "thead", "tbody"}


class Page(HTMLParser):
    """Collects tags and text; fails where tags do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open.pop() in OPTIONAL_END, f"{tag} closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def folder_of(tmp_path: Path, **columns: Any) -> Path:
    """Two methods on a small grid, with rows per sample, thirds and a failed run."""
    rows = []
    for method, scale in (("rtn", 1.0), ("gptq", 0.5)):
        score = additive({"vision": 0.3 * scale, "language": 0.5 * scale})
        made = factorial(score, method=method, levels=(2, 3, 4, 6, 16))
        rows += [row for row in made if row["method"] != "none" or method == "rtn"]
    for bits in (3, 4):
        part = study_tables.record("rtn", {"vision": 16, "language": 15}, 0.8)
        part |= {"run_id": f"third-{bits}", "bits.language": 15.1, "bits.language.end": bits}
        part["levels"] = {"method": "rtn", "language.end": bits}
        rows.append(part)
    for row in rows:
        row.setdefault("levels", {} if row["method"] == "none" else {"method": row["method"]})
        row |= {"seconds.quantize": 1.5, "seconds.eval": 2.0, "layer_error": 0.01, **columns}
    file = study_tables.with_samples(tmp_path, rows)
    failed = {"run_id": "bad", "status": "failed", "error": "<script>alert(1)</script>"}
    with file.open("a") as stream:
        stream.write(json.dumps({**failed, "levels": {}}) + "\n")
    return tmp_path


def test_the_page_is_whole_and_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path)
    out = tmp_path / "r.html"
    assert main(["report", str(folder), "--out", str(out), "--data", "none"]) == 0
    assert re.fullmatch(r"wrote .*r\.html \([\d,]+ bytes\)\n", capsys.readouterr().out)
    text = out.read_text()
    page = parse(text)
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert "url(" not in text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv")) or ""
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    targets = {a["href"] for tag, a in page.tags if tag == "a"}
    ids = {f"#{a['id']}" for _, a in page.tags if "id" in a}
    assert targets <= ids
    said = " ".join(page.text)
    for piece in (
        "tiny \N{MIDDLE DOT} vqa",
        "98 % of full precision from",
        "From 3 bits up, largest share of the variance in percent: language",
        "gptq over rtn",
        "Thirds and layer types",
        "language end",
        "Loss of both beyond the sum",
        "SHA-256",
        "mmq report",
        "bad failed: <script>alert(1)</script>",
    ):
        assert piece in said, piece
    assert not list(tmp_path.glob("*.part"))


def test_text_of_others_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">&"\'|[x](y)'
    folder = folder_of(tmp_path, model=evil)
    for place in folder.glob("runs/*/vqa.jsonl"):
        place.write_text(place.read_text().replace('"blue"', json.dumps(evil)))
    out = write_report(folder, tmp_path / "r.html", _options(), title=evil, data=None)
    page = parse(out.read_text())
    assert not [attrs for tag, attrs in page.tags if tag == "img"]
    assert any(evil in text for text in page.text)
    pytest.importorskip("matplotlib")
    folder = tmp_path / "md"
    text = write_report(tmp_path, folder, _options(), kind="markdown", title=evil).read_text()
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<img", outside)
    assert not re.search(r"(?<!\\)\[x", outside)


def _options() -> Options:
    return Options(resamples=50)


def test_markdown_names_its_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = folder_of(tmp_path)
    assert main(["report", str(folder), "--format", "markdown", "--commit", "abc"]) == 0
    text = (folder / "report" / "report.md").read_text()
    charts = re.findall(r"!\[[a-z ]+\]\(([\w.-]+)\)", text)
    assert charts == ["t0-0-size.png", "t0-0-dose.png", "t0-0-importance.png"]
    for name in charts:
        assert (folder / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "- commit: `abc`" in text
    heads = [line for line in text.splitlines() if line.startswith("|---")]
    assert len(heads) == 5
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") - line.count(r"\|") for line in table.splitlines()}) == 1


def test_samples_that_changed_come_first(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    table = read_table(folder)
    samples = samples_of(folder, grids(table), "score.vqa.accuracy_always")
    assert len(samples) == 12
    changed = [sum(answer.changed for answer in sample.answers) for sample in samples]
    assert changed == sorted(changed, reverse=True)
    assert changed[0] > 0
    first = samples[0]
    assert [answer.label for answer in first.answers] == [
        "rtn 4/4", "gptq 4/4", "rtn 3/3", "gptq 3/3",
    ]  # fmt: skip
    assert first.full.text == "red"
    assert first.expected == "red"
    assert first.image == ""
    with pytest.raises(EvalError, match="data: expected a dataset folder"):
        samples_of(folder, grids(table), "score.vqa.accuracy_always", data=tmp_path / "nowhere")


def test_images_of_the_built_in_data_are_thumbnails(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    scenes = tiny_data.caption_items("test", 60)
    for place in folder.glob("runs/*/vqa.jsonl"):
        rows = [json.loads(line) for line in place.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["cluster"] = scenes[number // 2].id
        study_tables.write_jsonl(place, rows)
    table = read_table(folder)
    samples = samples_of(folder, grids(table), "score.vqa.accuracy_always", data="tiny")
    assert all(s.image.startswith("data:image/png;base64,") for s in samples)
    assert max(len(s.image) for s in samples) < 20_000


def test_bad_places_are_refused_before_any_work(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(EvalError, match="out: expected a new file in a folder that exists"):
        write_report(folder, tmp_path / "no" / "r.html", _options())
    with pytest.raises(EvalError, match="out: expected a new file in a folder that exists"):
        write_report(folder, tmp_path, _options())
    with pytest.raises(EvalError, match="format: expected one of html, markdown, got 'pdf'"):
        write_report(folder, tmp_path / "r.pdf", _options(), kind="pdf")


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(0.0, 100.0) == [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    assert svg.ticks(-0.3, 0.9) == pytest.approx([-0.25, 0.0, 0.25, 0.5, 0.75])
    assert svg.ticks(5.0, 5.0) == [5.0]
    for low, high in ((0.001, 0.0042), (-17.0, 3.0), (640.0, 661.0)):
        found = svg.ticks(low, high)
        assert 3 <= len(found) <= 8
        assert low - 1e-9 <= found[0] <= found[-1] <= high + 1e-9


def test_scales_and_colours() -> None:
    scale = svg.linear(0.0, 10.0, 100.0, 200.0)
    assert (scale(0.0), scale(5.0), scale(10.0)) == (100.0, 150.0, 200.0)
    assert svg.linear(3.0, 3.0, 0.0, 10.0)(3.0) == 5.0
    assert svg.logarithmic(2.0, 8.0, 0.0, 1.0)(4.0) == pytest.approx(0.5)
    assert [heat_class(value, 1.0) for value in (-1.0, -0.5, -0.01, 0.0, 1.0)] == [
        "l9", "l4", "", "", "g9",
    ]  # fmt: skip
    assert heat_class(-1.0, 0.0) == ""


def test_a_method_has_one_colour_and_verdicts_say_what_is_shown(tmp_path: Path) -> None:
    """The table's first method is awq in one model and gptq in the other."""
    rows = []
    for model, order in (("one", ("awq", "gptq")), ("two", ("gptq", "rtn"))):
        for method in order:
            made = factorial(additive({"vision": 0.1, "language": 0.2}), method=method)
            rows += [
                {**row, "model": model, "run_id": f"{model}-{row['run_id']}"}
                for row in made
                if row["method"] != "none" or method == order[0]
            ]
    found = analyze(study_tables.write_jsonl(tmp_path / "t.jsonl", rows))
    series = [charts.series_of(model["targets"][0]) for model in found["models"]]
    assert [model["model"] for model in found["models"]] == ["one", "two"]
    assert series == [{"gptq": 1, "awq": 2}, {"rtn": 0, "gptq": 1}]
    values = ({"low": 0.0004, "high": 0.1}, {"low": 0.0006, "high": 0.1}, {"low": -1, "high": -0.1})
    assert [shown_sign(value) for value in values] == [0, 1, -1]
