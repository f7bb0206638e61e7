# SPDX-License-Identifier: Apache-2.0
"""Where the time of retrieval goes: modules of the model against everything around them.

    python tests/bench/retrieval_profile.py --images 60

Times the forward passes of the tiny retrieval model's parts inside a whole prediction; what is left
is Python, numpy, tokenizing, decoding of images and files. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import mmq
from mmq_evals import tiny
from mmq_evals.tasks.build import build_tasks

PARTS = (
    "vision_model",
    "embeddings",
    "qformer",
    "vision_projection",
    "text_projection",
    "itm_head",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    name = "tiny-blip2-retrieval"
    model: Any = mmq.load(tiny.path(name))
    processor = mmq.load_processor(tiny.path(name))
    task = build_tasks(model, ["retrieval"], "tiny", "test", args.images)["retrieval"]
    seconds = dict.fromkeys(PARTS, 0.0)
    calls = dict.fromkeys(PARTS, 0)
    begun: dict[str, float] = {}
    for part in PARTS:
        module = getattr(model, part)
        module.register_forward_pre_hook(
            lambda *_, part=part: begun.__setitem__(part, time.perf_counter())
        )

        def finished(*_: Any, part: str = part) -> None:
            seconds[part] += time.perf_counter() - begun[part]
            calls[part] += 1

        module.register_forward_hook(finished)
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        parts = list(
            task.predict(model, processor, batch_size=args.batch_size, scratch=Path(folder))
        )
        predicted = time.perf_counter() - started
        started = time.perf_counter()
        rows = task.rows({row["id"]: row for row in parts})
        merged = time.perf_counter() - started
    pairs = sum(len(row["texts"]) for row in parts)
    print(
        f"{name}, {args.images} images, {len(rows)} queries, {pairs} pairs, "
        f"{torch.get_num_threads()} thread(s): {predicted:.2f} s"
    )
    for part in PARTS:
        print(f"  {part:<20}{seconds[part]:8.3f} s {100 * seconds[part] / predicted:6.1f} % "
              f"in {calls[part]} calls")  # fmt: skip
    rest = predicted - sum(seconds.values())
    print(f"  {'everything else':<20}{rest:8.3f} s {100 * rest / predicted:6.1f} %")
    print(f"queries put together from pairs: {merged:.3f} s")
    print(json.dumps({"pairs": pairs, "seconds": seconds, "total": predicted, "rest": rest}))


if __name__ == "__main__":
    main()
