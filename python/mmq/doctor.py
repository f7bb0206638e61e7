# SPDX-License-Identifier: Apache-2.0
"""What this machine has: kernels, instruction sets, threads, CUDA, Java, optional packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import mmq_ext

EXTRAS = {
    "easy_vqa": "the easy-vqa task (mmq[tiny])",
    "pycocoevalcap": "METEOR, SPICE and the tokenizer ptb (mmq[java])",
    "pytest_benchmark": "kernel benchmarks (mmq[bench])",
}


def _java_version() -> str | None:
    java = shutil.which("java")
    if java is None:
        return None
    shown = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    lines = (shown.stderr or shown.stdout).splitlines()
    return lines[0] if lines else "present, prints no version"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnose() -> dict[str, Any]:
    """A JSON-ready description of the machine; runs one packed product to prove the kernels."""
    return {
        "mmq": _version("mmq"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "cpu": {
            "machine": platform.machine(),
            "isa": mmq_ext.cpu_isa(),
            "isas": mmq_ext.cpu_isas(),
            "threads": torch.get_num_threads(),
            "threading": mmq_ext.threading_backend(),
            "kernels": "ok" if _kernels_agree() else "WRONG RESULT",
        },
        "cuda": _cuda(),
        "java": _java_version(),
        "extras": {
            name: {"installed": importlib.util.find_spec(name) is not None, "serves": serves}
            for name, serves in EXTRAS.items()
        },
    }


def _cuda() -> dict[str, Any]:
    """What the CUDA library holds, and whether this machine and this torch can use it."""
    available = torch.cuda.is_available()
    found: dict[str, Any] = {
        "kernels": "not in this build",
        "torch": torch.version.cuda,
        "device": torch.cuda.get_device_name() if available else None,
    }
    if not Path(mmq_ext.cuda_library_path()).exists():
        return found
    try:
        status = mmq_ext.cuda_status()
    except RuntimeError as error:
        return found | {"kernels": str(error)}
    found |= {"kernels": "usable" if not status["problem"] else status["problem"]}
    return found | {name: status[name] for name in status if name != "problem"}


def _kernels_agree() -> bool:
    """One small packed product against the same product of the dequantized weight."""
    from mmq.linear import QuantLinear
    from mmq.spec import QuantSpec

    generator = torch.Generator().manual_seed(0)
    dense = torch.nn.Linear(96, 24)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(24, 96, generator=generator))
    packed = QuantLinear.from_float(dense, QuantSpec(bits=4, group_size=32))
    x = torch.randn(3, 96, generator=generator)
    expected = torch.nn.functional.linear(x, packed.dequantize(), dense.bias)
    return torch.allclose(packed(x), expected, rtol=1e-4, atol=1e-4)


def _cuda_line(cuda: dict[str, Any]) -> str:
    parts = [f"CUDA kernels: {cuda['kernels']}"]
    if "architectures" in cuda:
        parts.append(f"built for {cuda['architectures']}")
    device = cuda["device"] or "none"
    if "capability" in cuda:
        device += f" (compute capability {cuda['capability'] / 10:.1f})"
    parts.append(f"device: {device}")
    parts.append(f"torch {'built for CUDA ' + cuda['torch'] if cuda['torch'] else 'without CUDA'}")
    return "; ".join(parts)


def format_diagnosis(diagnosis: dict[str, Any]) -> str:
    """The same as lines for a terminal."""
    cpu, cuda = diagnosis["cpu"], diagnosis["cuda"]
    lines = [
        f"mmq {diagnosis['mmq']}, Python {diagnosis['python']}, torch {diagnosis['torch']}, "
        f"transformers {diagnosis['transformers']}",
        f"CPU kernels: {cpu['kernels']}; {cpu['isa']} in use, of {', '.join(cpu['isas'])} "
        f"({cpu['machine']})",
        f"threads: {cpu['threads']} through {cpu['threading']}",
        _cuda_line(cuda),
        f"Java: {diagnosis['java'] or 'not found (METEOR and SPICE need it)'}",
    ]
    lines += [
        f"extra {name}: {'installed' if extra['installed'] else 'not installed'}, "
        f"for {extra['serves']}"
        for name, extra in diagnosis["extras"].items()
    ]
    return "\n".join(lines)
