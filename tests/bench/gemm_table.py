# SPDX-License-Identifier: Apache-2.0
"""Times packed_gemm beside torch, ATen and other libraries, and says of every cell: met or short.

    python tests/bench/gemm_table.py                     # the standard cells of gemm_cells.py
    python tests/bench/gemm_table.py --bits 4 --rows 1,8 --shapes 4096x4096 --group-sizes 32,128

A cell is a shape, a number of rows, a width and a group size. The cells of one shape and M are
timed together: all their kernels run in turn, round after round, so that a busy machine slows all
of them alike: quote the ratios of one run. The other libraries are those of peers.py; one without
the width takes part with the next wider one it has. With MMQ_CPU_ISA=avx2, say the same to OpenVINO
(ONEDNN_MAX_CPU_ISA=AVX2) and to ggml (MMQ_BENCH_GGML, a build without AVX-512). `x fp32` is the
median over rounds of torch's time / the kernel's of the same round; `x best` is the ratio of the
fastest rounds, which other processes disturb least. GB/s, of weights with their scales, and GFLOP/s
belong to the median. `--cpu-time` takes one thread's processor time instead of wall time, for
machines where other processes hold the cores. `--json` keeps everything, for gemm_report.py and
gemm_plot.py; it is written after every turn, and a run that was stopped goes on with the same file.
The last line is the summary as one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gemm_cases import Case, Maker, aten_int4, ours, same_case, torch_bf16, torch_fp32
from gemm_cells import TYPICAL, Cell, goal, grid, standard, turns
from gemm_report import Rows, summary, write_cells, write_head, write_rows, write_summary
from peers import exact_peers, int8_peers, missing, onnxruntime

import mmq_ext
from mmq_ext import _C

SLEEP_SECONDS = 0.005
MODES = ("exact", "int8")
DENSE = Maker(torch_fp32)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def read_bandwidth() -> float:
    """GB/s at which torch sums an array far larger than the caches; the best of some calls."""
    x = torch.ones(2**28, dtype=torch.int8).view(torch.float32)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds) / 1e9


def wait_for_sleep() -> None:
    """Until this process uses no processor: every library's threads spin for a while after a call.

    How long depends on the library and on what else runs: up to 40 ms were seen.
    """
    for _ in range(20):
        used = time.process_time()
        time.sleep(SLEEP_SECONDS)
        if time.process_time() - used < SLEEP_SECONDS / 4:
            return


def time_in_turn(
    cases: list[Case], rounds: int, calls: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of every call, per case; the first round warms up and does not count.

    Before a case has its turn the other libraries' threads fall asleep, and its own wake up in a
    call that is not timed.
    """
    seconds: list[list[float]] = [[] for _ in cases]
    for round_ in range(rounds + 1):
        for case, mine in zip(cases, seconds, strict=True):
            wait_for_sleep()
            case.run()
            for _ in range(calls if round_ else 0):
                start = clock()
                case.run()
                mine.append(clock() - start)
    return seconds


def ahead_of_ours() -> bool:
    """Whether ours is held to fewer instructions than ONNX Runtime, which always uses them all."""
    return mmq_ext.cpu_isa() != _C.cpu_isas()[0]


def kernels_of(cell: Cell) -> dict[str, list[Maker]]:
    """Ours, peers by mode, and others that are only shown."""
    others = []
    if (cell.k, cell.n) in TYPICAL and (cell.bits, cell.group_size) == (4, 128):
        others = [Maker(aten_int4, group_size=cell.group_size), Maker(torch_bf16)]
    group_size = cell.k if cell.group_size == -1 else cell.group_size
    kernels = {
        "ours": [Maker(ours, group_size=group_size, bits=cell.bits, mode=mode) for mode in MODES],
        "exact": exact_peers(cell.bits, cell.group_size, cell.k),
        "int8": int8_peers(cell.bits, cell.group_size, cell.k),
        "others": others,
    }
    if ahead_of_ours():
        for mode in MODES:
            kernels["others"] += [peer for peer in kernels[mode] if peer.func is onnxruntime]
            kernels[mode] = [peer for peer in kernels[mode] if peer.func is not onnxruntime]
    return kernels


def run_turn(cells: list[Cell], rounds: int, clock: Callable[[], float]) -> list[tuple[Rows, Rows]]:
    """For each of some cells of one shape and M: a row per kernel, and a verdict per mode."""
    k, n, m = cells[0][:3]
    found = {cell: kernels_of(cell) for cell in cells}
    makers = {same_case(DENSE): DENSE}
    for kernels in found.values():
        makers |= {same_case(maker): maker for part in kernels.values() for maker in part}
    cases = {key: maker(m, k, n) for key, maker in makers.items()}
    calls = 6 if m <= 8 else 3 if m <= 64 else 1
    rounds = rounds if m <= 8 else max(3, rounds // 2)
    timed = dict(zip(cases, time_in_turn(list(cases.values()), rounds, calls, clock), strict=True))
    return [_judged(cell, found[cell], cases, timed) for cell in cells]


def _judged(
    cell: Cell,
    kernels: dict[str, list[Maker]],
    cases: dict[tuple[object, ...], Case],
    timed: dict[tuple[object, ...], list[float]],
) -> tuple[Rows, Rows]:
    keys = {part: [same_case(maker) for maker in makers] for part, makers in kernels.items()}
    dense = same_case(DENSE)
    shown = dict.fromkeys([dense, *(key for part in keys.values() for key in part)])
    rows = [_row(cell, cases[key], timed[key], timed[dense]) for key in shown]
    verdicts = []
    for mode, own in zip(MODES, keys["ours"], strict=True):
        # From many rows on the exact mode is to keep up with dense fp32.
        rivals = [dense] if mode == "exact" and cell.m > 64 else keys[mode]
        if rivals:
            best = min(rivals, key=lambda key: statistics.median(timed[key]))
            verdicts.append(_verdict(cell, mode, cases[best].name, timed[own], timed[best]))
    return rows, verdicts


def _row(cell: Cell, case: Case, seconds: list[float], dense: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    ratios = [base / own for base, own in zip(dense, seconds, strict=True)]
    return {
        **cell._asdict(),
        "kernel": case.name,
        "median_ms": median * 1e3,
        "iqr_ms": (quartiles[2] - quartiles[0]) * 1e3,
        "best_ms": min(seconds) * 1e3,
        "gb_per_s": case.weight_bytes / median / 1e9,
        "gflop_per_s": 2 * cell.m * cell.n * cell.k / median / 1e9,
        "x_torch_fp32": statistics.median(ratios),
        "x_torch_fp32_best": min(dense) / min(seconds),
    }


def _verdict(
    cell: Cell, mode: str, peer: str, own: list[float], other: list[float]
) -> dict[str, Any]:
    ratios = [p / o for p, o in zip(other, own, strict=True)]
    ratio, wanted = statistics.median(ratios), goal(mode, cell.bits, cell.m)
    found = {"mode": mode, "peer": peer, "ratio": ratio, "ratio_best": min(other) / min(own)}
    return {**cell._asdict(), **found, "goal": wanted, "met": ratio >= wanted}


# --- a run and its file -------------------------------------------------------------------------


def conditions(args: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """What figures depend on: a file with others is not continued."""
    library = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()[:12]
    switches = ("MMQ_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MMQ_BENCH_GGML")
    return {
        "device": processor(),
        "threads": args.threads,
        "clock": clock.__name__,
        "isa": mmq_ext.cpu_isa(),
        "threading": mmq_ext.threading_backend(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "library": library,
        "switches": {name: os.environ[name] for name in switches if name in os.environ},
    }


def begin(path: Path | None, machine: dict[str, Any]) -> dict[str, Any]:
    """The run in `path` if it was stopped and its conditions are these, else an empty one."""
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        same = all(found["machine"].get(name) == value for name, value in machine.items())
        if same and not found["complete"]:
            return found
    now = {"load_average": os.getloadavg()[0], "read_gb_per_s": round(read_bandwidth(), 1)}
    return {"complete": False, "machine": {**machine, **now}, "results": [], "verdicts": []}


def save(path: Path | None, run: dict[str, Any]) -> None:
    """Written whole beside the file and renamed: a killed run leaves a readable one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(run, indent=1) + "\n")
    part.replace(path)


def has(run: dict[str, Any], cell: Cell) -> bool:
    wanted = cell._asdict().items()
    return any(all(row[name] == size for name, size in wanted) for row in run["results"])


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bits", type=_numbers, help="widths of ours, comma-separated")
    parser.add_argument("--rows", type=_numbers)
    parser.add_argument("--shapes", help="KxN, comma-separated")
    parser.add_argument("--group-sizes", type=_numbers)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
    parser.add_argument("--json", type=Path, help="keep all figures in this file")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = None
    if args.shapes is not None:
        shapes = [(int(k), int(n)) for k, n in (s.split("x") for s in args.shapes.split(","))]
    given = (shapes, args.rows, args.bits, args.group_sizes)
    cells = standard() if all(part is None for part in given) else grid(*given)
    run = begin(args.json, conditions(args, clock))
    out = sys.stdout
    if missing():
        out.write(f"not installed, left out: {', '.join(missing())}\n")
    if ahead_of_ours():
        best = _C.cpu_isas()[0]
        out.write(f"ONNX Runtime uses {best}, ours does not: shown, not compared with\n")
    out.write(" ".join(f"{name}={value}" for name, value in run["machine"].items()) + "\n")
    left = [cell for cell in cells if not has(run, cell)]
    if len(left) < len(cells):
        out.write(f"{len(cells) - len(left)} of {len(cells)} cells are taken from {args.json}\n")
    write_head(out)
    for turn in turns(left):
        for rows, judged in run_turn(turn, args.rounds, clock):
            write_rows(out, rows, judged)
            run["results"] += rows
            run["verdicts"] += judged
        save(args.json, run)
    run["complete"] = True
    save(args.json, run)
    write_cells(out, run["verdicts"])
    write_summary(out, run["verdicts"])
    last = {"machine": run["machine"], "summary": summary(run["verdicts"])}
    out.write(json.dumps(last) + "\n")


if __name__ == "__main__":
    main()
