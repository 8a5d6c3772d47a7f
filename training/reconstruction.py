"""How much of what reads a channel the other channels can not rebuild."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.moments import LayerMoments, input_moments
from edgewise.calibration.patches import Reader
from edgewise.calibration.taps import open_taps, sizes_on, values_of
from edgewise.passes.base import Refused
from edgewise.passes.channel_links import Indices, Slot
from edgewise.passes.channels import ChannelGraph, ChannelGroup
from edgewise.passes.graph import Array, constant_of, opset
from edgewise.passes.linear import LAYERS, Linear, layer_ending_at
from edgewise.training.sums import layers_of, total_behind

Floats = npt.NDArray[np.float64]

_DAMPING = 1e-2  # in mean variances: few samples make directions look free that are not
_SPATIAL = ("Conv", "ConvTranspose")
_BATCH = 32  # samples that run together
_PROBED = 8  # samples that show how large the branches of sums are
_AT_ONCE = 32  # this part of the channels that are left falls in one step


def reconstruction_scores(
    model: ir.Model,
    samples: Samples,
    *,
    threads: int | None = None,
    memory: int = 1 << 30,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Floats]:
    """What the readers of a channel lose when it falls after all lesser ones of its group, per group.

    The least important channel falls first, the weights of all that stay are refitted, and so on: of
    channels that tell the same, all but one fall early. With W the weights of a reader and H the covariance
    of its inputs, the loss of inputs c is tr(W_c' ([H^-1]_cc)^-1 W_c) (optimal brain surgeon, Hassibi and
    Stork 1993, over whole channels). It is summed over the readers of a group, each in terms of the variance
    of its outputs and times the share that these have in the sum that they end up in: what is lost in a
    branch is covered by what goes past it. So groups compare. Channels that cannot leave get as much as the
    dearest, and those of groups that no layer with constant weights reads get one.

    The samples are read once for each part of the groups whose moments fit into half of `memory` bytes.
    """
    graph = ChannelGraph.of(model.graph, opset(model))
    readers = _readers(graph)
    effects = _effects(graph, readers, _shares(model, samples, threads, memory))
    size = max(1, min(_BATCH, len(samples)))
    scores: dict[str, Floats] = {}
    for part in _parts(readers, memory // 2):
        nodes = dict.fromkeys(node for group in part for node, _ in readers[group])
        moments: Mapping[str, LayerMoments] = {}
        if nodes:
            _, moments = input_moments(
                model,
                samples.batches(size),
                [_reader(node) for node in nodes],
                batch=size,
                threads=threads,
                memory=memory,
                progress=progress,
            )
        for group in part:
            problems = [
                problem
                for node, labels in readers[group]
                for problem in _problems(node, labels, moments, effects[node])
            ]
            scores[group.name] = _greedy(group, problems)
    return scores


Readers = Mapping[ChannelGroup, Sequence[tuple[ir.Node, Indices]]]
"""The layers that read the channels of a group, each with the channel that every one of its inputs is."""


def _readers(graph: ChannelGraph) -> Readers:
    readers: dict[ChannelGroup, list[tuple[ir.Node, Indices]]] = {group: [] for group in graph.groups}
    for node in graph.graph:
        layer = _layer_at(node)
        if layer is None or layer.inputs.axis is None or _is_depthwise(layer):
            continue
        source = node.inputs[0]
        assert source is not None  # `layer_ending_at` has seen to it
        slot = Slot(source, layer.inputs.axis)
        if slot in graph.home:
            readers[graph.home[slot]].append((node, graph.home[slot].members[slot]))
    return readers


def _shares(model: ir.Model, samples: Samples, threads: int | None, memory: int) -> dict[ir.Node, float]:
    """The share of the variance of a sum that a layer which writes into it makes."""
    tails = layers_of(model.graph).values()
    totals = {node: total for node, tail in tails if (total := total_behind(tail)) is not None}
    axes = {
        v.name or "": node.op_type in _SPATIAL for node, t in totals.items() for v in (t.branch, t.result)
    }
    feed = next(samples.batches(_PROBED), None)
    if feed is None or not axes:
        return {}
    taps = open_taps(model, sizes_on(model, list(axes), feed), memory, threads)
    variances = {name: _variance(array, 1 if axes[name] else -1) for name, array in values_of(taps, feed)}
    found = {}
    for node, total in totals.items():
        part, whole = (variances[v.name or ""] for v in (total.branch, total.result))
        found[node] = min(1.0, part / whole) if whole > 0 else 1.0
    return found


def _variance(array: Array, axis: int) -> float:
    """The mean over the channels, which lie on `axis`."""
    rows = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    return float(rows.var(0, dtype=np.float64).mean())


def _effects(graph: ChannelGraph, readers: Readers, shares: Mapping[ir.Node, float]) -> dict[ir.Node, float]:
    """What share of a sum each reader acts upon: its own, or that of the layers which read its outputs."""
    effects: dict[ir.Node, float] = {}
    everyone = {node for some in readers.values() for node, _ in some}
    for node in reversed(graph.graph):
        if node not in everyone:
            continue
        layer = _layer_at(node)
        axis = None if layer is None else layer.outputs.axis
        group = None if axis is None else graph.home.get(Slot(node.outputs[0], axis))
        behind = [effects[n] for n, _ in readers.get(group, ()) if n in effects] if group is not None else []
        effects[node] = shares.get(node, max(behind, default=1.0))
    return effects


def _layer_at(node: ir.Node) -> Linear | None:
    """The layer whose weights `node` holds; large, and so read when it is needed."""
    try:
        return layer_ending_at(node) if node.op_type in LAYERS else None
    except Refused:
        return None


def _is_depthwise(layer: Linear) -> bool:
    """Whether outputs leave with their only input, so that nothing is there to be rebuilt."""
    groups, _, inputs, _ = layer.weight.shape
    return bool(groups > 1 and inputs == 1)


def _reader(node: ir.Node) -> Reader:
    weight = constant_of(node.inputs[1])
    assert weight is not None  # `layer_ending_at` has seen to it
    return Reader.of(node, weight)


def _parts(readers: Readers, memory: int) -> Iterator[list[ChannelGroup]]:
    """The groups in order, as many at a time as the moments of their readers fit."""
    part: list[ChannelGroup] = []
    room = memory
    for group, some in readers.items():
        size = sum(8 * r.groups * r.length**2 for r in (_reader(node) for node, _ in some))
        if part and size > room:
            yield part
            part, room = [], memory
        part.append(group)
        room -= size
    if part:
        yield part


@dataclass
class _Problem:
    """A part of the inputs of one reader, and the weights of the outputs that read them.

    `inverse` is that of the covariance, [k, k]; `weight` is [k, outputs], scaled so that errors count alike
    in all readers; `labels` says which channel each input is.
    """

    inverse: Floats
    weight: Floats
    labels: Indices

    def costs(self, size: int) -> Floats:
        """What falls with each channel alone, [size]."""
        costs = np.zeros(size)
        order = np.argsort(self.labels, kind="stable")
        channels, counts = np.unique(self.labels, return_counts=True)
        starts = np.cumsum(counts) - counts
        for count in np.unique(counts):
            some = counts == count
            at = order[starts[some][:, None] + np.arange(count)]
            weight = self.weight[at]
            inverse = self.inverse[at[:, :, None], at[:, None, :]]
            costs[channels[some]] = (weight * np.linalg.solve(inverse, weight)).sum((1, 2))
        return costs

    def remove(self, leaving: npt.NDArray[np.bool_]) -> float:
        """Refit without the channels of this mask, [size]; what is lost by it."""
        out = leaving[self.labels]
        if not out.any():
            return 0.0
        known = self.inverse[out][:, out]
        solved = np.linalg.solve(known, np.hstack([self.weight[out], self.inverse[out][:, ~out]]))
        outputs = self.weight.shape[1]
        lost = float((self.weight[out] * solved[:, :outputs]).sum())
        across = self.inverse[~out][:, out]
        self.weight = self.weight[~out] - across @ solved[:, :outputs]
        self.inverse = self.inverse[~out][:, ~out] - across @ solved[:, outputs:]
        self.labels = self.labels[~out]
        return lost


def _problems(
    node: ir.Node, labels: Indices, moments: Mapping[str, LayerMoments], effect: float
) -> list[_Problem]:
    """One for each group of a convolution and each block of its moments."""
    layer, seen = _layer_at(node), moments[node.outputs[0].name or ""]
    assert layer is not None  # `_readers` has seen to it
    groups, outputs, inputs, taps = layer.weight.shape
    matrix = layer.weight.transpose(0, 3, 2, 1).reshape(groups, taps * inputs, outputs)
    owners = np.broadcast_to(labels.reshape(groups, 1, inputs), (groups, taps, inputs)).reshape(groups, -1)
    parts = [(block, seen.covariance(number)) for number, block in enumerate(seen.blocks)]
    energy = sum(float((matrix[:, b] * (covariance @ matrix[:, b])).sum()) for b, covariance in parts)
    if not 0 < energy < np.inf:  # what the layer gives is constant, or not finite
        return []
    scaled = matrix * math.sqrt(effect / energy)
    return [
        _Problem(_inverse(covariance[group]), scaled[group, block], owners[group, block])
        for block, covariance in parts
        for group in range(groups)
    ]


def _inverse(covariance: Floats) -> Floats:
    variance = float(np.trace(covariance)) / len(covariance)
    damping = _DAMPING * variance if variance > 0 else 1.0
    return np.asarray(np.linalg.inv(covariance + damping * np.eye(len(covariance))), np.float64)


def _greedy(group: ChannelGroup, problems: Sequence[_Problem]) -> Floats:
    """What each channel adds to the loss when it falls, least first."""
    if not problems:
        return np.ones(group.size)
    scores, left, least = np.zeros(group.size), ~group.blocked, 0.0
    while left.any():
        costs = np.sum([p.costs(group.size) for p in problems], axis=0)
        candidates = np.flatnonzero(left)
        count = max(1, len(candidates) // _AT_ONCE)
        falling = candidates[np.argsort(costs[candidates], kind="stable")[:count]]
        mask = np.zeros(group.size, np.bool_)
        mask[falling] = True
        together = sum(p.remove(mask) for p in problems)
        apart = costs[falling]
        added = apart * (together / max(float(apart.sum()), np.finfo(float).tiny))
        scores[falling] = np.maximum.accumulate(np.maximum(added, least))  # who falls later is worth more
        least = float(scores[falling[-1]])
        left[falling] = False
    scores[group.blocked] = least
    return scores
