"""The single jobs that `optimize` is made of: prune, calibrate, quantize, compare."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgewise.calibration.cluster import crew_of
from edgewise.calibration.collect import MEMORY
from edgewise.calibration.data import Preprocess, Samples
from edgewise.calibration.findings import findings
from edgewise.calibration.partial import collect_to
from edgewise.calibration.plan import observed_values
from edgewise.calibration.plan import plan as plan_int8
from edgewise.calibration.sharding import Task
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.candidates import FORMATS, Given
from edgewise.optimizer.choice import INPUT, choose
from edgewise.optimizer.comparison import Difference, differences
from edgewise.optimizer.inputs import RANDOM, as_samples, check_inputs
from edgewise.optimizer.int8 import prepare
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.optimization import check_targets, measure_files, run_job, stamp_of, write_result
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, no_progress, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.pruning import PREPARATION
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.optimizer.report import Report, Score, facts_of, plain
from edgewise.optimizer.start import Start, begin
from edgewise.optimizer.version import VERSION
from edgewise.passes.fingerprint import fingerprint
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator

ModelPath = str | os.PathLike[str]
_PRUNED, _INT8 = "pruned", "int8"
_REMOVAL = "prune-channels{multiple: 4}"
_PRUNING = (*PREPARATION, "fuse-batch-norm", _REMOVAL, "drop-dead-nodes")
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
    validation: str | Samples | None = None,
    recipe: Recipe | None = None,
    report: ModelPath | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write as little of `model` as the bound in the recipe's section `prune` allows, recovered on `data`.

    Without that section the channels leave that hold nothing but zeros, and the outputs stay the same up to
    rounding; this is checked on `data`, or on seeded inputs. The recipe's own chain of passes and its
    benchmark are not used then. With it, what is written is also measured and never slower, and static int8
    follows where the recipe has it. Samples that nothing is learned from judge: those for `validation`, or
    some that are held back. An interrupted run keeps its trials in `output` + ".trials.part", and the same
    call goes on from there. Raises `InputError` on input that cannot be used, `EdgewiseError` where the bound
    cannot be kept or nothing can leave.
    """
    if recipe is not None and recipe.prune is not None:
        return run_job(
            model,
            Path(output),
            data=data,
            validation=validation,
            recipe=recipe,
            given=Given(pruned=True),
            report=report,
            force=force,
            progress=progress,
        )
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
    memory: int = MEMORY,
    workers: int | None = None,
    ray: str | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> CalibrationReport:
    """Observe all samples and write the table of what every value held, an .npz file for `quantize`.

    What is observed is `model` after the exact passes of the recipe: `quantize` with the same recipe
    meets the same model. Up to `memory` bytes of values are held at once. The samples are split over
    `workers` processes, or with `ray` over the Ray cluster of that address ("local" starts one); the table is
    the same. An interrupted run leaves `output` + ".part", and the same call goes on from there. Raises
    `InputError` on input that cannot be used, `EdgewiseError` where workers keep dying or nothing in the
    model can be int8.
    """
    begin = time.perf_counter()
    output = Path(output)
    recipe = recipe or Recipe()
    options = recipe.quantize or Quantize()
    job = _prepared(_start(model, output, data, recipe, force, progress), options, progress)
    assert job.samples is not None
    values, total = observed_values(job.exact, options.options), len(job.samples)
    if not values:
        unseen = CalibrationTable(fingerprint(job.exact), 0, {})
        why = plan_int8(job.exact, unseen, options.options, target_of(recipe.target)).why_nothing
        raise EdgewiseError(f"{job.path} was not calibrated: {why}")
    table, notes = collect_to(
        output,
        Task(job.exact, job.samples, values, recipe.threads, memory),
        crew_of(workers, ray),
        progress=lambda done: progress("calibrate", done, total),
    )
    return CalibrationReport(
        model=str(job.path),
        path=str(output),
        source=job.samples.source,
        samples=table.samples,
        values=len(table.sketches),
        digest=table.digest,
        seconds=time.perf_counter() - begin,
        notes=(*job.notes, *notes, *findings(table)),
    )


def merge_tables(tables: Sequence[ModelPath], output: ModelPath, *, force: bool = False) -> CalibrationReport:
    """Write the table of all samples of some tables: that which one run over them all would have written.

    Raises `InputError` unless they are of the same model and the same values.
    """
    begin, output = time.perf_counter(), Path(output)
    if not tables:
        raise InputError("there is no table to merge: name those that calibrate wrote")
    files.check_writable(output, force=force)
    merged = reduce(CalibrationTable.merge, map(CalibrationTable.load, tables))
    merged.save(output)
    return CalibrationReport(
        model=f"fingerprint {merged.fingerprint[:12]}",
        path=str(output),
        source=", ".join(map(str, tables)),
        samples=merged.samples,
        values=len(merged.sketches),
        digest=merged.digest,
        seconds=time.perf_counter() - begin,
        notes=findings(merged),
    )


def quantize(
    model: ModelPath,
    output: ModelPath,
    *,
    data: str | Samples | None = None,
    validation: str | Samples | None = None,
    table: ModelPath | None = None,
    plan: ModelPath | None = None,
    recipe: Recipe | None = None,
    report: ModelPath | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write the fastest form of `model` that keeps the bound, in static int8 as far as that pays.

    The ranges come from `table`, which `calibrate` wrote, or from `data`; those for `validation` judge, or
    samples that do not calibrate. A `plan` says what becomes of every node and value. Where nothing wins, the
    model is written in float, and the report says why. An interrupted run leaves its table in `output` +
    ".table.part", and the same call goes on from there. Raises `InputError` on input that cannot be used,
    `EdgewiseError` if nothing in the model can be int8.
    """
    recipe = recipe or Recipe()
    recipe = recipe.model_copy(update={"quantize": recipe.quantize or Quantize()})
    assert recipe.quantize is not None
    if data is None and table is None and plan is None and recipe.quantize.format not in FORMATS:
        raise InputError("int8 needs the ranges of values: pass samples with --data, or a table with --table")
    ranges = None if table is None else CalibrationTable.load(table)
    given = Given(ranges, None if plan is None else Path(plan), int8=True)
    return run_job(
        model,
        Path(output),
        data=data,
        validation=validation,
        recipe=recipe,
        given=given,
        report=report,
        force=force,
        progress=progress,
    )


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
