"""Find out what int8 costs and saves on the target, node by node, and place it accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgewise.calibration.placement import Costs, Placement, corrected, costs_of, noisy, place
from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Progress
from edgewise.optimizer.recipe import Recipe
from edgewise.passes.infer_shapes import shapes_on
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.latency import measure
from edgewise.runtime.profile import Profile
from edgewise.runtime.profile_rounds import profile_in_turns

Floats = Mapping[str, str]
PlanWith = Callable[[Floats], QuantPlan]
"""The plan in which these nodes stay in float, by first output and with the reason."""

_STAGE = "time of every layer"
_CORRECTIONS = 2
_SECONDS = 5.0  # of the run that compares the placements
_NO_GAIN = 1e-6  # ms


@dataclass(frozen=True)
class Placer:
    """Costs as measured on the target, from which a placement follows for every price of noise."""

    model: ir.Model
    able: frozenset[str]
    costs: Costs
    floats: Floats
    """The fastest placement found."""

    def within(self, noise: Mapping[str, float], most: float) -> Placement:
        """The fastest placement found whose nodes in int8 add no more noise than `most`.

        A price of noise finds the best placements where gains and noise differ from node to node, and jumps
        from all to nothing where they do not: then a part of the nodes is what is looked for.
        """
        parts = (self._part(names, noise, most) for names in self._orders(noise))
        found = (self._at_a_price(noise, most), *(self._within(part, noise) for part in parts))
        return min(found, key=lambda placement: (placement.ms, placement.noise))

    def _within(self, part: set[str], noise: Mapping[str, float]) -> Placement:
        """The fastest placement that leaves all but these nodes in float."""
        found = place(self.model, part, self.costs, noise)
        left = {name: noisy(noise.get(name, 0.0)) for name in self.able - part}
        return replace(found, floats={**left, **found.floats})

    def _at_a_price(self, noise: Mapping[str, float], most: float) -> Placement:
        low, high = -12.0, 12.0  # decades of milliseconds
        best = place(self.model, self.able, self.costs, noise, 10**high)
        while high - low > 0.25:
            middle = (low + high) / 2
            found = place(self.model, self.able, self.costs, noise, 10**middle)
            if found.noise <= most:
                best, high = found, middle
            else:
                low = middle
        return best

    def _orders(self, noise: Mapping[str, float]) -> tuple[list[str], ...]:
        """The nodes from the first on, from the last on, and from that on which gains most for its noise."""
        names = [n.outputs[0].name or "" for n in self.model.graph if n.outputs]
        able = [name for name in names if name in self.able]
        costs = self.costs
        gain = {n: costs.in_float.get(n, 0.0) - costs.in_int8.get(n, 0.0) for n in able}
        return able, able[::-1], sorted(able, key=lambda n: noise.get(n, 0.0) / max(gain[n], _NO_GAIN))

    def _part(self, names: list[str], noise: Mapping[str, float], most: float) -> set[str]:
        """As many of the nodes, in this order, as add no more noise than `most`."""
        total = np.cumsum([max(noise.get(name, 0.0), 0.0) for name in names])
        return set(names[: int(np.searchsorted(total, most, side="right"))])


def find_placement(
    model: ir.Model,
    plan_with: PlanWith,
    rules: Floats,
    feed: Feed,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
) -> Placer:
    """Profile `model` and its int8 form, place, and correct the costs by what the placed model takes.

    The placements that come of it are measured as wholes, beside everything in int8, what the target's
    `rules` leave in float, and float: the fastest is kept.
    """
    steps = _CORRECTIONS + 2
    bench = _Bench(feed, recipe, folder)
    everything = plan_with({})
    able = frozenset(n.output for n in everything.quantized)
    progress(_STAGE, 0, steps)
    plain = bench.add(dict.fromkeys(able, "faster in float"), model)
    all_int8 = InsertQdq(everything).on(model)
    in_float, in_int8 = bench.profiles(plain, bench.add({}, all_int8))
    shapes = shapes_on(model, {name: np.shape(array) for name, array in feed.items()})
    costs = costs_of(model, in_float, in_int8, all_int8, {n: math.prod(s) for n, s in shapes.items()})
    for turn in range(_CORRECTIONS):
        progress(_STAGE, turn + 1, steps)
        floats = place(model, able, costs).floats
        if bench.knows(floats):
            break
        made = InsertQdq(plan_with(floats)).on(model)
        (found,) = bench.profiles(bench.add(floats, made))
        costs = corrected(costs, model, floats, found, made, in_float)
    if not bench.knows(rules):
        bench.add(rules, InsertQdq(plan_with(rules)).on(model))
    progress(_STAGE, steps - 1, steps)
    fastest = bench.fastest()
    progress(_STAGE, steps, steps)
    return Placer(model, able, costs, fastest)


@dataclass(frozen=True)
class _Bench:
    """Where placements are profiled and measured, each with the file that it made."""

    feed: Feed
    recipe: Recipe
    folder: Path
    trials: dict[Path, Floats] = field(default_factory=dict)

    def add(self, floats: Floats, made: ir.Model) -> Path:
        """Save what a placement made."""
        path = files.save(made, self.folder / f"{len(self.trials)}.onnx", force=True)
        self.trials[path] = floats
        return path

    def knows(self, floats: Floats) -> bool:
        return any(floats.keys() == known.keys() for known in self.trials.values())

    def profiles(self, *paths: Path) -> tuple[Profile, ...]:
        return profile_in_turns(paths, self.feed, provider=self.recipe.target, threads=self.recipe.threads)

    def fastest(self) -> Floats:
        """The placement whose file runs fastest, by one paired run."""
        paths = {path.stem: path for path in self.trials}
        report = measure(
            paths,
            feed=self.feed,
            conditions=Conditions(provider=self.recipe.target, threads=self.recipe.threads),
            max_seconds=_SECONDS,
            seed=self.recipe.seed,
        )
        speed = {next(iter(paths)): 1.0} | {ratio.name: ratio.speedup for ratio in report.ratios}
        return self.trials[paths[max(speed, key=speed.__getitem__)]]
