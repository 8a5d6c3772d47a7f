"""The main job: exact passes, int8, measurement, and the best of them written."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.choice import INPUT, choose
from edgewise.optimizer.inputs import RANDOM, as_samples
from edgewise.optimizer.int8 import calibrate_for_int8, prepare, quantize_step, split
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.layers import layer_noise
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, no_progress, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.profiling import profile
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.report import Report, facts_of, write_report
from edgewise.optimizer.torch_export import is_torch_target, to_model
from edgewise.optimizer.version import VERSION
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.latency import LatencyReport, measure
from edgewise.runtime.session import check_provider

EXACT, INT8 = "exact", "int8"

_NO_SAMPLES = (
    "no samples were given, so only exact passes ran: with --data (unlabelled samples are enough) static "
    "int8 can be calibrated and judged, and every step is checked on real inputs"
)


def optimize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    data: str | Samples | None = None,
    inputs: Sequence[str] = (),
    recipe: Recipe | None = None,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write the fastest and smallest model that still does the job of `model`, and say how it was found.

    `model` is an .onnx file or `package.module:callable` of a torch module, then with `inputs` such as
    `x=1x3x224x224`. Without `data` only exact passes run. The result is measured against the input on
    the recipe's target and is never slower. Raises `InputError` on input that cannot be used.
    """
    recipe, output = recipe or Recipe(), Path(output)
    check_provider(recipe.target)
    files.check_writable(output, force=force, source=Path(model))
    with tempfile.TemporaryDirectory(prefix="edgewise-") as scratch:
        path = as_file(model, inputs, Path(scratch), seed=recipe.seed)
        original = files.load(path)
        samples = as_samples(data, original, recipe.preprocess, recipe.seed)
        if report is not None:
            files.make_folder(Path(report))
        made = _make(original, samples, recipe, progress)
        stamp = stamp_of(recipe, files.sha256(path), made.table)
        result = _choose_and_write(path, made, stamp, recipe, output, Path(scratch), progress, force=force)
        if report is not None:
            result = _explained(result, [path, output], made, samples, recipe, progress)
    result = dataclasses.replace(result, input=dataclasses.replace(result.input, path=os.fspath(model)))
    if report is not None:
        from edgewise.optimizer.page import write_page  # brings matplotlib, which takes a second

        write_report(result, Path(report))
        write_page(result, Path(report))
    return result


def as_file(model: str | os.PathLike[str], inputs: Sequence[str], scratch: Path, *, seed: int) -> Path:
    """The .onnx file of `model`; a torch module is exported into `scratch` first."""
    if not is_torch_target(os.fspath(model)):
        return Path(model)
    return files.save(to_model(os.fspath(model), inputs, seed=seed), scratch / "exported.onnx")


@dataclass(frozen=True)
class _Made:
    """The models a run made, by name and in order of ambition, and how."""

    models: Mapping[str, ir.Model]
    steps: tuple[StepReport, ...]
    feeds: tuple[Feed, ...]
    judge: Judge | None = None
    table: CalibrationTable | None = None
    notes: tuple[str, ...] = ()
    in_float: ir.Model | None = None
    """What the int8 model was made from."""


def _make(original: ir.Model, samples: Samples | None, recipe: Recipe, progress: Progress) -> _Made:
    """Run the exact chain and, where samples allow, int8."""
    reference = Reference(original, probe_feeds(original, samples, seed=recipe.seed), threads=recipe.threads)
    exact, steps = run_passes(original, recipe.chain, reference, progress=progress)
    models = {INPUT: original}
    if exact is not original:
        models[EXACT] = exact
    if samples is None:
        return _Made(models, steps, reference.feeds, notes=(_NO_SAMPLES,))
    notes = (RANDOM,) if samples.random else ()
    if recipe.quantize is None:
        judge = Judge(original, samples, recipe.metric, recipe.max_drop, recipe.threads)
        return _Made(models, steps, reference.feeds, judge, notes=notes)
    parts = split(samples, recipe.quantize.samples, recipe.seed)
    judge = Judge(original, parts.judge, recipe.metric, recipe.max_drop, recipe.threads)
    ready, preparation = prepare(exact, recipe.quantize, reference, progress=progress)
    table = calibrate_for_int8(
        ready, parts.calibrate, recipe.quantize, threads=recipe.threads, progress=progress
    )
    int8, attempts = quantize_step(
        ready, table, reference, judge, recipe.quantize, target_of(recipe.target), progress=progress
    )
    if int8 is not None:
        models[INT8] = int8
    return _Made(models, steps + preparation + attempts, reference.feeds, judge, table, notes, ready)


def _choose_and_write(
    path: Path,
    made: _Made,
    stamp: Mapping[str, str],
    recipe: Recipe,
    output: Path,
    scratch: Path,
    progress: Progress,
    *,
    force: bool,
) -> Report:
    """Measure what was made, write the best of it and report."""
    paths = {
        name: path if name == INPUT else save_stamped(made.models[name], stamp, scratch / f"{name}.onnx")
        for name in made.models
    }
    latency = measure_files(paths, made.feeds[0], recipe, progress)
    candidates = choose({name: files.file_bytes(p) for name, p in paths.items()}, latency)
    chosen = next(c.name for c in candidates if c.chosen)
    save_stamped(made.models[chosen], stamp, output, force=force)
    score, found = (None, ()) if made.judge is None else made.judge.verdict(made.models[chosen])
    return Report(
        version=VERSION,
        input=facts_of(made.models[INPUT], path, files.sha256(path), files.file_bytes(path)),
        output=facts_of(made.models[chosen], output, files.sha256(output), files.file_bytes(output)),
        recipe=recipe.model_dump(mode="json"),
        steps=made.steps,
        differences=found,
        score=score,
        candidates=candidates,
        latency=latency,
        table=stamp.get("edgewise.table"),
        notes=made.notes,
    )


def _explained(
    result: Report,
    paths: Sequence[Path],
    made: _Made,
    samples: Samples | None,
    recipe: Recipe,
    progress: Progress,
) -> Report:
    """The report with what takes time to find out and only a page shows: noise by layer, where time goes."""
    if result.chosen == INT8 and made.in_float is not None:  # the noise of exact passes is rounding
        progress("noise of every layer", 0, 0)
        noise = layer_noise(made.in_float, made.models[INT8], made.feeds, threads=recipe.threads)
        result = dataclasses.replace(result, layers=noise)
    if recipe.benchmark is None:
        return result
    try:
        found = profile(
            paths,
            provider=recipe.target,
            threads=recipe.threads,
            data=samples,
            seed=recipe.seed,
            progress=progress,
        )
    except EdgewiseError as failure:  # the work is done: what explains it may be missing
        return dataclasses.replace(result, notes=(*result.notes, f"no profile: {failure}"))
    return dataclasses.replace(result, profiles=found)


def save_stamped(model: ir.Model, stamp: Mapping[str, str], path: Path, *, force: bool = False) -> Path:
    stamped = model.clone()
    stamped.metadata_props.update(stamp)
    return files.save(stamped, path, force=force)


def measure_files(
    paths: Mapping[str, Path], feed: Feed, recipe: Recipe, progress: Progress
) -> LatencyReport | None:
    if recipe.benchmark is None:
        return None
    return measure(
        paths,
        feed=feed,
        conditions=Conditions(provider=recipe.target, threads=recipe.threads),
        precision=recipe.benchmark.precision,
        max_seconds=recipe.benchmark.max_seconds,
        seed=recipe.seed,
        progress=lambda share: progress("benchmark", round(100 * share), 100),
    )


def stamp_of(recipe: Recipe, sha256: str, table: CalibrationTable | None) -> dict[str, str]:
    """What the output says of its making, as ONNX metadata.

    The recipe is written without what is the default of the version beside it, to weigh little.
    """
    stamp = {
        "edgewise.version": VERSION,
        "edgewise.recipe": recipe.model_dump_json(exclude_defaults=True),
        "edgewise.input.sha256": sha256,
    }
    if table is not None:
        stamp["edgewise.table"] = table.digest
    return stamp
