"""Static int8 as one verified step: calibrate, plan, insert, judge; the next range method if it fails."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.calibration.collect import collect
from edgewise.calibration.data import Samples
from edgewise.calibration.plan import observed_values, plan
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import Target
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, no_progress, run_passes, run_step
from edgewise.optimizer.recipe import Quantize
from edgewise.passes.insert_qdq import InsertQdq

_FEWEST_JUDGES = 32  # below that, the samples that calibrate judge as well


@dataclass(frozen=True)
class Split:
    """Samples that calibrate and samples that judge; apart where there are enough."""

    calibrate: Samples
    judge: Samples


def split(samples: Samples, count: int, seed: int) -> Split:
    """Draw `count` samples to calibrate; the rest judges, or all of them where few are left."""
    order = np.random.default_rng(seed).permutation(len(samples))
    rest = np.sort(order[count:])
    return Split(
        samples.take(np.sort(order[:count])), samples.take(rest) if len(rest) >= _FEWEST_JUDGES else samples
    )


def prepare(
    model: ir.Model, options: Quantize, reference: Reference, *, progress: Progress = no_progress
) -> tuple[ir.Model, tuple[StepReport, ...]]:
    """The model in the operators that have int8 kernels, and what that took; the same numbers come out."""
    prepared, steps = run_passes(model, options.preparation, reference, progress=progress)
    return prepared, tuple(step for step in steps if step.status != "no change")


def calibrate_for_int8(
    model: ir.Model,
    samples: Samples,
    options: Quantize,
    *,
    threads: int | None,
    progress: Progress = no_progress,
) -> CalibrationTable:
    """Observe every value whose range an int8 plan of `model` needs."""
    values = observed_values(model, options.options)
    return collect(
        model,
        samples,
        values,
        threads=threads,
        progress=lambda done: progress("calibrate", done, len(samples)),
    )


def quantize_step(
    model: ir.Model,
    table: CalibrationTable,
    reference: Reference,
    judge: Judge | None,
    options: Quantize,
    target: Target,
    *,
    progress: Progress = no_progress,
    strict: bool = False,
) -> tuple[ir.Model | None, tuple[StepReport, ...]]:
    """The int8 model by the first range method that keeps the bound, or None; and every attempt."""
    attempts: list[StepReport] = []
    for done, method in enumerate(options.methods):
        progress(f"int8 by {method} ranges", done, len(options.methods))
        chosen = plan(model, table, dataclasses.replace(options.options, method=method), target)
        made, step = run_step(model, InsertQdq(chosen), reference, judge=judge, strict=strict)
        attempts.append(dataclasses.replace(step, step=f"{InsertQdq.name} by {method} ranges"))
        if step.status != "rolled back":
            progress(f"int8 by {method} ranges", len(options.methods), len(options.methods))
            return (made if step.status == "applied" else None), tuple(attempts)
    return None, tuple(attempts)
