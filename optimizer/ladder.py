"""From a float model to int8 that stays near it: ways to lose less, each kept only where it helps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from edgewise.calibration.bias_correction import correct_biases
from edgewise.calibration.channel_ranges import collect_channels
from edgewise.calibration.collect import MEMORY, collect
from edgewise.calibration.data import Samples
from edgewise.calibration.edits import Edits, with_weights
from edgewise.calibration.moments import Moments, collect_moments
from edgewise.calibration.partial import collect_in
from edgewise.calibration.plan import observed_values, plan
from edgewise.calibration.rounding import round_weights
from edgewise.calibration.sharding import Task
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import Target
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, no_progress, run_step
from edgewise.optimizer.recipe import Quantize
from edgewise.optimizer.yardstick import Yardstick
from edgewise.passes.base import Contract, Pass
from edgewise.passes.channel_ranges import ChannelRanges
from edgewise.passes.equalize_channels import EqualizeChannels
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.passes.smooth_inputs import SmoothInputs
from edgewise.training.options import DivergedError, require_torch

Floats = Mapping[str, str]
Notes = tuple[str, ...]

_POLISHING: Mapping[str, str] = MappingProxyType(
    {
        "bias": "bias correction",
        "round": "learned rounding",
        "shift": "bias correction by what layers give",
        "train": "quantization-aware training",
    }
)
WORTH = 0.1
"""dB; less is chance."""
_STATUS = {True: "applied", False: "left out"}


@dataclass(frozen=True)
class Ground:
    """What all rungs stand on: samples to learn from, a yardstick on others, and the target's rules."""

    samples: Samples
    reference: Reference
    yardstick: Yardstick
    options: Quantize
    target: Target
    threads: int | None
    progress: Progress


@dataclass(frozen=True)
class Attempt:
    """A float model and the int8 model that a plan makes of it, `decibels` away from the original.

    `edits` are new numbers for weights of `model`, chosen for this plan.
    """

    model: ir.Model = field(repr=False)
    table: CalibrationTable
    plan: QuantPlan
    method: str
    decibels: float
    edits: Edits = field(default_factory=dict, repr=False)

    @property
    def edited(self) -> ir.Model:
        """The float model with the weights as they are to be rounded."""
        return with_weights(self.model, self.edits) if self.edits else self.model

    @property
    def int8(self) -> ir.Model:
        """The int8 model."""
        return InsertQdq(self.plan).on(self.edited)


def attempt(ground: Ground, model: ir.Model, table: CalibrationTable, method: str, floats: Floats) -> Attempt:
    """The int8 model by one range method, judged by the yardstick."""
    options = dataclasses.replace(ground.options.options, method=method)
    chosen = plan(model, table, options, ground.target, floats=floats)
    return judged(ground, Attempt(model, table, chosen, method, 0.0))


def judged(ground: Ground, made: Attempt) -> Attempt:
    """The same with its distance from the original."""
    return dataclasses.replace(made, decibels=ground.yardstick.decibels(made.int8))


def calibrated(ground: Ground, model: ir.Model) -> CalibrationTable:
    """The table of `model` on the samples to learn from."""
    return calibrate_for_int8(
        model, ground.samples, ground.options, ground.target, threads=ground.threads, progress=ground.progress
    )


def calibrate_for_int8(
    model: ir.Model,
    samples: Samples,
    options: Quantize,
    target: Target,
    *,
    threads: int | None,
    progress: Progress = no_progress,
) -> CalibrationTable:
    """Observe every value whose range a plan of `model` for `target` may need."""
    return collect(
        model,
        samples,
        observed_values(model, options.options, target),
        threads=threads,
        progress=lambda done: progress("calibrate", done, len(samples)),
    )


def calibrated_in(path: Path | None, ground: Ground, model: ir.Model) -> tuple[CalibrationTable, Notes]:
    """What `calibrated` gives, and notes; it is kept in `path`, from which an interrupted run goes on."""
    if path is None:
        return calibrated(ground, model), ()
    values, total = observed_values(model, ground.options.options), len(ground.samples)
    return collect_in(
        path,
        Task(model, ground.samples, values, ground.threads, MEMORY),
        progress=lambda done: ground.progress("calibrate", done, total),
    )


def best_ranges(ground: Ground, model: ir.Model, table: CalibrationTable) -> tuple[Attempt, StepReport]:
    """The range method whose int8 model is nearest to the float model on samples that did not calibrate."""
    start, methods = time.perf_counter(), ground.options.methods
    made = []
    for done, method in enumerate(methods):
        ground.progress(f"int8 by {method} ranges", done, len(methods))
        made.append(attempt(ground, model, table, method, {}))
    ground.progress("int8 ranges", len(methods), len(methods))
    best = max(made, key=lambda a: a.decibels)
    others = ", ".join(f"{a.method} {a.decibels:.1f}" for a in made if a is not best)
    reason = f"{best.decibels:.1f} dB" + (f" ({others})" if others else "")
    return best, report(f"int8 by {best.method} ranges", len(best.plan.quantized), True, reason, start)


def climb(ground: Ground, start: Attempt) -> tuple[Attempt, tuple[StepReport, ...]]:
    """Every rung that rewrites the float model, tried in turn: the best attempt, and what was tried."""
    steps: list[StepReport] = []
    best = start
    wanted = [rung for rung in ground.options.ladder if rung in _REWRITES]
    for done, rung in enumerate(wanted):
        ground.progress(f"int8: {rung}", done, len(wanted))
        best, step = _rewritten(ground, best, _REWRITES[rung])
        steps.append(step)
    return best, tuple(steps)


def _rewritten(
    ground: Ground, before: Attempt, rewrite: Callable[[Ground, ChannelRanges], Pass]
) -> tuple[Attempt, StepReport]:
    """An exact rewrite of the float model by what single channels held; its values are observed anew."""
    start = time.perf_counter()
    step = rewrite(ground, collect_channels(before.model, ground.samples, threads=ground.threads))
    model, outcome = run_step(before.model, step, ground.reference)
    if outcome.status != "applied":
        return before, outcome
    after = attempt(ground, model, calibrated(ground, model), before.method, {})
    helps, reason = _comparison(before, after)
    seconds = time.perf_counter() - start
    outcome = dataclasses.replace(outcome, status=_STATUS[helps], reason=reason, seconds=seconds)
    return (after if helps else before), outcome


def _equalization(ground: Ground, seen: ChannelRanges) -> Pass:
    return EqualizeChannels(ranges=seen, per_channel=ground.options.options.per_channel)


def _smoothing(_: Ground, seen: ChannelRanges) -> Pass:
    return SmoothInputs(ranges=seen)


_REWRITES: Mapping[str, Callable[[Ground, ChannelRanges], Pass]] = MappingProxyType(
    {"equalize": _equalization, "smooth": _smoothing}
)


def polish(ground: Ground, start: Attempt) -> tuple[Attempt, tuple[StepReport, ...]]:
    """Every rung that chooses new numbers for weights, for the plan as it is."""
    wanted = [rung for rung in _POLISHING if rung in ground.options.ladder]
    if not wanted:
        return start, ()
    stage, total = "inputs of every layer", len(ground.samples)
    moments = collect_moments(
        start.model,
        ground.samples,
        start.plan,
        threads=ground.threads,
        progress=lambda done: ground.progress(stage, done, total),
    )
    best, steps = start, []
    for done, rung in enumerate(wanted):
        ground.progress(f"int8: {_POLISHING[rung]}", done, len(wanted))
        begin = time.perf_counter()
        after = judged(ground, _polished(ground, best, rung, moments))
        helps, reason = _comparison(best, after)
        steps.append(report(_POLISHING[rung], max(len(after.edits), 1), helps, reason, begin))
        best = after if helps else best
    return best, tuple(steps)


def _polished(ground: Ground, best: Attempt, rung: str, moments: Moments) -> Attempt:
    if rung == "train":
        return _trained(ground, best)
    return dataclasses.replace(best, edits=_edits(ground, best, rung, moments))


def _edits(ground: Ground, best: Attempt, rung: str, moments: Moments) -> Edits:
    if rung == "round":
        return round_weights(best.model, best.plan, moments)
    evidence = moments if rung == "bias" else ground.samples
    return correct_biases(best.model, best.plan, evidence, edits=best.edits, threads=ground.threads)


def _trained(ground: Ground, best: Attempt) -> Attempt:
    """With weights that were trained for their integers, the float model being the teacher."""
    require_torch("the rung train of the ladder")
    from edgewise.training.quantization_aware import heal  # brings torch, which takes a second

    try:
        trained = heal(
            best.edited,
            best.plan,
            ground.samples,
            ground.yardstick.samples,
            teacher=best.model,
            threads=ground.threads,
            progress=lambda epoch: ground.progress("int8: train", epoch.number, epoch.number),
        )
    except DivergedError as error:  # what was learned until then counts
        trained = error.trained
    return dataclasses.replace(best, model=trained.model, edits={})


def _comparison(before: Attempt, after: Attempt) -> tuple[bool, str]:
    """Whether `after` is worth it, and the figures."""
    helps = after.decibels > before.decibels + WORTH
    return helps, f"{before.decibels:.1f} -> {after.decibels:.1f} dB"


def report(name: str, edits: int, kept: bool, reason: str, start: float) -> StepReport:
    """What became of a rung that is no pass."""
    return StepReport(
        step=name,
        contract=Contract.LOSSY.value,
        status=_STATUS[kept],
        edits=edits,
        seconds=time.perf_counter() - start,
        reason=reason,
    )
