# SPDX-License-Identifier: Apache-2.0
"""One process's models, tasks and quantized parts, and what makes a run of them cheap.

A model is loaded once and stays dense; parts are put in for a run and taken out again. Parts are
made once and kept on disk. Towers before the language model, and inputs, are remembered from run to
run (memo.py), so that a row is what ``mmq eval`` of the saved model would give, bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from mmq.architectures import COMPONENTS, Component
from mmq.parts import (
    Part,
    assembled,
    load_part,
    looks_back,
    prefixes_of,
    quantize_part,
    quantize_parts,
    save_part,
)
from mmq.plan import Plan, plan
from mmq.recipe import parse_recipe
from mmq.stored import account
from mmq_evals.calibration import calibration_samples
from mmq_evals.divergence import ReferenceModel
from mmq_evals.run import Prepared, evaluate_prepared
from mmq_evals.study.memo import Bounded, RememberingProcessor, remembering, size_of
from mmq_evals.study.runs import Run, load_model, prepare_tasks
from mmq_evals.study.store import Row

PARTS_NAME: Final = "parts"
ROWS_NAME: Final = "rows"
# Components whose outputs runs share: the language model comes last and is computed every time.
_REMEMBERED: Final[tuple[Component, ...]] = ("vision", "connector")
# Columns of measures of agreement with long names.
_SHORT: Final = {"logit KL": "kl", "logit KL, 99th percentile over tokens": "kl_p99"}


@dataclass(eq=False)
class _Subject:
    """A model with what belongs to it."""

    name: str
    model: Any
    processor: Any
    prepared: dict[tuple[str, ...], Prepared] = field(default_factory=dict)
    samples: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    towers: Bounded[Any] = field(default_factory=Bounded)
    inputs: Bounded[Any] = field(default_factory=Bounded)
    reference: ReferenceModel | None = None


class Bench:
    """Runs the runs of one plan in ``folder``; holds one model at a time."""

    def __init__(self, study: Mapping[str, Any], folder: Path) -> None:
        self._study, self._folder = study, folder
        self._subject: _Subject | None = None
        self._parts: Bounded[Part] = Bounded()

    def row(self, run: Run, reference: Path | None) -> Row:
        """Quantizes and evaluates one run; the row of the table, its status "done".

        ``reference`` is the folder of the full-precision rows that it is paired with.
        """
        subject = self._subject_of(run.model)
        decided = plan(parse_recipe(run.recipe), subject.model)
        started = time.monotonic()
        parts = self._parts_of(subject, decided, run)
        quantized = time.monotonic()
        folder = self._folder / ROWS_NAME / run.run_id
        dense = None if reference is None else self._reference(subject, run.tasks)
        with _in_place(subject, parts, run.parts):
            sizes = account(subject.model)
            result = evaluate_prepared(
                subject.model,
                RememberingProcessor(subject.processor, subject.inputs),
                self._prepared(subject, run.tasks),
                out_dir=folder,
                seed=self._study["seed"],
                reference=reference,
                reference_model=dense,
            )
        records = [record for part in parts for record in part.records]
        notes = sorted({note for part in parts for record in part.records for note in record.notes})
        return {
            "bpw_linears": sizes.packed_bits_per_weight,
            "bpw_model": sizes.model_bits_per_weight,
            "bytes": sizes.payload_bytes,
            "layer_error": _mean_error(records),
            "layer_errors": {part.component: _mean_error(part.records) for part in parts},
            **scores_of(result),
            "seconds.quantize": round(quantized - started, 3),
            "seconds.eval": round(time.monotonic() - quantized, 3),
            "rows": str(folder.relative_to(self._folder)),
            "notes": [*decided.coverage.notes, *notes],
        }

    def _subject_of(self, name: str) -> _Subject:
        if self._subject is None or self._subject.name != name:
            self._subject = _Subject(name, *load_model(name))
            self._parts = Bounded()
        return self._subject

    def _prepared(self, subject: _Subject, tasks: tuple[str, ...]) -> Prepared:
        if tasks not in subject.prepared:
            subject.prepared[tasks] = prepare_tasks(
                self._study, tasks, subject.model, subject.processor
            )
        return subject.prepared[tasks]

    def _reference(self, subject: _Subject, tasks: tuple[str, ...]) -> ReferenceModel | None:
        """A dense model beside the one that parts are put into, and its logits for all runs."""
        asks = (task.asking([]) for task in self._prepared(subject, tasks).tasks.values())
        if not self._study["logits"] or all(asking is None for asking in asks):
            return None
        if subject.reference is None:
            subject.reference = ReferenceModel(load_model(subject.name)[0])
        return subject.reference

    def _samples(self, subject: _Subject, count: int, seed: int) -> list[Any]:
        if (count, seed) not in subject.samples:
            data = self._study["data"]
            found = calibration_samples(
                subject.model,
                subject.processor,
                data="tiny" if data == "tiny" else Path(data),
                count=count,
                seed=seed,
            )
            subject.samples[count, seed] = [sample.inputs for sample in found]
        return subject.samples[count, seed]

    def _parts_of(self, subject: _Subject, decided: Plan, run: Run) -> list[Part]:
        """The parts of a run in the order of calibration, made where there is none on disk."""
        recipe = decided.recipe

        def samples() -> list[Any]:
            return self._samples(subject, recipe.calibration.samples, recipe.seed)

        keys = [
            (component, run.parts[component]) for component in COMPONENTS if component in run.parts
        ]
        known = [self._known(key) for _, key in keys]
        if looks_back(decided) and not all(known):
            made = quantize_parts(subject.model, decided, samples())
            known = [self._keep(part, key) for part, (_, key) in zip(made, keys, strict=True)]
        parts: list[Part] = []
        for (component, key), part in zip(keys, known, strict=True):
            if part is None:
                upstream = parts if recipe.calibration.upstream == "quantized" else []
                part = quantize_part(subject.model, decided, component, samples(), upstream)
                self._keep(part, key)
            parts.append(part)
        return parts

    def _known(self, key: str) -> Part | None:
        """A part in memory or on disk."""
        part, path = self._parts.get(key), self._path(key)
        if part is None and path.is_file():
            part = load_part(path)
            self._parts.put(key, part, _size(part))
        return part

    def _keep(self, part: Part, key: str) -> Part:
        save_part(part, self._path(key))
        self._parts.put(key, part, _size(part))
        return part

    def _path(self, key: str) -> Path:
        return self._folder / PARTS_NAME / f"{key}.safetensors"


@contextmanager
def _in_place(subject: _Subject, parts: Sequence[Part], keys: Mapping[str, str]) -> Iterator[None]:
    """The model with its parts, and its towers remembered under the names of theirs."""
    model: nn.Module = subject.model
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(assembled(model, parts))
        for component in _REMEMBERED:
            for path in prefixes_of(model, component):
                if path in dict(model.named_modules()):
                    name = f"{path} {keys.get(component, 'dense')}"
                    module = model.get_submodule(path)
                    stack.enter_context(remembering(module, name, subject.towers))
        yield


def _size(part: Part) -> int:
    held = [dict(module.named_buffers()) for module in part.packed.values()]
    return size_of([held, dict(part.dense)])


def _mean_error(records: Sequence[Any]) -> float | None:
    """Mean over linears of |(W' - W) x|^2 / |W x|^2 on the calibration inputs."""
    errors = [r.relative_error for r in records if r.relative_error is not None]
    return sum(errors) / len(errors) if errors else None


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The columns of one evaluation: scores with intervals, and what is paired with the reference.
    Scores are in [0, 1], CIDEr in [0, 10], KL in nats."""
    columns: dict[str, float] = {}
    for task, entry in result["tasks"].items():
        for metric, score in entry["scores"].items():
            name = f"{task}.{metric}"
            columns[f"score.{name}"] = score["value"]
            columns[f"low.{name}"], columns[f"high.{name}"] = score["low"], score["high"]
        against = entry.get("against_reference", {})
        for metric, change in against.get("differences", {}).items():
            name = f"{task}.{metric}"
            columns[f"diff.{name}"] = change["value"]
            columns[f"diff_low.{name}"], columns[f"diff_high.{name}"] = (
                change["low"],
                change["high"],
            )
            columns[f"p.{name}"] = change["p_value"]
        for key, found in against.get("agreement", {}).items():
            short = _SHORT.get(key, key.replace(" ", "_").replace("'", ""))
            name = f"{task}.{short}"
            columns[f"agreement.{name}"] = found["value"]
            columns[f"agreement_low.{name}"] = found["low"]
            columns[f"agreement_high.{name}"] = found["high"]
    return columns
