# SPDX-License-Identifier: Apache-2.0
"""From settings to runs: what each tensor gets decides which settings are one and the same run."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import mmq
from mmq.architectures import COMPONENTS
from mmq.correction import corrects
from mmq.errors import MmqError
from mmq.models import LinearUnit, resolve
from mmq.plan import LayerPlan, Plan, plan_units
from mmq.recipe import UNTOUCHED_BITS, Recipe
from mmq_evals import tiny
from mmq_evals.errors import EvalError
from mmq_evals.rows import model_fingerprint
from mmq_evals.run import Prepared, prepare, protocol_hash
from mmq_evals.study.grid import Setting, Study, expand, finer_selectors, selector_of

MIXED: Final = "mixed"
ID_LENGTH: Final = 16


@dataclass(frozen=True)
class Run:
    """One model under one recipe on some tasks.

    ``columns`` are those of the table that are known before it runs. ``parts`` are the keys of its
    quantized components, ``reference`` the run that it is paired with: the same model and tasks in
    full precision, None for that one itself.
    """

    run_id: str
    model: str
    tasks: tuple[str, ...]
    recipe: dict[str, Any]
    columns: dict[str, Any]
    parts: dict[str, str]
    reference: str | None


@dataclass(frozen=True)
class Planned:
    """All runs of a study, the settings that they stand for, and how often settings coincide."""

    study: dict[str, Any]
    runs: list[Run]
    settings: int
    by_grid: dict[str, int] = field(default_factory=dict)

    @property
    def shared(self) -> int:
        """Settings that some other setting already stands for."""
        return self.settings - sum(not run.columns["added"] for run in self.runs)

    def summary(self) -> str:
        """Counts in one line."""
        added = sum(run.columns["added"] for run in self.runs)
        grids = ", ".join(f"{name}: {count}" for name, count in self.by_grid.items())
        return (
            f"{self.settings} settings ({grids}); {self.shared} of them give every tensor what "
            f"another gives it; {len(self.runs)} runs, {added} of them full precision for "
            "comparison"
        )


def read_plan(path: Path) -> Planned:
    """What :func:`write_plan` wrote."""
    data = json.loads(path.read_text(encoding="ascii"))
    runs = [Run(**{**run, "tasks": tuple(run["tasks"])}) for run in data.pop("runs")]
    return Planned(runs=runs, **data)


def write_plan(planned: Planned, folder: Path) -> Path:
    """Writes a plan into ``folder`` under a name of its content."""
    text = json.dumps(asdict(planned), indent=1)
    name = hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]
    path = folder / f"plan-{name}.json"
    work = path.with_suffix(".part")
    work.write_text(text + "\n", encoding="ascii")
    work.replace(path)
    return path


def model_folder(name: str) -> Path:
    """The folder of a built-in tiny model or of a local one. Raises EvalError if it is neither."""
    if name in tiny.MODELS:
        return tiny.path(name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise EvalError(
            f"model: expected a folder with a config.json or one of {', '.join(tiny.MODELS)}, "
            f"got {name!r}"
        )
    return folder


def load_model(name: str) -> tuple[Any, Any]:
    """A dense model and its processor. Raises EvalError where either is missing."""
    folder = model_folder(name)
    processor = mmq.load_processor(folder)
    if processor is None:
        raise EvalError(f"{folder}: expected a processor beside the model, got none")
    return mmq.load(folder).eval(), processor


def prepare_tasks(
    study: Mapping[str, Any], tasks: Sequence[str] | None, model: Any, processor: Any
) -> Prepared:
    """The tasks of a study for a model."""
    data = study["data"]
    return prepare(
        model,
        processor,
        tasks,
        data="tiny" if data == "tiny" else Path(data),
        split=study["split"],
        limit=study["limits"],
        batch_size=study["batch_size"],
    )


def plan_study(study: Study) -> Planned:
    """Every run of ``study``, models in turn, full precision first.

    Raises EvalError for a model, task or axis that does not fit, before anything runs.
    """
    plain = study.model_dump(mode="json", exclude={"grids", "recipe", "methods"})
    by_model: dict[str, list[tuple[tuple[str, ...] | None, Setting]]] = {}
    by_grid: dict[str, int] = {}
    for grid, settings in expand(study):
        models = study.models if grid.models is None else grid.models
        if not models:
            raise EvalError(f"grid {settings[0].grid}: expected models, got none")
        if len(set(models)) < len(models):
            raise EvalError(f"models: expected different models, got {', '.join(models)}")
        by_grid[settings[0].grid] = len(settings) * len(models)
        tasks = study.tasks if grid.tasks is None else grid.tasks
        for model in models:
            by_model.setdefault(model, []).extend((tasks, setting) for setting in settings)
    for name in by_model:
        model_folder(name)  # every name is checked before the first model is loaded
    runs: dict[str, Run] = {}
    for name, pairs in by_model.items():
        runs |= _runs_of(plain, name, pairs)
    return Planned(plain, list(runs.values()), sum(by_grid.values()), by_grid)


def _runs_of(
    study: dict[str, Any],
    name: str,
    pairs: Sequence[tuple[tuple[str, ...] | None, Setting]],
) -> dict[str, Run]:
    model, processor = load_model(name)
    fingerprint = model_fingerprint(model)
    protocols: dict[tuple[str, ...] | None, dict[str, str]] = {}
    dense: dict[tuple[str, ...] | None, Run] = {}
    runs: dict[str, Run] = {}
    units = resolve(model)
    untouched = plan_units(Recipe(), units)
    for tasks, setting in pairs:
        if tasks not in protocols:
            prepared = prepare_tasks(study, tasks, model, processor)
            hashes = {
                task: protocol_hash(protocol) for task, protocol in prepared.protocols.items()
            }
            protocols[tasks] = hashes
            dense[tasks] = _run(name, fingerprint, untouched, hashes, study["seed"], None)
            runs.setdefault(dense[tasks].run_id, dense[tasks])
        try:
            decided = plan_units(setting.recipe, units)
        except MmqError as error:
            levels = json.dumps(setting.levels)
            raise EvalError(f"grid {setting.grid}, {levels}, {name}: {error}") from error
        run = _run(name, fingerprint, decided, protocols[tasks], study["seed"], setting)
        reference = dense[tasks].run_id
        if run.run_id == reference:
            runs[reference].columns["added"] = False
        elif run.run_id not in runs:
            runs[run.run_id] = replace(run, reference=reference)
    return runs


def _run(
    name: str,
    fingerprint: str,
    decided: Plan,
    protocols: Mapping[str, str],
    seed: int,
    setting: Setting | None,
) -> Run:
    recipe = decided.recipe
    parts = part_keys(decided, fingerprint)
    levels = {} if setting is None else setting.levels
    return Run(
        run_id=_hash([fingerprint, parts, dict(protocols), seed]),
        model=name,
        tasks=tuple(protocols),
        recipe=recipe.to_dict(),
        columns={
            "grid": None if setting is None or not parts else setting.grid,
            **_summary(decided),
            **_widths(decided, levels),
            "upstream": recipe.calibration.upstream if parts else None,
            "seed": recipe.seed if parts else None,
            "levels": levels if parts else {},
            "added": setting is None,
        },
        parts=parts,
        reference=None,
    )


@functools.lru_cache(maxsize=4096)
def choice_of(layer: LayerPlan) -> dict[str, Any]:
    """What one linear gets, without the options of methods that it does not use."""
    data = asdict(layer)
    for method in ("gptq", "awq"):
        if layer.method != method:
            data.pop(method, None)
        elif data[method].get("correction") == "none":  # Then its share does not matter.
            del data[method]["correction"], data[method]["alpha"]
    data.pop("reason", None)
    return data


def part_keys(decided: Plan, fingerprint: str) -> dict[str, str]:
    """For each component that is quantized, a name of all that its part depends on.

    Calibrated behind the quantized upstream, that is everything before it, too.
    """
    recipe = decided.recipe
    used = recipe.calibration.model_dump(mode="json")
    if used["token_weights"] == "none":
        del used["token_weights"]
    if not corrects(decided.quantized()):
        del used["held_out"]
    calibration = [used, recipe.seed]
    keys: dict[str, str] = {}
    for component in COMPONENTS:
        choices = {
            unit.path: choice_of(layer)
            for unit, layer in decided.quantized()
            if unit.component == component
        }
        if choices:
            behind = list(keys.values()) if recipe.calibration.upstream == "quantized" else []
            keys[component] = _hash([fingerprint, component, choices, calibration, behind])
    return keys


def _summary(decided: Plan) -> dict[str, Any]:
    """Method and grid that all quantized linears have in common. A group size of 0 is one scale
    for the whole matrix, -1 one for each row."""
    layers = [layer for _, layer in decided.quantized()]
    specs = [layer.spec for layer in layers if layer.spec is not None]
    sizes = {0 if spec.per_tensor else spec.group_size for spec in specs}
    return {
        "method": _common((layer.method for layer in layers), "none"),
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "zero": _common((spec.zero for spec in specs), None),
        "clip": _common((spec.clip for spec in specs), None),
    }


def _common(values: Iterable[str], none: str | None) -> str | None:
    found = set(values)
    if len(found) > 1:
        return MIXED
    return found.pop() if found else none


def _widths(decided: Plan, levels: Mapping[str, Any]) -> dict[str, float | None]:
    """The width of each component and of each finer axis: that of all its linears, else their mean
    by weights. Heads count where they are quantized, or where a component has nothing else; blocks
    that no output depends on do not."""
    columns: dict[str, float | None] = {}
    for component in COMPONENTS:
        mine = [(u, layer) for u, layer in decided.layers if u.component == component]
        columns[f"bits.{component}"] = _width(mine)
    for axis in finer_selectors(dict(levels)):
        selector = selector_of(axis)
        assert selector is not None
        keys = selector.keys()
        mine = [
            (u, layer)
            for u, layer in decided.layers
            if all(getattr(u, key) == value for key, value in keys.items())
        ]
        columns[f"bits.{axis}"] = _width(mine)
    return columns


def _width(layers: Sequence[tuple[LinearUnit, LayerPlan]]) -> float | None:
    counted = [
        (unit, layer)
        for unit, layer in layers
        if unit.reaches_output and (unit.layer_type != "head" or layer.spec is not None)
    ]
    if not counted:
        return UNTOUCHED_BITS if layers else None
    widths = [UNTOUCHED_BITS if layer.spec is None else layer.spec.bits for _, layer in counted]
    if len(set(widths)) == 1:
        return widths[0]
    weights = [unit.weights for unit, _ in counted]
    return sum(w * n for w, n in zip(widths, weights, strict=True)) / sum(weights)


def _hash(content: object) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]
