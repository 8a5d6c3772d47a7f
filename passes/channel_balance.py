"""The factors that bring the channels of weights and activations to one magnitude."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edgewise.passes.channel_links import Array, Indices, Slot
from edgewise.passes.channel_scales import Exponents, Layer, ScaleGraph
from edgewise.passes.channels import ChannelGroup

_DEAD = 20  # binary orders below the largest channel: whatever is there is not worth a factor
_WORTH = 0.6  # binary orders; more than the 0.5 that rounding leaves
_SETTLED = 0.01
_ROUNDS = 64


@dataclass(frozen=True)
class Pulls:
    """How much the spread of channels counts in what writes them, in themselves and in what reads them."""

    writers: float
    values: float
    readers: float


@dataclass(frozen=True, eq=False)
class _Term:
    """The magnitudes of a tensor, one for each of `labels`, as binary orders, NaN where there is nothing.

    They grow with the factor (`sign` 1) or shrink (-1).
    """

    labels: Indices
    orders: Array
    sign: int
    pull: float


def balanced(
    graph: ScaleGraph,
    groups: Collection[ChannelGroup],
    pulls: Pulls,
    *,
    per_channel: bool,
) -> dict[ChannelGroup, Exponents]:
    """Exponents for every group of the graph; other ones than `groups` keep factors of 1.

    Minimizes the sum over tensors of pull * variance of log2 |channel|, rounds, and starts again from there
    until nothing changes, so that a second run finds nothing to do. With weight scales `per_channel` a filter
    of its own magnitude costs nothing: what writes channels does not count if the values are known, nor does
    a depthwise reader.
    """
    settled = {group: np.zeros(group.size, np.int64) for group in graph.graph.groups}
    for _ in range(_ROUNDS):
        wishes = _Balance(graph, pulls, per_channel, settled).solved(groups)
        moves = {group: _rounded(wish - settled[group]) for group, wish in wishes.items()}
        if not any(move.any() for move in moves.values()):
            break
        settled = {group: settled[group] + move for group, move in moves.items()}
    return settled


def _rounded(wish: Array) -> Exponents:
    return np.where(np.abs(wish) >= _WORTH, np.rint(wish), 0).astype(np.int64)


class _Balance:
    """The exponents wished for so far."""

    def __init__(
        self,
        graph: ScaleGraph,
        pulls: Pulls,
        per_channel: bool,
        start: Mapping[ChannelGroup, Exponents],
    ) -> None:
        self._graph, self._pulls, self._per_channel = graph, pulls, per_channel
        self._wishes: dict[ChannelGroup, Array] = {g: own.astype(np.float64) for g, own in start.items()}

    def solved(self, groups: Collection[ChannelGroup]) -> Mapping[ChannelGroup, Array]:
        """Go through the groups until none moves."""
        for _ in range(_ROUNDS):
            if max((self._step(group) for group in groups), default=0) < _SETTLED:
                break
        return self._wishes

    def _step(self, group: ChannelGroup) -> float:
        """Move the channels of a group to where they are best, all others staying; how far at most."""
        total, pull = np.zeros(group.size), np.zeros(group.size)
        for term in self._terms(group):
            live = np.isfinite(term.orders)
            labels, orders = term.labels[live], term.orders[live]
            if labels.size:
                np.add.at(total, labels, -term.sign * term.pull * (orders - orders.mean()))
                np.add.at(pull, labels, term.pull)
        move = np.divide(total, pull, out=np.zeros_like(total), where=pull > 0)
        now, (least, most) = self._wishes[group], self._graph.caps[group]
        self._wishes[group] = np.clip(now + move, least, most)
        return float(np.abs(self._wishes[group] - now).max(initial=0))

    def _terms(self, group: ChannelGroup) -> Iterator[_Term]:
        writers, readers = self._graph.writers[group], self._graph.readers[group]
        values = self._values(group)
        if self._per_channel:
            readers = [layer for layer in readers if not layer.is_depthwise]
        if self._per_channel and values:
            writers = []
        for layer in writers:
            yield self._weights(layer, layer.outputs, 1, self._pulls.writers / len(writers))
        for layer in readers:
            yield self._weights(layer, layer.inputs, -1, self._pulls.readers / len(readers))
        for slot, magnitude in values.items():
            orders = _orders(magnitude * np.exp2(self._of(slot)))
            yield _Term(self._graph.labels(slot), orders, 1, self._pulls.values / len(values))

    def _weights(self, layer: Layer, slot: Slot, sign: int, pull: float) -> _Term:
        """The largest weight of each output or input as the factors are now."""
        groups, outputs, inputs = layer.magnitude.shape
        out = np.exp2(self._of(layer.outputs)).reshape(groups, outputs, 1)
        into = np.exp2(-self._of(layer.inputs)).reshape(groups, 1, inputs)
        largest = (layer.magnitude * out * into).max(axis=2 if sign > 0 else 1).reshape(-1)
        return _Term(self._graph.labels(slot), _orders(largest), sign, pull)

    def _values(self, group: ChannelGroup) -> Mapping[Slot, Array]:
        """The largest magnitudes of what the group's readers read."""
        slots = (layer.inputs for layer in self._graph.readers[group])
        return {slot: self._graph.reach[slot] for slot in slots if slot in self._graph.reach}

    def _of(self, slot: Slot) -> Array:
        group = self._graph.graph.home[slot]
        return self._wishes[group][group.members[slot]]


def _orders(magnitudes: Array) -> Array:
    """log2, NaN for channels that are dead beside the largest."""
    live = magnitudes > magnitudes.max(initial=0.0) * 2.0**-_DEAD
    return np.log2(magnitudes, out=np.full(len(magnitudes), np.nan), where=live)
