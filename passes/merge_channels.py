"""Merge channels that are copies or multiples of others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.channel_copies import Copies, numbered, ranks
from edgewise.passes.channel_links import Array, Indices, NodeView, Slot
from edgewise.passes.channel_mixing import Mixing
from edgewise.passes.channels import ChannelGraph, ChannelGroup, Cuts
from edgewise.passes.graph import constant_of, opset
from edgewise.passes.linear import set_constant

Places = tuple[Indices, Indices]
"""Inputs of a layer, by the group and the place in it."""

Sum = tuple[Slot, Array]
"""The axis of a weight along which it reads channels, and the whole weight after columns were added up."""

_BLOCK = 2**22  # weights that are added up in one go: their copies in double precision stay small


@dataclass(frozen=True)
class MergeChannels(Pass):
    """Merge channels that on every input are a multiple of another one into that other one.

    Given:   y = W x + b     where input j is f times input i, and f is a power of two or the negative of one
    Result:  y = W' x' + b   where x' and W' lack input j, and W'[:, i] = W[:, i] + f W[:, j]

    Filters that are copies make channels that are, and so they stay through elementwise functions, norms,
    pooling, depthwise layers, sums and moves (see `Copies`). Padding is no obstacle: both channels see the
    same border. A channel leaves with all its slices (see `ChannelGraph`), so it has to be like one and the
    same channel for all of its readers. Every value that stays keeps its numbers. Refused are channels that
    are so, and have to stay all the same.

    `multiple` is that of `prune-channels`.
    """

    name: ClassVar[str] = "merge-channels"
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"{self.name}: multiple must be at least 1, not {self.multiple}")

    def apply(self, model: ir.Model) -> Outcome:
        edits, refused = 0, Counter[str]()
        for graph in list(model.graphs()):
            plan = _plan(ChannelGraph.of(graph, opset(model)), self.multiple)
            try:
                while plan.leaving:
                    edits += _carry_out(plan)
                    plan = _plan(ChannelGraph.of(graph, opset(model)), self.multiple)
                refused += _refusals(plan)
            except Refused as refusal:
                refused[str(refusal)] += plan.leaving
        return Outcome(edits, MappingProxyType(dict(refused)))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is to be merged: channel c of a group, if it is in `cuts`, into channel `into[group][c]`.

    Those that are not in `cuts` could be merged too but for what holds them, or into themselves.
    """

    graph: ChannelGraph
    copies: Copies
    into: Mapping[ChannelGroup, Indices]
    cuts: Cuts

    @property
    def leaving(self) -> int:
        """How many channels leave."""
        return sum(int(cut.sum()) for cut in self.cuts.values())


def _plan(graph: ChannelGraph, multiple: int) -> _Plan:
    copies = Copies.of(graph)
    readers = _readers(graph, copies)
    into = {group: _partners(group, readers[group], copies) for group in graph.groups}
    wanted: Cuts = {group: own != np.arange(group.size) for group, own in into.items()}
    any_wanted = any(mask.any() for mask in wanted.values())
    return _Plan(graph, copies, into, graph.settle(wanted, multiple) if any_wanted else wanted)


def _readers(graph: ChannelGraph, copies: Copies) -> Mapping[ChannelGroup, dict[tuple[Slot, int], None]]:
    """The slots of each group that are read by what does not leave with them, and in how many groups."""
    readers: dict[ChannelGroup, dict[tuple[Slot, int], None]] = defaultdict(dict)
    for layer in copies.layers.values():
        if not _is_depthwise(layer):
            readers[graph.home[layer.source]][layer.source, len(layer.weight)] = None
    for group in graph.groups:
        readers[group].update(dict.fromkeys((block.slot, 1) for block in group.blocks if block.reads))
    return readers


def _is_depthwise(layer: Mixing) -> bool:
    """Whether each input has outputs of its own, which leave with it."""
    groups, _, inputs, _ = layer.weight.shape
    return bool(groups > 1 and inputs == 1)


def _partners(group: ChannelGroup, readers: Iterable[tuple[Slot, int]], copies: Copies) -> Indices:
    """For each channel the first one that is like it for every reader; one that cannot leave comes first."""
    own = np.arange(group.size)
    if not any(slot in copies.known for slot, _ in readers):
        return own
    table = np.hstack([_seen(group, slot, groups, copies) for slot, groups in readers])
    order = np.argsort(~group.blocked, kind="stable")
    into = np.empty_like(own)
    into[order] = order[numbered(table[order])]
    return np.where((table < 0).all(1), own, into)  # what nobody reads is like nothing


def _seen(group: ChannelGroup, slot: Slot, groups: int, copies: Copies) -> Indices:
    """What a reader sees of each channel, by number; groups of a layer each see inputs of their own."""
    labels = group.members[slot]
    every, known = np.arange(len(labels)), copies.known.get(slot)
    like = every if known is None else known.like
    return _spread(group, labels, like * groups + every // (len(labels) // groups))


def _spread(group: ChannelGroup, labels: Indices, numbers: Indices) -> Indices:
    """The numbers that each channel has, in order: [channel, place], -1 where it has no more."""
    place = ranks(labels)
    table = np.full((group.size, place.max(initial=0) + 1), -1)
    table[labels, place] = numbers
    return table


def _carry_out(plan: _Plan) -> int:
    """Add up columns and remove the channels; how many left, none where weights had to be parted first."""
    sums = defaultdict[ir.Value, list[Sum]](list)
    for slot, weight in _sums(plan):
        sums[slot.value].append((slot, weight))
    if not all(_can_hold(value, own) for value, own in sums.items()):
        _part(slot for own in sums.values() for slot, _ in own)
        return 0
    for value, own in sums.items():
        assert value.const_value is not None  # it is an initializer
        value.const_value = ir.Tensor(own[0][1], dtype=value.const_value.dtype, name=value.name)
    plan.graph.remove(plan.cuts)
    return plan.leaving


def _sums(plan: _Plan) -> Iterator[Sum]:
    """The new weight of every layer that reads a channel that leaves."""
    for layer in plan.copies.layers.values():
        group = plan.graph.home[layer.source]
        if plan.cuts[group][group.members[layer.source]].any() and not _is_depthwise(layer):
            view, links = NodeView(layer.node, plan.graph.opset), plan.graph.couplings[layer.node].links
            found = (k.a for k in links if k.b == layer.source and k.a.use is not None)
            slot = next(found, view.slot(1, 1))  # a grouped Conv links no axis
            yield slot, _sum(plan, layer, slot)


def _sum(plan: _Plan, layer: Mixing, slot: Slot) -> Array:
    """The weight with the columns of channels that leave added to those of the channels like them."""
    group = plan.graph.home[layer.source]
    labels, factors = group.members[layer.source], plan.copies.known[layer.source].factors
    gone = np.flatnonzero(plan.cuts[group][labels])
    stay = _spread(group, labels, np.arange(len(labels)))[plan.into[group][labels[gone]], ranks(labels)[gone]]
    weight = constant_of(slot.value)
    assert weight is not None  # it is one of the layers that were analysed
    groups, _, inputs, _ = layer.weight.shape
    changed = np.array(weight, order="C")
    columns = np.moveaxis(changed.reshape(groups, -1, *changed.shape[1:]), 1 + slot.axis, 1)
    ratio = (factors[gone] / factors[stay]).reshape(-1, *[1] * (columns.ndim - 2))
    step = max(1, _BLOCK // columns[:, :, :1].size)
    for start in range(0, columns.shape[2], step):
        _add_up(columns[:, :, start : start + step], np.divmod(gone, inputs), np.divmod(stay, inputs), ratio)
    return changed


def _add_up(columns: Array, gone: Places, stay: Places, ratio: Array) -> None:
    """Add what leaves to what stays for it, in double precision; `Refused` where a sum is too large."""
    wide = columns.astype(np.float64)
    np.add.at(wide, stay, ratio * wide[gone])
    with np.errstate(over="ignore"):
        narrow = wide.astype(columns.dtype)
    if not np.isfinite(narrow[np.isfinite(wide)]).all():
        raise Refused("merged weights would overflow")
    columns[...] = narrow


def _can_hold(value: ir.Value, sums: list[Sum]) -> bool:
    """Whether the weight may become what its readers want: all of them the same."""
    settled = value.is_initializer() and not value.is_graph_output() and len(value.uses()) == len(sums)
    return settled and all(np.array_equal(sums[0][1], other) for _, other in sums[1:])


def _part(slots: Iterable[Slot]) -> None:
    """Give every reader an initializer of its own."""
    for slot in slots:
        assert slot.use is not None  # it is a constant's
        weight = constant_of(slot.value)
        assert weight is not None
        set_constant(slot.use.node, slot.use.position, weight, "weight")


def _refusals(plan: _Plan) -> Counter[str]:
    """Why channels stay that are like others; the last channel of a value needs no reason."""
    counted = Counter[str]()
    quotas = {slot for quota in plan.graph.quotas for slot in (quota.inputs, quota.outputs)}
    for group, into in plan.into.items():
        waiting = (into != np.arange(group.size)) & ~plan.cuts[group]
        held = [(block.reason, group.members[block.slot]) for block in group.blocks]
        held += [
            ("groups of a Conv would become unequal", group.members[s]) for s in quotas & group.members.keys()
        ]
        for reason, labels in held:
            mine = np.unique(labels[waiting[labels]])
            counted[reason] += len(mine)
            waiting[mine] = False
    return +counted
