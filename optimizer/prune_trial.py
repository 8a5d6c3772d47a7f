"""One amount of pruning, tried: channels leave, and what stays is given its accuracy back."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from edgewise.optimizer.grading import graded
from edgewise.optimizer.int8 import Split
from edgewise.optimizer.ladder import report
from edgewise.optimizer.parallel import pack, unpack
from edgewise.optimizer.pipeline import Progress, StepReport, no_progress
from edgewise.optimizer.pricing import ByMacs, Pricing, price
from edgewise.optimizer.recipe import Prune
from edgewise.optimizer.yardstick import Yardstick
from edgewise.passes.channel_links import Indices
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels, survivors
from edgewise.runtime.errors import EdgewiseError
from edgewise.training.importance import BY_GRADIENTS, Scores, score
from edgewise.training.options import DivergedError, Epoch, History, TrainOptions
from edgewise.training.refit import recover_closed_form, reestimate
from edgewise.training.selection import select, uniform

_WIDE = 256  # channels: from there on kernels want round widths, and narrower layers lose much by them
_ROUND, _FINE = 8, 4
_BRANCH_WEIGHTS = (0.5, 1.0, 1.5, math.inf)  # times its score that a branch counts
_FITTED = {"reestimate": "statistics and biases"}
_SCORING = 512  # samples that score channels and refit layers: more tell little new
_BATCH = 64
_WORK = 4e12  # multiply-accumulates of a distillation: about two minutes of two cores
_MOST_EPOCHS = 60  # of the usual effort, and of less
_BACKWARD = 3  # a step forward and back takes as long as three forward

Kept = Mapping[tuple[str, int], Indices]
Plans = tuple[PrunePlan, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """What the trials of a job share: the model that is pruned, samples, and what its channels are worth.

    `pricing` says what a budget is a share of, and `macs` what work a training is. What an interrupted
    training goes on from is kept in `folder`.
    """

    model: ir.Model
    parts: Split
    scores: Scores
    pricing: Pricing
    macs: ByMacs
    options: Prune
    seed: int = 0
    threads: int | None = None
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Trial:
    """What became of the model at `budget`, the share of its cost that may stay."""

    budget: float
    model: ir.Model
    steps: tuple[StepReport, ...]
    history: History | None = None


def work(shared: bytes, budget: float) -> bytes:
    """One trial by a worker."""
    task: Task = unpack(shared)
    with threadpool_limits(task.threads, "blas"):
        return pack(try_out(task, budget))


def try_out(task: Task, budget: float, progress: Progress = no_progress) -> Trial:
    """Cut the model to `budget` of its cost and recover it, in as many steps as the options say."""
    now, count = _State(task.model), task.options.schedule
    yardstick = Yardstick(task.model, task.parts.choose, threads=task.threads)
    for number in range(1, count + 1):
        # Much at first, where most is to spare: the cubic schedule of Zhu and Gupta (2017, arXiv 1710.01878).
        left = budget + (1 - budget) * (1 - number / count) ** 3
        now = _Step(task, yardstick, now, f"{budget:.4f}-{number}", progress).to(left)
    return Trial(budget, now.model, now.steps, now.history)


def scored(
    model: ir.Model,
    parts: Split,
    options: Prune,
    seed: int,
    threads: int | None,
    progress: Progress = no_progress,
) -> Scores:
    """What the channels of a model are worth, on as many samples as that takes.

    What gradients tell is graded by what a refit gives back, where there will be one.
    """
    few = parts.calibrate.take(range(min(len(parts.calibrate), _SCORING)))
    found = score(model, options.score, few, seed=seed, threads=threads, memory=options.memory)
    if options.score not in BY_GRADIENTS or options.recover == "none" or options.ratio is not None:
        return found
    return graded(model, found, parts, threads=threads, memory=options.memory, progress=progress)


def planned(task: Task, model: ir.Model, scores: Scores, budget: float) -> Plans:
    """What may leave, for a share of the cost or, with a ratio, of the channels.

    What a whole branch takes along is too much for gradients to foresee, so where branches would leave there
    are several ways: with many of them, with few, and by channels alone.
    """
    if task.options.ratio is not None:
        return (uniform(model, scores, 1 - budget),)
    widest = max((len(worth) for worth in scores.values()), default=0)
    cost, multiple = task.pricing(model), _ROUND if widest >= _WIDE else _FINE
    most, *fewer = _BRANCH_WEIGHTS
    plans = [select(model, scores, cost, budget, multiple=multiple, branch_weight=most)]
    for weight in fewer if plans[0].branches else ():
        with suppress(EdgewiseError):  # with so few branches the budget is not reached
            plans.append(select(model, scores, cost, budget, multiple=multiple, branch_weight=weight))
    return tuple(plan for i, plan in enumerate(plans) if plan not in plans[:i])


@dataclass(frozen=True, eq=False)
class _State:
    """A model on its way: what it has left of the values of the task's model, and of its cost."""

    model: ir.Model
    kept: Kept = field(default_factory=dict)
    left: float = 1.0
    steps: tuple[StepReport, ...] = ()
    history: History | None = None

    def recovered(self, model: ir.Model, by: str, helps: bool, told: str, start: float) -> _State:
        """The state with what a recovery made of the model, if that helps, and with what is `told` of it."""
        steps = (*self.steps, report(by, 1, helps, told, start))
        return dataclasses.replace(self, model=model if helps else self.model, steps=steps)


@dataclass(frozen=True, eq=False)
class _Step:
    """One cut, and the recovery from it. Each part of the recovery stays only where it helps.

    Whether a refit does is seen by noise, which is what it makes small. A distillation is after the order of
    scores rather than their size: it is judged by its own loss, on samples that it does not learn from.
    """

    task: Task
    yardstick: Yardstick
    before: _State
    name: str
    progress: Progress

    def to(self, left: float) -> _State:
        """The state with `left` of the cost of the task's model, or of its channels."""
        start, task, before = time.perf_counter(), self.task, self.before
        self.progress("choose channels", 0, 1)
        first = before.model is task.model
        scores = task.scores if first else self._scores()
        plans = planned(task, before.model, scores, min(left / self._left(), 1.0))
        now = self._nearest([self._cut(plan, left, start) for plan in plans])
        return self._distilled(now) if task.options.recover == "distill" else now

    def _cut(self, plan: PrunePlan, left: float, start: float) -> _State:
        """The state without what the plan takes, and refitted where that is wanted."""
        task, before, cut = self.task, self.before, RemoveChannels(plan).on(self.before.model)
        share = price(cut, task.macs) / price(task.model, task.macs)
        done = report(RemoveChannels(plan).label, len(plan), True, f"{share:.1%} of the MACs left", start)
        now = _State(cut, self._kept(plan), left, (*before.steps, done), before.history)
        return now if task.options.recover == "none" else self._refitted(now, plan)

    def _nearest(self, states: Sequence[_State]) -> _State:
        """The one that is nearest to the task's model."""
        if len(states) == 1:
            return states[0]
        return max(states, key=lambda state: self.yardstick.decibels(state.model))

    def _left(self) -> float:
        """What is left before this cut; of a cost that may be less than the last cut was to leave."""
        task, before = self.task, self.before
        if before.model is task.model or task.options.ratio is not None:
            return before.left
        return price(before.model, task.pricing) / price(task.model, task.pricing)

    def _scores(self) -> Scores:
        task = self.task
        return scored(self.before.model, task.parts, task.options, task.seed, task.threads, self.progress)

    def _kept(self, plan: PrunePlan) -> Kept:
        """What is left of the values of the task's model, of which some may have left before."""
        kept = dict(self.before.kept)
        for key, stay in survivors(self.before.model, plan).items():
            kept[key] = kept[key][stay] if key in kept else stay
        return MappingProxyType(kept)

    def _refitted(self, now: _State, plan: PrunePlan) -> _State:
        task, samples = self.task, self.task.parts.calibrate
        start, how = time.perf_counter(), task.options.recover
        recover = reestimate if how == "reestimate" else recover_closed_form
        fitted = recover(
            self.before.model,
            plan,
            samples.take(range(min(len(samples), _SCORING))),
            threads=task.threads,
            memory=task.options.memory,
            progress=lambda done, total: self.progress("refit layers", done, total),
        )
        before, after = self.yardstick.decibels(now.model), self.yardstick.decibels(fitted)
        told = f"{before:.1f} -> {after:.1f} dB"
        return now.recovered(fitted, _FITTED.get(how, "closed-form recovery"), after > before, told, start)

    def _distilled(self, now: _State) -> _State:
        from edgewise.training.distillation import distill  # brings torch, which takes a second

        task, start = self.task, time.perf_counter()
        options = self._training(now.model)
        try:
            trained = distill(
                task.model,
                now.model,
                task.parts.calibrate,
                task.parts.choose,
                options,
                staying=now.kept,
                checkpoint=None if task.folder is None else task.folder / f"{self.name}.npz",
                threads=task.threads,
                progress=lambda epoch: self._tell(epoch, options),
            )
        except DivergedError as error:  # what was learned until then counts
            trained = error.trained
        first, best = trained.history.start, trained.history.best
        told = f"loss on samples held back {first.held_back:.3g} -> {best.held_back:.3g}"
        learned = now.recovered(trained.model, "distillation", best.held_back < first.held_back, told, start)
        return dataclasses.replace(learned, history=trained.history)

    def _tell(self, epoch: Epoch, options: TrainOptions) -> None:
        self.progress("distil", epoch.number, options.epochs or 1)

    def _training(self, student: ir.Model) -> TrainOptions:
        """As many epochs as the effort pays for: in work, not in time, so that the next run is the same."""
        task, options, rows = self.task, self.task.options, len(self.task.parts.calibrate)
        each = _BACKWARD * price(student, task.macs) + price(task.model, task.macs)
        epochs = round(options.effort * _WORK / options.schedule / (each * rows))
        return TrainOptions(
            epochs=min(max(epochs, 1), round(_MOST_EPOCHS * max(options.effort, 1.0))),
            batch=max(1, min(_BATCH, rows // 4)),
            learning_rate=5e-4,
            inner=0.0,  # what layers give was just fitted, and watching them costs a quarter more
            frozen=1.0,  # statistics of batches would undo the fit: its outputs vary less than the original's
            seed=task.seed,
            memory=task.options.memory,
        )
