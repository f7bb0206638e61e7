# SPDX-License-Identifier: Apache-2.0
"""How fast a packed 7B-shaped model loads, and how much memory that takes.

    python tests/bench/load_table.py [--layers 8] [--bits 4] [--folder DIR]

A LLaVA with the widths of Vicuna-7B (4096, 11008, 32 heads, vocabulary 32,064) but ``--layers``
blocks, a CLIP tower of CLIP-L's widths with 2 blocks, random codes and scales, is written once to
the folder (by the format's own names, no model is quantized). Then, each in a process of its own:
``mmq.load``; every packed tensor read, validated and repacked, without a model; and ``repack``
alone from memory. Rates are packed bytes (qweight, scales, zeros) per second; memory is the peak of
anonymous pages, and of all resident pages, above what the process had before, as a multiple of the
bytes loaded. The file is in the page cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = ("mmq.load", "linears alone", "repack alone")
GROUP = 128


def write_checkpoint(folder: Path, layers: int, bits: int) -> int:
    """Writes the folder; returns the bytes of its packed tensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from mmq.linear import Layout
    from mmq_ext import ops

    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        num_hidden_layers=layers,
        vocab_size=32064,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=2,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, dict[str, object]] = {}
    packed_bytes = 0
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".layers." not in f".{path}":
            continue
        n, k = module.out_features, module.in_features
        groups = ops.group_count(k, GROUP)
        packed = {
            "qweight": torch.randint(
                -(2**31), 2**31, (n, ops.row_words(k, bits)), dtype=torch.int32
            ),
            "scales": (torch.rand(n, groups) * 0.01 + 0.001).half(),
            "qzeros": ops.pack(torch.randint(0, 1 << bits, (n, groups), dtype=torch.uint8), bits),
        }
        packed_bytes += sum(t.numel() * t.element_size() for t in packed.values())
        tensors |= {f"{path}.{name}": tensor for name, tensor in packed.items()}
        layout = Layout(
            bits,
            GROUP,
            "integer",
            n,
            k,
            "rtn",
            "",
            "float16",
            False,
            False,
            False,
            module.bias is not None,
        )
        table[path] = layout.to_dict()
    for name, parameter in model.state_dict().items():
        if name.rpartition(".")[0] not in table or name.endswith("bias"):
            tensors[name] = torch.randn(parameter.shape).mul_(0.02).half()
    folder.mkdir(parents=True)
    data = json.loads(config.to_json_string()) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "float16",
        "quantization_config": {
            "quant_method": "mmq",
            "format_version": 1,
            "version": "bench",
            "modules": table,
        },
    }
    (folder / "config.json").write_text(json.dumps(data))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    size = (folder / "model.safetensors").stat().st_size
    sums = {"model.safetensors": {"bytes": size, "sha256": digest}}
    (folder / "checksums.json").write_text(json.dumps(sums))
    (folder / "bench.json").write_text(json.dumps({"packed_bytes": packed_bytes, "file": size}))
    return packed_bytes


class Peak:
    """Peaks of anonymous and of all resident bytes of this process above those at the start."""

    def __init__(self) -> None:
        self.anonymous = self.resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> tuple[int, int]:
        fields = dict.fromkeys(("RssAnon", "VmRSS"), 0)
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in fields:
                fields[name] = int(rest.split()[0]) * 1024
        return fields["RssAnon"], fields["VmRSS"]

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._note()

    def _note(self) -> None:
        anonymous, resident = self.now()
        self.anonymous = max(self.anonymous, anonymous - self._base[0])
        self.resident = max(self.resident, resident - self._base[1])

    def __enter__(self) -> Peak:
        self._base = self.now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._note()
        self._stop.set()
        self._thread.join()


def run_case(case: str, folder: Path) -> dict[str, float]:
    """One measurement, in this process."""
    import torch
    from safetensors import safe_open

    import mmq
    import mmq.hf
    from mmq.linear import Layout, QuantLinear
    from mmq_ext import ops

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    ops.pack(torch.zeros(64, 64, dtype=torch.uint8), 4)
    config = json.loads((folder / "config.json").read_text())
    table = config["quantization_config"]["modules"]
    kept: list[object] = []
    if case == "repack alone":
        words = torch.randint(-(2**31), 2**31, (11008, 512), dtype=torch.int32)
        ops.repack(words, 4, 4096)
        started = time.perf_counter()
        for _ in range(10):
            ops.repack(words, 4, 4096)
        seconds = (time.perf_counter() - started) / 10
        return {"seconds": seconds, "bytes": words.numel() * 4, "anonymous": 0, "resident": 0}
    with Peak() as peak:
        started = time.perf_counter()
        if case == "mmq.load":
            kept.append(mmq.load(folder))
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                for path, data in table.items():
                    layer = QuantLinear.empty(Layout.from_dict(path, data))
                    for name in layer.layout.tensors():
                        setattr(layer, name, file.get_tensor(f"{path}.{name}"))
                    layer.packed.validate(path)
                    layer.prepare()
                    kept.append(layer)
        seconds = time.perf_counter() - started
    sizes = json.loads((folder / "bench.json").read_text())
    loaded = sizes["file"] if case == "mmq.load" else sizes["packed_bytes"]
    return {
        "seconds": seconds,
        "bytes": sizes["packed_bytes"],
        "anonymous": peak.anonymous / loaded,
        "resident": peak.resident / loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="kept; default: a temporary one")
    parser.add_argument("--case", choices=CASES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(run_case(args.case, args.folder)) + "\n")
        return
    work = Path(tempfile.mkdtemp()) if args.folder is None else None
    folder = args.folder or work / "model"  # type: ignore[operator]
    try:
        if not folder.exists():
            write_checkpoint(folder, args.layers, args.bits)
        sizes = json.loads((folder / "bench.json").read_text())
        sys.stdout.write(
            f"{args.layers} language blocks, {args.bits} bits, "
            f"{sizes['packed_bytes'] / 1e9:.2f} GB "
            f"packed, file {sizes['file'] / 1e9:.2f} GB\n"
        )
        rows = []
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
            runs = [
                json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                for _ in range(args.rounds)
            ]
            seconds = [run["seconds"] for run in runs]
            middle = statistics.median(seconds)
            row = {
                "case": case,
                "seconds": middle,
                "spread": (max(seconds) - min(seconds)) / middle,
                "gb_per_s": runs[0]["bytes"] / middle / 1e9,
                "anonymous": max(run["anonymous"] for run in runs),
                "resident": max(run["resident"] for run in runs),
            }
            rows.append(row)
            sys.stdout.write(
                f"{case:<14} {middle:>7.3f} s +-{row['spread']:>4.0%} {row['gb_per_s']:>6.2f} GB/s "
                f"peak {row['anonymous']:.2f} x anonymous, {row['resident']:.2f} x resident\n"
            )
            sys.stdout.flush()
    finally:
        if work is not None:
            shutil.rmtree(work)
    sys.stdout.write(json.dumps({"layers": args.layers, "bits": args.bits, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
