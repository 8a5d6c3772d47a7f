"""Find out what int8 costs and saves on the target, node by node, and place it accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgewise.calibration.placement import Costs, Placement, corrected, costs_of, place
from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Progress
from edgewise.optimizer.recipe import Recipe
from edgewise.passes.infer_shapes import shapes_on
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.profile import Profile
from edgewise.runtime.profile_rounds import profile_in_turns

Floats = Mapping[str, str]
PlanWith = Callable[[Floats], QuantPlan]
"""The plan in which these nodes stay in float, by first output and with the reason."""

_CORRECTIONS = 2


@dataclass(frozen=True)
class Placer:
    """Costs as measured on the target, from which a placement follows for every price of noise."""

    model: ir.Model
    able: frozenset[str]
    costs: Costs
    floats: Floats
    """The fastest placement found."""

    def at(self, noise: Mapping[str, float], price: float) -> Placement:
        """The placement of least time where a unit of noise costs `price` milliseconds."""
        return place(self.model, self.able, self.costs, noise, price)

    def within(self, noise: Mapping[str, float], most: float) -> Placement:
        """The fastest placement whose nodes in int8 add no more noise than `most`."""
        low, high = -12.0, 12.0  # decades of the price
        best = self.at(noise, 10**high)
        while high - low > 0.25:
            middle = (low + high) / 2
            found = self.at(noise, 10**middle)
            if found.noise <= most:
                best, high = found, middle
            else:
                low = middle
        return best


def find_placement(
    model: ir.Model, plan_with: PlanWith, feed: Feed, recipe: Recipe, folder: Path, progress: Progress
) -> Placer:
    """Profile `model` and its int8 form, place, and correct the costs by what the placed model takes.

    Of all that was run, the fastest is kept.
    """
    stage = "time of every layer"
    progress(stage, 0, _CORRECTIONS + 1)
    bench = _Bench(feed, recipe, folder)
    everything = plan_with({})
    able = frozenset(n.output for n in everything.quantized)
    whole, int8 = bench.save(model, "float"), InsertQdq(everything).on(model)
    in_float, in_int8 = bench.profiles(whole, bench.save(int8, "int8"))
    shapes = shapes_on(model, {name: np.shape(array) for name, array in feed.items()})
    costs = costs_of(model, in_float, in_int8, int8, {n: math.prod(s) for n, s in shapes.items()})
    runs = {frozenset[str](): in_int8.nodes_ms, able: in_float.nodes_ms}
    tried: dict[frozenset[str], Floats] = {frozenset(): {}, able: dict.fromkeys(able, "faster in float")}
    for turn in range(_CORRECTIONS):
        progress(stage, turn + 1, _CORRECTIONS + 1)
        floats = place(model, able, costs).floats
        if frozenset(floats) in runs:
            break
        made = InsertQdq(plan_with(floats)).on(model)
        (found,) = bench.profiles(bench.save(made, "placed"))
        runs[frozenset(floats)], tried[frozenset(floats)] = found.nodes_ms, floats
        costs = corrected(costs, model, floats, found, made, in_float)
    progress(stage, _CORRECTIONS + 1, _CORRECTIONS + 1)
    return Placer(model, able, costs, tried[min(runs, key=runs.__getitem__)])


@dataclass(frozen=True)
class _Bench:
    """Where models are profiled."""

    feed: Feed
    recipe: Recipe
    folder: Path

    def save(self, model: ir.Model, name: str) -> Path:
        return files.save(model, self.folder / f"{name}.onnx", force=True)

    def profiles(self, *paths: Path) -> tuple[Profile, ...]:
        return profile_in_turns(paths, self.feed, provider=self.recipe.target, threads=self.recipe.threads)
