"""Static int8: of all that keeps the bound, the fastest on the target; or none, and why."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgewise.calibration.collect import collect
from edgewise.calibration.data import Samples
from edgewise.calibration.findings import broken, findings, strangers
from edgewise.calibration.placement import Costs, is_noisy
from edgewise.calibration.plan import observed_values, plan
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import X86_VNNI, Target, target_of
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.ladder import (
    Attempt,
    Floats,
    Ground,
    attempt,
    best_ranges,
    calibrated_in,
    climb,
    polish,
)
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, no_progress, run_passes, run_step
from edgewise.optimizer.placing import Placer, find_placement
from edgewise.optimizer.portability import SAFE, ported
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.optimizer.sensitivity import NodeSensitivity, sensitivities
from edgewise.optimizer.yardstick import Yardstick
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.machine import describe

_FEWEST_JUDGES = 32  # below that, the samples that calibrate judge as well
_FEWEST_KEPT_BACK = 8
_MOST_KEPT_BACK = 32
_BATCH = 8
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
_MOST_ASKED = 16  # samples that sensitivity is measured on
_RETREATS = (1 / 2, 1 / 4, 1 / 16, 1 / 64)  # of the noise of the fastest placement
_SLOWER = "every node is faster in float on this target"


@dataclass(frozen=True)
class Split:
    """Samples that calibrate, samples that tell which way is best, samples that judge.

    Apart where there are enough.
    """

    calibrate: Samples
    choose: Samples
    judge: Samples

    def at_most(self, count: int) -> Split:
        """With the first `count` of the samples to learn from, and a few to choose by."""
        learn, choose = (
            range(min(len(s), n)) for s, n in ((self.calibrate, count), (self.choose, _MOST_KEPT_BACK))
        )
        return Split(self.calibrate.take(learn), self.choose.take(choose), self.judge)


def split(samples: Samples, count: int, seed: int, validation: Samples | None = None) -> Split:
    """Draw `count` samples to learn from, a quarter of them to choose by.

    Those for validation judge; without any the rest does, or all of few.
    """
    order = np.random.default_rng(seed).permutation(len(samples))
    known, rest = order[:count], np.sort(order[count:])
    back = min(len(known) // 4, _MOST_KEPT_BACK)
    kept, used = (known[:back], known[back:]) if back >= _FEWEST_KEPT_BACK else (known, known)
    left = samples.take(rest) if len(rest) >= _FEWEST_JUDGES else samples
    return Split(
        calibrate=samples.take(np.sort(used)),
        choose=samples.take(np.sort(kept[:_MOST_KEPT_BACK])),
        judge=left if validation is None else validation,
    )


def too_few(samples: int) -> tuple[str, ...]:
    """A word on samples that are hardly any."""
    count = f"{samples} sample{'s' * (samples > 1)}"
    note = f"{count} cannot stand for all that the model will meet: give {_FEWEST_JUDGES} or more"
    return (note,) if samples < _FEWEST_JUDGES else ()


def prepare(
    model: ir.Model, options: Quantize, reference: Reference, *, progress: Progress = no_progress
) -> tuple[ir.Model, tuple[StepReport, ...]]:
    """The model in the operators that have int8 kernels, and what that took; the same numbers come out.

    Every node has a name then, by which it is found again in what is made of it.
    """
    prepared, steps = run_passes(model, options.preparation, reference, progress=progress)
    for node in prepared.graph:
        node.name = node.name or (node.outputs[0].name if node.outputs else None)
    return prepared, tuple(step for step in steps if step.status != "no change")


@dataclass(frozen=True)
class Int8:
    """What the search ended with. `model` is None where nothing kept the bound or paid: `why` says what.

    `in_float` is what the model was made from, `sensitivity` what its nodes add to the noise, where that
    had to be known.
    """

    model: ir.Model | None
    plan: QuantPlan
    in_float: ir.Model
    table: CalibrationTable | None
    steps: tuple[StepReport, ...]
    why: str = ""
    sensitivity: tuple[NodeSensitivity, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    @property
    def floats(self) -> dict[str, str]:
        """The nodes that stay in float, by first output, and why."""
        return {n.output: n.why for n in self.plan.nodes if n.form == "float" and n.why}


def plan_only(
    model: ir.Model,
    table: CalibrationTable | None,
    chosen: QuantPlan | None,
    reference: Reference,
    judge: Judge | None,
    recipe: Recipe,
) -> Int8:
    """The plan that was `chosen`, or that follows from `table` by the target's rules, as it is."""
    if chosen is None:
        assert table is not None
        options = recipe.quantize or Quantize()
        by = dataclasses.replace(options.options, method=options.methods[0])
        chosen = plan(model, table, by, target_of(recipe.target))
        if not chosen.quantized:
            return Int8(None, chosen, model, table, (), chosen.why_nothing)
    made, step = run_step(model, InsertQdq(chosen), reference, judge=judge)
    return Int8(made if step.status == "applied" else None, chosen, model, table, (step,), _why(step))


def find_int8(
    model: ir.Model,
    parts: Split,
    reference: Reference,
    judge: Judge,
    recipe: Recipe,
    *,
    table: CalibrationTable | None = None,
    kept: Path | None = None,
    progress: Progress = no_progress,
) -> Int8:
    """Search ranges, rewrites, placement and roundings for the fastest int8 model that keeps the bound.

    Without a `table` one is made of samples, in `kept` if that is given: there an interrupted search goes on.
    """
    options = recipe.quantize or Quantize()
    target = target_of(recipe.target)
    if target.saturates and options.portable == "off":
        target = X86_VNNI
    timed = options.search and recipe.benchmark is not None and recipe.objective != "size"
    ground = Ground(
        samples=parts.calibrate,
        reference=reference,
        yardstick=Yardstick(model, parts.choose, threads=recipe.threads),
        options=options,
        target=target.measured() if timed else target,
        threads=recipe.threads,
        progress=progress,
    )
    if table is None:
        table, told = calibrated_in(kept, ground, model)
    else:
        told = _strangers(ground, model, table, parts.judge)
    told += too_few(len(parts.judge))
    best, step = best_ranges(ground, model, table)
    told += findings(table, (best.method,))
    if not best.plan.quantized:
        why = "; ".join(filter(None, (best.plan.why_nothing, broken(table))))
        return Int8(None, best.plan, model, table, (), why, notes=told)
    best, climbed = climb(ground, best)
    steps = (step, *climbed)
    placer = _placer(ground, best, target, parts.choose, recipe) if timed else _unmeasured(best)
    if not placer.able - placer.floats.keys():
        return Int8(None, best.plan, best.model, best.table, steps, _SLOWER, notes=told)
    result = _within_bound(ground, best, placer, judge, steps)
    return dataclasses.replace(result, notes=(*told, *result.notes))


def _strangers(ground: Ground, model: ir.Model, table: CalibrationTable, judge: Samples) -> tuple[str, ...]:
    """A word where samples are unlike those that a given table was made of."""
    few = judge.take(range(0, len(judge), -(-len(judge) // _MOST_ASKED)))
    values = [name for name in observed_values(model, ground.options.options) if name in table.sketches]
    return strangers(table, collect(model, few, values, threads=ground.threads)) if values else ()


def _placer(ground: Ground, best: Attempt, rules: Target, samples: Samples, recipe: Recipe) -> Placer:
    options = dataclasses.replace(ground.options.options, method=best.method)
    by_rule = plan(best.model, best.table, options, rules).nodes
    able = {n.output for n in best.plan.quantized}
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        return find_placement(
            best.model,
            lambda floats: _replanned(ground, best, floats).plan,
            {n.output: n.why for n in by_rule if n.form == "float" and n.output in able},
            next(iter(samples)),
            recipe,
            Path(folder),
            ground.progress,
        )


def _unmeasured(best: Attempt) -> Placer:
    """All nodes count alike where none was timed."""
    able = frozenset(n.output for n in best.plan.quantized)
    return Placer(best.model, able, Costs(dict.fromkeys(able, 1.0), {}), {})


def _replanned(ground: Ground, best: Attempt, floats: Floats) -> Attempt:
    """The same attempt with other nodes in float, not judged."""
    options = dataclasses.replace(ground.options.options, method=best.method)
    chosen = plan(best.model, best.table, options, ground.target, floats=floats)
    return dataclasses.replace(best, plan=chosen, edits={})


def _within_bound(
    ground: Ground, best: Attempt, placer: Placer, judge: Judge, steps: tuple[StepReport, ...]
) -> Int8:
    """The first of the placements, the fastest first, that keeps the bound."""
    found: tuple[NodeSensitivity, ...] = ()
    for found, floats in _placements(ground, best, placer):
        now = attempt(ground, best.model, best.table, best.method, floats) if floats else best
        if not now.plan.quantized:
            break
        now, room, verdict = _with_room(ground, now, floats)
        now, polished = polish(ground, now)
        made, step = run_step(now.edited, InsertQdq(now.plan), ground.reference, judge=judge)
        steps += (*room, *polished, dataclasses.replace(step, step=_named(now)))
        if step.status == "applied":
            asked = _with_forms(found, now.plan)
            return Int8(made, now.plan, now.edited, now.table, steps, "", asked, verdict)
    return Int8(None, best.plan, best.model, best.table, steps, _why(steps[-1]), found)


def _placements(
    ground: Ground, best: Attempt, placer: Placer
) -> Iterator[tuple[tuple[NodeSensitivity, ...], Floats]]:
    """The fastest placement, then the fastest with half of its noise, and so on; with what was asked."""
    yield (), placer.floats
    whole = _replanned(ground, best, placer.floats).plan
    samples, progress = ground.yardstick.samples, ground.progress
    found = node_noise(best.model, whole, samples, threads=ground.threads, progress=progress)
    noise = {n.output: n.noise_share for n in found}
    for share in _RETREATS if found else ():
        yield found, placer.within(noise, share * sum(noise.values())).floats


def _with_room(
    ground: Ground, now: Attempt, floats: Floats
) -> tuple[Attempt, tuple[StepReport, ...], tuple[str, ...]]:
    """The attempt that does best without saturating on x86 without VNNI, and a word on that."""
    if not ground.target.saturates:
        return now, (), ()
    if not ground.options.search:
        return now, (), (SAFE,)
    found = ported(ground, now, floats, here=describe().int8_saturates)
    return found.attempt, (found.step,), (found.verdict,)


def node_noise(
    model: ir.Model, chosen: QuantPlan, samples: Samples | None, *, threads: int | None, progress: Progress
) -> tuple[NodeSensitivity, ...]:
    """What every node of a plan adds to the noise of the outputs, on a few samples; nothing without any."""
    if samples is None or not any(v.dtype in _FLOATS for v in model.graph.outputs):
        return ()
    few = samples.take(range(min(len(samples), _MOST_ASKED)))
    feeds = tuple(few.batches(_BATCH))
    return sensitivities(model, chosen, feeds, threads=threads, progress=progress)


def _with_forms(found: tuple[NodeSensitivity, ...], chosen: QuantPlan) -> tuple[NodeSensitivity, ...]:
    """What became of the nodes that were asked about."""
    why = {n.output: n.why for n in chosen.nodes if n.form == "float"}
    return tuple(
        dataclasses.replace(n, form="float by accuracy" if is_noisy(why[n.output]) else "float by speed")
        if n.output in why
        else n
        for n in found
    )


def _named(now: Attempt) -> str:
    """A step by how much of the model it takes to int8."""
    return f"{InsertQdq.name}: {len(now.plan.quantized)} of {len(now.plan.nodes)} nodes"


def _why(step: StepReport) -> str:
    return step.reason or "the plan leaves every node in float: let the form of some be int8"
