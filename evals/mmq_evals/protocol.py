# SPDX-License-Identifier: Apache-2.0
"""The protocol of a task's run: all that its scores depend on but the weights, as plain JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mmq_evals.tasks.base import Task
from mmq_evals.tasks.build import Limit, limit_of, model_class


def protocol_hash(protocol: dict[str, Any]) -> str:
    """SHA-256 of a protocol block, the same for equal blocks whatever their order."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def differing_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The keys in which two protocols differ."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def run_protocols(
    model: Any, processor: Any, tasks: Mapping[str, Task], batch_size: int, limit: Limit
) -> dict[str, dict[str, Any]]:
    """The protocol of every task of a run: prompt, decoding and padding side of the task, image
    size, types, batch size, versions, and the samples."""
    common = _common_protocol(model, processor, batch_size)
    return {name: _protocol(task, common, limit_of(limit, name)) for name, task in tasks.items()}


def _common_protocol(model: Any, processor: Any, batch_size: int) -> dict[str, Any]:
    image_processor = processor.image_processor
    settings = image_processor.to_dict()
    kept = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std")
    return {
        "model_class": model_class(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "image_processor": {
            "class": type(image_processor).__name__,
            **{key: settings[key] for key in kept if key in settings},
        },
        "tokenizer_class": type(processor.tokenizer).__name__,
        "versions": {
            name: _version(name) for name in ("mmq", "torch", "transformers", "numpy", "pillow")
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _protocol(task: Task, common: dict[str, Any], limit: int | None) -> dict[str, Any]:
    ids = "\n".join(task.ids)
    dataset = task.dataset
    protocol = {
        "task": task.name,
        **task.protocol,
        **common,
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "limit": limit,
            "rows": len(task.ids),
            "ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
        },
    }
    # As it will be read back: tuples become lists, enumerations their values.
    plain: dict[str, Any] = json.loads(json.dumps(protocol))
    return plain
