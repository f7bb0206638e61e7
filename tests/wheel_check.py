# SPDX-License-Identifier: Apache-2.0
"""Installs a built wheel into empty environments, one per torch version, and uses it there.

    python tests/wheel_check.py --wheel dist/mmq-0.1.0-*.whl --torch torch==2.13.0 --full

For each torch the compiled module is imported, one packed product is compared with the dense one,
the mapped libraries are checked for a second OpenMP runtime, and the CUDA kernels (a wheel that was
built beside nvcc must have them) are opened and say what this machine lacks. With ``--full`` the
tiny LLaVA is quantized and evaluated by the installed command alone, away from the source tree.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

SMOKE = """
import re, torch, mmq, mmq_ext
from mmq_ext import ops
dense = torch.nn.Linear(100, 30)
packed = mmq.QuantLinear.from_float(dense, mmq.QuantSpec(bits=3, group_size=32))
x = torch.randn(5, 100)
want = torch.nn.functional.linear(x, packed.dequantize(), dense.bias)
assert torch.allclose(packed(x), want, atol=1e-4), "packed product differs"
maps = open("/proc/self/maps").read()
runtimes = set(re.findall(r"\\S*lib(?:gomp|omp|iomp5)\\S*", maps))
print("torch", torch.__version__, mmq_ext.cpu_isa(), mmq_ext.threading_backend(), sorted(runtimes))
assert len(runtimes) == 1, f"expected one OpenMP runtime, got {sorted(runtimes)}"
assert "libmmq_cuda" not in maps, "the CUDA library is opened by an import"
if HAS_CUDA and not torch.cuda.is_available():
    found = mmq_ext.cuda_status()
    assert "no NVIDIA driver was found" in found["problem"], found
    print("CUDA kernels for", found["architectures"], "-", found["problem"])
"""
CUDA_LIBRARIES = {"mmq_ext/libmmq_cuda.so", "mmq_ext/libmmq_cudart.so"}


def run(*command: str | Path, cwd: Path) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


def has_cuda(wheel: Path) -> bool:
    """Whether the wheel holds the CUDA kernels: both libraries or none, and both beside nvcc."""
    held = CUDA_LIBRARIES & set(zipfile.ZipFile(wheel).namelist())
    wanted = CUDA_LIBRARIES if held or shutil.which("nvcc") else set()
    if held != wanted:
        raise SystemExit(f"{wheel}: expected {sorted(wanted)} in it, got {sorted(held)}")
    return bool(held)


def check(wheel: Path, torch: str, full: bool) -> None:
    """One environment: install, import, multiply; with ``full`` also quantize and evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        venv.create(root / "env", with_pip=True)
        binaries = root / "env" / "bin"
        pip = (binaries / "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, torch, cwd=root)
        run(*pip, f"{wheel.resolve()}[tiny]", cwd=root)
        smoke = f"HAS_CUDA = {has_cuda(wheel)}\n{SMOKE}"
        run(binaries / "python", "-c", smoke, cwd=root)
        run(binaries / "mmq", "doctor", cwd=root)
        if full:
            packed = root / "packed"
            run(
                *(binaries / "mmq", "quantize", "tiny-llava", "--method", "gptq", "--bits", "4"),
                *("--group-size", "64", "--out", packed, "--quiet"),
                cwd=root,
            )
            run(binaries / "mmq", "eval", packed, "--limit", "200", cwd=root)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--torch", action="append", required=True, help="a pip requirement")
    parser.add_argument("--full", action="store_true", help="also quantize and evaluate")
    args = parser.parse_args()
    for torch in args.torch:
        check(args.wheel, torch, args.full)
    print(f"wheel works beside {', '.join(args.torch)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
