"""One amount of pruning, tried: what is cut, what of the recovery stays, and for how long it learns."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from threadpoolctl import threadpool_info

pytest.importorskip("torch", reason="a trial may distil")

from rewrites import build, normal
from small_nets import classifier, constants, disturbed, images

from edgewise.calibration.data import from_arrays
from edgewise.optimizer import prune_trial
from edgewise.optimizer.parallel import pack, unpack
from edgewise.optimizer.pricing import ByMacs, price, shapes_of
from edgewise.optimizer.prune_trial import Task, Trial, planned, scored, try_out, work
from edgewise.optimizer.pruning import split_to_prune
from edgewise.optimizer.recipe import Prune
from edgewise.passes.branches import branches_of
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.infer_shapes import shapes_on
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator, TensorSpec
from edgewise.training import distillation
from edgewise.training.options import DivergedError, Epoch, History, Trained, TrainOptions

EFFORT = 1e-5
"""Of the default: some epochs of a small net."""


def make_task(width: int = 32, count: int = 64, **options: Any) -> Task:
    model = classifier(width)
    samples = images(model, count)
    chosen = Prune.model_validate({"score": "magnitude-l2", "effort": EFFORT, **options})
    parts = split_to_prune(samples, 0)
    macs = ByMacs(shapes_of(next(iter(samples))))
    scores = scored(model, parts, chosen, 0, 1)
    return Task(model, parts, scores, macs, macs, chosen, threads=1)


def share(task: Task, model: ir.Model) -> float:
    return price(model, task.macs) / price(task.model, task.macs)


def same(one: ir.Model, other: ir.Model) -> bool:
    a, b = constants(one), constants(other)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def statuses(trial: Trial) -> dict[str, str]:
    return {step.step: step.status for step in trial.steps}


def bad_refit(before: ir.Model, plan: PrunePlan, *_: Any, **__: Any) -> ir.Model:
    return disturbed(RemoveChannels(plan).on(before), 3.0)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[prune_trial.Kept]:
    """What distillation is told that the student has left of the teacher's values, at every call."""
    told: list[prune_trial.Kept] = []

    def listen(*_: Any, staying: prune_trial.Kept, **__: Any) -> Trained:
        told.append(staying)
        model = _[1]
        return Trained(model, History((Epoch(0, None, 1.0, 0.0, 0.0, 0.0),)))

    monkeypatch.setattr(distillation, "distill", listen)
    return told


@pytest.mark.parametrize("schedule", [1, 2, 3])
def test_what_stays_is_told_of_the_models_own_values(schedule: int, kept: list[prune_trial.Kept]) -> None:
    """Through all steps: indices of the values before the first of them, as many as are left in the end."""
    task = make_task(schedule=schedule)
    trial = try_out(task, 0.3)
    assert len(kept) == schedule
    shapes = {"x": (1, 1, 8, 8)}
    before, after = shapes_on(task.model, shapes), shapes_on(trial.model, shapes)
    shrunk = {
        (name, axis)
        for name, shape in after.items()
        if name in before and name not in constants(task.model)
        for axis, size in enumerate(shape)
        if size != before[name][axis]
    }
    assert shrunk
    assert shrunk <= kept[-1].keys()
    for (name, axis), indices in kept[-1].items():
        assert len(indices) == after[name][axis]
        assert np.array_equal(indices, np.unique(indices))
        assert indices[-1] < before[name][axis]


def test_the_channels_that_are_told_are_those_that_stay(kept: list[prune_trial.Kept]) -> None:
    """The first layer's filters are those of the original at the indices told, through two steps."""
    task = make_task(schedule=2, recover="distill")
    trial = try_out(task, 0.5)
    (first,) = {tuple(i.tolist()) for (name, axis), i in kept[-1].items() if name == "c1" and axis == 1}
    filters, original = constants(trial.model)["w1"], constants(task.model)["w1"]
    assert len(filters) == len(first) < len(kept[0]["c1", 1])
    # Refitting may rescale later layers; nothing rewrites filters of the first layer, which reads the input.
    np.testing.assert_array_equal(filters, original[list(first)])


def test_a_schedule_cuts_much_at_first_and_ends_where_it_should(kept: list[prune_trial.Kept]) -> None:
    task = make_task(schedule=3, recover="none")
    trial = try_out(task, 0.3)
    left = [float(step.reason.split("%")[0]) / 100 for step in trial.steps]
    assert left == sorted(left, reverse=True)
    wanted = [0.3 + 0.7 * (1 - n / 3) ** 3 for n in (1, 2, 3)]
    for found, most in zip(left, wanted, strict=True):
        assert most - 0.13 < found <= most + 1e-3  # widths are multiples of 8 of 32 channels
    assert share(task, trial.model) <= 0.3
    assert not kept


def test_a_ratio_is_of_the_channels_through_all_steps() -> None:
    for schedule in (1, 2):
        trial = try_out(make_task(ratio=0.5, recover="none", schedule=schedule), 0.5)
        weights = constants(trial.model)
        assert (len(weights["w1"]), len(weights["w2"])) == (16, 16)


def test_a_refit_that_harms_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(recover="closed-form")
    bare = try_out(
        dataclasses.replace(task, options=task.options.model_copy(update={"recover": "none"})), 0.5
    )

    assert statuses(try_out(task, 0.5))["closed-form recovery"] == "applied"
    monkeypatch.setattr(prune_trial, "recover_closed_form", bad_refit)
    trial = try_out(task, 0.5)
    assert statuses(trial)["closed-form recovery"] == "left out"
    assert same(trial.model, bare.model)


HISTORY = History((Epoch(0, None, 1.0, 0.0, 0.0, 0.0), Epoch(1, 0.5, 0.5, 1.0, 0.1, 0.1)), "told")


@pytest.mark.parametrize("explodes", [False, True])
def test_a_distillation_that_harms_is_left_out(explodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that ends before its time."""
    task, history = make_task(), History(tuple(dataclasses.replace(e, held_back=1.0) for e in HISTORY.epochs))
    refitted = dataclasses.replace(task, options=task.options.model_copy(update={"recover": "closed-form"}))

    def harms(_: ir.Model, student: ir.Model, *__: Any, **___: Any) -> Trained:
        trained = Trained(disturbed(student, 3.0), history)
        if explodes:
            raise DivergedError("training diverged", trained)
        return trained

    monkeypatch.setattr(distillation, "distill", harms)
    trial = try_out(task, 0.5)
    assert statuses(trial)["distillation"] == "left out"
    assert trial.history == history
    assert same(trial.model, try_out(refitted, 0.5).model)


def test_a_distillation_is_judged_by_what_it_is_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may raise the noise of the outputs and still be nearer in what they say."""
    learned: list[ir.Model] = []

    def noisy(_: ir.Model, student: ir.Model, *__: Any, **___: Any) -> Trained:
        learned.append(disturbed(student, 3.0))
        return Trained(learned[0], HISTORY)

    monkeypatch.setattr(distillation, "distill", noisy)
    trial = try_out(make_task(), 0.5)
    assert trial.steps[-1].reason == "loss on samples held back 1 -> 0.5"
    assert statuses(trial)["distillation"] == "applied"
    assert trial.model is learned[0]


def test_what_was_learned_before_it_exploded_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    real = distillation.distill

    def explodes(*models: Any, **options: Any) -> Trained:
        raise DivergedError("training diverged", real(*models, **options))

    monkeypatch.setattr(prune_trial, "recover_closed_form", bad_refit)
    whole = try_out(task, 0.5)
    assert statuses(whole)["distillation"] == "applied"
    monkeypatch.setattr(distillation, "distill", explodes)
    assert same(try_out(task, 0.5).model, whole.model)


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """How every distillation was to be made."""
    made: list[TrainOptions] = []

    def listen(_: ir.Model, student: ir.Model, *others: Any, **__: Any) -> Trained:
        made.append(others[2])
        return Trained(student, HISTORY)

    monkeypatch.setattr(distillation, "distill", listen)
    return made


def epochs(lessons: list[TrainOptions], **options: Any) -> int:
    """How many epochs the trial of half the work takes, all steps together."""
    lessons.clear()
    try_out(make_task(**options), 0.5)
    return sum(lesson.epochs or 0 for lesson in lessons)


def test_the_epochs_follow_the_effort_and_not_the_clock(
    lessons: list[TrainOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = epochs(lessons, effort=EFFORT)
    assert few >= 2
    assert epochs(lessons, effort=2 * EFFORT) == pytest.approx(2 * few, abs=1)
    (lesson,) = lessons
    assert lesson.max_seconds is None
    assert lesson.steps is None
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 1000 * clock())
    assert epochs(lessons, effort=EFFORT) == few


def test_the_epochs_follow_the_work_of_an_epoch(lessons: list[TrainOptions]) -> None:
    few = epochs(lessons, effort=4 * EFFORT)
    assert epochs(lessons, effort=4 * EFFORT, count=128) == pytest.approx(few / 2, abs=1)
    assert epochs(lessons, effort=4 * EFFORT, width=64) < 0.5 * few


def test_there_is_one_epoch_at_least_and_an_end(lessons: list[TrainOptions]) -> None:
    assert epochs(lessons, effort=1e-12) == 1
    assert epochs(lessons, effort=1.0) == 60
    assert epochs(lessons, effort=2.5) == 150


def test_steps_share_the_effort(lessons: list[TrainOptions]) -> None:
    one = epochs(lessons, effort=4 * EFFORT)
    assert len(lessons) == 1
    # The student of the first step is larger, so that its epochs cost more.
    assert 0.6 * one < epochs(lessons, effort=4 * EFFORT, schedule=2) <= one + 1
    assert len(lessons) == 2


def test_a_batch_is_a_quarter_of_few_samples(lessons: list[TrainOptions]) -> None:
    epochs(lessons, count=64)
    assert lessons[0].batch == 12  # 64 samples less 10 that judge and 4 that choose
    epochs(lessons, count=32)
    assert lessons[0].batch == 6


def test_the_same_task_gives_the_same_model(tmp_path: Path) -> None:
    task = make_task(schedule=2)
    one, other = try_out(task, 0.5), try_out(dataclasses.replace(task, folder=tmp_path), 0.5)
    assert same(one.model, other.model)
    assert {path.name for path in tmp_path.iterdir()} == {"0.5000-1.npz", "0.5000-2.npz"}


def test_a_task_is_the_same_in_another_process() -> None:
    task = make_task(recover="closed-form")
    there = unpack(pack(task))
    assert there.options == task.options
    assert (there.seed, there.threads, there.folder) == (task.seed, task.threads, task.folder)
    assert same(there.model, task.model)
    assert there.scores.keys() == task.scores.keys()
    assert all(np.array_equal(there.scores[name], task.scores[name]) for name in task.scores)
    for name in ("calibrate", "choose", "judge"):
        one, other = getattr(task.parts, name), getattr(there.parts, name)
        assert len(one) == len(other)
        assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(one, other, strict=True))
    assert price(there.model, there.pricing) == price(task.model, task.pricing)


def test_a_worker_gives_what_a_trial_here_gives() -> None:
    task = make_task(recover="closed-form")
    there, here = unpack(work(pack(task), 0.5)), try_out(task, 0.5)
    assert there.budget == 0.5
    assert same(there.model, here.model)
    assert statuses(there) == statuses(here)
    feed = next(iter(task.parts.judge))
    outputs = [Evaluator(model).run(feed)["y"] for model in (there.model, here.model)]
    np.testing.assert_array_equal(*outputs)


def test_a_worker_keeps_to_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them share the cores, and numpy would take all of them in each."""
    seen: list[int] = []

    def listen(task: Task, budget: float) -> None:
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")

    monkeypatch.setattr(prune_trial, "try_out", listen)
    work(pack(make_task()), 0.5)
    assert set(seen) == {1}


def test_a_budget_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(EdgewiseError, match="cannot be reached: at least"):
        try_out(make_task(recover="none"), 0.001)


def test_a_plan_is_of_the_scores() -> None:
    """Among channels that cost the same those of least score leave."""
    task = make_task()
    (plan,) = planned(task, task.model, task.scores, 0.5)
    assert len(plan) > 0
    for name, leaving in plan.leaving.items():
        scores = task.scores[name]
        assert max(scores[list(leaving)]) <= min(np.delete(scores, leaving))


@pytest.mark.parametrize(("width", "multiple"), [(32, 4), (256, 8)])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_the_wider_the_layers_the_rounder_their_widths(width: int, multiple: int, budget: float) -> None:
    task = make_task(width)
    (plan,) = planned(task, task.model, task.scores, budget)
    left = [len(task.scores[name]) - len(channels) for name, channels in plan.leaving.items()]
    assert left
    assert all(count % multiple == 0 for count in left)


SPECS = (TensorSpec("x", np.dtype(np.float32), ("N", 8, 8, 8)),)
RESIDUAL = """
    g (float[N, 8, 8, 8] x) => (float[N, 8, 8, 8] y)
    {
        f = Conv <pads = [1, 1, 1, 1]> (x, w1)
        s = Add (x, f)
        c = Conv <pads = [1, 1, 1, 1]> (s, w2)
        r = Relu (c)
        y = Conv <pads = [1, 1, 1, 1]> (r, w3)
    }"""


@pytest.mark.parametrize("recover", ["none", "closed-form"])
@pytest.mark.parametrize(("strength", "branches"), [(3.0, 0), (1e-4, 1)])
def test_a_branch_leaves_only_where_it_is_less_than_what_channels_cost(
    strength: float, branches: int, recover: str
) -> None:
    """Whatever its score says: nothing is lost by it here, and much by any channel."""
    weights = {f"w{i}": normal(8, 8, 3, 3, seed=i) for i in (1, 2, 3)}
    model = build(RESIDUAL, 17, **{**weights, "w1": np.float32(strength) * weights["w1"]})
    samples = from_arrays({"x": normal(96, 8, 8, 8)}, SPECS)
    parts, macs = split_to_prune(samples, 0), ByMacs(shapes_of(samples[0]))
    options = Prune.model_validate({"score": "fisher", "recover": recover})
    found = scored(model, parts, options, 0, 1)
    (branch,) = (one.name for one in branches_of(model.graph))
    scores = {**{name: worth + 1 for name, worth in found.items()}, branch: np.zeros(1)}
    task = Task(model, parts, scores, macs, macs, options, threads=1)
    assert [len(plan.branches) for plan in planned(task, model, scores, 0.67)] == [1, 0]
    trial = try_out(task, 0.67)
    assert sum(node.op_type == "Add" for node in trial.model.graph) == 1 - branches


SECOND = """
        g = Conv <pads = [1, 1, 1, 1]> (s, w4)
        t = Add (s, g)
        c = Conv <pads = [1, 1, 1, 1]> (t, w2)"""
TWICE = RESIDUAL.replace("\n        c = Conv <pads = [1, 1, 1, 1]> (s, w2)", SECOND)


def test_there_are_ways_with_many_branches_and_with_few() -> None:
    """All within the budget and none of them twice; channels alone do not get there."""
    model = build(TWICE, 17, **{f"w{i}": normal(8, 8, 3, 3, seed=i) for i in (1, 2, 3, 4)})
    macs, branches = ByMacs({"x": (1, 8, 8, 8)}), branches_of(model.graph)
    graph = ChannelGraph.of(model.graph, 17)
    scores = {group.name: np.ones(group.size) for group in graph.groups}
    scores |= {branch.name: np.full(1, worth) for branch, worth in zip(branches, (3.0, 5.0), strict=True)}
    task = dataclasses.replace(make_task(), model=model, pricing=macs)
    ways = planned(task, model, scores, 0.5)
    assert [len(plan.branches) for plan in ways] == [2, 1]
    assert all(price(RemoveChannels(plan).on(model), macs) <= 0.5 * price(model, macs) for plan in ways)
