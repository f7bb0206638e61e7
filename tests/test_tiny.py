# SPDX-License-Identifier: Apache-2.0
"""The shipped tiny models and their generated data."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

import mmq
from mmq_evals import tiny
from mmq_evals.calibration import calibration_samples
from mmq_evals.errors import EvalError
from mmq_evals.run import evaluate
from mmq_evals.stats import paired_difference
from mmq_evals.tiny import architectures, data, score
from mmq_evals.tiny.scenes import (
    SPLIT_SIZES,
    WIDTHS,
    Scene,
    Thing,
    captions,
    questions,
    relation,
    render,
    scene,
    scenes,
    split_of,
)

SPLITS = ("train", "calibration", "test")


@pytest.fixture(scope="module", params=tiny.MODELS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, ProcessorMixin]:
    return request.param, *_load(tiny.path(request.param))


def _load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    torch.set_num_threads(1)
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


# Scenes


def test_splits_are_disjoint_by_id_and_by_content() -> None:
    ids: dict[str, set[str]] = {}
    contents: dict[str, set[str]] = {}
    for split in SPLITS:
        drawn = list(scenes(split, 2000))
        ids[split] = {id for id, _ in drawn}
        contents[split] = {shown.content for _, shown in drawn}
        assert len(ids[split]) == len(drawn)
        assert all(split_of(shown.content) == split for _, shown in drawn)
    for a, b in (("train", "test"), ("train", "calibration"), ("calibration", "test")):
        assert not ids[a] & ids[b]
        assert not contents[a] & contents[b]


def test_test_scenes_have_distinct_contents_so_that_a_caption_names_one_image() -> None:
    drawn = list(scenes("test"))
    assert len(drawn) == SPLIT_SIZES["test"]
    assert len({shown.content for _, shown in drawn}) == len(drawn)


def test_scenes_are_the_same_on_every_machine() -> None:
    drawn = list(scenes("test", 20))
    words = [repr((id, shown)).encode() for id, shown in drawn]
    words += ["\n".join(captions(shown)).encode() for _, shown in drawn]
    assert _digest(words) == "155fc4759dc61a8f"
    assert _digest([render(shown).tobytes() for _, shown in drawn]) == "971d9ce7a9673017"


def test_another_seed_gives_other_pixels() -> None:
    shown = scene("test", 0)
    other = Scene(shown.things, shown.background, shown.seed + 1)
    assert render(shown).tobytes() != render(other).tobytes()
    assert render(shown).tobytes() == render(shown).tobytes()


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split of train, calibration, test, got 'dev'"):
        list(scenes("dev"))


def test_every_caption_names_every_object() -> None:
    for _, shown in scenes("train", 200):
        texts = captions(shown)
        assert len(set(texts)) == 5
        for text in texts:
            words = text.split()
            for thing in shown.things:
                assert {thing.size, thing.color, thing.shape} <= set(words)


def test_captions_and_answers_agree_with_the_picture() -> None:
    star = Thing("large", "red", "star", 10.0, 24.0, 8.0)
    ring = Thing("small", "blue", "ring", 38.0, 26.0, 5.0)
    shown = Scene((star, ring), "pale", 0)
    assert relation(star, ring) == "left of"
    assert relation(ring, star) == "right of"
    assert captions(shown)[0] == "a large red star left of a small blue ring on a pale background"
    pixels = np.asarray(render(shown)).astype(int)
    assert np.abs(pixels[24, 10] - (225, 30, 30)).max() < 45
    assert np.abs(pixels[26, 38] - (240, 240, 245)).max() < 45  # the hole of the ring
    answers = {
        q.text: q.answer for seed in range(20) for q in questions(shown, random.Random(seed))
    }
    assert answers["what color is the star?"] == "red"
    assert answers["how big is the ring?"] == "small"
    assert answers["what shape is the blue object?"] == "ring"
    assert answers["how many shapes are there?"] == "two"
    assert answers["what is the background?"] == "pale"
    assert answers["how many pixels wide is the star?"] == "16"
    assert answers["how many pixels wide is the ring?"] == "10"
    assert answers["what is right of the large red star?"] == "blue ring"


def test_yes_and_no_are_balanced() -> None:
    asked = [
        q
        for id, shown in scenes("train", 600)
        for q in questions(shown, random.Random(id))
        if q.type == "exists"
    ]
    answers = Counter(q.answer for q in asked)
    assert 0.4 < answers["yes"] / answers.total() < 0.6
    widths = {thing.width for _, shown in scenes("train", 600) for thing in shown.things}
    assert widths == set(WIDTHS)


# Items


def test_items_of_scenes() -> None:
    caption, retrieval = data.caption_items("test", 3), data.retrieval_items("test", 3)
    assert [i.id for i in caption] == [i.id for i in retrieval] == [i for i, _ in scenes("test", 3)]
    assert caption[0].references == retrieval[0].captions
    assert len(caption[0].references) == 5
    assert caption[0].image().size == (48, 48)
    assert caption[0].image().mode == "RGB"
    asked = data.vqa_items("test", limit=10)
    assert len(asked) == 10
    assert len({i.id for i in asked}) == 10
    assert [i.image_id for i in asked] == [i for i, _ in scenes("test", 3) for _ in range(4)][:10]


def test_easy_vqa_official_split() -> None:
    pytest.importorskip("easy_vqa")
    train, test = data.vqa_items("train", "easy-vqa"), data.vqa_items("test", "easy-vqa")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert not {i.image_id for i in train} & {i.image_id for i in test}
    assert Counter(i.answers[0] for i in test).most_common(1) == [("yes", 3611)]
    assert test[0].image().size == (64, 64)
    assert test[0].image().mode == "RGB"
    with pytest.raises(ValueError, match="splits train and test, got 'calibration'"):
        data.vqa_items("calibration", "easy-vqa")


def test_missing_easy_vqa_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(EvalError, match=r"the extra mmq\[tiny\]"):
        data.vqa_items("test", "easy-vqa")


def test_bad_requests_are_refused(loaded: tuple[str, PreTrainedModel, ProcessorMixin]) -> None:
    name, _, processor = loaded
    with pytest.raises(ValueError, match="source of scenes, widths, easy-vqa, got 'coco'"):
        data.vqa_items("test", "coco")
    with pytest.raises(ValueError, match=r"tiny model of .*, got 'gpt'"):
        tiny.path("gpt")
    with pytest.raises(ValueError, match=r"tiny model of .*, got 'gpt'"):
        data.calibration_samples("gpt", processor, 1, 0)
    for n in (0, 513):
        with pytest.raises(ValueError, match=f"between 1 and 512 calibration samples, got {n}"):
            data.calibration_samples(name, processor, n, 0)


# Checkpoints


def test_checkpoint_size_and_storage(loaded: tuple[str, PreTrainedModel, ProcessorMixin]) -> None:
    name, model, _ = loaded
    folder = tiny.path(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = tensors.keys()
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    record = json.loads((folder / "training.json").read_text())
    assert record["name"] == name
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_widths_and_depths(loaded: tuple[str, PreTrainedModel, ProcessorMixin]) -> None:
    name, model, _ = loaded
    config = model.config
    vision = config.vision_config
    assert vision.hidden_size >= 256
    assert vision.hidden_size // vision.num_attention_heads == 88
    assert vision.num_hidden_layers >= 3
    if name != "tiny-blip2-retrieval":
        assert config.text_config.hidden_size >= 192
        assert config.text_config.num_hidden_layers >= 3
    if name != "tiny-llava":
        layers = model.qformer.encoder.layer
        assert [layer.has_cross_attention for layer in layers] == [True, False, True, False]
        assert model.query_tokens.shape == (1, 8, 192)
        assert config.qformer_config.intermediate_size % 64 != 0
    widths = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert any(width % 64 for width in widths)


def test_score_is_far_above_the_blind_baselines(
    loaded: tuple[str, PreTrainedModel, ProcessorMixin],
) -> None:
    name, model, processor = loaded
    if name == "tiny-llava":
        pytest.importorskip("easy_vqa")
    limits = {"tiny-llava": 200, "tiny-blip2-caption": 50, "tiny-blip2-retrieval": 30}
    got = score.SCORES[name](model, processor, limits[name])
    if name == "tiny-blip2-caption":
        assert got["token_f1"] > got["best_constant_token_f1"] + 0.2
    elif name == "tiny-llava":
        for source in ("scenes", "widths", "easy-vqa"):
            best = max(got[f"{source} majority"], got[f"{source} question_only"])
            assert got[f"{source} accuracy"] > best + (0.4 if source == "scenes" else 0.2)
    else:
        assert min(got["matching text_r1"], got["matching image_r1"]) > 15 * got["chance"]


def test_three_bits_hurt_the_reading_of_widths(tmp_path: Path) -> None:
    """Most questions have clear answers, which survive three bits; widths are a measurement."""
    rows = {}
    for name, bits in (("full", None), ("uniform", 3)):
        model, processor = (
            mmq.load(tiny.path("tiny-llava")),
            mmq.load_processor(tiny.path("tiny-llava")),
        )
        if bits is not None:
            samples = calibration_samples(model, processor, count=1)
            recipe = mmq.Recipe.simple(name, bits=bits)
            mmq.quantize(model, recipe, [sample.inputs for sample in samples])
        out = tmp_path / name
        result = evaluate(model, processor, ["widths"], out_dir=out, batch_size=50)
        file = out / result["tasks"]["widths"]["rows"]
        rows[name] = [json.loads(line) for line in file.read_text().splitlines()]
    scores = {
        name: {row["id"]: row["scores"]["accuracy_always"] for row in found}
        for name, found in rows.items()
    }
    images = {row["id"]: row["cluster"] for row in rows["full"]}
    assert len(images) > 1900
    lost = paired_difference(scores["full"], scores["uniform"], images, resamples=2000)
    assert lost.low > 0


def test_checkpoint_round_trips(
    loaded: tuple[str, PreTrainedModel, ProcessorMixin], tmp_path: Path
) -> None:
    name, model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor_again = _load(tmp_path)
    (before,) = data.calibration_samples(name, processor, 1, 0)
    (after,) = data.calibration_samples(name, processor_again, 1, 0)
    assert all(torch.equal(before.inputs[key], after.inputs[key]) for key in before.inputs)
    with torch.no_grad():
        key = "logits_per_image" if name == "tiny-blip2-retrieval" else "logits"
        assert torch.equal(model(**before.inputs)[key], again(**after.inputs)[key])


def test_processor_has_no_unknown_words(
    loaded: tuple[str, PreTrainedModel, ProcessorMixin],
) -> None:
    name, _, processor = loaded
    for id, shown in scenes("train", 200):
        asked = [f"{q.text} {q.answer}" for q in questions(shown, random.Random(id))]
        for text in asked if name == "tiny-llava" else captions(shown):
            assert architectures.UNK not in processor.tokenizer(text)["input_ids"], text


def test_calibration_samples(loaded: tuple[str, PreTrainedModel, ProcessorMixin]) -> None:
    name, model, processor = loaded
    samples = data.calibration_samples(name, processor, 8, seed=3)
    again = data.calibration_samples(name, processor, 8, seed=3)
    other = data.calibration_samples(name, processor, 8, seed=4)
    assert [s.id for s in samples] == [s.id for s in again] != [s.id for s in other]
    assert all(
        torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
        for a, b in zip(samples, again, strict=True)
    )
    assert not {s.id for s in samples} & {id for id, _ in scenes("test")}
    with torch.no_grad():
        for sample in samples:
            labels = [] if name == "tiny-blip2-retrieval" else ["labels"]
            assert set(sample.inputs) == {"pixel_values", "input_ids", "attention_mask", *labels}
            assert sample.inputs["input_ids"].shape[0] == 1
            assert bool(sample.inputs["attention_mask"].all())
            output = model(**sample.inputs)
            if name == "tiny-blip2-retrieval":
                matching = model(**sample.inputs, use_image_text_matching_head=True)
                assert matching.logits_per_image.shape == (1, 2)
            else:
                ids = sample.inputs["input_ids"]
                assert ids[0, -1] == architectures.EOS
                answer = sample.inputs["labels"] != -100
                assert torch.equal(sample.inputs["labels"][answer], ids[answer])
                words = processor.tokenizer.decode(ids[~answer], skip_special_tokens=True)
                prompt = "ASSISTANT:" if name == "tiny-llava" else tiny.CAPTION_PROMPT
                assert words.replace(" ", "").endswith(prompt.replace(" ", ""))
                assert output.logits.shape[:2] == ids.shape
