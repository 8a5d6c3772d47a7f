"""Pruning under a bound, on a network that was really trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from answers import measured

pytest.importorskip("torch", reason="pruning with distillation needs torch")

from edgewise.calibration.data import from_arrays
from edgewise.models.digits import load_digits, load_digits_net
from edgewise.optimizer import files, optimization, prune, pruning
from edgewise.optimizer.pipeline import no_progress
from edgewise.optimizer.pruning import split_to_prune
from edgewise.optimizer.quick_int8 import QuickInt8
from edgewise.optimizer.recipe import Benchmark, Prune, Quantize, Recipe
from edgewise.optimizer.report import Amount, Report, best_amount
from edgewise.optimizer.torch_export import export
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import TensorSpec
from edgewise.runtime.latency import LatencyReport

EFFORT = 0.004
"""Of the default: some epochs of a small net."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network in a folder with unlabelled samples beside it."""
    folder = tmp_path_factory.mktemp("digits")
    export(load_digits_net(), ["image=1x1x8x8"], folder / "net.onnx")
    np.savez(folder / "samples.npz", image=load_digits().train_images[:320])
    np.savez(folder / "few.npz", image=load_digits().train_images[:96])
    return folder


def pruned(folder: Path, out: Path, *, data: str = "samples.npz", **options: object) -> Report:
    """The job, in float and without a benchmark unless `options` say otherwise."""
    recipe = Recipe(quantize=None, benchmark=None, threads=1)
    chosen = {key: value for key, value in options.items() if key in Recipe.model_fields}
    rest = {"effort": EFFORT, **{k: v for k, v in options.items() if k not in chosen}}
    recipe = recipe.with_options(**chosen, prune=Prune(**rest).model_dump())
    return prune(folder / "net.onnx", out, data=str(folder / data), recipe=recipe)


def with_signs_for_weights(model: ir.Model) -> ir.Model:
    """A copy of which less is left than of one in int8."""
    crude = model.clone()
    for value in crude.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32 and array.ndim > 1:
            value.const_value = ir.tensor(np.sign(array), name=value.name)
    return crude


def test_half_of_the_work_leaves_and_the_answers_stay(digits: Path, tmp_path: Path) -> None:
    report = pruned(digits, tmp_path / "out.onnx", max_macs=0.5, recover="closed-form")
    (amount,) = report.amounts
    assert 0.4 < amount.macs <= 0.5
    assert report.output.parameters < 0.75 * report.input.parameters
    assert report.chosen == "pruned"
    assert report.score is not None
    assert report.score.after >= 0.9
    files.load(tmp_path / "out.onnx")


def test_distillation_is_told_and_does_no_harm(digits: Path, tmp_path: Path) -> None:
    report = pruned(digits, tmp_path / "out.onnx", max_macs=0.12)
    assert report.history is not None
    assert report.history.best.held_back <= report.history.start.held_back
    steps = {step.step: step.status for step in report.steps}
    assert steps["closed-form recovery"] == "applied"
    assert steps["distillation"] in ("applied", "left out")
    json.dumps(report.to_dict())
    assert "Amounts of pruning" in report.to_markdown()


def test_a_bound_on_the_metric_is_kept_by_what_is_written(digits: Path, tmp_path: Path) -> None:
    report = pruned(digits, tmp_path / "out.onnx", max_drop=0.02, trials=2, recover="closed-form")
    assert report.score is not None
    assert report.score.after >= report.score.before - report.score.allowed
    kept = [a.budget for a in report.amounts if a.keeps_bound]
    lost = [a.budget for a in report.amounts if not a.keeps_bound]
    assert min(kept) < 1
    assert all(budget < min(kept) for budget in lost)


@pytest.mark.slow  # it measures
def test_every_amount_is_timed_where_time_counts(digits: Path, tmp_path: Path) -> None:
    benchmark = Benchmark(max_seconds=1.0).model_dump()
    report = pruned(
        digits, tmp_path / "out.onnx", max_drop=0.5, trials=2, recover="none", cost="macs",
        score="magnitude-l2", benchmark=benchmark,
    )  # fmt: skip
    assert len(report.amounts) == 2
    assert all(a.speedup is not None and a.speedup > 0 for a in report.amounts)


@pytest.mark.parametrize(
    ("objective", "bound", "counted"),
    [
        ("latency", {}, "latency"),
        ("size", {}, "size"),
        ("balanced", {}, "balanced"),
        ("balanced", {"max_macs": 0.5}, "macs"),
        ("latency", {"max_size": 1.0}, "size"),
        ("latency", {"max_macs": 0.5, "cost": "balanced"}, "balanced"),
    ],
)
def test_what_is_saved_is_what_the_bound_or_the_objective_is_about(
    objective: str, bound: dict[str, object], counted: str
) -> None:
    recipe = Recipe().with_options(objective=objective, prune=Prune.model_validate(bound).model_dump())
    assert pruning._counted(recipe) == counted


@pytest.mark.parametrize(
    ("crossing", "middle"),
    [(0.5, 0.5), (0.4, 0.574), (0.0, 0.707), (1.0, 0.354)],  # 0.25 ** (0.5, 0.4, 0.25, 0.75)
)
def test_the_next_amount_is_where_the_bound_is_expected(crossing: float, middle: float) -> None:
    (one,) = pruning._between(1.0, 0.25, crossing, 1)
    assert one == pytest.approx(middle, abs=1e-3)
    many = pruning._between(1.0, 0.25, crossing, 3)
    assert many[1] == pytest.approx(one)
    assert 1.0 > many[0] > many[1] > many[2] > 0.25


LITTLE, MUCH = (
    Amount(b, b, 1000, size, 0.9, None, True, x) for b, size, x in ((0.2, 900, 2.0), (0.5, 500, 1.5))
)


@pytest.mark.parametrize(("objective", "best"), [("latency", LITTLE), ("size", MUCH), ("balanced", MUCH)])
def test_the_objective_picks_among_amounts(objective: str, best: Amount) -> None:
    assert best_amount((MUCH, LITTLE), objective) is best
    broken = dataclasses.replace(best, keeps_bound=False)
    assert best_amount((LITTLE, MUCH, broken), objective) is best


def test_of_amounts_that_nobody_timed_the_least_is_best() -> None:
    least, more = (dataclasses.replace(a, speedup=None) for a in (LITTLE, MUCH))
    assert best_amount((more, least), "latency") is least
    low, high = (dataclasses.replace(a, keeps_bound=False, score=s) for a, s in ((least, 0.3), (more, 0.8)))
    assert best_amount((low, high), "latency") is high


def test_the_ratio_is_of_every_layers_channels(digits: Path, tmp_path: Path) -> None:
    report = pruned(digits, tmp_path / "out.onnx", ratio=0.5, recover="none")
    assert report.output.parameters < 0.4 * report.input.parameters


def test_the_size_is_that_of_the_file(digits: Path, tmp_path: Path) -> None:
    wanted = 0.15 * (digits / "net.onnx").stat().st_size / 1e6
    report = pruned(digits, tmp_path / "out.onnx", max_size=wanted, recover="none")
    assert 0.8 * wanted < report.output.bytes / 1e6 < 1.05 * wanted  # the stamp is not counted


@pytest.mark.parametrize("cost", ["macs", "size"])
def test_what_is_saved_may_be_another_cost_than_the_bounds(cost: str, digits: Path, tmp_path: Path) -> None:
    report = pruned(
        digits, tmp_path / f"{cost}.onnx", max_macs=0.5, recover="none", score="random", cost=cost
    )
    (amount,) = report.amounts
    assert 0.4 < amount.macs <= 0.5


@pytest.mark.slow  # several searches
def test_the_same_seed_gives_the_same_file(digits: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        pruned(digits, tmp_path / name, data="few.npz", max_macs=0.12, schedule=2)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.slow  # several searches
def test_an_interrupted_search_goes_on(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried is not tried again, though fewer amounts are wanted now, and the end is the same."""
    options = {"max_drop": 0.02, "trials": 2, "recover": "reestimate"}
    pruned(digits, tmp_path / "whole.onnx", **options)
    tried: list[float] = []
    real = pruning.try_out

    def interrupted(task: pruning.Task, budget: float, progress: pruning.Progress = no_progress) -> object:
        tried.append(budget)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return real(task, budget, progress)

    monkeypatch.setattr(pruning, "try_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruned(digits, tmp_path / "out.onnx", **{**options, "trials": 3})
    assert not (tmp_path / "out.onnx").exists()
    pruned(digits, tmp_path / "out.onnx", **options)
    assert len(tried) == 3
    assert tried[1] == tried[2]
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_int8_follows_under_the_same_bound(digits: Path, tmp_path: Path) -> None:
    recipe = Recipe().quantize
    assert recipe is not None
    quantize = recipe.model_copy(update={"search": False, "ladder": (), "methods": ("minmax",)})
    report = pruned(
        digits, tmp_path / "out.onnx", max_drop=0.03, trials=1, recover="closed-form",
        quantize=quantize.model_dump(),
    )  # fmt: skip
    assert report.amounts[0].int8_score is not None
    assert report.chosen == "int8"
    assert report.output.bytes < 0.3 * report.input.bytes


@pytest.mark.parametrize("fastest", ["int8", "unpruned int8"])
def test_int8_of_the_whole_model_is_written_where_it_is_better(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    tables = {}

    def clock(paths: Mapping[str, Path], *_: object) -> LatencyReport:
        assert list(paths) == ["input", "exact", "unpruned int8", "pruned", "int8"]
        tables.update({n: files.load(p).metadata_props.get("edgewise.table") for n, p in paths.items()})
        return measured({n: (2.0, 1.9, 2.1) if n == fastest else (1.2, 1.1, 1.3) for n in paths})

    monkeypatch.setattr(optimization, "measure_files", clock)
    quantize = Quantize(search=False, ladder=(), methods=("minmax",)).model_dump()
    report = pruned(
        digits, tmp_path / "out.onnx", max_drop=0.03, trials=4, recover="closed-form", quantize=quantize
    )
    name = fastest.replace("int8", "int8 by minmax ranges")
    sizes = {candidate.name: candidate.bytes for candidate in report.candidates}
    assert report.chosen == fastest
    assert sizes["int8"] < sizes["unpruned int8"] < 0.4 * sizes["exact"]
    assert report.output.bytes == sizes[fastest]
    assert next(step.status for step in report.steps if step.step == name) == "applied"
    assert tables["int8"] != tables["unpruned int8"]
    assert files.load(tmp_path / "out.onnx").metadata_props["edgewise.table"] == tables[fastest]
    assert report.table == tables[fastest]


def test_int8_of_the_whole_model_does_not_keep_a_bound_on_what_is_left(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(paths: Mapping[str, Path], *_: object) -> LatencyReport:
        assert list(paths) == ["input", "exact", "pruned", "int8"]
        return measured({name: (1.2, 1.1, 1.3) for name in paths if name != "input"})

    monkeypatch.setattr(optimization, "measure_files", clock)
    quantize = Quantize(search=False, ladder=(), methods=("minmax",)).model_dump()
    report = pruned(digits, tmp_path / "out.onnx", max_macs=0.5, recover="closed-form", quantize=quantize)
    assert report.chosen == "int8"


def test_int8_that_breaks_the_bound_on_the_whole_model_counts_by_what_is_lost_on_top(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuickInt8, "nearest", lambda self, model: with_signs_for_weights(model))
    quantize = Quantize(search=False, ladder=(), methods=("minmax",)).model_dump()
    options = {"max_drop": 0.03, "trials": 1, "recover": "closed-form", "quantize": quantize}
    (amount,) = pruned(digits, tmp_path / "out.onnx", **options).amounts
    assert amount.int8_score is not None
    assert amount.int8_score <= amount.score
    monkeypatch.setattr(pruning, "_int8_cost", lambda *_: 0.0)
    with pytest.raises(EdgewiseError, match="no amount of pruning"):
        pruned(digits, tmp_path / "other.onnx", **options)


@pytest.mark.slow  # several searches
def test_two_processes_try_two_amounts(digits: Path, tmp_path: Path) -> None:
    report = pruned(digits, tmp_path / "out.onnx", max_drop=0.05, trials=2, workers=2, recover="none")
    assert len(report.amounts) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_macs": 0.001}, "cannot be reached"),
        ({"max_macs": 0.5, "metric": "numpy:isfinite"}, "metric numpy:isfinite failed"),
        ({"max_macs": 0.5, "data": "two.npz"}, "too few"),
        ({"max_macs": 0.5, "data": "alike.npz"}, "cannot bound"),
    ],
)
def test_what_cannot_be_done_is_told_and_nothing_written(
    digits: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    images = load_digits().train_images
    np.savez(digits / "two.npz", image=images[:2])
    np.savez(digits / "alike.npz", image=np.repeat(images[:1], 64, axis=0))
    with pytest.raises(EdgewiseError, match=words):
        pruned(digits, tmp_path / "out.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_every_amount_is_written_where_that_is_wanted(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    options = {"max_drop": 0.02, "trials": 2, "recover": "none", "candidates": str(folder)}
    report = pruned(digits, tmp_path / "out.onnx", **options)
    assert {path.name for path in folder.iterdir()} == {f"macs-{a.macs:.4f}.onnx" for a in report.amounts}
    assert all(files.load(path).graph.outputs for path in folder.iterdir())


def test_the_best_effort_is_written_at_once_with_a_word(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search without success has tried is not tried again for it."""
    options = {"min_metric": 1.5, "recover": "none", "trials": 1}
    with pytest.raises(EdgewiseError, match=r"no amount of pruning keeps agreement.*out.onnx.trials.part"):
        pruned(digits, tmp_path / "out.onnx", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx.trials.part"]
    monkeypatch.delattr(pruning, "try_out")
    report = pruned(digits, tmp_path / "out.onnx", **options, best_effort=True)
    assert any("no amount of pruning keeps" in note for note in report.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "magnitude-l2"}, "distillation needs torch: .*, or --recover closed-form"),
        ({"recover": "none"}, "the score fisher needs torch: .*, or --score magnitude-l2"),
    ],
)
def test_without_torch_a_word_tells_what_does_without(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], words: str
) -> None:
    from edgewise.training import options as training

    monkeypatch.setattr(training, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=words):
        pruned(digits, tmp_path / "out.onnx", max_macs=0.5, **options)


def test_samples_are_needed(digits: Path, tmp_path: Path) -> None:
    recipe = Recipe(prune=Prune(max_macs=0.5), benchmark=None)
    with pytest.raises(InputError, match="pass them with --data"):
        prune(digits / "net.onnx", tmp_path / "out.onnx", recipe=recipe)


def test_parts_are_apart_and_all_there() -> None:
    specs = (TensorSpec("x", np.dtype(np.float32), ("N", 1)),)
    parts = split_to_prune(from_arrays({"x": np.arange(100, dtype=np.float32)[:, None]}, specs), seed=0)
    seen = [feed["x"].item() for part in (parts.calibrate, parts.choose, parts.judge) for feed in part]
    assert sorted(seen) == list(range(100))


def test_those_for_validation_judge_and_all_others_teach() -> None:
    specs = (TensorSpec("x", np.dtype(np.float32), ("N", 1)),)
    samples, judges = (
        from_arrays({"x": np.arange(start, start + 100, dtype=np.float32)[:, None]}, specs)
        for start in (0, 100)
    )
    parts = split_to_prune(samples, seed=0, validation=judges)
    assert sorted(feed["x"].item() for part in (parts.calibrate, parts.choose) for feed in part) == list(
        range(100)
    )
    assert [feed["x"].item() for feed in parts.judge] == list(range(100, 200))


def test_labels_of_those_that_judge_are_enough(digits: Path, tmp_path: Path) -> None:
    images, labels = load_digits().test_images[:50], load_digits().test_labels[:50]
    np.savez(tmp_path / "judges.npz", image=images, labels=labels)
    recipe = Recipe(benchmark=None, threads=1, prune=Prune(max_macs=0.7, recover="closed-form"))
    recipe = recipe.with_options(quantize={"search": False})
    report = prune(
        digits / "net.onnx",
        tmp_path / "out.onnx",
        data=str(digits / "few.npz"),
        validation=str(tmp_path / "judges.npz"),
        recipe=recipe,
    )
    assert report.score is not None
    assert (report.score.metric, report.score.samples) == ("top1", 50)


def test_few_judge_where_that_decides_nothing() -> None:
    specs = (TensorSpec("x", np.dtype(np.float32), ("N", 1)),)
    samples = from_arrays({"x": np.arange(2000, dtype=np.float32)[:, None]}, specs)
    parts = split_to_prune(samples, seed=0, decides=False)
    assert [len(part) for part in (parts.calibrate, parts.choose, parts.judge)] == [1750, 125, 125]
