"""Pruning under a bound: as little of the model is kept as the bound allows."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.partial import Origin
from edgewise.optimizer import files
from edgewise.optimizer.int8 import Split
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.parallel import pack, unpack, workers_for
from edgewise.optimizer.pipeline import Progress, Reference, StepReport, run_passes
from edgewise.optimizer.pricing import (
    Alike,
    ByBytes,
    ByMacs,
    ByParameters,
    ByTime,
    Priced,
    Pricing,
    price,
    shapes_of,
)
from edgewise.optimizer.prune_trial import Plans, Task, Trial, planned, scored, try_out, work
from edgewise.optimizer.quick_int8 import QuickInt8
from edgewise.optimizer.recipe import Prune, Recipe
from edgewise.optimizer.report import Amount, best_amount
from edgewise.optimizer.width_probe import Bench
from edgewise.passes import parse
from edgewise.passes.remove_channels import RemoveChannels
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.latency import measure
from edgewise.training.importance import BY_GRADIENTS
from edgewise.training.options import History, require_torch

PREPARATION = (
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
)
"""What lets channels be seen. Norms stay: scores and training know what to do with them."""

MEGABYTE = 1e6

_FEWEST = 32  # samples
_MOST_JUDGES = 1000
_FEW_JUDGES = 64
_MOST_CHOOSING = 200
_SECONDS = 4.0  # for a latency that is only a step towards the bound
_FIRST = 0.5**0.5  # of the cost: the amount that is tried first
_INSIDE = 0.25  # of the way between two amounts: the next one is no nearer to either
_CLOSE = 1.08  # amounts that are nearer to each other are not worth a trial between them
_NEAR = 0.97  # of a limit: near enough
_OF_THE_SEARCH = {"min_metric", "trials", "best_effort", "candidates", "workers", "ray"}  # not of a trial
_STEPS = 6  # towards a limit that has to be measured
_EASIER = 1.25


@dataclass(frozen=True, eq=False)
class Pruned:
    """How the search ended. `model` is None where no amount keeps the bound: `why` says what was reached."""

    model: ir.Model | None
    steps: tuple[StepReport, ...] = ()
    amounts: tuple[Amount, ...] = ()
    history: History | None = None
    why: str = ""


Cost = Callable[[ir.Model], float]
"""What a bound is about, of a pruned model that nothing was done to yet."""


@dataclass(frozen=True, eq=False)
class Search:
    """What the search for the right amount stands on. Trials that are done are kept in the task's folder.

    `int8` makes quick int8 forms, where int8 is wanted and pays; `int8_cost` is what such a form costs the
    whole model, where that breaks the bound.
    """

    task: Task
    judge: Judge
    recipe: Recipe
    reference: Reference
    progress: Progress
    int8: QuickInt8 | None = None
    int8_cost: float = 0.0

    @property
    def options(self) -> Prune:
        return self.task.options

    def for_metric(self) -> list[tuple[Trial, Amount]]:
        """Trials around the smallest amount that keeps the bound on the metric."""
        done: list[tuple[Plans, Trial, Amount]] = []
        amounts: list[Amount] = []
        least, why = 0.0, ""
        while len(done) < self.options.trials:
            if not (budgets := self._next(amounts, least)):
                break
            plans: dict[float, Plans] = {}
            for budget in budgets:
                try:
                    plans[budget] = self._planned(budget)
                except EdgewiseError as error:  # so few channels cannot stay
                    least, why = max(least, budget), str(error)
            new = _distinct(plans, [plan for plan, _, _ in done])
            done += [(plans[b], t, a) for b, (t, a) in zip(new, self.tried(new), strict=True)]
            for budget, wanted in plans.items():  # widths come in steps: two budgets may be one plan
                amount = next(a for plan, _, a in done if plan == wanted)
                amounts.append(dataclasses.replace(amount, budget=budget))
        if not done:
            raise EdgewiseError(why)
        return [(trial, amount) for _, trial, amount in done]

    def _next(self, amounts: Sequence[Amount], least: float) -> list[float]:
        """Budgets around where the bound is likely to lie; none where what is known is near enough.

        `least` is too little for any plan.
        """
        kept = min((a for a in amounts if a.keeps_bound), key=lambda a: a.budget, default=None)
        high = kept.budget if kept else 1.0
        lost = max((a for a in amounts if a.budget < high), key=lambda a: a.budget, default=None)
        low = lost.budget if lost else least
        if low and high / low < _CLOSE:
            return []
        spare = max((kept.worst if kept else self.judge.before) - self.judge.floor, 0.0)
        crossing = spare / (spare + self.judge.floor - lost.worst) if lost else 0.5
        return _between(high, low or high * _FIRST**2, crossing, self.options.workers or 1)

    def for_cost(self, cost: Cost, limit: float) -> list[tuple[Trial, Amount]]:
        """The trial of about the largest budget that brings `cost` down to `limit`."""
        budget, is_kept = self._budget(cost, limit)
        return [
            (trial, dataclasses.replace(amount, keeps_bound=is_kept))
            for trial, amount in self.tried([budget])
        ]

    def _budget(self, cost: Cost, limit: float) -> tuple[float, bool]:
        """By regula falsi, for the cost falls not quite in proportion; and whether the limit is kept.

        Raises `EdgewiseError` where no budget keeps the limit, unless the best effort will do.
        """
        low, high, least, why = 0.0, 1.0, 0.0, ""
        reached = cost(self.task.model)
        budget = min(limit / reached, 1.0)
        for number in range(_STEPS):
            self.progress("how much has to leave", number, _STEPS)
            guess = (max(low, least) + high) / 2
            try:
                found = max(map(cost, self._cuts(budget)))
            except EdgewiseError as error:  # so few channels cannot stay
                least, why, guess = budget, str(error), (budget + high) / 2
            else:
                low, high = (budget, high) if found <= limit else (low, budget)
                reached = min(reached, found)
                if _NEAR * limit <= found <= limit:
                    break
                guess = budget * limit * (1 + _NEAR) / 2 / found  # just below the limit, for above it is none
            budget = guess if max(low, least) < guess < high else (max(low, least) + high) / 2
        if not low and not self.options.best_effort:
            raise EdgewiseError(
                f"the bound cannot be reached: {reached:.4g} is the least that was found, not {limit:.4g}"
                f"{why and f' ({why})'}; with --best-effort as little as possible is kept"
            )
        return (low or high), bool(low)

    def _planned(self, budget: float) -> Plans:
        return planned(self.task, self.task.model, self.task.scores, budget)

    def _cuts(self, budget: float) -> list[ir.Model]:
        return [RemoveChannels(plan).on(self.task.model) for plan in self._planned(budget)]

    def tried(self, budgets: Sequence[float]) -> list[tuple[Trial, Amount]]:
        """One trial a budget, several at once where there are workers; those done before are read."""
        files = {budget: self._file(budget) for budget in budgets}
        known = {b: unpack(f.read_bytes()) for b, f in files.items() if f is not None and f.exists()}
        todo = [budget for budget in budgets if budget not in known]
        if todo and self.task.folder is not None:
            self.task.folder.mkdir(parents=True, exist_ok=True)
        trials = {**known, **dict(zip(todo, self._run(todo), strict=True))}
        for budget in todo:
            if (file := files[budget]) is not None:
                file.write_bytes(pack(trials[budget]))
        return [(trials[b], self._amount(trials[b])) for b in budgets]

    def _run(self, budgets: Sequence[float]) -> list[Trial]:
        if len(budgets) < 2 and self.options.ray is None:
            return [try_out(self.task, b, self._told(b)) for b in budgets]
        alone = dataclasses.replace(self.task, threads=1)
        with workers_for(work, pack(alone), len(budgets), self.options.ray) as over:
            return [unpack(answer) for answer in over(budgets)]

    def _told(self, budget: float) -> Progress:
        return lambda stage, done, total: self.progress(f"{budget:.0%} left: {stage}", done, total)

    def _file(self, budget: float) -> Path | None:
        return None if self.task.folder is None else self.task.folder / f"{budget:.4f}.trial"

    def _amount(self, trial: Trial) -> Amount:
        """What a trial came to."""
        task, model = self.task, trial.model
        found = Amount(
            budget=trial.budget,
            macs=price(model, task.macs) / price(task.model, task.macs),
            parameters=int(price(model, ByParameters())),
            bytes=int(price(model, ByBytes())),
            score=(score := self.judge.score(model)),
            int8_score=self._int8_score(model, score),
            keeps_bound=True,
        )
        keeps = not self.options.bounds_metric or found.worst >= self.judge.floor
        return dataclasses.replace(found, keeps_bound=keeps)

    def timed(
        self, tried: Sequence[tuple[Trial, Amount]], feed: Feed, seconds: float
    ) -> list[tuple[Trial, Amount]]:
        """The same with how much faster each is than the input, in the form that is wanted, in one run."""
        form = self.int8 or self.exact
        made = {"input": self.exact(self.task.model)}
        made |= {str(i): form(trial.model) for i, (trial, _) in enumerate(tried)}
        self.progress("how fast every amount is", 0, 1)
        speedup = _speedups(made, feed, self.recipe, seconds)
        return [
            (trial, dataclasses.replace(amount, speedup=speedup.get(str(i))))
            for i, (trial, amount) in enumerate(tried)
        ]

    def exact(self, model: ir.Model) -> ir.Model:
        """The model after the recipe's exact passes, held to its own outputs."""
        return _exact(model, self.recipe, self.reference)

    def _int8_score(self, model: ir.Model, in_float: float) -> float | None:
        """The score in int8 as it is quickly found, None where none is wanted.

        Where it is nothing to go by on the whole model, what it costs there is given back: so does the full
        search, which leaves nodes in float.
        """
        made = None if self.int8 is None else self.int8.nearest(model)
        if made is None:
            return None
        found = self.judge.score(made)
        return max(found, min(found + self.int8_cost, in_float))


def _quick_int8(
    model: ir.Model, feed: Feed, recipe: Recipe, parts: Split, reference: Reference
) -> QuickInt8 | None:
    """What makes int8 forms, where the recipe wants int8; None also where time counts and int8 takes more."""
    if recipe.quantize is None:
        return None
    form = QuickInt8(recipe.quantize, recipe, parts, reference.feeds)
    if _counted(recipe) != "latency":
        return form
    both = {"float": _exact(model, recipe, reference), "int8": form(model)}
    return form if _speedups(both, feed, recipe, _SECONDS).get("int8", 0.0) > 1 else None


def _int8_cost(model: ir.Model, judge: Judge, int8: QuickInt8 | None) -> float:
    """What the metric loses by quick int8 of the whole model, if more than the bound allows."""
    made = None if int8 is None else int8.nearest(model)
    score = judge.before if made is None else judge.score(made)
    return judge.before - score if score < judge.floor else 0.0


def _exact(model: ir.Model, recipe: Recipe, reference: Reference) -> ir.Model:
    return run_passes(model, recipe.chain, Reference(model, reference.feeds))[0]


def _speedups(
    models: Mapping[str, ir.Model], feed: Feed, recipe: Recipe, seconds: float
) -> Mapping[str, float]:
    """How much faster than the first each of the others is that runs, in one paired run."""
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        paths = {name: files.save(model, Path(folder) / f"{name}.onnx") for name, model in models.items()}
        found = measure(paths, feed=feed, conditions=_conditions(recipe), max_seconds=seconds)
    return {ratio.name: ratio.speedup for ratio in found.ratios}


def _between(high: float, low: float, crossing: float, count: int) -> list[float]:
    """So many budgets between two, the middle one at the `crossing`: a share of the way, in logarithms, down.

    It is not believed where it is near an end, for a score says little of scores far away.
    """
    middle = min(max(crossing, _INSIDE), 1 - _INSIDE)
    shares = np.interp(np.arange(1, count + 1) / (count + 1), (0, 0.5, 1), (0, middle, 1))
    return [float(high * (low / high) ** share) for share in shares]


def _distinct(plans: Mapping[float, Plans], known: Sequence[Plans]) -> list[float]:
    """The budgets of plans that are not known, one for each plan."""
    told = list(plans)
    return [b for i, b in enumerate(told) if plans[b] not in (*known, *(plans[other] for other in told[:i]))]


def split_to_prune(
    samples: Samples, seed: int, *, validation: Samples | None = None, decides: bool = True
) -> Split:
    """Samples to learn from, to stop learning by, and to judge by, drawn at random and apart.

    Those for validation judge; without any some are held back for it, and few where the judgement `decides`
    nothing. Raises `EdgewiseError` where there are too few.
    """
    count = len(samples)
    if count < _FEWEST:
        raise EdgewiseError(
            f"{count} samples are too few to learn from some and judge by others: give {_FEWEST} or more, "
            "better hundreds (labels are not needed)"
        )
    chooses = min(count // 16, _MOST_CHOOSING)
    judges = min(count // 6, _MOST_JUDGES if decides else max(chooses, _FEW_JUDGES))
    if validation is not None:
        judges = 0
    order = np.random.default_rng(seed).permutation(count)
    judge, choose, learn = np.split(order, [judges, judges + chooses])
    held = Split(*(samples.take(np.sort(part)) for part in (learn, choose, judge)))
    return held if validation is None else dataclasses.replace(held, judge=validation)


def find_pruned(
    original: ir.Model,
    parts: Split,
    judge: Judge,
    reference: Reference,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    progress: Progress,
) -> Pruned:
    """Prune `original` as the recipe says, and give back the best of all that was tried.

    Trials are kept in `folder`, from which an interrupted search goes on. Raises `EdgewiseError` where
    nothing can be pruned, where a bound other than that on the metric cannot be reached, and where the metric
    cannot tell a good model from a broken one.
    """
    options = recipe.prune or Prune()
    if options.recover == "distill":
        require_torch("distillation", "--recover closed-form")
    if options.score in BY_GRADIENTS:
        require_torch(f"the score {options.score}", "--score magnitude-l2")
    if judge.is_blind:
        raise EdgewiseError(
            f"{judge.metric.name} is the same when every sample gets the outputs of the first, so it cannot "
            "bound what pruning costs: give more samples, or another --metric"
        )
    ready, prepared = run_passes(original, [parse(spec) for spec in PREPARATION], reference)
    progress("what every channel is worth", 0, 1)
    scores = scored(ready, parts, options, recipe.seed, recipe.threads, progress)
    feed = next(iter(parts.calibrate))
    macs = ByMacs(shapes_of(feed))
    progress("what every channel costs", 0, 1)
    int8 = _quick_int8(ready, feed, recipe, parts, reference)
    pricing = _pricing(recipe, feed, ready, int8)
    task = Task(ready, parts, scores, pricing, macs, options, recipe.seed, recipe.threads)
    if folder is not None:
        task = dataclasses.replace(task, folder=_folder(task, recipe, folder))
    search = Search(task, judge, recipe, reference, progress, int8)
    if options.bounds_metric:
        search = dataclasses.replace(search, int8_cost=_int8_cost(ready, judge, int8))
        tried = search.for_metric()
    elif options.ratio is not None:
        tried = search.tried([1 - options.ratio])
    else:
        tried = search.for_cost(*_limit(search, feed))
    if recipe.benchmark is not None and len(tried) > 1:
        tried = search.timed(tried, feed, min(_SECONDS * len(tried), recipe.benchmark.max_seconds))
    if options.candidates is not None:
        _write_all(search, tried, Path(options.candidates))
    return _best(search, tried, prepared)


def _write_all(search: Search, tried: Sequence[tuple[Trial, Amount]], folder: Path) -> None:
    """Every amount as a file that is named by the share of the multiply-accumulates it has left."""
    files.make_folder(folder)
    for trial, amount in tried:
        files.save(search.exact(trial.model), folder / f"macs-{amount.macs:.4f}.onnx", force=True)


def _folder(task: Task, recipe: Recipe, root: Path) -> Path:
    """Where trials of just this task are kept: another model, other samples or options have another place."""
    origin = Origin.of(task.model, (), task.parts.calibrate)
    options = task.options.model_dump(exclude=_OF_THE_SEARCH)
    said = f"{origin} {options} {task.seed} {_counted(recipe)} {recipe.quantize}"
    return root / hashlib.sha256(said.encode()).hexdigest()[:16]


def _pricing(recipe: Recipe, feed: Feed, model: ir.Model, int8: QuickInt8 | None) -> Pricing:
    """What a budget is a share of: what counts to whom the model is for."""
    options = recipe.prune or Prune()
    if _counted(recipe) == "size":
        return _file(recipe)
    if _counted(recipe) == "macs":
        return ByMacs(shapes_of(feed))
    bench = Bench(provider=recipe.target, threads=recipe.threads)
    if int8 is not None:
        bench = dataclasses.replace(bench, int8=True, form=int8)
    by_time: Pricing = ByTime(feed, bench)
    if _counted(recipe) == "balanced":
        by_time = Alike((by_time, _file(recipe)))
    return Priced(by_time(model)) if options.schedule == 1 else by_time


def _file(recipe: Recipe) -> ByBytes:
    """Bytes of the file, of a weight that will be in int8 one."""
    return ByBytes(None if recipe.quantize is None else 1.0)


def _counted(recipe: Recipe) -> str:
    """What is to be saved, where nobody says by the bound."""
    options = recipe.prune or Prune()
    if options.cost is not None:
        return options.cost
    if recipe.objective == "size" or options.max_size is not None:
        return "size"
    by_macs = recipe.benchmark is None or options.max_macs is not None or options.ratio is not None
    if by_macs:
        return "macs"
    return "balanced" if recipe.objective == "balanced" else "latency"


def _limit(search: Search, feed: Feed) -> tuple[Cost, float]:
    """What is bounded, and by how much."""
    task, options, recipe = search.task, search.options, search.recipe
    if options.max_macs is not None:
        whole = price(task.model, task.macs)
        return lambda model: price(model, task.macs) / whole, options.max_macs
    if options.max_size is not None:
        return lambda model: price(search.exact(model), _file(recipe)) / MEGABYTE, options.max_size
    assert options.max_latency is not None  # or it would be a bound on the metric
    return lambda model: _milliseconds(search.exact(model), feed, recipe), options.max_latency


def _conditions(recipe: Recipe) -> Conditions:
    return Conditions(provider=recipe.target, threads=recipe.threads)


def _milliseconds(model: ir.Model, feed: Feed, recipe: Recipe) -> float:
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        path = files.save(model, Path(folder) / "model.onnx")
        where, seconds = _conditions(recipe), _SECONDS
        (found,) = measure({"model": path}, feed=feed, conditions=where, max_seconds=seconds).models
    if found.failed:
        raise EdgewiseError(f"the pruned model cannot be measured: {found.failed}")
    return found.median_ms


def _best(search: Search, tried: Sequence[tuple[Trial, Amount]], prepared: tuple[StepReport, ...]) -> Pruned:
    """Of those that keep the bound the one that the objective asks for; with best effort else the best."""
    amounts = tuple(sorted((amount for _, amount in tried), key=lambda a: a.budget))
    best = best_amount(amounts, search.recipe.objective)
    why = ""
    if not best.keeps_bound:
        why = (
            f"no amount of pruning keeps {search.judge.metric.name} at {search.judge.floor:.4f} or more: "
            f"{best.worst:.4f} was reached with {best.macs:.0%} of the multiply-accumulates"
            if search.options.bounds_metric
            else f"the bound cannot be reached: {best.macs:.0%} of the multiply-accumulates stay"
        )
        if not search.options.best_effort:
            return Pruned(None, (), amounts, None, why)
    chosen = next(trial for trial, amount in tried if amount is best)
    exact, steps = run_passes(
        chosen.model, search.recipe.chain, Reference(chosen.model, search.reference.feeds)
    )
    told = tuple(s for s in (*prepared, *chosen.steps, *steps) if s.status != "no change")
    return Pruned(exact, told, amounts, chosen.history, why)
