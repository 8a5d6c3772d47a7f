"""The single jobs that `optimize` is made of: prune, calibrate, quantize, compare."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgewise.calibration.data import Preprocess, Samples
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.choice import INPUT, choose
from edgewise.optimizer.comparison import Difference, differences
from edgewise.optimizer.inputs import RANDOM, as_samples, check_inputs
from edgewise.optimizer.int8 import calibrate_for_int8, prepare, quantize_step, split
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.optimization import (
    Start,
    begin,
    check_targets,
    measure_files,
    stamp_of,
    write_result,
)
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, no_progress, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.optimizer.report import Report, Score, facts_of, plain
from edgewise.optimizer.version import VERSION
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.runtime.session import check_provider

ModelPath = str | os.PathLike[str]
_PRUNED, _INT8 = "pruned", "int8"
_REMOVAL = "prune-channels{multiple: 4}"
_PRUNING = (
    "freeze-inputs",
    "inline-functions",
    "lift-constants",
    "upgrade-opset",
    "infer-shapes",
    "fold-shapes",
    "fold-constants",
    "drop-zero-states",
    "drop-identity",
    "drop-no-ops",
    "split-before-transpose",
    "merge-reshapes",
    "fuse-batch-norm",
    _REMOVAL,
    "drop-dead-nodes",
)
_NOT_JUDGED = (
    "no samples were given, so nobody knows how well the int8 model does its job: judge it with --data"
)
_SEEDED = (
    "seeded noise went in, nothing like real inputs: pass samples with --data for differences that count"
)
_NOTHING_PRUNED = "every channel is needed: none was removed"


@dataclass(frozen=True)
class CalibrationReport:
    """A table that was written: `values` were observed on `samples`, `digest` names the table."""

    model: str
    path: str
    source: str
    samples: int
    values: int
    digest: str
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of `second` are from those of `first` on `inputs`; its score on samples."""

    first: str
    second: str
    inputs: str
    differences: tuple[Difference, ...]
    score: Score | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        data: dict[str, Any] = plain(self)
        return data


@dataclass(frozen=True)
class _Job:
    """A model that was read and went through exact passes, and how."""

    start: Start
    recipe: Recipe
    reference: Reference
    exact: ir.Model
    steps: tuple[StepReport, ...]

    @property
    def path(self) -> Path:
        return self.start.path

    @property
    def original(self) -> ir.Model:
        return self.start.adapted.model

    @property
    def samples(self) -> Samples | None:
        return self.start.samples

    @property
    def notes(self) -> tuple[str, ...]:
        return self.start.notes


def _start(
    path: ModelPath, output: Path, data: str | Samples | None, recipe: Recipe, force: bool, progress: Progress
) -> _Job:
    """Refuse what cannot end well, read the model, run the recipe's exact passes."""
    files.check_writable(output, force=force, source=Path(path))
    start = begin(Path(path), data, recipe)
    original = start.adapted.model
    reference = Reference(original, start.feeds, threads=recipe.threads)
    exact, steps = run_passes(original, recipe.chain, reference, progress=progress)
    return _Job(start, recipe, reference, exact, steps)


def _prepared(job: _Job, options: Quantize, progress: Progress) -> _Job:
    """The job with its model in the operators that have int8 kernels."""
    exact, steps = prepare(job.exact, options, job.reference, progress=progress)
    return dataclasses.replace(job, exact=exact, steps=job.steps + steps)


def prune(
    model: ModelPath,
    output: ModelPath,
    *,
    data: str | Samples | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write `model` without the channels that hold nothing but zeros, and only what that takes.

    The outputs stay the same up to rounding; this is checked on `data`, or on seeded inputs. The
    recipe's own chain of passes and its benchmark are not used. Raises `InputError` on input that
    cannot be used.
    """
    recipe = (recipe or Recipe()).model_copy(update={"passes": _PRUNING, "benchmark": None})
    check_targets(Path(output), recipe, Path(model), force=force)
    job = _start(model, Path(output), data, recipe, force, progress)
    removed = any(step.step == _REMOVAL and step.status == "applied" for step in job.steps)
    notes = job.notes if removed else (*job.notes, _NOTHING_PRUNED)
    return _write(job, _PRUNED, job.exact, Path(output), force, progress, notes=notes)


def calibrate(
    model: ModelPath,
    data: str | Samples,
    output: ModelPath,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> CalibrationReport:
    """Observe all samples and write the table of what every value held, an .npz file for `quantize`.

    What is observed is `model` after the exact passes of the recipe: `quantize` with the same recipe
    meets the same model. Raises `InputError` on input that cannot be used.
    """
    begin = time.perf_counter()
    output = Path(output)
    recipe = recipe or Recipe()
    options = recipe.quantize or Quantize()
    job = _prepared(_start(model, output, data, recipe, force, progress), options, progress)
    assert job.samples is not None
    table = calibrate_for_int8(job.exact, job.samples, options, threads=recipe.threads, progress=progress)
    table.save(output)
    return CalibrationReport(
        model=str(job.path),
        path=str(output),
        source=job.samples.source,
        samples=table.samples,
        values=len(table.sketches),
        digest=table.digest,
        seconds=time.perf_counter() - begin,
        notes=job.notes,
    )


def quantize(
    model: ModelPath,
    output: ModelPath,
    *,
    data: str | Samples | None = None,
    table: ModelPath | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write `model` in static int8, after the exact passes of the recipe.

    The ranges come from `table`, which `calibrate` wrote, or from `data`; samples that do not calibrate
    judge. Unlike `optimize` this writes the int8 model even if it is slower: the report tells. Raises
    `InputError` on input that cannot be used, `EdgewiseError` if nothing can be int8 or every range
    method costs more than the recipe's `max_drop`.
    """
    if data is None and table is None:
        raise InputError("int8 needs the ranges of values: pass samples with --data, or a table with --table")
    recipe = recipe or Recipe()
    options = recipe.quantize or Quantize()
    check_provider(recipe.target)
    check_targets(Path(output), recipe, Path(model), force=force)
    loaded = None if table is None else CalibrationTable.load(table)
    job = _prepared(_start(model, Path(output), data, recipe, force, progress), options, progress)
    loaded, judges = _calibration(job, loaded, options, progress)
    judge = (
        None
        if judges is None
        else Judge(job.original, judges, recipe.metric, recipe.max_drop, recipe.threads)
    )
    int8, attempts = quantize_step(
        job.exact, loaded, job.reference, judge, options, target_of(recipe.target), progress=progress
    )
    if int8 is None:
        why = attempts[-1].reason or "none of its operators can be int8: see edgewise inspect"
        raise EdgewiseError(f"{job.path} was not quantized: {why}")
    job = dataclasses.replace(job, steps=job.steps + attempts)
    notes = job.notes if judge is not None else (*job.notes, _NOT_JUDGED)
    return _write(job, _INT8, int8, Path(output), force, progress, notes=notes, judge=judge, table=loaded)


def _calibration(
    job: _Job, table: CalibrationTable | None, options: Quantize, progress: Progress
) -> tuple[CalibrationTable, Samples | None]:
    """The table that was given or is made now, and the samples that judge."""
    if table is not None:
        table.check(job.exact)
        return table, job.samples
    assert job.samples is not None
    parts = split(job.samples, options.samples, job.recipe.seed)
    made = calibrate_for_int8(
        job.exact, parts.calibrate, options, threads=job.recipe.threads, progress=progress
    )
    return made, parts.judge


def _write(
    job: _Job,
    name: str,
    result: ir.Model,
    output: Path,
    force: bool,
    progress: Progress,
    *,
    notes: tuple[str, ...],
    judge: Judge | None = None,
    table: CalibrationTable | None = None,
) -> Report:
    """Write the result whatever the measurement says, measure it against the input and report."""
    digest = files.sha256(job.path)
    stamp, feeds = stamp_of(job.recipe, digest, table), job.reference.feeds
    ort = write_result(result, stamp, job.recipe, output, feeds, force=force)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as scratch:
        paths = {INPUT: job.start.file(Path(scratch)), name: output}
        sizes = {key: files.file_bytes(path) for key, path in paths.items()}
        latency = measure_files(paths, feeds[0], job.recipe, progress)
    score, found = (None, ()) if judge is None else judge.verdict(result)
    return Report(
        version=VERSION,
        input=facts_of(job.start.adapted.original, job.path, digest, files.file_bytes(job.path)),
        output=facts_of(result, output, files.sha256(output), sizes[name]),
        recipe=job.recipe.model_dump(mode="json"),
        steps=job.steps,
        differences=found,
        score=score,
        candidates=tuple(dataclasses.replace(c, chosen=c.name == name) for c in choose(sizes, latency)),
        latency=latency,
        table=None if table is None else table.digest,
        notes=notes,
        changes=job.start.adapted.changes,
        ort=ort,
    )


def compare(
    first: ModelPath,
    second: ModelPath,
    *,
    data: str | Samples | None = None,
    preprocess: Preprocess | None = None,
    metric: str | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Run two .onnx files on the same samples, or on seeded inputs, and tell how far they are apart.

    With samples the second is scored by `metric` as well, see `edgewise.optimizer.metrics`. Raises
    `InputError` on files that cannot be used or whose inputs or outputs differ in name or type.
    """
    expected, actual = files.load(first), files.load(second)
    check_inputs(expected, actual, Path(second))
    _check_outputs(expected, actual, Path(second))
    samples = as_samples(data, expected, preprocess, seed)
    if samples is None:
        feeds = probe_feeds(expected, None, seed=seed)
        outputs = [
            [e.run(feed) for feed in feeds]
            for e in (Evaluator(expected, threads=threads), Evaluator(actual, threads=threads))
        ]
        found = differences(*outputs)
        return Comparison(str(first), str(second), f"{len(feeds)} seeded inputs", found, notes=(_SEEDED,))
    judge = Judge(expected, samples, metric, 0.0, threads)
    score, found = judge.verdict(actual)
    return Comparison(
        first=str(first),
        second=str(second),
        inputs=f"{len(samples)} samples of {samples.source}",
        differences=found,
        score=score,
        notes=(RANDOM,) if samples.random else (),
    )


def _check_outputs(expected: ir.Model, model: ir.Model, path: Path) -> None:
    names = {value.name for value in model.graph.outputs}
    if missing := [value.name for value in expected.graph.outputs if value.name not in names]:
        raise InputError(f"{path} has no output {missing[0]!r}, only {', '.join(map(str, names))}")
