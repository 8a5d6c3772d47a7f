"""Find out what int8 costs and saves on the target, node by node, and place it accordingly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.profile import Profile
from edgewise.runtime.profile_rounds import profile_in_turns

Floats = Mapping[str, str]
PlanWith = Callable[[Floats], QuantPlan]
"""The plan in which these nodes stay in float, by first output and with the reason."""

_CORRECTIONS = 2
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
