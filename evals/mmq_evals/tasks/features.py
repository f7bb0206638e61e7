# SPDX-License-Identifier: Apache-2.0
"""Tensors that a task computes once and reads often, as files that several processes fill together.

A folder belongs to one content: its name is the hash of all that the tensors depend on, so that
another image set, image size, weight or device never finds them. A file appears whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mmq_evals.errors import EvalError
from mmq_evals.rows import Shard

# Tensors by name, and what else is to be known about them, JSON-ready.
Features = tuple[dict[str, torch.Tensor], dict[str, Any]]


def features_folder(scratch: Path, kind: str, content: Any) -> Path:
    """The folder for tensors of a ``kind`` that depend on ``content``, which is JSON-ready."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return scratch / f"{kind}-{digest[:16]}"


def fill(folder: Path, count: int, shard: Shard, compute: Callable[[int], Features]) -> list[Path]:
    """The ``count`` files of a folder, computing those that nobody has computed yet.

    A process begins with its own share and then takes over what others have not done by then, so
    that it neither waits for them nor depends on them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"features: expected a folder, got {folder} ({error.strerror})") from error
    files = [folder / f"{number:06d}.safetensors" for number in range(count)]
    own = range(shard.rank, count, shard.count)
    # From the end: another process that is still at work comes from the beginning.
    for number in (*own, *(n for n in reversed(range(count)) if n not in own)):
        if files[number].exists():
            continue
        tensors, known = compute(number)
        part = files[number].with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            file.write(save(contiguous, metadata={"known": json.dumps(known)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, files[number])
    return files


def read_features(file: Path, device: torch.device) -> Features:
    """What `fill` was given to write.

    Raises:
        EvalError: the file is broken.
    """
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, json.loads(opened.metadata()["known"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise EvalError(f"features: {file} is broken, remove it: {error}") from None
