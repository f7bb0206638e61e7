# SPDX-License-Identifier: Apache-2.0
"""Allocation: the knapsack against brute force, its costs against what is stored, its tables."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from calibration_samples import samples_for

import mmq
from mmq import sensitivity
from mmq.allocate import (
    Constraints,
    Option,
    allocate,
    allocated_recipe,
    budget_bytes,
    frontier,
    recipe_text,
    refine,
)
from mmq.calibrate import calibrating
from mmq.cli import main
from mmq.error_table import LARGE, Choice, ErrorTable, UnitErrors
from mmq.errors import MmqError
from mmq.linear import QuantLinear
from mmq.models import architecture_of, resolve
from mmq.outputs import OutputDivergence, gradient_energies, predictions
from mmq.prepare import calibration_batches
from mmq.recipe import load_recipe, parse_recipe
from mmq.sensitivity import Bank, measure_errors
from mmq_evals.metrics.agreement import token_agreement

WIDTHS = (2, 3, 4, 5, 6, 8)
FISHER: Any = {"objectives": ("fisher",)}
NONE: Any = {"objectives": ()}


def tiny(name: str) -> Any:
    return tiny_models.randomize(tiny_models.TINY[name](), seed=1)


def recipe_of(method: str = "gptq", **more: Any) -> mmq.Recipe:
    settings: dict[str, Any] = {"method": method, "bits": 4}
    if method != "uniform":
        settings["group_size"] = 16
    return parse_recipe({"all": {**settings, **more}})


def random_items(rng: random.Random, count: int) -> list[list[Option]]:
    """Items as tables have them, and odd ones: equal bytes, equal errors, errors that rise."""
    items = []
    for _ in range(count):
        sizes = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 6))]
        items.append(
            [Option(i, size, rng.choice((0.5, 1.0, rng.random()))) for i, size in enumerate(sizes)]
        )
    return items


def brute_force(items: list[list[Option]], budget: int) -> tuple[float, int] | None:
    """The least error within the budget, and the least bytes that give it."""
    best: tuple[float, int] | None = None
    for options in itertools.product(*items):
        size = sum(option.stored_bytes for option in options)
        error = 0.0
        for option in options:
            error += option.error
        if size <= budget and (best is None or (error, size) < best):
            best = (error, size)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force_at_every_budget(seed: int) -> None:
    rng = random.Random(seed)
    items = random_items(rng, 1 + seed % 6)
    solved = frontier(items)
    assert solved.is_exact
    largest = sum(max(o.stored_bytes for o in item) for item in items)
    for budget in range(largest + 2):
        expected = brute_force(items, budget)
        if expected is None:
            with pytest.raises(MmqError, match="budget: expected at least"):
                solved.best(budget)
            continue
        chosen = solved.best(budget)
        error = 0.0
        for option, item in zip(chosen, items, strict=True):
            assert option in item
            error += option.error
        assert (error, sum(option.stored_bytes for option in chosen)) == expected


def test_a_thinned_frontier_keeps_the_budget_and_never_worsens_with_more() -> None:
    rng = random.Random(3)
    items = [
        [Option(b, b * (1000 + 7 * i) + i, rng.random() * 4.0**-b) for b in WIDTHS]
        for i in range(12)
    ]
    exact, thinned = frontier(items, states=10**5), frontier(items, states=200)
    assert exact.is_exact
    assert not thinned.is_exact
    assert len(thinned.error) <= 201
    low = sum(min(o.stored_bytes for o in item) for item in items)
    high = sum(max(o.stored_bytes for o in item) for item in items)
    last = float("inf")
    for budget in [*range(low, high, 997), high]:
        chosen = thinned.best(budget)
        error = sum(option.error for option in chosen)
        assert sum(option.stored_bytes for option in chosen) <= budget
        assert error <= last
        last = error
        best = sum(option.error for option in exact.best(budget))
        assert best <= error + 1e-12
    middle = (low + high) // 2
    found = [sum(o.error for o in solved.best(middle)) for solved in (exact, thinned)]
    assert found[1] <= 1.1 * found[0]


def made_up(groups: int = 3) -> ErrorTable:
    """Six linears of two sizes; the linears of a group read one input."""
    units = []
    for i in range(6):
        n = 100 if i % 2 else 60
        choices = tuple(
            Choice(b, n * b * 10, (i + 1) * 4.0**-b, (6 - i) * 4.0**-b, kl=0.1 * 4.0**-b)
            for b in (*WIDTHS, 16)
        )
        units.append(
            UnitErrors(
                f"part.{i}.fc", "vision", "vision", i, "mlp", n, 80, f"g{i % groups}", "", choices
            )
        )
    return ErrorTable({}, tuple(units))


def test_constraints_hold_and_objectives_differ() -> None:
    table = made_up()
    free = allocate(table, 3.5, "relative")
    assert free.bits_per_weight <= 3.5
    assert free.exact
    assert len(set(free.bits.values())) > 1
    assert allocate(table, 3.5, "output").bits != free.bits
    fixed = Constraints(fixed=(("part.*", 3), ("*.5.fc", 16)))
    found = allocate(table, (380 * 3 + 100 * 16) / 480, "relative", fixed)
    assert found.bits == {**dict.fromkeys(free.bits, 3), "part.5.fc": 16}
    at_least = Constraints(minimum=(("*.0.fc", 6), ("*.1.fc", 4)))
    found = allocate(table, 3.9, "relative", at_least)
    assert found.bits["part.0.fc"] >= 6
    assert found.bits["part.1.fc"] >= 4
    assert found.error >= allocate(table, 3.9, "relative").error
    tied = allocate(table, 3.5, "relative", Constraints(tie_inputs=True))
    for i in range(3):
        assert tied.bits[f"part.{i}.fc"] == tied.bits[f"part.{i + 3}.fc"]
    assert tied.error >= free.error


def test_ties_go_to_fewer_bytes() -> None:
    same = tuple(Choice(b, 100 * b, 0.0, 0.0) for b in (2, 4, 8))
    unit = UnitErrors("a", "vision", "vision", 0, "mlp", 10, 80, "g", "", same)
    assert allocate(ErrorTable({}, (unit,)), 6.0, "relative").bits == {"a": 2}


@pytest.mark.parametrize(
    ("bpw", "objective", "constraints", "message"),
    [
        (1.9, "relative", {}, r"bpw: expected 2\.0000 to 16\.0000 stored bits .* got 1\.9"),
        (16.5, "relative", {}, r"bpw: expected 2\.0000 to 16\.0000 stored"),
        (float("nan"), "relative", {}, "bpw: expected"),
        (3.0, "fisher", {}, "expected a table with fisher, got none for part.0.fc"),
        (
            3.0,
            "best",
            {},
            "objective: expected one of relative, output, fisher, kl, mixed, got 'best'",
        ),
        (3.0, "relative", {"fixed": (("q*", 3),)}, r"fixed: expected 'q\*' to match"),
        (
            3.0,
            "relative",
            {"fixed": (("*", 7),)},
            "expected one of 2, 3, 4, 5, 6, 8, 16 bits, got 7",
        ),
        (
            3.0,
            "relative",
            {"fixed": (("*", 3),), "minimum": (("*.2.fc", 4),)},
            "part.2.fc: expected a width that fixed, minimum and ties allow",
        ),
        (3.0, "relative", {"minimum": (("*", 4),)}, r"bpw: expected 4\.0000 to 16\.0000"),
    ],
)
def test_refusals(bpw: float, objective: Any, constraints: Any, message: str) -> None:
    with pytest.raises(MmqError, match=message):
        allocate(made_up(), bpw, objective, Constraints(**constraints))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("blip2-opt", {"method": "gptq", "gptq": {"order": "act"}}),
        ("llava", {"method": "gptq", "zero": "symmetric"}),
        ("llava", {"method": "rtn", "zero": "float"}),
        ("llava-gqa", {"method": "awq", "awq": {"steps": 4}}),
        ("blip2-retrieval", {"method": "uniform"}),
    ],
)
def test_predicted_bytes_are_those_of_the_quantized_model(name: str, settings: Any) -> None:
    """Equal, but for AWQ's and act-order's vectors that turn out to be the identity."""
    model = tiny(name)
    recipe = recipe_of(**settings)
    samples = samples_for(model)
    table = measure_errors(model, recipe, samples, (2, 3, 6), objectives=())
    uniform = [choice.stored_bytes for unit in table.units for choice in unit.choices]
    low, high = 8 * min(uniform), 8 * max(uniform)
    assert low < high
    weights = sum(unit.n * unit.k for unit in table.units)
    middle = sum(unit.choice(3).stored_bytes for unit in table.units)
    found = allocate(table, 8 * middle / weights + 0.3, "relative")
    assert len(set(found.bits.values())) > 1
    manifest = mmq.quantize(model, allocated_recipe(recipe, found), samples)
    assert {record.path: record.bits for record in manifest.linears} == found.bits
    planned = {unit.path: unit.choice(found.bits[unit.path]).stored_bytes for unit in table.units}
    stored = {record.path: record.stored_bytes for record in manifest.linears}
    optional = "awq" in settings["method"] or "gptq" in settings
    if optional:
        assert all(stored[path] <= planned[path] for path in stored)
        same = sum(stored[path] == planned[path] for path in stored)
        assert same > 0.6 * len(stored)
    else:
        assert stored == planned
        assert manifest.packed_bytes == found.stored_bytes
    assert manifest.bits_per_weight is not None
    assert manifest.bits_per_weight <= found.bits_per_weight


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_errors_are_those_of_quantizing_on_the_full_model(method: str) -> None:
    """The table's errors at 3 bits equal a run's records with ``upstream: full``; heads too."""
    model = tiny("llava")
    samples = samples_for(model)
    data = {**recipe_of(method, bits=3).to_dict(), "heads": ["*linear_?"]}
    data["calibration"] = {"upstream": "full", "samples": 4}
    recipe = parse_recipe(data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = measure_errors(model, recipe, samples, (3, 16), objectives=())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    manifest = mmq.quantize(model, recipe, samples)
    assert [unit.path for unit in table.units] == [
        unit.path for unit in resolve(model) if unit.path in {r.path for r in manifest.linears}
    ]
    for record in manifest.linears:
        unit = next(unit for unit in table.units if unit.path == record.path)
        assert unit.choice(3).output == pytest.approx(record.output_error, rel=1e-4)
        assert unit.choice(3).relative == pytest.approx(record.relative_error, rel=1e-4)
        assert unit.choice(16) == Choice(16, 2 * unit.n * unit.k, 0.0, 0.0, 0.0, 0.0)


def test_measured_divergence_is_that_of_the_logits() -> None:
    """KL of one quantized linear, recomputed with the evaluation's own function."""
    model = tiny("llava")
    samples = samples_for(model, 3)
    recipe = parse_recipe(
        {"overrides": [{"match": "*layers.1.mlp.up_proj", "method": "rtn", "group_size": 16}]}
    )
    table = measure_errors(model, recipe, samples, (2,), objectives=("kl",))
    full = [predictions(model, architecture_of(model), sample)[0].logits for sample in samples]
    mmq.quantize(
        model,
        parse_recipe({"overrides": [{**recipe.to_dict()["overrides"][0], "bits": 2}]}),
        samples,
    )
    low = [predictions(model, architecture_of(model), sample)[0].logits for sample in samples]
    found = token_agreement(torch.cat(full).detach().numpy(), torch.cat(low).detach().numpy())
    assert table.units[0].choice(2).kl == pytest.approx(float(found.kl.mean()), rel=1e-3)
    assert float(found.kl.mean()) > 0


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "blip2-retrieval", "llava"])
def test_energies_are_the_fisher_information_of_the_outputs(name: str) -> None:
    """Against sum_y p_y (d log p_y)^2 for every prediction and every class, by autograd."""
    model = tiny(name)
    architecture = architecture_of(model)
    count = 4 if "retrieval" in name else 2  # Contrastive predictions need texts of equal lengths.
    batches = calibration_batches(model, recipe_of(), samples_for(model, count))
    paths = [unit.path for unit in resolve(model) if unit.reaches_output][-9:-1:2]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with calibrating(model):
        found = gradient_energies(model, architecture, batches, paths, draws=150)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    sums = {path: torch.zeros_like(found[path]) for path in paths}
    rows = 0
    for batch in batches:
        zeros: dict[str, list[torch.Tensor]] = {path: [] for path in paths}

        def hook(path: str, zeros: Any = zeros) -> Any:
            def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                zeros[path].append(torch.zeros_like(output, requires_grad=True))
                return output + zeros[path][-1]

            return add

        handles = [model.get_submodule(p).register_forward_hook(hook(p)) for p in paths]
        logs = [p.logits.log_softmax(dim=-1) for p in predictions(model, architecture, batch)]
        for handle in handles:
            handle.remove()
        rows += sum(map(len, logs))
        flat = [(path, zero) for path in paths for zero in zeros[path]]
        for value in (value for log in logs for value in log.flatten()):
            gradients = torch.autograd.grad(
                value, [zero for _, zero in flat], retain_graph=True, allow_unused=True
            )
            for (path, _), gradient in zip(flat, gradients, strict=True):
                if gradient is not None:
                    squares = gradient.double().square().flatten(0, -2).sum(dim=0)
                    sums[path] += float(value.detach().exp()) * squares
    for path in paths:
        expected = sums[path] / rows
        assert float(expected.sum()) > 0
        assert float(found[path].sum() / expected.sum()) == pytest.approx(1.0, abs=0.15), path
        assert float((found[path] - expected).norm() / expected.norm()) < 0.25, path


def test_labels_choose_the_predictions() -> None:
    model = tiny("llava")
    sample = samples_for(model, 1)[0]
    labels = sample["input_ids"].clone()
    labels[:, :-2] = -100
    (free,) = predictions(model, architecture_of(model), sample)
    (forced,) = predictions(model, architecture_of(model), {**sample, "labels": labels})
    assert len(free.targets) == int((sample["input_ids"][:, 1:] != tiny_models.IMAGE_TOKEN).sum())
    assert torch.equal(forced.targets, sample["input_ids"][0, -2:])
    assert torch.allclose(forced.logits, free.logits[-2:], atol=1e-5)
    with pytest.raises(MmqError, match="expected labels or token ids"):
        predictions_without_ids(model, sample)


def predictions_without_ids(model: Any, sample: dict[str, torch.Tensor]) -> None:
    embeds = model.get_input_embeddings()(sample["input_ids"])
    predictions(model, architecture_of(model), {"inputs_embeds": embeds})


def test_mixed_measures_where_errors_are_large_and_estimates_elsewhere() -> None:
    model, recipe = tiny("llava"), recipe_of("rtn")
    samples = samples_for(model, 3)
    table = measure_errors(model, recipe, samples, (2, 4))
    both = measure_errors(model, recipe, samples, (2, 4), objectives=("fisher", "kl"))
    large = 0
    for unit, other in zip(table.units, both.units, strict=True):
        for found, whole in zip(unit.choices, other.choices, strict=True):
            assert (found.kl is not None) == (found.relative > LARGE)
            assert found.error("mixed") == (whole.kl if found.kl is not None else whole.fisher)
            assert found.error("mixed") is not None
            large += found.kl is not None
    assert 0 < large < 2 * len(table.units)
    assert allocate(table, 4.5).objective == "mixed"


def test_an_interrupted_measurement_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = tiny("llava"), recipe_of()
    samples = samples_for(model)
    whole = measure_errors(model, recipe, samples, (2, 4), **FISHER)
    file = tmp_path / "errors.json"

    class StopError(Exception):
        pass

    def stop(path: str, done: int, total: int) -> None:
        if done * 2 >= total:
            raise StopError

    with pytest.raises(StopError):
        measure_errors(model, recipe, samples, (2, 4), **FISHER, file=file, progress=stop)
    calls: list[str] = []
    real = sensitivity.quantize_weight

    def counted(weight: Any, unit: Any, *rest: Any) -> Any:
        calls.append(unit.path)
        return real(weight, unit, *rest)

    monkeypatch.setattr(sensitivity, "quantize_weight", counted)
    resumed = measure_errors(model, recipe, samples, (2, 4), **FISHER, file=file)
    assert 0 < len(calls) < 2 * len(whole.units)
    assert resumed == whole
    calls.clear()
    assert measure_errors(model, recipe, samples, (2, 4), **FISHER, file=file) == whole
    assert not calls
    wider = measure_errors(model, recipe, samples, (2, 4, 8), **FISHER, file=file)
    assert [c.bits for c in wider.units[0].choices] == [2, 4, 8]
    assert ErrorTable.read(file).units[0].choice(16).output == 0.0


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    model, recipe = tiny("llava"), recipe_of("rtn")
    samples, file = samples_for(model), tmp_path / "errors.json"
    measure_errors(model, recipe, samples, (2,), **NONE, file=file)
    with pytest.raises(MmqError, match=r"expected recipe .* measure anew"):
        measure_errors(model, recipe_of("rtn", clip="none"), samples, (2,), **NONE, file=file)
    with pytest.raises(MmqError, match=r"expected samples .* measure anew"):
        measure_errors(model, recipe, samples[1:], (2,), **NONE, file=file)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(MmqError, match=r"expected errors of these weights, .*up_proj differs"):
        measure_errors(model, recipe, samples, (2,), **NONE, file=file)
    for content, message in (
        ("{", "expected a table of errors in JSON"),
        ("[]", "expected mmq-errors version 1, got None"),
        (json.dumps({"format": "mmq-errors", "version": 2}), "version 1, got .*2"),
        (json.dumps({"format": "mmq-errors", "version": 1, "units": [{}]}), "units with choices"),
    ):
        file.write_text(content)
        with pytest.raises(MmqError, match=message):
            ErrorTable.read(file)
    with pytest.raises(MmqError, match="bits: expected 2 to 8, or 16, got 9"):
        measure_errors(model, recipe, samples, (2, 9))
    with pytest.raises(MmqError, match="bits: expected at least one width"):
        measure_errors(model, recipe, samples, ())
    with pytest.raises(MmqError, match="recipe: expected at least one linear"):
        measure_errors(model, mmq.Recipe.simple("rtn", 16), samples, (2,))


def test_refinement_lowers_the_measured_divergence_within_the_budget() -> None:
    model, recipe = tiny("llava"), recipe_of("rtn")
    samples = samples_for(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bank: Bank = {}
    table = measure_errors(model, recipe, samples, (2, 3, 4, 16), objectives=(), bank=bank)
    first = allocate(table, 4.8, "relative")
    limits = Constraints(minimum=(("*.o_proj", 3),), tie_inputs=True)
    start = allocate(table, 4.8, "relative", limits)
    for constraints, allocation in ((None, first), (limits, start)):
        found = refine(
            model, recipe, samples, table, bank, allocation, 4.8, constraints, evaluations=25
        )
        assert found.divergence is not None
        assert found.first_divergence is not None
        assert found.divergence <= found.first_divergence
        assert 8 * found.stored_bytes <= 4.8 * found.weights
        sizes = [unit.choice(found.bits[unit.path]).stored_bytes for unit in table.units]
        assert found.stored_bytes == sum(sizes)
        if constraints is None:
            assert found.divergence < found.first_divergence
    assert all(bits >= 3 for path, bits in found.bits.items() if path.endswith("o_proj"))
    groups: dict[str, set[int]] = {}
    for unit in table.units:
        groups.setdefault(unit.input_group, set()).add(found.bits[unit.path])
    assert all(len(widths) == 1 for widths in groups.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    # The measured divergence is that of the quantized model, calibrated on full inputs.
    batches = calibration_batches(model, recipe, samples)
    with calibrating(model):
        measure = OutputDivergence(model, architecture_of(model), batches)
        full = parse_recipe({**recipe.to_dict(), "calibration": {"upstream": "full"}})
        mmq.quantize(model, allocated_recipe(full, found), samples)
        assert measure() == pytest.approx(found.divergence, rel=1e-3)


def test_the_written_recipe_reads_back(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {"all": {"method": "rtn"}, "overrides": [{"match": "*.0.*", "group_size": 8}], "seed": 3}
    )
    found = allocate(made_up(), 3.3, "relative")
    allocated = allocated_recipe(recipe, found)
    file = tmp_path / "allocated.yaml"
    file.write_text(recipe_text(allocated, found, 3.3))
    assert load_recipe(file) == allocated
    assert allocated.overrides[0] == recipe.overrides[0]
    assert {o.match: o.bits for o in allocated.overrides[1:]} == found.bits
    assert file.read_text().startswith("# Widths for at most 3.3 stored bits per weight of these 6")


def test_budget_bytes() -> None:
    assert budget_bytes(8 * 1234 / 777, 777) == 1234
    assert budget_bytes(-1.0, 10) == budget_bytes(float("inf"), 10) == -1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "allocated.yaml"
    recipe.write_text(
        "overrides: [{component: language, third: end, method: rtn, group_size: 64}]\n"
        "calibration: {samples: 2}\n"
    )
    errors = tmp_path / "errors.json"
    common = ["allocate", "tiny-llava", "--recipe", str(recipe), "--errors", str(errors)]
    given = [*common, "--out", str(out), "--bpw"]
    assert (
        main([*given, "3.1", "--min-bits", "*.down_proj=3", "--refine", "2", "--bits", "2,3,4,8"])
        == 0
    )
    text = capsys.readouterr().out
    assert "7 linears:" in text
    assert "stored bits per weight of them, budget 3.1" in text
    packed = tmp_path / "packed"
    assert (
        main(["quantize", "tiny-llava", "--recipe", str(out), "--out", str(packed), "--quiet"]) == 0
    )
    manifest = json.loads((packed / "manifest.json").read_text())
    assert 2.5 < manifest["bits_per_weight"] <= 3.1
    for argv, message in (
        ([*given, "1.5"], "bpw: expected 2.3980 to 8.4251 stored bits per weight of the 7 linears"),
        ([*given, "99"], "got 99"),
        ([*given, "3", "--bits", "2,x"], "expected a width in bits, got 'x'"),
        ([*given, "3", "--bits", "2,9"], "expected 2 to 8, or 16, got 9"),
        ([*given, "3", "--fix", "down"], "--fix: expected GLOB=BITS, got 'down'"),
        ([*given, "3", "--fix", "*nothing=3"], "to match a linear"),
        ([*given, "3", "--refine", "-1"], "refine: expected at least 0"),
        (
            [*common, "--bpw", "3", "--out", str(tmp_path / "no" / "x.yaml")],
            "out: expected a .yaml",
        ),
    ):
        capsys.readouterr()
        assert main(argv) == 2
        lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("mmq:")]
        assert len(lines) == 1
        assert message in lines[0]


def test_the_bank_holds_what_would_be_packed() -> None:
    model, recipe = tiny("llava"), recipe_of("awq")
    samples = samples_for(model)
    bank: Bank = {}
    measure_errors(model, recipe, samples, (3,), objectives=(), bank=bank)
    full = parse_recipe({**recipe_of("awq", bits=3).to_dict(), "calibration": {"upstream": "full"}})
    before = {
        path: module.weight.detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    mmq.quantize(model, full, samples)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {path for path, _ in bank} == set(layers)
    for (path, _), packed in bank.items():
        assert packed.effective_weight().shape == before[path].shape
        error = (packed.effective_weight() - before[path]).norm() / before[path].norm()
        assert float(error) < 0.5
