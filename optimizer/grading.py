"""Scores of channels and branches, held against each other by what a refit leaves of their loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.optimizer.int8 import Split
from edgewise.optimizer.pipeline import Progress
from edgewise.optimizer.pricing import ByMacs, price, shapes_of
from edgewise.optimizer.yardstick import Yardstick
from edgewise.passes.branches import branches_of
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels
from edgewise.runtime.evaluate import Feed
from edgewise.training.importance import Scores
from edgewise.training.refit import reestimate

_SAMPLES = 32  # a scale and a bias for every output take few, and so does the noise of a whole model
_FEWEST = 8  # of a large one, whose samples have more positions
_WORK = 1e12  # multiply-accumulates of one run of the model for every sample and refit, before it is fewer


def graded(
    model: ir.Model, scores: Scores, parts: Split, *, threads: int | None, memory: int, progress: Progress
) -> Scores:
    """The scores, each times the share of the noise that stays when what it scores leaves and is made up for.

    Gradients foresee what the outputs lose with a channel or a branch, but not how much of it new statistics
    and biases behind it give back: nine tenths for an early branch of a deep residual network, next to
    nothing for a narrow layer. So half of the channels of each group leave once, those of least score, and
    each branch, every time alone, and the noise is measured before and after. Where it cannot be, as where
    nothing leaves or nothing changes, the median of the others stands for it.
    """
    plans, left = dict(_alone(model, scores)), dict[str, float]()
    few = range(_how_many(model, parts.calibrate[0], len(plans)))
    learn, choose = (s.take(few[: len(s)]) for s in (parts.calibrate, parts.choose))
    yardstick = Yardstick(model, choose, threads=threads)
    for done, (name, plan) in enumerate(plans.items()):
        progress("what a refit gives back", done, len(plans))
        fitted = reestimate(model, plan, learn, threads=threads, memory=memory)
        gained = yardstick.decibels(fitted) - yardstick.decibels(RemoveChannels(plan).on(model))
        if math.isfinite(gained):
            left[name] = 10 ** (-max(gained, 0.0) / 10)
    usual = float(np.median(list(left.values()))) if left else 1.0
    return MappingProxyType({name: worth * left.get(name, usual) for name, worth in scores.items()})


def _how_many(model: ir.Model, feed: Feed, refits: int) -> int:
    """Samples for each refit."""
    work = price(model, ByMacs(shapes_of(feed))) * max(refits, 1)
    return min(_SAMPLES, max(_FEWEST, round(_WORK / work)))


def _alone(model: ir.Model, scores: Scores) -> Iterator[tuple[str, PrunePlan]]:
    """For everything that has a score a plan without it: without a branch, or half of a group's channels."""
    graph = ChannelGraph.of(model.graph, opset(model))
    for branch in branches_of(model.graph):
        if branch.name in scores:
            yield branch.name, PrunePlan.of({}, [branch.name])
    worth = {group: scores[group.name] for group in graph.groups if group.name in scores}
    nothing = {group: np.zeros(group.size, np.bool_) for group in graph.groups}
    for group, losses in worth.items():
        able = np.flatnonzero(np.isfinite(losses))
        leaving = nothing[group].copy()
        leaving[able[np.argsort(losses[able], kind="stable")][: len(able) // 2]] = True
        plan = PrunePlan.of(graph.settle({**nothing, group: leaving}))
        if len(plan):
            yield group.name, plan
