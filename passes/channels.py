"""The dependency graph of channels: which slices of which tensors have to leave together.

Every node couples slots (one axis of one value) index by index. Indices that are coupled, directly or
by way of others, are one channel. Slots that share channels form a `ChannelGroup`. A channel leaves
with all its slices or not at all.

The dependency graph of DepGraph (Fang et al., CVPR 2023), built on ONNX operators instead of autograd.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.base import PassError, Refused
from edgewise.passes.channel_links import (
    Array,
    Coupling,
    Indices,
    Link,
    NodeView,
    Quota,
    Slot,
    Use,
    dims_of,
    size_of,
)
from edgewise.passes.channel_moves import MOVES
from edgewise.passes.channel_rules import BROADCAST, RULES, CouplingRule
from edgewise.passes.graph import constant_of, new_initializer, opset
from edgewise.passes.linear import release

Mask = npt.NDArray[np.bool_]
COUPLINGS: Mapping[str, CouplingRule] = {**RULES, **MOVES}
_OLDEST = 7  # before, operators broadcast by attributes and may normalize with the batch's statistics


@dataclass(frozen=True)
class Block:
    """Why a slot may not shrink. `reads`: because of who reads it, not of who makes it."""

    reason: str
    slot: Slot
    reads: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Slots that share `size` channels. Index i of a slot is a slice of channel `members[slot][i]`."""

    size: int
    members: Mapping[Slot, Indices]
    blocks: tuple[Block, ...]

    @cached_property
    def name(self) -> str:
        """The first value that has the channels, and its axis: the same whenever the graph is read."""
        slot = next((slot for slot in self.members if slot.use is None), next(iter(self.members)))
        return f"{slot.value.name}[{slot.axis}]"

    @cached_property
    def blocked(self) -> Mask:
        """The channels that can never leave, [size]."""
        mask = np.zeros(self.size, np.bool_)
        for block in self.blocks:
            mask[self.members[block.slot]] = True
        return mask

    def slices(self, channel: int) -> tuple[tuple[ir.Value, int, Indices], ...]:
        """All (value, axis, indices) that leave with `channel`."""
        found = ((s.value, s.axis, np.flatnonzero(labels == channel)) for s, labels in self.members.items())
        return tuple((value, axis, indices) for value, axis, indices in found if len(indices))


Cuts = Mapping[ChannelGroup, Mask]
"""The channels of each group that are to leave, bool of shape [group.size]."""

Worth = Mapping[ChannelGroup, npt.NDArray[np.float64]]
"""What the channels of each group are worth, [group.size]."""


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The couplings and channel groups of one graph (not of the graphs below it), until it is edited."""

    graph: ir.Graph
    opset: int
    couplings: Mapping[ir.Node, Coupling]
    groups: tuple[ChannelGroup, ...]

    @classmethod
    def of(
        cls,
        graph: ir.Graph,
        opset: int,
        *,
        zeros: bool = False,
        rules: Mapping[str, CouplingRule] = COUPLINGS,
    ) -> ChannelGraph:
        """Read the graph. Values must have shapes: what has none is blocked by "shape is unknown".

        With `zeros` slots of that kind (see `Coupling`) may shrink, and what is cut there must be zero.
        By other `rules` channels belong together for another reason than that they have to leave together.
        """
        couplings, refused = _couple(graph, opset, rules)
        blocks = _Blocks(graph, couplings, refused, zeros)
        links = [link for coupling in couplings.values() for link in coupling.links]
        links += blocks.shared_weights(links)
        loose = [c.quota for c in couplings.values() if c.quota is not None]
        families = _families(links, loose)
        groups = (_group(slots, own, blocks) for slots, own in families if _is_cuttable(slots, loose))
        return cls(graph, opset, couplings, tuple(groups))

    @cached_property
    def home(self) -> Mapping[Slot, ChannelGroup]:
        """The group of every slot that has one."""
        return {slot: group for group in self.groups for slot in group.members}

    @cached_property
    def quotas(self) -> tuple[Quota, ...]:
        """The grouped convolutions."""
        return tuple(c.quota for c in self.couplings.values() if c.quota is not None)

    @cached_property
    def zeros(self) -> tuple[Slot, ...]:
        """The slots that shrink by zeros only."""
        return tuple(slot for c in self.couplings.values() for slot in c.zeros if slot in self.home)

    @cached_property
    def least(self) -> Mapping[Slot, int]:
        """How many indices leave at once, of slots where one is not worth what it takes."""
        least = {slot: n for c in self.couplings.values() for slot, n in c.least.items()}
        return {slot: n for slot, n in least.items() if slot in self.home}

    @cached_property
    def widths(self) -> frozenset[Slot]:
        """The slots along which layers have weights. How many heads there are matters to no kernel."""
        grouped = (slot for quota in self.quotas for slot in (quota.inputs, quota.outputs))
        weighed = (s for s in self.home if s.use is not None and s.use.node.op_type not in BROADCAST)
        return frozenset((*grouped, *weighed))

    def leaving(self, slot: Slot, cuts: Cuts) -> Mask:
        """The indices of `slot` that leave with `cuts`; the slot must be in a group."""
        group = self.home[slot]
        return cuts[group][group.members[slot]]

    def settle(self, cuts: Cuts, multiple: int = 1, worth: Worth | None = None) -> dict[ChannelGroup, Mask]:
        """The part of `cuts` that can leave; taken back is what is worth most, and of equals the first.

        Blocked channels stay, one index of every slot stays, or as many as make the new width of a layer a
        multiple of `multiple`, grouped convolutions lose as many channels in each of their groups, and a slot
        with a least number (see `Coupling`) loses that many or none.
        """
        settled = {group: cuts[group] & ~group.blocked for group in self.groups}
        worth = {group: np.zeros(group.size) for group in self.groups} if worth is None else worth
        while self._fill_up(settled, multiple, worth) or self._level(settled, worth) or self._spare(settled):
            pass
        return settled

    def _fill_up(self, cuts: Cuts, multiple: int, worth: Worth) -> bool:
        """Take back channels of every slot that would be too narrow; whether there was one."""
        changed = False
        for slot, group in self.home.items():
            leaving = self.leaving(slot, cuts)
            staying, unit = len(leaving) - int(leaving.sum()), multiple if slot in self.widths else 1
            missing = max(-(-staying // unit), 1) * unit - staying
            if missing and leaving.any():
                labels = group.members[slot][leaving]
                dearest = np.argsort(-worth[group][labels], kind="stable")[:missing]
                cuts[group][labels[dearest]] = False
                changed = True
        return changed

    def _level(self, cuts: Cuts, worth: Worth) -> bool:
        """Take back what a grouped convolution would lose unevenly; whether there was any."""
        changed = False
        for quota in self.quotas:
            slots = (quota.inputs, quota.outputs)
            masks: list[Mask] = [self.leaving(slot, cuts).reshape(quota.groups, -1) for slot in slots]
            staying: Mask = np.any([~mask.all(1) for mask in masks], axis=0)
            for slot, mask in zip(slots, masks, strict=True):
                group, labels = self.home[slot], self.home[slot].members[slot]
                excess = _excess(mask, staying, worth[group][labels].reshape(mask.shape))
                cuts[group][labels[excess]] = False
                changed |= len(excess) > 0
        return changed

    def _spare(self, cuts: Cuts) -> bool:
        """Take back what is too little to be worth it; whether there was any."""
        changed = False
        for slot, least in self.least.items():
            leaving = self.leaving(slot, cuts)
            if 0 < leaving.sum() < least:
                cuts[self.home[slot]][self.home[slot].members[slot]] = False
                changed = True
        return changed

    def remove(self, cuts: Cuts) -> None:
        """Take the channels out of the graph. All or nothing: `PassError` unless `settle` agrees with `cuts`.

        Slices are not looked at: whether the outputs stay the same is the caller's business. This object is
        of no use afterwards.
        """
        if any((cuts[group] != settled).any() for group, settled in self.settle(cuts).items()):
            raise PassError("channels were to be removed that cannot leave")
        kept = {
            slot: np.flatnonzero(~cuts[group][labels])
            for group in self.groups
            for slot, labels in group.members.items()
            if cuts[group][labels].any()
        }
        for coupling in self.couplings.values():
            if coupling.cut is not None and any(slot in kept for slot in _named(coupling, zeros=True)):
                coupling.cut(kept.get)
        _shrink_constants(self.graph, kept)
        _shrink_shapes(kept)


def channel_graphs(model: ir.Model, *, zeros: bool = False) -> Iterator[ChannelGraph]:
    """One for the model's graph and each of its subgraphs; functions are left alone."""
    for graph in list(model.graphs()):
        yield ChannelGraph.of(graph, opset(model), zeros=zeros)


def find_groups(model: ir.Model) -> tuple[ChannelGroup, ...]:
    """All channel groups of the model, in the order of its nodes."""
    return tuple(group for graph in channel_graphs(model) for group in graph.groups)


def _couple(
    graph: ir.Graph, opset: int, rules: Mapping[str, CouplingRule]
) -> tuple[dict[ir.Node, Coupling], dict[ir.Node, str]]:
    """What every node asks, and why those that ask for everything to stay do so."""
    couplings: dict[ir.Node, Coupling] = {}
    refused: dict[ir.Node, str] = {}
    for node in graph:
        rule = rules.get(node.op_type) if node.domain == "" else None
        try:
            if opset < _OLDEST:
                raise Refused("opset before 7")
            couplings[node] = Coupling() if rule is None else rule(NodeView(node, opset))
        except Refused as refusal:
            refused[node] = str(refusal)
    _decide(couplings)
    return couplings, refused


def _decide(couplings: dict[ir.Node, Coupling]) -> None:
    """Of rival links of a Reshape keep one.

    Where an axis is split up, that to the part which is chosen; where axes are merged, that from the axis
    which has channels of some layer, else the first. An axis that is held fast where it is made, as copies of
    heads are, is no rival.
    """
    for node, coupling in couplings.items():
        couplings[node] = _without_fast(coupling, couplings)
    parts = _parts(couplings)
    anchored: set[Slot] = set()
    for node, coupling in couplings.items():
        links = list(coupling.links)
        for some in coupling.options:
            wanted = [link for link in some if link.b in parts] or [k for k in some if k.a in anchored]
            links.append((wanted or some)[0])
        couplings[node] = replace(coupling, links=tuple(links), options=())
        anchored.update(slot for link in links for slot in _anchored(link, anchored))
        if coupling.quota is not None:
            anchored.add(coupling.quota.outputs)


def _without_fast(coupling: Coupling, couplings: Mapping[ir.Node, Coupling]) -> Coupling:
    """The coupling without rivals that are held fast where they are made, unless all are."""
    links, options = list(coupling.links), []
    for some in coupling.options:
        open_ = tuple(link for link in some if _is_open(link.a, couplings)) or some
        if len(open_) == 1:
            links += open_
        else:
            options.append(open_)
    return replace(coupling, links=tuple(links), options=tuple(options))


def _is_open(slot: Slot, couplings: Mapping[ir.Node, Coupling]) -> bool:
    """Whether the node that makes a slot lets it shrink."""
    producer = slot.value.producer()
    coupling = None if producer is None else couplings.get(producer)
    return coupling is not None and slot in _named(coupling, zeros=False)


def _parts(couplings: Mapping[ir.Node, Coupling]) -> set[Slot]:
    """For every axis that is split up, the part along which its channels go on.

    That is a part which nobody on its way holds fast. Of several it is one that meets a part that is chosen
    already, as the heads of values meet those of queries, whose other part is summed over; else the first.
    """
    rivals = [some for c in couplings.values() for some in c.options if len({link.a for link in some}) == 1]
    ways = {link.b: _way(link.b, couplings) for some in rivals for link in some}
    chosen, met = set[Slot](), set[Slot]()
    for some in sorted(rivals, key=lambda some: sum(bool(ways[link.b]) for link in some)):
        open_ = [link.b for link in some if ways[link.b]] or [some[0].b]
        best = next((slot for slot in open_ if not met.isdisjoint(ways[slot])), open_[0])
        chosen.add(best)
        met |= ways[best]
    return chosen


def _way(start: Slot, couplings: Mapping[ir.Node, Coupling]) -> set[Slot]:
    """The slots that `start` is handed on to until a layer or a Reshape takes it; none if it is held fast."""
    reached, waiting = {start}, [start]
    while waiting:
        slot = waiting.pop()
        if slot.value.is_graph_output():
            return set()
        for reader, _ in slot.value.uses():
            coupling = couplings.get(reader)
            if coupling is None or slot not in _named(coupling, zeros=False):
                return set()
            onward = {link.b for link in coupling.links if link.a == slot} - reached
            reached |= onward
            waiting += onward
    return reached


def _anchored(link: Link, anchored: set[Slot]) -> tuple[Slot, ...]:
    return (link.b,) if link.a.use is not None or link.a in anchored else ()


def _named(coupling: Coupling, *, zeros: bool) -> set[Slot]:
    """The slots that may shrink, with or without those that do by zeros only."""
    named = set(coupling.free)
    for link in itertools.chain(coupling.links, *coupling.options):
        named.update((link.a, link.b))
    return named.union(coupling.zeros) if zeros else named.difference(coupling.zeros)


class _Blocks:
    """Finds what keeps a slot from shrinking: whoever touches it without naming it."""

    def __init__(
        self,
        graph: ir.Graph,
        couplings: Mapping[ir.Node, Coupling],
        refused: Mapping[ir.Node, str],
        zeros: bool,
    ) -> None:
        self._graph = graph
        self._named = {node: _named(coupling, zeros=zeros) for node, coupling in couplings.items()}
        self._refused = refused
        self._torn: set[Slot] = set()

    def shared_weights(self, links: Iterable[Link]) -> list[Link]:
        """Links between the readers of one constant, so that it stays one; vectors may be copied instead."""
        slots = dict.fromkeys(link.a for link in links if link.a.use is not None)
        readers: dict[tuple[ir.Value, int], list[Slot]] = defaultdict(list)
        for slot in slots:
            if len(slot.value.uses()) > 1 and not _is_vector(slot.value):
                readers[slot.value, slot.axis].append(slot)
        for (value, _), own in readers.items():
            if len(own) != len(value.uses()):
                self._torn.update(own)
        return [Link(other, own[0]) for own in readers.values() for other in own[1:]]

    def of(self, slot: Slot) -> Iterator[Block]:
        """Every reason why `slot` must stay as it is."""
        if slot.use is not None:
            if slot in self._torn:
                yield Block("shared weight", slot, reads=False)
            return
        producer = slot.value.producer()
        if producer is None:
            yield Block("graph input", slot, reads=False)
        elif slot not in self._named.get(producer, ()):
            yield Block(self._reason(producer), slot, reads=False)
        if slot.value.is_graph_output():
            yield Block("graph output", slot, reads=True)
        for reader, _ in slot.value.uses():
            if reader.graph is not self._graph:
                yield Block("control flow", slot, reads=True)
            elif slot not in self._named.get(reader, ()):
                yield Block(self._reason(reader), slot, reads=True)

    def _reason(self, node: ir.Node) -> str:
        return self._refused.get(node, node.op_type)


def _is_vector(value: ir.Value) -> bool:
    dims = [d for d in dims_of(value) if isinstance(d, int)]
    return int(np.prod(dims)) == max(dims, default=1)


def _families(links: Sequence[Link], quotas: Sequence[Quota]) -> Iterator[tuple[list[Slot], list[Link]]]:
    """Slots that are linked in any way, with their links."""
    parent: dict[Slot, Slot] = {}

    def root(slot: Slot) -> Slot:
        parent.setdefault(slot, slot)
        while (up := parent[slot]) != slot:
            parent[slot] = slot = parent[up]
        return slot

    for quota in quotas:
        root(quota.inputs), root(quota.outputs)
    for link in links:
        parent[root(link.a)] = root(link.b)
    slots, own = defaultdict[Slot, list[Slot]](list), defaultdict[Slot, list[Link]](list)
    for slot in parent:
        slots[root(slot)].append(slot)
    for link in links:
        own[root(link.a)].append(link)
    for top, family in slots.items():
        yield family, own[top]


def _is_cuttable(slots: Sequence[Slot], quotas: Sequence[Quota]) -> bool:
    """Whether weights would shrink with the slots, all of known size; pixels and batches have none."""
    grouped = {slot for quota in quotas for slot in (quota.inputs, quota.outputs)}
    shrink = any(slot.use is not None or slot in grouped for slot in slots)
    return shrink and all(isinstance(dims_of(slot.value)[slot.axis], int) for slot in slots)


def _group(slots: Sequence[Slot], links: Sequence[Link], blocks: _Blocks) -> ChannelGroup:
    sizes = [size_of(slot) for slot in slots]
    starts = dict(zip(slots, np.cumsum([0, *sizes]).tolist(), strict=False))
    heads, tails = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for link in links:
        every = np.arange(size_of(link.a))
        heads.append(starts[link.a] + (every if link.source is None else link.source))
        tails.append(starts[link.b] + (every if link.target is None else link.target))
    labels = _components(sum(sizes), np.concatenate(heads), np.concatenate(tails))
    members = {s: labels[starts[s] : starts[s] + n] for s, n in zip(slots, sizes, strict=True)}
    found = tuple(block for slot in slots for block in blocks.of(slot))
    return ChannelGroup(int(labels.max(initial=-1)) + 1, members, found)


def _components(size: int, heads: Indices, tails: Indices) -> Indices:
    """Number the connected components of a graph by the order of their first vertex.

    Roots hook onto smaller roots, then every path is halved until it is flat: all edges at once, in a
    number of rounds that grows with the logarithm of the longest chain.
    """
    parent = np.arange(size)
    while True:
        high, low = np.maximum(parent[heads], parent[tails]), np.minimum(parent[heads], parent[tails])
        if np.array_equal(high, low):
            break
        np.minimum.at(parent, high, low)
        while not np.array_equal(flatter := parent[parent], parent):
            parent = flatter
    return np.unique(parent, return_inverse=True)[1].astype(np.int64)


def _excess(leaving: Mask, staying: Mask, worth: npt.NDArray[np.float64]) -> Indices:
    """The flat indices that a grouped convolution cannot lose; `leaving` is [group, index of the group].

    Not all of a slot leaves, so the group that loses least keeps an index, and with it every other.
    """
    if not staying.any():
        return np.empty(0, np.int64)
    too_many = leaving.sum(1, keepdims=True) - leaving[staying].sum(1).min()
    dearest = np.argsort(np.where(leaving, -worth, np.inf), axis=1, kind="stable")
    rank = np.argsort(dearest, axis=1)
    return np.flatnonzero(leaving & (rank < too_many) & staying[:, np.newaxis])


def _shrink_constants(graph: ir.Graph, kept: Mapping[Slot, Indices]) -> None:
    """Give every reader its smaller constant; readers that want the same one share it."""
    axes: dict[tuple[ir.Value, Use], dict[int, Indices]] = defaultdict(dict)
    for slot, indices in kept.items():
        if slot.use is not None:
            axes[slot.value, slot.use][slot.axis] = indices
    sharers: dict[tuple[object, ...], list[Use]] = defaultdict(list)
    wanted: dict[tuple[object, ...], tuple[ir.Value, dict[int, Indices]]] = {}
    for (value, use), cut in axes.items():
        key = (value, *((axis, cut[axis].tobytes()) for axis in sorted(cut)))
        sharers[key].append(use)
        wanted[key] = value, cut
    for key, (value, cut) in wanted.items():
        array = constant_of(value)
        assert array is not None  # its slots have a use
        for axis, indices in cut.items():
            array = np.take(array, indices, axis)
        _assign(graph, value, sharers[key], array)


def _assign(graph: ir.Graph, value: ir.Value, uses: Sequence[Use], array: Array) -> None:
    """Let `uses` read `array` where they read `value`, under the same name if nobody else reads that."""
    if value.is_initializer() and not value.is_graph_output() and len(uses) == len(value.uses()):
        assert value.const_value is not None
        value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)
        value.shape = ir.Shape(array.shape)
        return
    fresh = new_initializer(graph, value.name or "weight", array)
    for node, index in uses:
        node.replace_input_with(index, fresh)
    release(value)


def _shrink_shapes(kept: Mapping[Slot, Indices]) -> None:
    for slot, indices in kept.items():
        if slot.use is None and slot.value.shape is not None:
            dims = list(slot.value.shape)
            dims[slot.axis] = len(indices)
            slot.value.shape = ir.Shape(dims)
