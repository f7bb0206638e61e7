# SPDX-License-Identifier: Apache-2.0
"""The evaluation run: files, protocol, comparison with a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_models
import numpy as np
import pytest
import torch

from mmq_evals.compare import compare
from mmq_evals.data import layouts
from mmq_evals.divergence import ReferenceModel
from mmq_evals.errors import EvalError
from mmq_evals.run import evaluate, format_result, protocol_hash, read_result
from mmq_evals.tasks.captioning import PROTOCOLS
from mmq_evals.tasks.generation import Answer, Asking, forced_logits


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return eval_models.blip2("caption")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return eval_models.karpathy_coco(tmp_path / "coco")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_and_scores(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    eval_models.gqa(coco)
    out = tmp_path / "out"
    seen: list[tuple[str, int, int]] = []
    result = evaluate(
        *model,
        ["captioning", "gqa"],
        out_dir=out,
        data=coco,
        batch_size=3,
        progress=lambda *event: seen.append(event),
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "captioning.jsonl",
        "gqa.jsonl",
        "result.json",
    ]
    assert read_result(out) == read_result(out / "result.json") == result
    assert seen[0] == ("captioning", 1, 4)
    assert seen[-1] == ("gqa", 2, 2)
    rows = read_rows(out / "captioning.jsonl")
    assert [row["id"] for row in rows] == ["100", "101", "102", "103"]
    entry = result["tasks"]["captioning"]
    mean = sum(row["scores"]["cider"] for row in rows) / 4
    assert entry["scores"]["cider"]["value"] == pytest.approx(mean)
    assert entry["counts"] == {"rows": 4, "clusters": 4, "failed": 0}
    protocol = entry["protocol"]
    assert protocol["prompt"] == "a photo of"
    assert protocol["generation"]["num_beams"] == 5
    assert protocol["data"]["name"] == "coco-karpathy"
    assert protocol["dtype"] == "float32"
    assert protocol["versions"]["torch"] == torch.__version__
    assert entry["protocol_hash"] == protocol_hash(protocol)
    assert result["tasks"]["gqa"]["breakdown"]["form"].keys() == {"binary", "open"}
    table = format_result(result)
    assert "captioning: 4 rows of 4 images (coco-karpathy, test)" in table
    assert "constant caption: cider" in table


def test_limit_stores_the_document_frequencies(
    model: tuple[Any, Any], coco: Path, tmp_path: Path
) -> None:
    result = evaluate(*model, ["captioning"], out_dir=tmp_path / "out", data=coco, limit=2)
    assert result["tasks"]["captioning"]["counts"]["rows"] == 2
    table = json.loads((tmp_path / "out" / "captioning.df.json").read_text())
    assert table["n_images"] == 4


def test_a_run_repeats_itself(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        evaluate(*model, ["captioning"], out_dir=tmp_path / name, data=coco, batch_size=3)
    first, second = (tmp_path / name / "captioning.jsonl" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_reference(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    evaluate(*model, ["captioning"], out_dir=tmp_path / "full", data=coco)
    same = evaluate(
        *model, ["captioning"], out_dir=tmp_path / "same", data=coco, reference=tmp_path / "full"
    )
    against = same["tasks"]["captioning"]["against_reference"]
    assert against["agreement"]["identical captions"]["count"] == 4
    for metric in ("cider", "rouge_l", "bleu_1", "bleu_4"):
        assert against["differences"][metric]["value"] == 0.0
        assert against["differences"][metric]["p_value"] == 1.0
    assert "identical captions: 100.00 [100.00, 100.00] (4 of 4)" in format_result(same)
    with pytest.raises(EvalError, match=r"ran under another protocol; different: batch_size, data"):
        evaluate(
            *model,
            ["captioning"],
            out_dir=tmp_path / "other",
            data=coco,
            limit=2,
            batch_size=1,
            reference=tmp_path / "full" / "result.json",
        )
    assert not (tmp_path / "other").exists()
    with pytest.raises(EvalError, match="no file"):
        evaluate(
            *model,
            ["captioning"],
            out_dir=tmp_path / "other",
            data=coco,
            reference=tmp_path / "nowhere",
        )


def test_logits_against_the_reference(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    eval_models.gqa(coco)
    full, processor = model
    tasks = ["captioning", "gqa"]
    settings: dict[str, Any] = {"data": coco, "batch_size": 3}
    evaluate(full, processor, tasks, out_dir=tmp_path / "full", **settings)
    settings |= {"reference": tmp_path / "full", "reference_model": full}
    same = evaluate(full, processor, tasks, out_dir=tmp_path / "same", **settings)
    for entry in same["tasks"].values():
        agreement = entry["against_reference"]["agreement"]
        assert agreement["logit KL"]["value"] == 0.0
        assert agreement["same first token"]["value"] == 1.0
    changed, _ = eval_models.blip2("caption")
    with torch.no_grad():
        for weight in changed.language_model.parameters():
            weight.mul_(1.1)
    result = evaluate(changed, processor, tasks, out_dir=tmp_path / "b", **settings)
    entry = result["tasks"]["captioning"]["against_reference"]
    found = entry["agreement"]
    # By hand, one image at a time, on the tokens of the reference's rows.
    kl, same_first = [], []
    items = layouts.captions(coco).items
    prompt, generation = PROTOCOLS["lavis"]
    for item, row in zip(items, read_rows(tmp_path / "full" / "captioning.jsonl"), strict=True):
        asking = Asking((prompt,), generation)
        logits = [
            forced_logits(each, processor, [item.image()], asking, [row["tokens"]])[0].double()
            for each in (full, changed)
        ]
        p, q = (each.log_softmax(dim=1) for each in logits)
        kl.append((p.exp() * (p - q)).sum(dim=1))
        same_first.append(p.argmax(dim=1) == q.argmax(dim=1))
    assert found["logit KL"]["value"] == pytest.approx(
        float(torch.stack([each.mean() for each in kl]).mean()), rel=1e-3
    )
    assert found["logit KL"]["value"] > 1e-4
    assert found["logit KL"]["low"] <= found["logit KL"]["value"] <= found["logit KL"]["high"]
    p99 = np.quantile(torch.cat(kl).numpy(), 0.99)
    percentile = found["logit KL, 99th percentile over tokens"]
    assert percentile["value"] == pytest.approx(p99, rel=1e-3)
    assert percentile["low"] <= percentile["value"] <= percentile["high"]
    assert percentile["low"] < percentile["high"]
    assert found["same first token"]["value"] == pytest.approx(
        float(torch.cat(same_first).double().mean())
    )
    assert "logit KL: " in format_result(result)
    rows = read_rows(tmp_path / "b" / entry["logits"])
    assert [len(row["kl"]) for row in rows] == [len(each) for each in kl]
    # A comparison of the two runs shows them, too; that of others has none.
    compared = compare(tmp_path / "full", tmp_path / "b")["captioning"]["agreement"]
    assert compared["logit KL"] == found["logit KL"]
    assert "logit KL" not in compare(tmp_path / "b", tmp_path / "full")["captioning"]["agreement"]
    settings |= {"reference_model": changed, "out_dir": tmp_path / "c"}
    with pytest.raises(EvalError, match="reference_model: expected the model of"):
        evaluate(full, processor, tasks, **settings)
    assert not (tmp_path / "c").exists()


def test_the_references_logits_are_computed_once(
    model: tuple[Any, Any], coco: Path, tmp_path: Path
) -> None:
    full, processor = model
    settings: dict[str, Any] = {"data": coco, "batch_size": 3}
    evaluate(full, processor, ["captioning"], out_dir=tmp_path / "full", **settings)
    other, _ = eval_models.blip2("caption")
    with torch.no_grad():
        other.language_projection.weight.mul_(1.2)
    seen: list[int] = []
    hook = full.vision_model.register_forward_hook(lambda *_: seen.append(1))
    settings["reference"] = tmp_path / "full"

    def run(name: str, reference: Any) -> tuple[int, str]:
        seen.clear()
        evaluate(
            *(other, processor, ["captioning"]),
            out_dir=tmp_path / name,
            reference_model=reference,
            **settings,
        )
        return len(seen), (tmp_path / name / "captioning.logits.jsonl").read_text()

    batches, expected = run("a", full)
    assert batches == 2
    reference = ReferenceModel(full)
    assert run("b", reference) == (batches, expected)
    assert run("c", reference) == (0, expected)
    # Where only a part fits, the rest is computed again.
    rows = [json.loads(line) for line in expected.splitlines()]
    vocabulary = min(full.config.text_config.vocab_size, len(processor.tokenizer))
    first = sum(len(row["kl"]) for row in rows[:3]) * vocabulary * 4
    small = ReferenceModel(full, capacity=first)
    assert run("d", small) == (batches, expected)
    assert run("e", small) == (1, expected)
    none = ReferenceModel(full, capacity=len(rows[3]["kl"]) * vocabulary * 4 - 1)
    assert run("f", none) == run("g", none) == (batches, expected)
    hook.remove()


def test_logits_that_are_not_finite(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    """A collapsed model is reported, not fatal."""
    full, processor = model
    evaluate(full, processor, ["captioning"], out_dir=tmp_path / "full", data=coco)
    broken, _ = eval_models.blip2("caption")
    with torch.no_grad():
        broken.language_projection.weight.fill_(3e38)
    result = evaluate(
        *(broken, processor, ["captioning"]),
        out_dir=tmp_path / "b",
        data=coco,
        reference=tmp_path / "full",
        reference_model=full,
    )
    agreement = result["tasks"]["captioning"]["against_reference"]["agreement"]
    assert "logit KL" not in agreement
    assert agreement["same first token"]["value"] == 0.0
    rows = read_rows(tmp_path / "b" / "captioning.logits.jsonl")
    assert rows[0]["kl"][0] is None


def test_reference_of_retrieval(coco: Path, tmp_path: Path) -> None:
    model, processor = eval_models.blip2("retrieval")
    full = evaluate(model, processor, None, out_dir=tmp_path / "full", data=coco)
    model.itm_head.weight.data.neg_()
    changed = evaluate(
        model, processor, None, out_dir=tmp_path / "b", data=coco, reference=tmp_path / "full"
    )
    before, after = (r["tasks"]["retrieval"] for r in (full, changed))
    paired = after["against_reference"]["differences"]["r_mean"]
    change = after["scores"]["r_mean"]["value"] - before["scores"]["r_mean"]["value"]
    assert abs(change) > 0.01
    assert paired["value"] == pytest.approx(change, rel=1e-12)
    assert paired["low"] <= paired["value"] <= paired["high"]
    assert paired["clusters"] == 4


def test_a_failed_run_leaves_the_earlier_result(
    model: tuple[Any, Any], coco: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(*model, ["captioning"], out_dir=out, data=coco, batch_size=1)
    before = {name: (out / name).read_bytes() for name in ("captioning.jsonl", "result.json")}

    def stop(task: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*model, ["captioning"], out_dir=out, data=coco, batch_size=1, progress=stop)
    assert {name: (out / name).read_bytes() for name in before} == before
    # The rows that came before are on disk.
    assert [row["id"] for row in read_rows(out / "captioning.0-of-1.jsonl.part")] == ["100", "101"]


@pytest.mark.parametrize("kind", ["caption", "retrieval"])
def test_images_that_do_not_decode_are_counted(coco: Path, tmp_path: Path, kind: str) -> None:
    """The score is that of a run over the other images, and says so."""
    model, processor = eval_models.blip2(kind)
    task = "captioning" if kind == "caption" else "retrieval"
    full = evaluate(model, processor, [task], out_dir=tmp_path / "a", data=coco, batch_size=2)
    (coco / "val2014" / "COCO_val2014_000000000002.jpg").write_text("broken")
    out = tmp_path / "out"
    result = evaluate(
        *(model, processor, [task]),
        out_dir=out,
        data=coco,
        batch_size=2,
        reference=tmp_path / "a",
    )
    entry, before = result["tasks"][task], full["tasks"][task]
    failed = entry["counts"]["failed"]
    assert failed == len(entry["failed"]) > 0
    assert entry["counts"]["rows"] == before["counts"]["rows"] - failed
    assert entry["counts"]["clusters"] == 3
    assert entry["against_reference"]["samples"] == entry["counts"]["rows"]
    ids = [row["id"] for row in read_rows(out / f"{task}.jsonl")]
    every = [row["id"] for row in read_rows(tmp_path / "a" / f"{task}.jsonl")]
    assert ids == [row_id for row_id in every if row_id not in entry["failed"]]
    text = format_result(result)
    assert f"not scored: {failed} rows; the first: item '102': image" in text
    for path in (coco / "val2014").iterdir():
        path.write_text("broken")
    with pytest.raises(EvalError, match=f"{task}: no image decodes: item '100': image"):
        evaluate(model, processor, [task], out_dir=tmp_path / "none", data=coco)


def test_predictions_cannot_break_lines(
    model: tuple[Any, Any], coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = ["a\nb\u2028c\x85d", "", "\ufffd" * 3, "x" * 10_000]
    monkeypatch.setattr(
        "mmq_evals.tasks.captioning.generate", lambda *_: [Answer(text, (2,)) for text in garbage]
    )
    result = evaluate(*model, ["captioning"], out_dir=tmp_path / "out", data=coco, batch_size=4)
    assert [r["prediction"] for r in read_rows(tmp_path / "out" / "captioning.jsonl")] == garbage
    assert result["tasks"]["captioning"]["counts"]["rows"] == 4


def test_a_weight_that_is_not_finite_is_named(coco: Path, tmp_path: Path) -> None:
    model, processor = eval_models.blip2("caption")
    with torch.no_grad():
        model.language_projection.weight[1, 2] = torch.inf
    with pytest.raises(EvalError, match=r"^language_projection.weight: expected finite weights"):
        evaluate(model, processor, None, out_dir=tmp_path / "out", data=coco)
    assert not (tmp_path / "out").exists()


def test_refusals_before_any_work(model: tuple[Any, Any], coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(EvalError, match="batch_size: expected at least 1, got 0"):
        evaluate(*model, ["captioning"], out_dir=out, data=coco, batch_size=0)
    with pytest.raises(EvalError, match="expected a dataset folder"):
        evaluate(*model, ["captioning"], out_dir=out, data=tmp_path / "nothing")
    with pytest.raises(EvalError, match="does not fit"):
        evaluate(*model, ["captioning", "retrieval"], out_dir=out, data=coco)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvalError, match="empty has no dataset for any task of Blip2ForCond"):
        evaluate(*model, None, out_dir=out, data=tmp_path / "empty")
    assert not out.exists()
    (tmp_path / "result.json").write_text('{"format": "mmq-eval-result", "version": 99}')
    with pytest.raises(EvalError, match="expected version 1, got 99"):
        read_result(tmp_path)
