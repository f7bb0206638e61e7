# SPDX-License-Identifier: Apache-2.0
"""How fast a packed 7B-shaped model loads, and how much memory that takes.

    python tests/bench/load_table.py [--layers 8] [--bits 4] [--folder DIR]

A LLaVA with the widths of Vicuna-7B (4096, 11008, 32 heads, vocabulary 32,064) but ``--layers``
blocks, a CLIP tower of CLIP-L's widths with 2 blocks, random codes and scales, is written once to
the folder (by the format's own names, no model is quantized). Then, each in a process of its own:

- ``mmq.load`` in a new process, the import of the model's code included, and with that code there;
- every packed tensor read, validated and repacked, without a model, and ``repack`` alone;
- SHA-256 of the file, alone.

Rates are packed bytes (qweight, scales, zeros) per second; memory is the peak of anonymous pages,
and of all resident pages, above what the process had before, as a multiple of the bytes loaded. The
file is in the page cache.

A virtual machine may have to get every new page from its host, which here takes 1.2 to 2.4 s per
GB and hides the rest. So the process holds touched memory and gives it back to the system as fast
as the load takes new pages: what is measured is a machine that has its memory. ``--new-memory``
leaves that out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

CASES = ("mmq.load", "mmq.load, imported", "linears alone", "repack alone", "SHA-256 alone")
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


class Ballast:
    """Touched memory, given back in pieces as the process takes new memory, some in advance."""

    PIECE = 64 << 20
    AHEAD = 4

    def __init__(self, size: int) -> None:
        self._pieces = []
        for _ in range(-(-size // self.PIECE)):
            piece = mmap.mmap(-1, self.PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            piece.madvise(mmap.MADV_HUGEPAGE)
            for page in range(0, self.PIECE, mmap.PAGESIZE):
                piece[page] = 1
            self._pieces.append(piece)
        self._whole = len(self._pieces)

    @property
    def held(self) -> int:
        """Bytes that are not given back."""
        return len(self._pieces) * self.PIECE

    def follow(self, taken: int) -> None:
        """Gives back ``taken`` bytes in all, and the pieces in advance."""
        while self._pieces and self._whole - len(self._pieces) < taken // self.PIECE + self.AHEAD:
            self._pieces.pop().close()


class Peak:
    """Peaks of anonymous and of all resident bytes of this process above those at the start."""

    def __init__(self, ballast: Ballast) -> None:
        self.anonymous = self.resident = 0
        self._ballast = ballast
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> tuple[int, int]:
        fields = dict.fromkeys(("RssAnon", "VmRSS"), 0)
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in fields:
                fields[name] = int(rest.split()[0]) * 1024 - self._ballast.held
        return fields["RssAnon"], fields["VmRSS"]

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._note()

    def _note(self) -> None:
        anonymous, resident = self.now()
        self.anonymous = max(self.anonymous, anonymous - self._base[0])
        self.resident = max(self.resident, resident - self._base[1])
        self._ballast.follow(anonymous - self._base[0])

    def __enter__(self) -> Peak:
        self._base = self.now()
        self._ballast.follow(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._note()


def repack_alone() -> dict[str, float]:
    import torch

    from mmq_ext import ops

    words = torch.randint(-(2**31), 2**31, (11008, 512), dtype=torch.int32)
    ops.repack(words, 4, 4096)
    started = time.perf_counter()
    for _ in range(10):
        ops.repack(words, 4, 4096)
    seconds = (time.perf_counter() - started) / 10
    return {"seconds": seconds, "bytes": words.numel() * 4, "anonymous": 0, "resident": 0}


def linears(folder: Path) -> object:
    """Every packed linear of the file, ready, as the loader makes them."""
    import torch
    from safetensors import safe_open

    from mmq.hf import prepare_layers
    from mmq.linear import Layout, QuantLinear

    config = json.loads((folder / "config.json").read_text())
    layers = torch.nn.ModuleList()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for path, data in config["quantization_config"]["modules"].items():
            layer = QuantLinear.empty(Layout.from_dict(path, data))
            for name in layer.layout.tensors():
                setattr(layer, name, file.get_tensor(f"{path}.{name}"))
            layers.append(layer)
    prepare_layers(layers)
    return layers


def run_case(case: str, folder: Path, new_memory: bool) -> dict[str, float]:
    """One measurement, in this process."""
    import torch

    import mmq
    import mmq.hf
    from mmq.files import checksum
    from mmq_ext import ops

    torch.set_num_threads(min(2, os.cpu_count() or 1))
    ops.pack(torch.zeros(64, 64, dtype=torch.uint8), 4)
    if case == "repack alone":
        return repack_alone()
    if case == "mmq.load, imported":
        from transformers import LlavaForConditionalGeneration  # noqa: F401
    sizes = json.loads((folder / "bench.json").read_text())
    loads: dict[str, Callable[[Path], object]] = {
        "linears alone": linears,
        "SHA-256 alone": lambda folder: checksum(folder / "model.safetensors"),
    }
    load = loads.get(case, mmq.load)
    with Peak(Ballast(0 if new_memory else sizes["packed_bytes"] + (512 << 20))) as peak:
        started = time.perf_counter()
        kept = load(folder)
        seconds = time.perf_counter() - started
    del kept
    loaded = sizes["packed_bytes"] if case == "linears alone" else sizes["file"]
    return {
        "seconds": seconds,
        "bytes": loaded if case == "SHA-256 alone" else sizes["packed_bytes"],
        "anonymous": peak.anonymous / loaded,
        "resident": peak.resident / loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="kept; default: a temporary one")
    parser.add_argument("--new-memory", action="store_true", help="see above")
    parser.add_argument("--case", choices=CASES, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        sys.stdout.write(json.dumps(run_case(args.case, args.folder, args.new_memory)) + "\n")
        return
    work = Path(tempfile.mkdtemp()) if args.folder is None else None
    folder = args.folder or work / "model"  # type: ignore[operator]
    try:
        if not folder.exists():
            write_checkpoint(folder, args.layers, args.bits)
        sizes = json.loads((folder / "bench.json").read_text())
        config = json.loads((folder / "config.json").read_text())
        layers = config["text_config"]["num_hidden_layers"]
        sys.stdout.write(
            f"{layers} language blocks, {args.bits} bits, "
            f"{sizes['packed_bytes'] / 1e9:.2f} GB "
            f"packed, file {sizes['file'] / 1e9:.2f} GB\n"
        )
        rows = []
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", str(folder)]
            command += ["--new-memory"] * args.new_memory
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
                f"{case:<18} {middle:>7.3f} s +-{row['spread']:>4.0%} {row['gb_per_s']:>6.2f} GB/s "
                f"peak {row['anonymous']:.2f} x anonymous, {row['resident']:.2f} x resident\n"
            )
            sys.stdout.flush()
    finally:
        if work is not None:
            shutil.rmtree(work)
    sys.stdout.write(json.dumps({"layers": layers, "bits": args.bits, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
