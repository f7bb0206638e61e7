# SPDX-License-Identifier: Apache-2.0
"""Tasks on random models: what the model sees, what is decoded, and how rows are scored."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import eval_models
import numpy as np
import pytest
import torch

from mmq_evals.data import layouts
from mmq_evals.data.items import RetrievalItem, VqaItem
from mmq_evals.data.layouts import Dataset
from mmq_evals.errors import EvalError
from mmq_evals.metrics import recall_at_k
from mmq_evals.stats import Interval
from mmq_evals.summary import agreement_rows, paired_rows, score_rows
from mmq_evals.tasks import base
from mmq_evals.tasks.build import build_tasks, model_class, tasks_for
from mmq_evals.tasks.captioning import Captioning
from mmq_evals.tasks.generation import Asking, Generation, forced_logits, generate
from mmq_evals.tasks.matching import prepare_text
from mmq_evals.tasks.retrieval import Retrieval
from mmq_evals.tasks.vqa import PROTOCOLS, VisualQuestions


@pytest.fixture(scope="module")
def retrieval_model() -> tuple[Any, Any]:
    return eval_models.blip2("retrieval")


@pytest.fixture(scope="module")
def caption_model() -> tuple[Any, Any]:
    return eval_models.blip2("caption")


@pytest.fixture(scope="module")
def llava_model() -> tuple[Any, Any]:
    return eval_models.llava()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return eval_models.karpathy_coco(tmp_path)


def predict(task: Any, model: Any, processor: Any, *, batch_size: int) -> list[dict[str, Any]]:
    """The rows, by the way of JSON as in a run."""
    with TemporaryDirectory() as folder:
        parts = task.predict(model, processor, batch_size=batch_size, scratch=Path(folder))
        found = json.loads(json.dumps(list(parts), allow_nan=False))
    assert [part["id"] for part in found] == task.part_ids
    rows: list[dict[str, Any]] = task.rows({part["id"]: part for part in found})
    return rows


def score(task: Any, rows: list[dict[str, Any]]) -> dict[str, Interval]:
    return score_rows(base.scored(task, rows))


def agreement(task: Any, rows: Any, reference: Any) -> dict[str, float]:
    after, before = (base.scored(task, run) for run in (rows, reference))
    return {key: row["value"] for key, row in agreement_rows(after, before, task.primary).items()}


# ---- generation ----------------------------------------------------------------------------------


RED = eval_models.Image.new("RGB", (20, 12), eval_models.COLORS["red"])


def say(model: Any, processor: Any, prompts: list[str], *settings: Any, **named: Any) -> list[str]:
    asking = Asking(tuple(prompts), Generation(*settings, **named))
    return [answer.text for answer in generate(model, processor, [RED] * len(prompts), asking)]


@pytest.mark.parametrize("kind", ["caption", "t5", "llava"])
def test_generate_returns_new_text_only_and_batches_agree(kind: str) -> None:
    model = eval_models.llava() if kind == "llava" else eval_models.blip2(kind)
    mark = "<image> " if kind == "llava" else ""
    prompts = [mark + "a photo of", mark + "what color is it ? the left or right square", mark]
    batched = say(*model, prompts, 6, min_new_tokens=6)
    assert batched == [say(*model, [p], 6, min_new_tokens=6)[0] for p in prompts]
    # Six new tokens, special ones dropped; the prompt's words are not put in front.
    assert all(len(text.split()) <= 6 for text in batched)
    assert say(*model, prompts[:1], 6, min_new_tokens=6, num_beams=3, length_penalty=-1.0)


@pytest.mark.parametrize("kind", ["caption", "t5", "llava"])
def test_forced_logits_are_those_that_chose_the_answer(kind: str) -> None:
    model, processor = eval_models.llava() if kind == "llava" else eval_models.blip2(kind)
    mark = "<image> " if kind == "llava" else ""
    prompts = (mark + "a photo of", mark + "what color is it ? the left or right square", mark)
    asking = Asking(prompts, Generation(6))
    answers = generate(model, processor, [RED] * 3, asking)
    # Answers of different length, the last cut short.
    tokens = [list(answer.tokens) for answer in answers]
    tokens[2] = tokens[2][:2]
    logits = forced_logits(model, processor, [RED] * 3, asking, tokens)
    checked = 0
    for rows, row in zip(logits, tokens, strict=True):
        assert rows.shape == (len(row), len(processor.tokenizer))
        assert rows.dtype == torch.float32
        # An untrained model may say a token beyond the tokenizer's, which KL leaves out.
        said = [token for token in row if token < rows.shape[1]]
        chosen = zip(rows.argmax(dim=1).tolist(), row, strict=True)
        assert [best for best, token in chosen if token < rows.shape[1]] == said
        checked += len(said)
    assert checked >= 4
    one = Asking(prompts[1:2], asking.generation)
    # The longest prompt is not padded. (Others are between image and text by the BLIP-2 processor,
    # which T5 with its relative positions notices.)
    alone = forced_logits(model, processor, [RED], one, tokens[1:2])[0]
    torch.testing.assert_close(logits[1], alone, rtol=0, atol=1e-4)
    # Another answer moves every position after its change and none before.
    tokens[0][1] = 7 if tokens[0][1] != 7 else 8
    moved = forced_logits(model, processor, [RED] * 3, asking, tokens)[0]
    torch.testing.assert_close(moved[:2], logits[0][:2], rtol=0, atol=1e-5)
    assert (moved[2:] - logits[0][2:]).abs().amax() > 1e-3
    with pytest.raises(EvalError, match="at least one token in every answer"):
        forced_logits(model, processor, [RED], one, [[]])


def test_an_answer_ends_with_its_end_token(caption_model: tuple[Any, Any]) -> None:
    model, processor = caption_model
    asking = Asking(("a photo of",), Generation(6))
    whole = generate(model, processor, [RED], asking)[0].tokens
    end = whole[2]
    model.generation_config.eos_token_id, kept = [end, 2], model.generation_config.eos_token_id
    try:
        assert generate(model, processor, [RED], asking)[0].tokens == whole[: whole.index(end) + 1]
    finally:
        model.generation_config.eos_token_id = kept


def test_generate_cuts_the_prompt(caption_model: tuple[Any, Any]) -> None:
    model, processor = caption_model
    settings = Generation(4, min_new_tokens=4)
    long = generate(model, processor, [RED], Asking(("a photo of red blue green",), settings, 4))
    assert long == generate(model, processor, [RED], Asking(("a photo of",), settings))


def test_a_processor_that_hides_the_image_is_refused() -> None:
    model, processor = eval_models.blip2("caption")
    processor.num_query_tokens = None
    with pytest.raises(EvalError, match="expected image tokens"):
        generate(model, processor, [RED], Asking(("a photo of",), Generation(4)))


def test_generation_arguments() -> None:
    assert Generation(5).arguments() == {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": 5,
    }
    asking = PROTOCOLS["blip2-t5"].generation.arguments()
    assert (asking["num_beams"], asking["min_new_tokens"], asking["length_penalty"]) == (5, 1, -1.0)


# ---- captioning ----------------------------------------------------------------------------------


def test_captioning(caption_model: tuple[Any, Any], coco: Path) -> None:
    task = Captioning(layouts.captions(coco), "greedy")
    rows = predict(task, *caption_model, batch_size=3)
    assert [row["id"] for row in rows] == task.ids == ["100", "101", "102", "103"]
    assert rows == predict(task, *caption_model, batch_size=3)
    perfect = [row | {"prediction": row["references"][0]} for row in rows]
    scores = score(task, perfect)
    assert scores["rouge_l"].value == pytest.approx(1.0)
    assert scores["bleu_1"].value == pytest.approx(1.0)
    assert scores["cider"].value == pytest.approx(
        np.mean([task.sample_scores(row)["cider"] for row in perfect])
    )
    assert set(scores) == {"cider", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    baseline = task.baselines()["constant caption"]
    assert 0.0 < baseline["rouge_l"] < 1.0
    assert agreement(task, perfect, perfect)["identical captions"] == 1.0
    changed = [perfect[0] | {"prediction": "no"}, *perfect[1:]]
    assert agreement(task, changed, perfect)["identical captions"] == 0.75


def test_a_limit_keeps_the_document_frequencies_of_the_split(coco: Path) -> None:
    dataset = layouts.captions(coco)
    full, part = Captioning(dataset, "greedy"), Captioning(dataset, "greedy", limit=2)
    assert part.ids == full.ids[:2]
    assert part.df == full.df
    row = {"id": "100", "prediction": "a red square", "references": ["a red square"]}
    assert part.sample_scores(row) == full.sample_scores(row)
    with pytest.raises(EvalError, match="decoding: expected one of"):
        Captioning(dataset, "beam")


# ---- questions -----------------------------------------------------------------------------------


def test_vqav2_task(llava_model: tuple[Any, Any], tmp_path: Path) -> None:
    dataset = layouts.vqav2(eval_models.vqav2(tmp_path))
    task = VisualQuestions(dataset, "llava")
    rows = predict(task, *llava_model, batch_size=2)
    assert [row["cluster"] for row in rows] == ["42", "42", "7"]
    right = [row | {"prediction": row["answers"][0] + "."} for row in rows]
    assert score(task, right)["accuracy_always"].value == 1.0
    # All ten answers agree, so this protocol normalises nothing and the period costs the point.
    assert score(task, right)["accuracy_official-2021"].value == 0.0
    wrong = [right[0] | {"prediction": "blue"}, *right[1:]]
    assert task.breakdown(base.scored(task, wrong))["answer_type"] == {"other": 0.0, "yes/no": 1.0}
    assert task.breakdown(base.scored(task, wrong))["question_type"] == {
        "is it": 1.0,
        "what color": 0.0,
    }
    assert agreement(task, wrong, right) == pytest.approx(
        {"flipped answers": 1 / 3, "right to wrong": 1 / 3, "wrong to right": 0.0}
    )
    assert list(task.baselines()) == ["majority answer chosen on the test questions"]


def test_one_answer_and_blind_baselines() -> None:
    def item(n: int, question: str, answer: str) -> VqaItem:
        return VqaItem(f"q{n}", f"i{n}", eval_models.Image.new, question, (answer,))

    train = [item(0, "color?", "red"), item(1, "color?", "red"), item(2, "is it?", "yes")]
    test = [item(3, "color?", "red"), item(4, "is it?", "yes"), item(5, "else?", "no")]
    task = VisualQuestions(Dataset("d", "test", test, lambda: train), "llava")
    blind = task.baselines()
    assert blind["majority answer"]["accuracy_always"] == pytest.approx(1 / 3)
    by_question = blind["majority answer to the same question"]
    assert by_question["accuracy_always"] == pytest.approx(2 / 3)
    uneven = [*test, VqaItem("q6", "i6", eval_models.Image.new, "x", ("a", "b"))]
    with pytest.raises(EvalError, match="expected equally many answers"):
        VisualQuestions(Dataset("d", "test", uneven), "llava")


def test_gqa_task(caption_model: tuple[Any, Any], tmp_path: Path) -> None:
    dataset = layouts.gqa(eval_models.gqa(tmp_path))
    task = VisualQuestions(dataset, "blip2-opt", "gqa")
    rows = predict(task, *caption_model, batch_size=2)
    answered = [rows[0] | {"prediction": "Red."}, rows[1] | {"prediction": "no"}]
    scores = score(task, answered)
    assert scores["accuracy_official"].value == 0.0
    assert scores[task.primary].value == 0.5
    assert task.breakdown(base.scored(task, answered))["form"] == {"binary": 0.0, "open": 1.0}


# ---- retrieval -----------------------------------------------------------------------------------


def test_prepare_text() -> None:
    assert prepare_text('A "red" dog: (small)!  ') == "a red dog small"
    assert len(prepare_text("word " * 60).split()) == 50


def brute_force(model: Any, processor: Any, task: Retrieval) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and matching logit of all pairs by the model's own forward, pair by pair."""
    texts = [prepare_text(text) for item in task.items for text in item.captions]
    sim = np.zeros((len(task.items), len(texts)))
    matching = np.zeros_like(sim)
    for i, item in enumerate(task.items):
        pixels = processor.image_processor(images=item.image(), return_tensors="pt")
        for t, text in enumerate(texts):
            ids = processor.tokenizer(text, return_tensors="pt")
            inputs = {
                "pixel_values": pixels["pixel_values"],
                "input_ids": ids["input_ids"],
                "attention_mask": ids["attention_mask"],
            }
            with torch.no_grad():
                sim[i, t] = model(**inputs).logits_per_image
                matching[i, t] = model(**inputs, use_image_text_matching_head=True)[
                    "logits_per_image"
                ][0, 1]
    return sim, matching


@pytest.mark.parametrize("k_test", [3, 1000])
def test_retrieval_equals_brute_force(
    retrieval_model: tuple[Any, Any], coco: Path, k_test: int
) -> None:
    model, processor = retrieval_model
    task = Retrieval(layouts.retrieval(coco), k_test=k_test)
    rows = predict(task, model, processor, batch_size=2)
    assert [row["id"] for row in rows] == task.ids
    sim, matching = brute_force(model, processor, task)
    assert sim.std() > 1e-3
    for direction, similar, final in (
        ("txt", sim, sim + matching),
        ("img", sim.T, (sim + matching).T),
    ):
        mine = [row for row in rows if row["direction"] == direction]
        kept = np.full(final.shape, -np.inf)
        for query, row in enumerate(mine):
            # By value, not by index: rounding decides between candidates that are equally good.
            best = np.sort(similar[query])[::-1][:k_test]
            assert len(set(row["candidates"])) == len(best)
            found = np.sort(similar[query][row["candidates"]])[::-1]
            np.testing.assert_allclose(found, best, rtol=0, atol=1e-5)
            np.testing.assert_allclose(
                row["prediction"], final[query][row["candidates"]], rtol=0, atol=1e-5
            )
            kept[query, row["candidates"]] = row["prediction"]
        expected = recall_at_k(kept, [row["positives"] for row in mine]).recall
        scores = score(task, rows)
        for k in (1, 5, 10):
            assert scores[f"{direction}_r{k}"].value == pytest.approx(expected[k])
    means = [np.mean([scores[f"{d}_r{k}"].value for k in (1, 5, 10)]) for d in ("txt", "img")]
    assert scores["r_mean"].value == pytest.approx(np.mean(means))
    assert scores["txt_r_mean"].value == pytest.approx(means[0])


def test_r_mean_weighs_both_directions_equally(retrieval_model: tuple[Any, Any]) -> None:
    def open_image(number: int) -> Any:
        return eval_models.Image.new("RGB", (8, 8), (40 * number, 90, 20))

    items = [
        RetrievalItem(str(n), partial(open_image, n), tuple(f"a {c} square" for c in colors))
        for n, colors in enumerate((["red"], ["blue", "green", "red"], ["green"], ["blue", "red"]))
    ]
    task = Retrieval(Dataset("d", "test", items))
    first = predict(task, *retrieval_model, batch_size=2)
    # Hits and misses in both directions, as an untrained model need not have them.
    rng = np.random.default_rng(1)
    runs = []
    for _ in range(2):
        runs.append(
            [
                row
                | {
                    "candidates": list(range(row["of"])),
                    "prediction": rng.random(row["of"]).tolist(),
                }
                for row in first
            ]
        )
    values = []
    for rows in runs:
        scores = score(task, rows)
        directions = [scores[f"{d}_r{k}"].value for d in ("txt", "img") for k in (1, 5, 10)]
        assert scores["r_mean"].value == pytest.approx(np.mean(directions), rel=1e-14)
        # There are more captions than images: a plain mean of all rows is another number.
        plain = np.mean([task.sample_scores(row)["r_mean"] for row in rows])
        assert plain != pytest.approx(scores["r_mean"].value, rel=1e-3)
        values.append(scores["r_mean"].value)
    change = paired_rows(*(base.scored(task, rows) for rows in runs))["r_mean"]
    assert change.value == pytest.approx(values[0] - values[1], rel=1e-12)
    assert abs(change.value) > 0.01
    assert change.low < change.value < change.high


def test_retrieval_does_not_depend_on_image_token_index(
    retrieval_model: tuple[Any, Any], coco: Path
) -> None:
    model, processor = retrieval_model
    task = Retrieval(layouts.retrieval(coco))
    plain = predict(task, model, processor, batch_size=2)
    model.config.image_token_index = 4
    try:
        assert predict(task, model, processor, batch_size=2) == plain
    finally:
        model.config.image_token_index = None


def test_collapsed_retrieval_gets_no_credit(retrieval_model: tuple[Any, Any]) -> None:
    def open_image() -> Any:
        return eval_models.Image.new("RGB", (8, 8))

    # Equal images: every score of a text is the same for all of them.
    items = [RetrievalItem(str(n), open_image, ("a red square",)) for n in range(30)]
    task = Retrieval(Dataset("d", "test", items))
    rows = predict(task, *retrieval_model, batch_size=8)
    scores = score(task, rows)
    assert scores["img_r1"].value == scores["txt_r10"].value == 0.0
    assert task.baselines()["chance"]["img_r1"] == pytest.approx(1 / 30)


def test_nan_scores_are_null_and_count_as_misses(coco: Path) -> None:
    model, processor = eval_models.blip2("retrieval")
    model.itm_head.weight.data.fill_(float("nan"))
    task = Retrieval(layouts.retrieval(coco))
    rows = predict(task, model, processor, batch_size=2)
    assert rows[0]["prediction"] == [None] * 8
    assert score(task, rows)["txt_r5"].value == score(task, rows)["img_r1"].value == 0.0
    assert score(task, rows)["txt_r1"].value == 0.0
    assert task.breakdown(rows)["scores"]["NaN"] == 4 * 8 + 8 * 4
    with pytest.raises(EvalError, match="k_test"):
        Retrieval(layouts.retrieval(coco), k_test=0)


# ---- building ------------------------------------------------------------------------------------


def test_tasks_for_and_refusals(
    caption_model: tuple[Any, Any], llava_model: tuple[Any, Any], coco: Path
) -> None:
    caption, llava = caption_model[0], llava_model[0]
    assert tasks_for(caption) == ["captioning"]
    assert tasks_for(llava) == ["vqa", "widths", "easy-vqa"]
    assert tasks_for(caption, coco) == ["captioning"]
    assert tasks_for(llava, coco) == []
    assert tasks_for(llava, eval_models.gqa(coco)) == ["gqa"]
    with pytest.raises(EvalError, match="'retrieval' does not fit Blip2ForConditionalGeneration"):
        build_tasks(caption, ["retrieval"], coco, "test", None)
    with pytest.raises(EvalError, match=r"expected one of captioning, .* got 'ocr'"):
        build_tasks(caption, ["ocr"], coco, "test", None)
    with pytest.raises(EvalError, match="different tasks"):
        build_tasks(caption, ["captioning", "captioning"], coco, "test", None)
    with pytest.raises(EvalError, match="'gqa' has no tiny data"):
        build_tasks(llava, ["gqa"], "tiny", "test", None)
    with pytest.raises(EvalError, match="limit: expected at least 1, got 0"):
        build_tasks(caption, ["captioning"], coco, "test", 0)
    with pytest.raises(EvalError, match=r"expected one of Blip2.*, got Linear"):
        model_class(torch.nn.Linear(2, 2))
