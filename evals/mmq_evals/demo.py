# SPDX-License-Identifier: Apache-2.0
"""The main job on the built-in tiny models: quantize, save packed, load, evaluate, one table.

Every setting is quantized from the same checkpoint, saved, loaded again and evaluated from the
packed file, so that each row is about what is on disk. Scores come with intervals over images, and
next to them stand full precision and the naive baseline of the task.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import mmq
from mmq_evals import tiny
from mmq_evals.calibration import calibration_samples
from mmq_evals.divergence import ReferenceModel
from mmq_evals.errors import EvalError
from mmq_evals.report import changed_share
from mmq_evals.run import Prepared, evaluate_prepared, make_folder, prepare, tasks_for
from mmq_evals.study.memo import Bounded, RememberingProcessor

GROUP_SIZE: Final = 64
BITS: Final = (4, 3)
METHODS: Final = ("uniform", "rtn", "gptq", "awq")
CALIBRATION_SAMPLES: Final = 64
# Items per task in the demo; CIDEr's document frequencies stay those of the whole split.
LIMITS: Final = {"captioning": 250, "retrieval": 100, "vqa": 2000, "widths": 2000, "easy-vqa": 800}

# One recipe with a method and a width per component, the connector's heads included.
MIXED: Final[Mapping[str, Any]] = {
    "vision": {"method": "gptq", "bits": 4, "group_size": GROUP_SIZE},
    "connector": {"method": "rtn", "bits": 8, "group_size": GROUP_SIZE},
    "language": {"method": "awq", "bits": 3, "group_size": GROUP_SIZE},
    "overrides": [{"third": "end", "layer_type": "mlp", "bits": 4}],
}
_CONNECTOR_HEADS: Final = {"tiny-blip2-caption": ["language_projection"]}


@dataclass(frozen=True)
class DemoRow:
    """One line of the table: a model, a setting, a task.

    ``linear_bpw`` are stored bits per weight of the packed linears, ``model_bpw`` all stored bits
    over all parameters, ``bytes`` the tensor file. ``layer_error`` is the mean over linears of the
    relative squared output error on the calibration inputs. Scores are times 100. ``agreement``
    with full precision is by measure, as a result holds it (shares in [0, 1], KL in nats); full
    precision itself has none.
    """

    model: str
    task: str
    metric: str
    method: str
    bits: str
    linear_bpw: float | None
    model_bpw: float
    bytes: int
    layer_error: float | None
    score: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    agreement: Mapping[str, Mapping[str, Any]]
    full_precision: float
    baseline_name: str
    baseline: float
    rows: int


@dataclass(frozen=True)
class DemoReport:
    """The rows, the table as text, and the file that holds both."""

    rows: tuple[DemoRow, ...]
    table: str
    path: Path


def recipes(model_name: str) -> dict[tuple[str, str], mmq.Recipe]:
    """The settings of the demo by (method, bits): each method at each width, and one mixed."""
    found: dict[tuple[str, str], mmq.Recipe] = {}
    for bits in BITS:
        for method in METHODS:
            layer: dict[str, Any] = {"method": method, "bits": bits}
            if method != "uniform":
                layer["group_size"] = GROUP_SIZE
            found[method, str(bits)] = _recipe({"all": layer})
    mixed = dict(MIXED)
    if model_name == "tiny-blip2-retrieval":
        del mixed["language"]
    if model_name in _CONNECTOR_HEADS:
        mixed["heads"] = _CONNECTOR_HEADS[model_name]
    found["mixed", "4/8/3" if "language" in mixed else "4/8"] = _recipe(mixed)
    return found


def _recipe(data: Mapping[str, Any]) -> mmq.Recipe:
    return mmq.parse_recipe({**data, "calibration": {"samples": CALIBRATION_SAMPLES}})


def run_demo(
    out: Path,
    *,
    models: Sequence[str] = tiny.MODELS,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> DemoReport:
    """Runs everything and writes ``report.md`` and ``report.json`` below ``out``.

    ``limit`` bounds the items of every task further than the demo does. Packed checkpoints, rows
    and results of each run stay in ``out``. ``progress`` receives one line per step.

    Raises MmqError on bad input, EvalError among them.
    """
    if limit is not None and limit < 1:
        raise EvalError(f"limit: expected at least 1, got {limit}")
    make_folder(out)
    started = time.monotonic()
    rows: list[DemoRow] = []
    for name in models:
        rows += _one_model(name, out / name, limit, progress)
    table = format_table(rows)
    seconds = time.monotonic() - started
    report = out / "report.md"
    (out / "report.json").write_text(
        json.dumps({"seconds": seconds, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    report.write_text(_markdown(rows, seconds))
    return DemoReport(tuple(rows), table, report)


def _one_model(
    name: str, out: Path, limit: int | None, progress: Callable[[str], None]
) -> list[DemoRow]:
    processor = mmq.load_processor(tiny.path(name))
    model = mmq.load(tiny.path(name))
    tasks = tasks_for(model)
    limits = {task: min(LIMITS[task], limit or LIMITS[task]) for task in tasks}
    prepared = {task: prepare(model, processor, [task], limit=limits[task]) for task in tasks}
    # The same images for every setting, and twice for each: answers, then logits.
    remembering = RememberingProcessor(processor, Bounded())
    samples = calibration_samples(model, processor, count=CALIBRATION_SAMPLES)

    started = time.monotonic()
    full = {
        task: _evaluate(model, remembering, prepared[task], out / "full" / task) for task in tasks
    }
    reference = ReferenceModel(model)
    stored = (tiny.path(name) / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in model.parameters())
    progress(f"{name}: full precision evaluated in {time.monotonic() - started:.0f} s")
    rows = [
        _row(name, task, "full precision", "16", None, 8 * stored / parameters, stored, None, full)
        for task in tasks
    ]
    for (method, bits), recipe in recipes(name).items():
        started = time.monotonic()
        setting = f"{method}-{bits.replace('/', '-')}"
        model = mmq.load(tiny.path(name))
        manifest = mmq.quantize(
            model,
            recipe,
            [sample.inputs for sample in samples],
            sample_ids=[sample.id for sample in samples],
        )
        (out / setting).mkdir(parents=True, exist_ok=True)
        folder = mmq.save(model, out / setting / "packed", processor, overwrite=True)
        quantized = time.monotonic()
        model = mmq.load(folder)
        results = {
            task: _evaluate(
                *(model, remembering, prepared[task]),
                out / setting / task,
                (out / "full" / task, reference),
            )
            for task in tasks
        }
        errors = [r.relative_error for r in manifest.linears if r.relative_error is not None]
        rows += [
            _row(
                name,
                task,
                method,
                bits,
                manifest.bits_per_weight,
                manifest.model_bits_per_weight,
                (folder / "model.safetensors").stat().st_size,
                sum(errors) / len(errors),
                full,
                results,
            )
            for task in tasks
        ]
        progress(
            f"{name}: {method} {bits} bits, quantized and saved in {quantized - started:.0f} s, "
            f"evaluated in {time.monotonic() - quantized:.0f} s"
        )
    return rows


def _evaluate(
    model: Any,
    processor: Any,
    prepared: Prepared,
    out: Path,
    against: tuple[Path, ReferenceModel] | None = None,
) -> dict[str, Any]:
    reference, dense = (None, None) if against is None else against
    result = evaluate_prepared(
        *(model, processor, prepared), out_dir=out, reference=reference, reference_model=dense
    )
    (task,) = prepared.tasks
    entry: dict[str, Any] = result["tasks"][task]
    return entry


def _row(
    model: str,
    task: str,
    method: str,
    bits: str,
    linear_bpw: float | None,
    model_bpw: float,
    stored: int,
    layer_error: float | None,
    full: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
) -> DemoRow:
    entry = full[task] if results is None else results[task]
    metric = entry["primary"]
    score = entry["scores"][metric]
    against = entry.get("against_reference", {})
    change = against.get("differences", {}).get(metric)
    # The strongest answer that does not look at the image.
    name, scores = max(entry["baselines"].items(), key=lambda item: float(item[1][metric]))
    return DemoRow(
        model=model,
        task=task,
        metric=metric,
        method=method,
        bits=bits,
        linear_bpw=linear_bpw,
        model_bpw=model_bpw,
        bytes=stored,
        layer_error=layer_error,
        score=100 * score["value"],
        low=100 * score["low"],
        high=100 * score["high"],
        difference=None if change is None else 100 * change["value"],
        difference_low=None if change is None else 100 * change["low"],
        difference_high=None if change is None else 100 * change["high"],
        agreement=against.get("agreement", {}),
        full_precision=100 * full[task]["scores"][metric]["value"],
        baseline_name=name,
        baseline=100 * float(scores[metric]),
        rows=entry["counts"]["rows"],
    )


COLUMNS: Final = (
    "method",
    "bits",
    "bpw linears",
    "bpw model",
    "bytes",
    "layer error",
    "score [95 %]",
    "minus full [95 %]",
    "changed",
)
KL_COLUMNS: Final = ("KL, mnat [95 %]", "99th pct [95 %]", "same first")
RANK_COLUMNS: Final = ("rank correlation [95 %]",)


def _interval(found: Mapping[str, Any] | None, factor: float, form: str) -> str:
    if found is None:
        return "-"
    value, low, high = (format(factor * found[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _share(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{100 * found['value']:.1f}"


def _cells(row: DemoRow) -> tuple[str, ...]:
    change = {
        "value": row.difference,
        "low": row.difference_low,
        "high": row.difference_high,
    }
    score = {"value": row.score, "low": row.low, "high": row.high}
    agreement = row.agreement
    cells = (
        row.method,
        row.bits,
        "-" if row.linear_bpw is None else f"{row.linear_bpw:.2f}",
        f"{row.model_bpw:.2f}",
        f"{row.bytes:,}",
        "-" if row.layer_error is None else f"{row.layer_error:.4f}",
        _interval(score, 1, ".1f"),
        _interval(None if row.difference is None else change, 1, "+.1f"),
        _share(changed_share(agreement)),
    )
    if row.task == "retrieval":
        return (*cells, _interval(agreement.get("rank correlation"), 1, ".4f"))
    return (
        *cells,
        _interval(agreement.get("logit KL"), 1000, ".2f"),
        _interval(agreement.get("logit KL, 99th percentile over tokens"), 1000, ".1f"),
        _share(agreement.get("same first token")),
    )


def _columns(row: DemoRow) -> tuple[str, ...]:
    return COLUMNS + (RANK_COLUMNS if row.task == "retrieval" else KL_COLUMNS)


def _sections(rows: Sequence[DemoRow]) -> list[tuple[str, list[DemoRow]]]:
    """Rows by model and task, each with a heading that names metric, baseline and items."""
    keys = list(dict.fromkeys((row.model, row.task) for row in rows))
    sections = []
    for model, task in keys:
        part = [row for row in rows if (row.model, row.task) == (model, task)]
        head = part[0]
        sections.append(
            (
                f"{model}, {task}: {head.metric} times 100 over {head.rows} rows; "
                f"baseline without the image ({head.baseline_name}) {head.baseline:.1f}",
                part,
            )
        )
    return sections


def format_table(rows: Sequence[DemoRow]) -> str:
    """The table for a terminal."""
    lines = []
    for heading, part in _sections(rows):
        cells = [_columns(part[0]), *(_cells(row) for row in part)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", heading]
        lines += [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
    return "\n".join(lines)


NOTES: Final = (
    "Real architectures, tiny models trained from scratch on generated scenes and public data; "
    "the figures say nothing about the damage to checkpoints of billions of parameters.",
    f"RTN, GPTQ and AWQ: groups of {GROUP_SIZE}, integer zeros, fp16 scales, each with its own "
    "range search; uniform: one scale and float minimum per matrix. Same linears in all, heads "
    "dense (but for the connector's in the mixed recipe).",
    "bpw linears: stored bits per weight of the packed linears, scales and zeros included. "
    "bpw model: all stored bits over all parameters. layer error: mean over linears of "
    "|(W' - W) x|^2 / |W x|^2 on the calibration inputs of that run. Differences are paired, over "
    "the same items.",
    "changed: share of captions, answers or first candidates that are not those of full precision, "
    "times 100. KL: of the logits from full precision's on its own answers, in thousandths of a "
    "nat: mean over images, 99th percentile over tokens. same first: share of tokens that both "
    "rank first, times 100. rank correlation: Spearman's, of retrieval's final scores.",
)


def _markdown(rows: Sequence[DemoRow], seconds: float) -> str:
    lines = ["# Tiny models, quantized, packed and evaluated", ""]
    lines += [f"Wall time {seconds:.0f} s. Command: `mmq demo`.", ""]
    lines += [f"- {note}" for note in NOTES]
    for heading, part in _sections(rows):
        lines += ["", f"## {heading}", ""]
        columns = _columns(part[0])
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in part]
    return "\n".join(lines) + "\n"
