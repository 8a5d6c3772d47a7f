"""The main job: exact passes, int8, measurement, and the best of them written."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from edgewise.calibration.data import Samples
from edgewise.calibration.partial import kept_beside
from edgewise.calibration.table import CalibrationTable
from edgewise.optimizer import files
from edgewise.optimizer.bisection import culprit
from edgewise.optimizer.candidates import EXACT, Given, Made, make_candidates
from edgewise.optimizer.choice import INPUT, choose
from edgewise.optimizer.emit_ort import OrtFiles, emit_ort, files_beside
from edgewise.optimizer.frechet import Frechet
from edgewise.optimizer.int8 import node_noise
from edgewise.optimizer.layers import layer_noise
from edgewise.optimizer.pictures import Pictures, can_draw, pictures
from edgewise.optimizer.pipeline import Progress, StepReport, no_progress
from edgewise.optimizer.profiling import profile
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.report import Report, facts_of, write_report
from edgewise.optimizer.runtimes import limits_of
from edgewise.optimizer.start import Start, begin
from edgewise.optimizer.torch_export import is_torch_target, to_model
from edgewise.optimizer.version import VERSION
from edgewise.passes.base import Pass
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.latency import LatencyReport, measure
from edgewise.runtime.session import check_provider

_SLOWER = "the model was measured to be slower after it"
_MOST_TAKEN_BACK = 3  # searches for a pass that makes the model slower take a minute each


def optimize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    data: str | Samples | None = None,
    validation: str | Samples | None = None,
    inputs: Sequence[str] = (),
    recipe: Recipe | None = None,
    report: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write the fastest and smallest model that still does the job of `model`, and say how it was found.

    `model` is an .onnx file or `package.module:callable` of a torch module, then with `inputs` such as
    `x=1x3x224x224`. Without `data` only exact passes run; samples for `validation`, if given, do nothing but
    judge. The result is measured against the input on the recipe's target and is never slower. Raises
    `InputError` on input that cannot be used.
    """
    return run_job(
        model,
        Path(output),
        data=data,
        validation=validation,
        inputs=inputs,
        recipe=recipe or Recipe(),
        given=Given(),
        report=report,
        force=force,
        progress=progress,
    )


def run_job(
    model: str | os.PathLike[str],
    output: Path,
    *,
    data: str | Samples | None,
    validation: str | Samples | None = None,
    inputs: Sequence[str] = (),
    recipe: Recipe,
    given: Given,
    report: str | os.PathLike[str] | None = None,
    force: bool,
    progress: Progress,
) -> Report:
    """The job of `optimize`, with what is `given` to it."""
    check_provider(recipe.target)
    check_targets(output, recipe, Path(model), force=force)
    with (
        tempfile.TemporaryDirectory(prefix="edgewise-") as folder,
        kept_beside(output) as kept,
        kept_beside(output, "trials", after=BaseException) as trials,  # hours, not to be lost by a failure
        np.errstate(all="ignore"),  # what overflows is judged like all else
        threadpool_limits(recipe.threads, "blas"),
    ):
        scratch, given = Path(folder), dataclasses.replace(given, kept=kept, trials=trials)
        start = begin(as_file(model, inputs, scratch, seed=recipe.seed), data, recipe, validation)
        if report is not None:
            files.make_folder(Path(report))
        made, recipe = _make_none_slower(start, recipe, given, scratch, progress)
        result = _choose_and_write(start, made, recipe, output, force=force)
        if report is not None:
            result = _explained(result, [start.file(scratch), output], made, start.samples, recipe, progress)
    result = dataclasses.replace(result, input=dataclasses.replace(result.input, path=os.fspath(model)))
    if report is not None:
        publish(result, Path(report))
    return result


def publish(report: Report, folder: Path) -> None:
    """Write the report into `folder` for machines and for people."""
    from edgewise.optimizer.page import write_page  # brings matplotlib, which takes a second

    write_report(report, folder)
    write_page(report, folder)


def as_file(model: str | os.PathLike[str], inputs: Sequence[str], scratch: Path, *, seed: int) -> Path:
    """The .onnx file of `model`; a torch module is exported into `scratch` first."""
    if not is_torch_target(os.fspath(model)):
        return Path(model)
    return files.save(to_model(os.fspath(model), inputs, seed=seed), scratch / "exported.onnx")


def check_targets(output: Path, recipe: Recipe, source: Path, *, force: bool) -> None:
    """Raise `InputError` unless all files that the recipe wants may be written."""
    if recipe.emit is not None and output.suffix == ".ort":
        raise InputError(f"the .ort file is written beside {output}: let its name end otherwise")
    for path in (output, *(files_beside(output) if recipe.emit is not None else ())):
        files.check_writable(path, force=force, source=source)


def _make_none_slower(
    start: Start, recipe: Recipe, given: Given, scratch: Path, progress: Progress
) -> tuple[Made, Recipe]:
    """Make the models and measure them; an exact pass that made the model slower is found and left out.

    Gives back the recipe as it was followed.
    """
    taken_back: tuple[StepReport, ...] = ()
    while True:
        made = _measured(start, make_candidates(start, recipe, given, progress), recipe, scratch, progress)
        made = dataclasses.replace(made, steps=taken_back + made.steps)
        guilty = None
        if _is_slower(made.latency, EXACT) and len(taken_back) < _MOST_TAKEN_BACK:
            guilty = _culprit(start, made, recipe, scratch, progress)
        shorter = None if guilty is None else recipe.without(guilty)
        if guilty is None or shorter is None:
            return made, recipe
        if given.kept is not None:
            given.kept.unlink(missing_ok=True)  # it is of another model than the next one
        taken_back += (StepReport(guilty.spec, guilty.contract.value, "rolled back", reason=_SLOWER),)
        recipe = shorter


def _measured(start: Start, made: Made, recipe: Recipe, scratch: Path, progress: Progress) -> Made:
    """The models saved, all but the input with the stamp of their making, and measured."""
    digest = files.sha256(start.path)
    stamps = {name: stamp_of(recipe, digest, made.table(name)) for name in made.models}
    paths = {
        name: start.file(scratch)
        if name == INPUT
        else save_stamped(model, stamps[name], scratch / f"{name}.onnx", force=True)
        for name, model in made.models.items()
    }
    latency = measure_files(paths, made.feeds[0], recipe, progress)
    return dataclasses.replace(made, stamps=stamps, paths=paths, latency=latency)


def _is_slower(latency: LatencyReport | None, name: str) -> bool:
    ratios = () if latency is None else latency.ratios
    return any(ratio.name == name and ratio.verdict == "slower" for ratio in ratios)


def _culprit(start: Start, made: Made, recipe: Recipe, scratch: Path, progress: Progress) -> Pass:
    """The exact pass from which on the model is slower than the input."""
    passes = {step.spec: step for step in recipe.chain}
    applied = [passes[s.step] for s in made.steps if s.status == "applied" and s.step in passes]

    def is_slower(model: ir.Model) -> bool:
        trial = files.save(model, scratch / "trial.onnx", force=True)
        paths = {INPUT: start.file(scratch), "trial": trial}
        return _is_slower(measure_files(paths, made.feeds[0], recipe, progress), "trial")

    return culprit(start.adapted.model, applied, is_slower)


def _choose_and_write(start: Start, made: Made, recipe: Recipe, output: Path, *, force: bool) -> Report:
    """Write the best of what was made and report."""
    sizes = {name: files.file_bytes(p) for name, p in made.paths.items()}
    candidates = choose(sizes, made.latency, recipe.objective)
    chosen = next(c.name for c in candidates if c.chosen)
    score, found = (None, ()) if made.judge is None else made.judge.verdict(made.models[chosen])
    search, stamp = made.searches.get(chosen), made.stamps[chosen]
    ort = write_result(made.models[chosen], stamp, recipe, output, made.feeds, force=force)
    return Report(
        version=VERSION,
        input=facts_of(
            start.adapted.original, start.path, files.sha256(start.path), files.file_bytes(start.path)
        ),
        output=facts_of(made.models[chosen], output, files.sha256(output), files.file_bytes(output)),
        recipe=recipe.model_dump(mode="json"),
        steps=made.steps,
        differences=found,
        score=score,
        candidates=candidates,
        latency=made.latency,
        table=stamp.get("edgewise.table"),
        notes=made.notes,
        changes=start.adapted.changes,
        ort=ort,
        sensitivity=() if search is None else search.sensitivity,
        floats={} if search is None else search.floats,
        amounts=() if made.pruned is None else made.pruned.amounts,
        history=made.history,
    )


def _explained(
    result: Report,
    paths: Sequence[Path],
    made: Made,
    samples: Samples | None,
    recipe: Recipe,
    progress: Progress,
) -> Report:
    """The report with what takes time to find out and only a page shows: images, noise by layer, profiles."""
    result = dataclasses.replace(result, images=_drawn(made, result.chosen, recipe, progress))
    found = made.searches.get(result.chosen)
    if found is not None and found.model is not None:
        # Under the names of the plan, which the file may have lost. That of exact passes is rounding.
        progress("noise of every layer", 0, 0)
        noise = layer_noise(found.in_float, found.model, made.feeds, threads=recipe.threads)
        costs = found.sensitivity or node_noise(
            found.in_float, found.plan, samples, threads=recipe.threads, progress=progress
        )
        result = dataclasses.replace(result, layers=noise, sensitivity=costs)
    if recipe.benchmark is None:
        return result
    try:
        profiles = profile(
            paths,
            provider=recipe.target,
            threads=recipe.threads,
            data=samples,
            seed=recipe.seed,
            progress=progress,
        )
    except EdgewiseError as failure:  # the work is done: what explains it may be missing
        return dataclasses.replace(result, notes=(*result.notes, f"no profile: {failure}"))
    return dataclasses.replace(result, profiles=profiles)


def _drawn(made: Made, chosen: str, recipe: Recipe, progress: Progress) -> Pictures | None:
    """What the model that was written draws for the samples that judged it; None where it draws nothing."""
    if made.judge is None or chosen == INPUT or not can_draw(made.models[EXACT]):
        return None
    progress("what it draws", 0, 0)
    metric = made.judge.metric.function
    return pictures(
        made.models[INPUT],
        made.models[chosen],
        made.judge.samples,
        frechet=metric if isinstance(metric, Frechet) else None,
        threads=recipe.threads,
    )


def write_result(
    model: ir.Model,
    stamp: Mapping[str, str],
    recipe: Recipe,
    output: Path,
    feeds: Sequence[Feed],
    *,
    force: bool,
) -> OrtFiles | None:
    """Write the model, and beside it what the recipe wants emitted; where that fails, nothing."""
    if recipe.runtime is not None:
        limits_of(recipe.runtime).check(model)
    made = None
    if recipe.emit is not None:
        with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
            source = save_stamped(model, stamp, Path(folder) / output.name)
            ort, _ = files_beside(output)
            made = emit_ort(source, ort, feeds, threads=recipe.threads, force=force)
    save_stamped(model, stamp, output, force=force)
    return made


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
