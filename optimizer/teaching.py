"""Jobs that train: a student after its teacher, a model for new labels."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.optimizer import files
from edgewise.optimizer.candidates import Given
from edgewise.optimizer.choice import INPUT, choose
from edgewise.optimizer.inputs import check_inputs
from edgewise.optimizer.int8 import Split
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.optimization import (
    check_targets,
    measure_files,
    publish,
    run_job,
    save_stamped,
    stamp_of,
)
from edgewise.optimizer.pipeline import Progress, Reference, no_progress, run_passes
from edgewise.optimizer.pruning import PREPARATION, split_to_prune
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.optimizer.report import Report, Score, facts_of
from edgewise.optimizer.start import Start, begin
from edgewise.optimizer.version import VERSION
from edgewise.passes import parse
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.options import Epoch, History, Penalty, TrainOptions, require_torch

ModelPath = str | os.PathLike[str]
_TRAINED = "trained"
_LESSONS = 512  # samples, enough to learn back what rounding took
_NO_LESSON = (
    "the samples have no labels: --int8 alone learns at a rate and for a time of its own, so leave --epochs, "
    "--learning-rate, --batch, --freeze and --memory out"
)
_NO_LABELS = (
    "the samples have no labels to learn from: add them, or give --int8, which learns from the model's own "
    "answers, or distil another model's"
)


def distill(
    teacher: ModelPath,
    student: ModelPath,
    output: ModelPath,
    *,
    data: str | Samples | None,
    validation: str | Samples | None = None,
    recipe: Recipe | None = None,
    options: TrainOptions | None = None,
    report: ModelPath | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write `student` with weights that were trained until it answers like `teacher`, of the same inputs.

    Samples that nothing is learned from tell how often the two agree, before and after. The exact passes
    of the recipe run behind; its `prune` and `quantize` are not used. Raises `InputError` on models that do
    not fit together, `EdgewiseError` where training fails.
    """
    require_torch("distillation")
    from edgewise.training.distillation import distill as learn  # brings torch, which takes a second

    recipe, options, output = recipe or Recipe(), options or TrainOptions(), Path(output)
    for source in (student, teacher):
        check_targets(output, recipe, Path(source), force=force)
    start, model = begin(Path(student), data, recipe, validation), files.load(teacher)
    check_inputs(start.adapted.model, model, Path(teacher))
    parts = split_to_prune(_samples(start), recipe.seed, validation=start.validation)
    _check_outputs(model, start, recipe)
    judge = Judge(model, parts.judge, recipe.metric, recipe.max_drop, recipe.threads)
    ready, expected = (_prepared(m, start, recipe) for m in (start.adapted.model, model))
    _check_names(ready, options)
    trained = learn(
        expected,
        ready,
        parts.calibrate,
        parts.choose,
        options,
        threads=recipe.threads,
        progress=_told(progress, options),
    )
    reference = Reference(trained.model, start.feeds, threads=recipe.threads)
    exact, steps = run_passes(trained.model, recipe.chain, reference, progress=progress)
    before, after = judge.score(start.adapted.model), judge.score(exact)
    score = Score(judge.metric.name, before, after, 0.0, len(parts.judge))
    save_stamped(exact, stamp_of(recipe, files.sha256(start.path), None), output, force=force)
    result = _report(start, exact, output, recipe, score, progress)
    result = dataclasses.replace(result, steps=steps, history=trained.history)
    if report is not None:
        publish(result, Path(report))
    return result


def finetune(
    model: ModelPath,
    output: ModelPath,
    *,
    data: str | Samples | None,
    validation: str | Samples | None = None,
    replace_head: int | None = None,
    penalty: Penalty | None = None,
    int8: bool = False,
    recipe: Recipe | None = None,
    options: TrainOptions | None = None,
    report: ModelPath | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Report:
    """Write `model` trained on the labels of `data`, and then made as small and fast as `optimize` does.

    With `replace_head` its last layer starts anew with so many classes. A `penalty` drives weights to zero,
    and whole channels of zeros leave. With `int8` the weights are trained for their integers: that needs no
    labels. The int8 model, and a recipe's pruning, are held to the trained model. Raises `InputError` where
    labels or a head are missing, `EdgewiseError` where training fails.
    """
    require_torch("training")
    recipe, options = recipe or Recipe(), options or TrainOptions()
    check_targets(Path(output), recipe, Path(model), force=force)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        source, history, samples = Path(model), None, data
        start = begin(source, data, recipe, validation)
        recipe = recipe.model_copy(update={"quantize": _healing(recipe, start) if int8 else None})
        if _samples(start).labels is not None:
            ready = _headed(_prepared(start.adapted.model, start, recipe), replace_head, recipe.seed)
            parts = split_to_prune(_samples(start), recipe.seed, validation=start.validation)
            trained, history = _on_labels(ready, parts, recipe, options, penalty, progress)
            source = files.save(trained, Path(folder) / f"{Path(model).stem}.trained.onnx")
        elif replace_head is not None or penalty is not None or not int8:
            raise InputError(_NO_LABELS)
        elif options != TrainOptions(seed=options.seed):
            raise InputError(_NO_LESSON)
        result = run_job(
            source,
            Path(output),
            data=samples,
            validation=validation,
            recipe=recipe,
            given=Given(int8=int8, history=history),
            report=report,
            force=force,
            progress=progress,
        )
    return dataclasses.replace(result, input=dataclasses.replace(result.input, path=os.fspath(model)))


def _samples(start: Start) -> Samples:
    if start.samples is None:
        raise InputError("there is nothing to learn from: pass samples with --data")
    return start.samples


def _check_outputs(teacher: ir.Model, start: Start, recipe: Recipe) -> None:
    """Raise `InputError` where outputs of one name are of different shapes."""
    wanted, found = (
        Evaluator(model, threads=recipe.threads).run(start.feeds[0])
        for model in (teacher, start.adapted.model)
    )
    for name in wanted.keys() & found.keys():
        one, other = np.shape(wanted[name]), np.shape(found[name])
        if one != other:
            raise InputError(f"output {name!r} is of shape {one} for the teacher and {other} for the student")


def _check_names(model: ir.Model, options: TrainOptions) -> None:
    """Raise `InputError` on a pattern of weights to freeze that no name matches."""
    for pattern in options.freeze:
        if not fnmatch.filter(model.graph.initializers, pattern):
            known = ", ".join(list(model.graph.initializers)[:5])
            raise InputError(f"--freeze {pattern} is the name of no weight: they are called {known}, ...")


def _prepared(model: ir.Model, start: Start, recipe: Recipe) -> ir.Model:
    """The model as training wants it: its constants known, its batch norms there."""
    reference = Reference(model, start.feeds, threads=recipe.threads)
    return run_passes(model, [parse(spec) for spec in PREPARATION], reference)[0]


def _headed(model: ir.Model, classes: int | None, seed: int) -> ir.Model:
    from edgewise.training.transfer import replace_head

    return model if classes is None else replace_head(model, classes, seed)


def _on_labels(
    model: ir.Model,
    parts: Split,
    recipe: Recipe,
    options: TrainOptions,
    penalty: Penalty | None,
    progress: Progress,
) -> tuple[ir.Model, History]:
    """The model after training on what the parts hold to learn from; a few others tell when to stop."""
    from edgewise.training.distillation import finetune as learn  # brings torch, which takes a second
    from edgewise.training.graph_module import GraphModule
    from edgewise.training.penalties import Shrinking
    from edgewise.training.trainer import trainable

    module = GraphModule(model)
    Judge(model, parts.choose, recipe.metric, recipe.max_drop, recipe.threads)  # a bad metric fails now
    _check_names(model, options)
    weights = trainable(model, options.freeze)
    shrinking = None if penalty is None else Shrinking(penalty, model, module, weights)
    trained = learn(
        model,
        parts.calibrate,
        parts.choose,
        options,
        module=module,
        regularizer=shrinking,
        threads=recipe.threads,
        progress=_told(progress, options),
    )
    return trained.model, trained.history


def _told(progress: Progress, options: TrainOptions) -> Callable[[Epoch], None]:
    return lambda epoch: progress("train", epoch.number, options.epochs or epoch.number)


def _healing(recipe: Recipe, start: Start) -> Quantize:
    """Static int8 whose weights are trained for the integers they become.

    That takes more samples than calibration does, but for a quarter, which judges if nothing else does.
    """
    options, count = recipe.quantize or Quantize(), len(_samples(start))
    learns = min(count if start.validation is not None else 3 * count // 4, _LESSONS)
    ladder = (*options.ladder, "train")
    return options.model_copy(update={"ladder": ladder, "samples": max(options.samples, learns)})


def _report(
    start: Start, model: ir.Model, output: Path, recipe: Recipe, score: Score, progress: Progress
) -> Report:
    """What was written, whatever the measurement says, beside what came in."""
    with tempfile.TemporaryDirectory(prefix="edgewise-") as scratch:
        paths = {INPUT: start.file(Path(scratch)), _TRAINED: output}
        sizes = {name: files.file_bytes(path) for name, path in paths.items()}
        latency = measure_files(paths, start.feeds[0], recipe, progress)
    candidates = choose(sizes, latency, recipe.objective)
    return Report(
        version=VERSION,
        input=facts_of(start.adapted.original, start.path, files.sha256(start.path), sizes[INPUT]),
        output=facts_of(model, output, files.sha256(output), sizes[_TRAINED]),
        recipe=recipe.model_dump(mode="json"),
        steps=(),
        differences=(),
        score=score,
        candidates=tuple(dataclasses.replace(c, chosen=c.name == _TRAINED) for c in candidates),
        latency=latency,
        notes=start.notes,
        changes=start.adapted.changes,
    )
