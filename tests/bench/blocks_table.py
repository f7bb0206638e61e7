# SPDX-License-Identifier: Apache-2.0
"""Whole transformer blocks, packed at 4 bits beside dense torch: python tests/bench/blocks_table.py

Blocks of transformers, real widths and random weights: Llama as in LLaVA-7B,
OPT-2.7B, ViT-g of BLIP-2 (with its patch convolution, 2 % of the work), CLIP-L. "decode" is one
token behind a cache of ``--context``, "prefill" that many tokens at once; a tower sees the tokens
of one image. Activations are fp32 but for dense "bf16" and packed "exact bf16". All versions take
turns; times are medians, the spread is the interquartile range over the median, ratios are medians
over rounds of dense time over packed time. ``interleave`` is what a packed linear costs between two
torch products, over what it costs alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
)

import mmq
import mmq_ext

SPEC = mmq.QuantSpec(4, 128)
Run = Callable[[nn.Module], object]


def llama() -> nn.Module:
    return LlamaModel(
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, vocab_size=8)
    )


def opt() -> nn.Module:
    return OPTModel(
        OPTConfig(
            hidden_size=2560,
            word_embed_proj_dim=2560,
            ffn_dim=10240,
            num_attention_heads=32,
            num_hidden_layers=1,
            vocab_size=8,
        )
    )


def vit_g() -> nn.Module:
    return Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=1))


def clip_l() -> nn.Module:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=1,
            image_size=336,
            patch_size=14,
        )
    )


def tokens(model: nn.Module, count: int) -> Tensor:
    width: int = model.config.hidden_size  # type: ignore[assignment, union-attr]
    x = torch.randn(1, count, width, generator=torch.Generator().manual_seed(0))
    return x.to(next(model.parameters()).dtype)


def prefill(context: int) -> Run:
    return lambda model: model(inputs_embeds=tokens(model, context), use_cache=False)


def decode(context: int) -> Run:
    caches: dict[int, DynamicCache] = {}

    def run(model: nn.Module) -> object:
        cache = caches.get(id(model))
        if cache is None:
            cache = caches[id(model)] = DynamicCache(config=model.config)
            model(inputs_embeds=tokens(model, context), past_key_values=cache)
        result = model(inputs_embeds=tokens(model, 1), past_key_values=cache)
        cache.crop(-1)
        return result

    return run


def image(size: int) -> Run:
    return lambda model: model(
        pixel_values=torch.zeros(1, 3, size, size, dtype=next(model.parameters()).dtype)
    )


def packed(model: nn.Module, mode: str) -> nn.Module:
    made = copy.deepcopy(model)
    for path, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            layer = mmq.QuantLinear.from_float(module, SPEC, mode=mode)  # type: ignore[arg-type]
            made.set_submodule(path, layer)
    return made


def time_in_turn(versions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for round_ in range(rounds + 1):
        for name, run in versions.items():
            started = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


def block_rows(name: str, model: nn.Module, runs: dict[str, Run], rounds: int) -> list[object]:
    model = model.eval().requires_grad_(False)
    models = {
        "fp32": model,
        "bf16": copy.deepcopy(model).to(torch.bfloat16),
        "exact": packed(model, "exact"),
        "exact bf16": packed(model, "exact").to(torch.bfloat16),
        "int8": packed(model, "int8"),
    }
    rows: list[object] = []
    for phase, run in runs.items():
        times = time_in_turn(
            {which: lambda run=run, m=m: run(m) for which, m in models.items()},  # type: ignore[misc]
            rounds,
        )
        row: dict[str, object] = {"block": name, "phase": phase}
        cells = []
        for which, mine in times.items():
            row[which] = {"ms": 1e3 * statistics.median(mine), "spread": spread(mine)}
            cells.append(f"{which} {1e3 * statistics.median(mine):8.2f} +-{spread(mine):4.0%}")
        for which in ("exact", "exact bf16", "int8"):
            for dense in ("fp32", "bf16"):
                ratio = statistics.median(
                    a / b for a, b in zip(times[dense], times[which], strict=True)
                )
                row[f"{which} x {dense}"] = ratio
                cells.append(f"{which}/{dense} {ratio:5.2f}x")
        sys.stdout.write(f"{name:<10} {phase:<8} " + "  ".join(cells) + "\n")
        sys.stdout.flush()
        rows.append(row)
    return rows


def interleave(rounds: int) -> list[object]:
    """A packed linear between two torch products."""
    rows: list[object] = []
    a = torch.randn(256, 1024)
    b = torch.randn(1024, 1024)
    linear = nn.Linear(4096, 4096, bias=False)
    for mode in ("exact", "int8"):
        layer = mmq.QuantLinear.from_float(linear, SPEC, mode=mode)  # type: ignore[arg-type]
        for m in (1, 64):
            x = torch.randn(m, 4096)
            times = time_in_turn(
                {
                    "alone": lambda layer=layer, x=x: layer(x),  # type: ignore[misc]
                    "products": lambda: (a @ b, a @ b),
                    "between": lambda layer=layer, x=x: (a @ b, layer(x), a @ b),  # type: ignore[misc]
                },
                20 * rounds,
            )
            middle = {name: statistics.median(mine) for name, mine in times.items()}
            ratio = (middle["between"] - middle["products"]) / middle["alone"]
            rows.append({"mode": mode, "m": m, "ratio": ratio} | middle)
            sys.stdout.write(
                f"interleave {mode:<6} M={m:<3} alone {1e3 * middle['alone']:.3f} ms, between two "
                f"products {1e3 * (middle['between'] - middle['products']):.3f} ms: {ratio:.2f}x\n"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--blocks", nargs="*", default=["llama", "opt", "vit-g", "clip-l"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    text = {"decode": decode(args.context), "prefill": prefill(args.context)}
    blocks: dict[str, tuple[Callable[[], nn.Module], dict[str, Run]]] = {
        "llama": (llama, text),
        "opt": (opt, {"decode": decode(args.context), "prefill": prefill(args.context)}),
        "vit-g": (vit_g, {"257": image(224)}),
        "clip-l": (clip_l, {"577": image(336)}),
    }
    machine = {"isa": mmq_ext.cpu_isa(), "threads": args.threads, "torch": torch.__version__}
    sys.stdout.write(f"{machine} ms, context {args.context}, rounds {args.rounds}\n")
    rows: list[object] = []
    with torch.no_grad():
        for name in args.blocks:
            make, runs = blocks[name]
            rows += block_rows(name, make(), runs, args.rounds)
        rows += interleave(args.rounds)
    sys.stdout.write(json.dumps({"machine": machine, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
