# SPDX-License-Identifier: Apache-2.0
"""Train one of the tiny models from scratch, in float32 on the CPU.

    python -m mmq_evals.tiny.train tiny-llava --out DIR [--seed 0] [--start DIR]

One loop, three losses. First, a linear probe names the object in each patch of a scene (shape,
colour, size): it lets the vision tower see within minutes and is thrown away after training.
A finished run leaves a Hugging Face folder in float16 and ``training.json``.

``--start`` takes over every tensor of the same name and shape from an earlier checkpoint: it goes
on with a model, or gives the retrieval model the captioner's vision tower, queries and Q-Former.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmq_evals.data.items import VqaItem
from mmq_evals.tasks.vqa import LLAVA

from . import CAPTION_PROMPT, MODELS
from .architectures import BOS, EOS, Model, Processor, build, processor
from .data import vqa_items
from .scenes import (
    COLORS,
    SHAPES,
    SIZES,
    SPLIT_SIZES,
    WIDTHS,
    Scene,
    captions,
    questions,
    render,
    scene,
)
from .score import SCORES

IGNORE = -100
SCORED = 100  # held-out images or questions scored after training
TEMPERATURE = 0.05
EASY_VQA_SHARE = 0.25
QUESTIONS_PER_IMAGE = 8
REHEARSED_SHARE = 0.3


@dataclass(frozen=True)
class Stage:
    """One stage of training: warm up, then a cosine down to a hundredth."""

    steps: int
    batch: int
    learning_rate: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.02


@dataclass(frozen=True)
class Plan:
    """How one model is trained; a frozen tower is that of BLIP-2's and LLaVA's own recipes."""

    vision: Stage
    task: Stage
    freeze_vision: bool


PLANS = {
    "tiny-blip2-caption": Plan(Stage(1000, 64), Stage(1200, 64), freeze_vision=True),
    # With --start from the captioner, whose tower has learnt to see.
    "tiny-blip2-retrieval": Plan(Stage(0, 64), Stage(500, 48), freeze_vision=True),
    "tiny-llava": Plan(Stage(600, 64), Stage(800, 48), freeze_vision=False),
}

# A loss computes the task's loss for samples of given numbers, and says which scenes were shown
# (None for an image that is no scene).
Shown = list[Scene | None]
Loss = Callable[[list[int]], tuple[Tensor, Shown]]


class PatchProbe(nn.Module):
    """Linear heads: shape, colour, size and width of the object centred in a patch, or none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = {"shape": SHAPES, "color": tuple(COLORS), "size": SIZES, "width": WIDTHS}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(words) + 1) for name, words in self.words.items()}
        )

    def forward(self, features: Tensor, shown: Shown) -> Tensor:
        """Mean cross-entropy; ``features``: (batch, 1 + patches, width), class token first."""
        losses = []
        for name, words in self.words.items():
            target = torch.zeros(features.shape[0], features.shape[1] - 1, dtype=torch.long)
            for row, drawn in enumerate(shown):
                if drawn is None:
                    target[row] = IGNORE
                    continue
                for thing in drawn.things:
                    target[row, thing.patch] = 1 + words.index(getattr(thing, name))
            logits = self.heads[name](features[:, 1:])
            losses.append(
                cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE)
            )
        return torch.stack(losses).mean()


def _labels(input_ids: Tensor, starts: list[list[int]]) -> Tensor:
    """The ids from each start of a row up to and with the next end token, ``IGNORE`` elsewhere."""
    labels = torch.full_like(input_ids, IGNORE)
    for row, tokens in enumerate(input_ids.tolist()):
        for start in starts[row]:
            end = tokens.index(EOS, start) + 1
            labels[row, start:end] = input_ids[row, start:end]
    return labels


def caption_loss(model: Model, processor: Processor) -> Loss:
    """Next-token loss on one reference caption; half of the samples have no prompt."""

    def loss(numbers: list[int]) -> tuple[Tensor, Shown]:
        shown = [scene("train", number) for number in numbers]
        rngs = [random.Random(f"caption {number}") for number in numbers]
        prompts = [CAPTION_PROMPT if rng.random() < 0.5 else "" for rng in rngs]
        chosen = [rng.choice(captions(drawn)) for rng, drawn in zip(rngs, shown, strict=True)]
        inputs = processor(
            images=[render(drawn) for drawn in shown],
            text=[f"{p} {c}</s>" for p, c in zip(prompts, chosen, strict=True)],
            padding=True,
            return_tensors="pt",
        )
        rows = inputs["input_ids"].tolist()
        starts = [[r.index(BOS) + 1 + len(p.split())] for r, p in zip(rows, prompts, strict=True)]
        output = model(**inputs, labels=_labels(inputs["input_ids"], starts))
        return output.loss, list(shown)

    return loss


def vqa_loss(model: Model, processor: Processor, focus: Collection[str] = ()) -> Loss:
    """Next-token loss on the answers of a conversation of several questions about one image.

    With types of questions in ``focus``, all others are only rehearsed: seldom asked.
    """
    by_image: dict[str, list[VqaItem]] = {}
    for item in vqa_items("train", "easy-vqa"):
        by_image.setdefault(item.image_id, []).append(item)
    photos = list(by_image.values())
    assistant = processor.tokenizer.convert_tokens_to_ids("ASSISTANT:")

    def loss(numbers: list[int]) -> tuple[Tensor, Shown]:
        shown: Shown = []
        images, texts = [], []
        for number in numbers:
            rng = random.Random(f"vqa {number}")
            if rng.random() < EASY_VQA_SHARE:
                asked = rng.choice(photos)
                images.append(asked[0].image())
                turns = [(item.question, item.answers[0]) for item in asked]
                rng.shuffle(turns)
                shown.append(None)
            else:
                drawn = scene("train", number)
                images.append(render(drawn))
                every = questions(drawn, rng)
                kept = [
                    asked
                    for asked in every
                    if not focus or asked.type in focus or rng.random() < REHEARSED_SHARE
                ]
                turns = [(asked.text, asked.answer) for asked in kept or every[:1]]
                shown.append(drawn)
            text = "".join(
                f"{LLAVA.prompt.format(question)} {answer}</s>"
                for question, answer in turns[:QUESTIONS_PER_IMAGE]
            )
            head, mark, rest = text.partition("<image>\n")
            texts.append(head + mark + rest.replace("<image>\n", ""))
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        starts = [
            [n + 1 for n, token in enumerate(row) if token == assistant]
            for row in inputs["input_ids"].tolist()
        ]
        return model(**inputs, labels=_labels(inputs["input_ids"], starts)).loss, shown

    return loss


def retrieval_loss(model: Model, processor: Processor) -> Loss:
    """Contrastive loss plus matching loss with hard negatives, as in the BLIP-2 paper's stage 1.

    For a third of the pairs, another caption of the image and another image of the caption are
    drawn as negatives by the softmax of the contrastive similarity; the matching head sees the true
    pairs and both negatives.
    """

    def loss(numbers: list[int]) -> tuple[Tensor, Shown]:
        shown = [scene("train", number) for number in numbers]
        inputs = processor(
            images=[render(drawn) for drawn in shown],
            text=[
                random.Random(f"retrieval {number}").choice(captions(drawn))
                for number, drawn in zip(numbers, shown, strict=True)
            ],
            padding=True,
            return_tensors="pt",
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        pairs = model(**inputs)
        features = pairs.vision_model_output.last_hidden_state
        similarity = pairs.logits_per_image / TEMPERATURE
        same = torch.tensor([[a.content == b.content for a in shown] for b in shown])
        own = torch.eye(len(shown), dtype=torch.bool)
        similarity = similarity.masked_fill(same & ~own, float("-inf"))
        true = torch.arange(len(shown))
        contrastive = cross_entropy(similarity, true) + cross_entropy(similarity.t(), true)

        chance = similarity.detach().masked_fill(own, float("-inf"))
        true = true[: len(shown) // 3]
        hard_texts = torch.multinomial(chance.softmax(dim=1), 1).flatten()[true]
        hard_images = torch.multinomial(chance.t().softmax(dim=1), 1).flatten()[true]
        image_rows = torch.cat([true, true, hard_images])
        text_rows = torch.cat([true, hard_texts, true])
        queries = model.query_tokens.expand(len(image_rows), -1, -1)
        seen = torch.ones(queries.shape[:2], dtype=torch.long)
        hidden = model.qformer(
            query_embeds=model.embeddings(input_ids=ids[text_rows], query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([seen, mask[text_rows]], dim=1),
            encoder_hidden_states=features[image_rows],
        ).last_hidden_state
        logits = model.itm_head(hidden[:, : queries.shape[1]]).mean(dim=1)
        matches = (torch.arange(len(image_rows)) < len(true)).long()
        return contrastive / 2 + cross_entropy(logits, matches), list(shown)

    return loss


LOSSES = {
    "tiny-blip2-caption": caption_loss,
    "tiny-blip2-retrieval": retrieval_loss,
    "tiny-llava": vqa_loss,
}


def _fit(
    label: str,
    modules: list[nn.Module],
    loss: Callable[[list[int]], Tensor],
    stage: Stage,
    seed: int,
) -> list[float]:
    """Minimise ``loss`` over the modules' trainable parameters; its mean of each hundred steps."""
    if stage.steps == 0:
        return []
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, stage.learning_rate, betas=(0.9, 0.98), weight_decay=stage.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / stage.warmup,
            0.01 + 0.99 * (1 + math.cos(math.pi * step / stage.steps)) / 2,
        ),
    )
    order = random.Random(seed)
    history: list[float] = []
    recent: list[float] = []
    started = time.monotonic()
    for step in range(1, stage.steps + 1):
        value = loss([order.randrange(SPLIT_SIZES["train"]) for _ in range(stage.batch)])
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(value.item())
        if step % 100 == 0 or step == stage.steps:
            history.append(round(sum(recent) / len(recent), 4))
            recent.clear()
            seconds = time.monotonic() - started
            print(f"{label} {step}/{stage.steps} loss {history[-1]} {seconds:.0f} s", flush=True)
    return history


def train(
    name: str, plan: Plan, seed: int, start: Path | None = None, focus: Collection[str] = ()
) -> tuple[Model, Processor, dict[str, list[float]]]:
    """The trained model, its processor, and each stage's mean loss of every hundred steps.

    First the vision tower alone learns to see, through the probe; then the whole model, or all but
    the tower, learns the task; LLaVA mostly with the types of questions in ``focus``, if any.
    """
    torch.manual_seed(seed)
    model, words = build(name), processor(name)
    if start is not None:
        mine = model.state_dict()
        # Through the class, as names on disk need not be those of the modules (LLaVA's are not).
        config = json.loads((start / "config.json").read_text(encoding="utf-8"))
        kind = getattr(transformers, config["architectures"][0])
        given = kind.from_pretrained(start, dtype=torch.float32).state_dict().items()
        same = {k: v for k, v in given if k in mine and v.shape == mine[k].shape}
        model.load_state_dict(same, strict=False)
        print(f"{name}: {len(same)} of {len(mine)} tensors from {start.name}", flush=True)
    tower = model.model.vision_tower if name == "tiny-llava" else model.vision_model
    probe = PatchProbe(tower.config.hidden_size)
    losses_of = LOSSES | {"tiny-llava": partial(vqa_loss, focus=focus)}
    task_loss = losses_of[name](model, words)

    def see(numbers: list[int]) -> Tensor:
        shown = [scene("train", number) for number in numbers]
        images = words.image_processor([render(drawn) for drawn in shown], return_tensors="pt")
        loss: Tensor = probe(tower(images["pixel_values"]).last_hidden_state, list(shown))
        return loss

    features: list[Tensor] = []

    def learn(numbers: list[int]) -> Tensor:
        features.clear()
        task, shown = task_loss(numbers)
        return task if plan.freeze_vision else task + probe(features[0], shown) / 2

    losses = {"vision": _fit(f"{name} vision", [tower, probe], see, plan.vision, seed)}
    tower.requires_grad_(not plan.freeze_vision)
    hook = tower.register_forward_hook(
        lambda module, inputs, output: features.append(output.last_hidden_state)
    )
    losses["task"] = _fit(f"{name} task", [model, probe], learn, plan.task, seed + 1)
    hook.remove()
    return model.eval(), words, losses


def _commit() -> str:
    """The commit of the working tree that holds this file, or "unknown" outside of one."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one of the tiny models from scratch.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps on the task; default: the model's plan")
    parser.add_argument("--vision-steps", type=int, help="steps of the vision tower alone before")
    parser.add_argument("--start", type=Path, help="folder of an earlier checkpoint")
    parser.add_argument("--focus", nargs="*", default=[], help="LLaVA: question types to ask most")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = PLANS[args.name]
    if args.steps is not None:
        plan = replace(plan, task=replace(plan.task, steps=args.steps))
    if args.vision_steps is not None:
        plan = replace(plan, vision=replace(plan.vision, steps=args.vision_steps))
    earlier = None
    if args.start is not None:
        earlier = json.loads((args.start / "training.json").read_text(encoding="utf-8"))
    started, commit = time.monotonic(), _commit()
    model, words, losses = train(args.name, plan, args.seed, args.start, args.focus)
    seconds = time.monotonic() - started

    model.half().save_pretrained(args.out)
    words.save_pretrained(args.out)
    stored = type(model).from_pretrained(args.out, dtype=torch.float32)
    record = {
        "name": args.name,
        "seed": args.seed,
        "seconds": round(seconds),
        "threads": args.threads,
        "plan": asdict(plan),
        "focus": args.focus,
        "parameters": sum(p.numel() for p in stored.parameters()),
        "held_out": {k: round(v, 4) for k, v in SCORES[args.name](stored, words, SCORED).items()},
        "losses": losses,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "start": earlier,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["held_out"]))


if __name__ == "__main__":
    main()
