"""The models that could be written: the exact one, and the lossy ones that keep the bound."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.table import CalibrationTable
from edgewise.optimizer.choice import INPUT
from edgewise.optimizer.int8 import Int8, Split, find_int8, plan_only, prepare, split
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, run_passes, run_step
from edgewise.optimizer.plan_files import load_plan
from edgewise.optimizer.pruning import Pruned, find_pruned, split_to_prune
from edgewise.optimizer.recipe import Prune, Quantize, Recipe
from edgewise.optimizer.start import Start
from edgewise.passes.base import Pass
from edgewise.passes.convert_floats import ConvertFloats
from edgewise.passes.quantize_dynamic import QuantizeDynamic
from edgewise.passes.quantize_weights import QuantizeWeights
from edgewise.passes.shorten_names import ShortenNames
from edgewise.passes.store_weights import StoreWeights
from edgewise.passes.to_qoperator import ToQOperator
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.latency import LatencyReport
from edgewise.training.options import History

EXACT, PRUNED, INT8, DYNAMIC, STORED = "exact", "pruned", "int8", "int8 dynamic", "int8 stored"
UNPRUNED = "unpruned "
"""What the names begin with of int8 forms that nothing was pruned from, where there are pruned ones too."""

FORMATS: Mapping[str, Pass] = MappingProxyType(
    {
        "dynamic": QuantizeDynamic(),
        "int4-weights": QuantizeWeights(bits=4),
        "int8-weights": QuantizeWeights(bits=8),
        "float16": ConvertFloats(to="float16"),
        "bfloat16": ConvertFloats(to="bfloat16"),
    }
)
"""The formats that need no samples, as the pass that writes them."""

_NO_SAMPLES = (
    "no samples were given, so only exact passes ran: with --data (unlabelled samples are enough) static "
    "int8 can be calibrated and judged, and every step is checked on real inputs"
)
_NOT_JUDGED = (
    "no samples were given, so nobody knows how well the int8 model does its job: judge it with --data"
)


@dataclass(frozen=True)
class Given:
    """What a person brings instead of having it found: ranges, or a whole plan of a file."""

    table: CalibrationTable | None = None
    plan: Path | None = None
    int8: bool = False
    """Whether it is a failure that nothing in the model can be int8."""
    pruned: bool = False
    """Whether it is a failure that no amount of pruning keeps the bound."""
    kept: Path | None = None
    """Where the table that is made of samples is kept while the job runs."""
    trials: Path | None = None
    """The folder in which trials of pruning are kept while the job runs."""
    history: History | None = None
    """How the model learned before the job."""


@dataclass(frozen=True)
class Made:
    """The models a run made, by name and in order of ambition, and how."""

    models: Mapping[str, ir.Model]
    steps: tuple[StepReport, ...]
    feeds: tuple[Feed, ...]
    judge: Judge | None = None
    notes: tuple[str, ...] = ()
    searches: Mapping[str, Int8] = field(default_factory=dict)
    """How each search for static int8 ended, by the name of the model that it was after."""
    pruned: Pruned | None = None
    """How the search for what can leave ended."""
    history: History | None = None
    """How a model learned, before the job or after pruning."""
    stamps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    paths: Mapping[str, Path] = field(default_factory=dict)
    """Where the models are saved."""
    latency: LatencyReport | None = None

    @property
    def best(self) -> ir.Model:
        """The most ambitious of the models in float."""
        return self.models.get(PRUNED, self.models[EXACT])

    def table(self, name: str) -> CalibrationTable | None:
        """The table of the search that a model belongs to."""
        search = self.searches.get(UNPRUNED + INT8 if name.startswith(UNPRUNED) else INT8)
        return None if search is None else search.table

    def plus(self, name: str, made: tuple[ir.Model, StepReport]) -> Made:
        """With what one more step made of a model, if it kept its word."""
        model, step = made
        kept = {name: model} if step.status == "applied" else {}
        return dataclasses.replace(self, models={**self.models, **kept}, steps=(*self.steps, step))


def make_candidates(start: Start, recipe: Recipe, given: Given, progress: Progress) -> Made:
    """Run the exact chain and, as far as samples and formats allow, what is lossy; then shorten the names."""
    made = _made(start, recipe, given, progress)
    for name, model in made.models.items() if recipe.short_names else ():
        if name != INPUT:
            reference = Reference(model, made.feeds, threads=recipe.threads)
            made = made.plus(name, run_step(model, ShortenNames(), reference))
    return made


def _made(start: Start, recipe: Recipe, given: Given, progress: Progress) -> Made:
    original = start.adapted.model
    reference = Reference(original, start.feeds, threads=recipe.threads)
    exact, steps = run_passes(original, recipe.chain, reference, progress=progress)
    made = Made(
        {INPUT: original, EXACT: exact}, steps, reference.feeds, notes=start.notes, history=given.history
    )
    options, parts = recipe.quantize, None
    if recipe.prune is not None:
        made, parts = _pruned(start, made, recipe, given, reference, progress)
    if options is None:
        return dataclasses.replace(made, judge=made.judge or _judge(start, start.judges, recipe))
    if options.format in FORMATS:
        return _converted(start, made, recipe, FORMATS[options.format], reference, progress)
    if start.samples is None and given.table is None and given.plan is None:
        return dataclasses.replace(made, notes=(_NO_SAMPLES, *made.notes))
    if PRUNED in made.models and given.plan is None and (recipe.prune or Prune()).bounds_metric:
        made = _unpruned(start, made, recipe, given, reference, progress, parts)
    return _quantized(start, made, recipe, given, reference, progress, parts)


def _pruned(
    start: Start, made: Made, recipe: Recipe, given: Given, reference: Reference, progress: Progress
) -> tuple[Made, Split]:
    """With what is left of the model under the bound, and the samples by what they are for."""
    if start.samples is None:
        raise InputError("pruning needs samples, unlabelled ones will do: pass them with --data")
    options = recipe.prune or Prune()
    decides = recipe.quantize is not None or options.bounds_metric
    parts = split_to_prune(start.samples, recipe.seed, validation=start.validation, decides=decides)
    judge = _judge(start, parts.judge, recipe, options.min_metric)
    assert judge is not None
    found = find_pruned(
        start.adapted.model, parts, judge, reference, recipe, folder=given.trials, progress=progress
    )
    if found.model is None and given.pruned:
        where = "" if given.trials is None else f" (what was tried is in {given.trials})"
        raise EdgewiseError(
            f"{found.why}; --best-effort writes that at once{where}, and --effort 4 learns for longer"
        )
    told = (f"nothing is pruned: {found.why}",) if found.model is None else (found.why,) if found.why else ()
    kept = {} if found.model is None else {PRUNED: found.model}
    if found.model is not None and not options.bounds_metric:  # then int8 may cost as much again, at most
        spare = math.inf if recipe.quantize is None else judge.allowed
        judge = _judge(start, parts.judge, recipe, judge.score(found.model) - spare)
    made = dataclasses.replace(
        made,
        models={**made.models, **kept},
        steps=made.steps + found.steps,
        judge=judge,
        notes=(*made.notes, *told),
        pruned=found,
        history=found.history or made.history,
    )
    return made, parts


def _converted(
    start: Start, made: Made, recipe: Recipe, step: Pass, reference: Reference, progress: Progress
) -> Made:
    """With the model in a format that needs no samples; they judge it, where there are some."""
    progress(step.name, 0, 1)
    judge = made.judge or _judge(start, start.judges, recipe)
    made = made.plus(step.name, run_step(made.best, step, reference, judge=judge))
    progress(step.name, 1, 1)
    told = (_NOT_JUDGED,) if judge is None else judge.notes
    return dataclasses.replace(made, judge=judge, notes=(*made.notes, *told))


def _unpruned(
    start: Start,
    made: Made,
    recipe: Recipe,
    given: Given,
    reference: Reference,
    progress: Progress,
    parts: Split | None,
) -> Made:
    """With int8 forms of all that the exact passes left: what pruning lost of the bound, int8 may need."""
    alone = dataclasses.replace(made, models={EXACT: made.models[EXACT]}, steps=(), notes=())
    given = dataclasses.replace(given, int8=False, kept=None)  # what is kept is of the pruned model
    alone = _quantized(start, alone, recipe, given, reference, progress, parts)
    less = {name: made.models[name] for name in (INPUT, EXACT)}
    forms = {UNPRUNED + name: model for name, model in alone.models.items() if name != EXACT}
    return dataclasses.replace(
        made,
        models={**less, **forms, **made.models},
        steps=made.steps + tuple(dataclasses.replace(s, step=UNPRUNED + s.step) for s in alone.steps),
        searches={UNPRUNED + name: search for name, search in alone.searches.items()},
    )


def _quantized(
    start: Start,
    made: Made,
    recipe: Recipe,
    given: Given,
    reference: Reference,
    progress: Progress,
    parts: Split | None,
) -> Made:
    """With static int8, what else is worth a try, and what the objective asks for."""
    options, exact = recipe.quantize or Quantize(), made.best
    if parts is not None:
        reference = Reference(exact, reference.feeds, threads=recipe.threads)
    ready, preparation = prepare(exact, options, reference, progress=progress)
    judge, found = _static(start, ready, given, reference, recipe, progress, made.judge, parts)
    if found.model is None and given.int8 and not found.plan.quantized:
        raise EdgewiseError(f"{start.path} was not quantized: {found.why}")
    told = (f"no int8: {found.why}",) if found.model is None else (_NOT_JUDGED,) if judge is None else ()
    made = dataclasses.replace(
        made,
        models={**made.models, **({} if found.model is None else {INT8: found.model})},
        steps=made.steps + preparation + found.steps,
        judge=judge,
        notes=(*made.notes, *told, *(() if judge is None else judge.notes), *found.notes),
        searches={**made.searches, INT8: found},
    )
    if options.format == "qoperator" and found.model is not None:
        made = made.plus(INT8, run_step(found.model, ToQOperator(), reference, judge=judge))
    is_rival = options.format == "auto" and recipe.benchmark is not None and _is_of_products(exact)
    if is_rival and judge is not None:
        made = made.plus(DYNAMIC, run_step(exact, QuantizeDynamic(), reference, judge=judge))
    if recipe.objective != "latency" and judge is not None:
        source = made.models.get(INT8, exact)
        made = made.plus(STORED, run_step(source, StoreWeights(), reference, judge=judge))
    return made


def _is_of_products(model: ir.Model) -> bool:
    """Whether matrix products and LSTMs do most of the work, the layers that dynamic int8 is for."""
    kinds = Counter(node.op_type for node in model.graph)
    return sum(kinds[op] for op in ("MatMul", "Gemm", "LSTM")) > kinds["Conv"] + kinds["ConvTranspose"]


def _judge(start: Start, samples: Samples | None, recipe: Recipe, floor: float | None = None) -> Judge | None:
    if samples is None:
        return None
    return Judge(start.adapted.model, samples, recipe.metric, recipe.max_drop, recipe.threads, floor)


def _static(
    start: Start,
    ready: ir.Model,
    given: Given,
    reference: Reference,
    recipe: Recipe,
    progress: Progress,
    judge: Judge | None,
    parts: Split | None,
) -> tuple[Judge | None, Int8]:
    """The int8 model as it was planned, or the best that samples let us find; and who judges it."""
    options, samples = recipe.quantize or Quantize(), start.samples
    if given.table is not None:
        given.table.check(ready)
    chosen = None if given.plan is None else load_plan(given.plan, ready)
    if samples is None or chosen is not None:
        judge = judge or _judge(start, start.judges, recipe)
        return judge, plan_only(ready, given.table, chosen, reference, judge, recipe)
    if parts is None:
        parts = split(samples, options.samples, recipe.seed, start.validation)
        judge = _judge(start, parts.judge if given.table is None else start.judges, recipe)
    else:
        parts = parts.at_most(options.samples)
    assert judge is not None
    return judge, find_int8(
        ready, parts, reference, judge, recipe, table=given.table, kept=given.kept, progress=progress
    )
