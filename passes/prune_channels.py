"""Remove channels that cannot change any output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass
from edgewise.passes.channel_constants import Constants, Floats, Mixing
from edgewise.passes.channel_links import Array, Indices, size_of
from edgewise.passes.channel_recurrent import CELLS, add_to_bias
from edgewise.passes.channels import ChannelGraph, ChannelGroup, Cuts, Mask, channel_graphs
from edgewise.passes.graph import (
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    only_user,
    opset,
    replace,
)
from edgewise.passes.linear import constant_input, set_constant

_UNEVEN = "groups of a Conv would become unequal"

_FEW = "too few channels to be worth the nodes that it takes"

Held = list[tuple[str, Indices]]
"""Reasons, each with the channels that it holds."""


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels that hold one number for every input, and channels that nothing depends on.

    Given:   y = W x + b    where input i is the constant c, or W[j, i] is zero for every output j that stays
    Result:  y = W' x' + b' where x' and W' lack input i, and b' = b + W[:, i] c

    Given:   y = W * x + b    with zero padding, or transposed, where inputs i and k are the constants c and d
    Result:  y = W' * x' + b  where x' and W' lack input i, and W'[:, k] = W[:, k] + (c / d) W[:, i]

    A channel leaves with all its slices (see `ChannelGraph`) once every layer that reads one of them can do
    without. A layer whose border sees fewer taps than its middle makes no bias of a constant, but images of
    constants are multiples of each other, border and all: one of them does the work of all, at any size. (A
    map in place of the bias would save that one channel too, for one number an output and pixel in the file,
    an addition of as many, and a size that is fixed.) Groups of a Conv have no channel in common and refuse.
    Norms and sums over channels do without zeros alone, and a norm only where they are many (see
    `channel_norms`). Heads of attention are channels like others.
    A channel is zero, or constant, also where its range says so (see `Bounds`), as behind a Relu that never
    sees a positive number. Every value that stays keeps its numbers. Refused are channels that no output
    depends on and that have to stay all the same.

    Kernels like some widths better than others, so a layer may run slower with 63 channels than with 64:
    with `multiple` above one as many channels stay as make every narrower width a multiple of it. They are
    counted as refused.
    """

    name: ClassVar[str] = "prune-channels"
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"{self.name}: multiple must be at least 1, not {self.multiple}")

    def apply(self, model: ir.Model) -> Outcome:
        edits, refused = 0, Counter[str]()
        for graph in list(model.graphs()):
            analysis = _analyse(ChannelGraph.of(graph, opset(model), zeros=True), self.multiple)
            while removed := _remove(analysis):
                edits += removed
                analysis = _analyse(ChannelGraph.of(graph, opset(model), zeros=True), self.multiple)
            refused += _refusals(analysis)
        return Outcome(edits, MappingProxyType(dict(refused)))


@dataclass(frozen=True)
class ChannelCount:
    """What is known of the `channels` of one value along `axis`.

    `zero` and `constant` (but not zero) hold one number for every input; on the others nothing depends if
    they are `unread`. `removable` is how many of the three kinds can leave.
    """

    value: str
    axis: int
    channels: int
    zero: int
    constant: int
    unread: int
    removable: int


def removable_channels(model: ir.Model) -> tuple[ChannelCount, ...]:
    """Every value with channels that are zero, constant or unread, in the graph's order. Edits nothing."""
    analyses = (_analyse(graph) for graph in channel_graphs(model, zeros=True))
    counts = (count for analysis in analyses for count in _counts(analysis))
    return tuple(count for count in counts if count.zero or count.constant or count.unread)


@dataclass(frozen=True, eq=False)
class _Analysis:
    """What can leave a graph, and the constants it follows from."""

    graph: ChannelGraph
    constants: Constants
    cuts: Cuts
    multiple: int
    free: Cuts
    """What could leave if widths were free."""


def _analyse(graph: ChannelGraph, multiple: int = 1) -> _Analysis:
    """Let every channel leave, then take back what a layer needs, and then what a width needs."""
    constants = Constants.of(graph)
    wanted = {group: ~group.blocked for group in graph.groups}
    for slot in graph.zeros:
        wanted[graph.home[slot]][graph.home[slot].members[slot][constants.at(slot) != 0]] = False
    free = _settled(graph, constants, wanted, 1)
    cuts = free if multiple == 1 else _settled(graph, constants, free, multiple)
    return _Analysis(graph, constants, cuts, multiple, free)


def _settled(graph: ChannelGraph, constants: Constants, wanted: Cuts, multiple: int) -> Cuts:
    """The part of `wanted` that every layer can do without and every width agrees to."""
    cuts: Cuts = {group: cut.copy() for group, cut in wanted.items()}
    layers = constants.layers[::-1]
    seen: dict[Mixing, Mask] = {}
    while True:
        stale = [m for m in layers if m not in seen or (seen[m] != _staying(graph, m, cuts)).any()]
        for layer in stale:
            seen[layer] = _staying(graph, layer, cuts)
            needed = layer.needed(constants.at(layer.source), seen[layer])
            home = graph.home[layer.source]
            cuts[home][home.members[layer.source][needed]] = False
        if not stale:
            settled = graph.settle(cuts, multiple)
            if all(np.array_equal(settled[group], cut) for group, cut in cuts.items()):
                return cuts
            cuts = settled


def _staying(graph: ChannelGraph, layer: Mixing, cuts: Cuts) -> Mask:
    """The outputs of `layer` that stay."""
    return ~graph.leaving(layer.target, cuts)


def _remove(analysis: _Analysis) -> int:
    """Fold what leaves into the layers that read it, and remove it; the number of channels that left."""
    removed = sum(int(cut.sum()) for cut in analysis.cuts.values())
    if removed:
        offsets = [(layer.node, _offset(analysis, layer)) for layer in analysis.constants.layers]
        columns = [
            (layer.node, *_column(analysis, layer)) for layer in analysis.constants.layers if layer.uneven
        ]
        analysis.graph.remove(analysis.cuts)
        for node, position, column in columns:
            if column.any():
                _add_to_column(node, position, column)
        for node, offset in offsets:
            if offset.any():
                _add_offset(node, offset)
    return removed


def _offset(analysis: _Analysis, layer: Mixing) -> Floats:
    """What the inputs that leave add to the outputs of `layer` that stay."""
    known = analysis.constants.at(layer.source)
    leaving = analysis.graph.leaving(layer.source, analysis.cuts) & layer.usable(known)
    added = layer.contribution(np.where(leaving, known, 0.0))
    return added[_staying(analysis.graph, layer, analysis.cuts)]


def _column(analysis: _Analysis, layer: Mixing) -> tuple[int, Floats]:
    """What the constants that leave add to the weight of the one that stands for them, [staying output, tap].

    With it the index of that input among those that stay.
    """
    known = analysis.constants.at(layer.source)
    leaving, carrier = analysis.graph.leaving(layer.source, analysis.cuts), layer.carrier(known)
    if carrier is None:
        return 0, np.zeros(0)
    multiples = np.where(leaving & ~np.isnan(known), known, 0.0) / known[carrier]
    column = layer.combined(multiples)[_staying(analysis.graph, layer, analysis.cuts)]
    return int((~leaving[:carrier]).sum()), column


def _add_to_column(node: ir.Node, position: int, column: Floats) -> None:
    """Add to the weight with which a Conv or ConvTranspose reads an input."""
    weight = constant_of(node.inputs[1])
    assert weight is not None  # it is one of the layers that were analysed
    changed: Array = weight.copy()
    taps = changed[position] if node.op_type == "ConvTranspose" else changed[:, position]
    taps += column.reshape(taps.shape).astype(weight.dtype)
    set_constant(node, 1, changed, "weight")


def _add_offset(node: ir.Node, offset: Floats) -> None:
    """Add a number per channel to what a Conv, Gemm or MatMul gives, or to the gates of a recurrent layer."""
    if node.op_type in CELLS:
        add_to_bias(node, offset)
        return
    if node.op_type == "MatMul":
        _add_behind(node, offset)
        return
    weight, bias = constant_of(node.inputs[1]), constant_of(node.inputs[2] if len(node.inputs) > 2 else None)
    assert weight is not None  # it is one of the layers that were analysed
    if bias is not None:
        offset = offset + bias * np.float64(attribute(node, "beta", 1.0))
    node.attributes.pop("beta", None)
    set_constant(node, 2, offset.astype(weight.dtype), "bias")


def _add_behind(matmul: ir.Node, offset: Floats) -> None:
    """Into the bias that is added to a MatMul already, or into an Add of its own."""
    side = int(constant_of(matmul.inputs[1]) is not None)
    weight = constant_of(matmul.inputs[side])
    assert weight is not None  # as above
    shift = (offset if side else offset[:, np.newaxis]).astype(weight.dtype)
    out = matmul.outputs[0]
    add = only_user(out)
    index = constant_input(add) if add is not None and add.op_type == "Add" and add.domain == "" else None
    if add is not None and index is not None:
        set_constant(add, index, constant_of(add.inputs[index]) + shift, "bias")
        return
    product = new_node(matmul, "MatMul", matmul.inputs, hint=f"{out.name}.product")
    bias = new_initializer(graph_of(matmul), f"{out.name}.bias", shift)
    total = new_node(matmul, "Add", [product, bias], hint=f"{out.name}.sum")
    product.shape = total.shape = out.shape
    replace(out, total)


def _refusals(analysis: _Analysis) -> Counter[str]:
    """Why channels stay that no output depends on; the last channel of a value needs no reason."""
    alive, held = _demands(analysis)
    counted = Counter[str]()
    for group, cut in analysis.cuts.items():
        rounded = analysis.free[group] & ~cut
        counted[f"kept so that widths stay multiples of {analysis.multiple}"] += int(rounded.sum())
        waiting = ~cut & ~alive[group] & ~rounded
        for labels in group.members.values():
            if len(labels) == 1:
                waiting[labels] = False
        for reason, labels in held[group]:
            why = np.zeros(group.size, np.bool_)
            why[labels] = True
            counted[reason] += int((waiting & why).sum())
            waiting &= ~why
    return +counted


def _demands(analysis: _Analysis) -> tuple[dict[ChannelGroup, Mask], dict[ChannelGroup, Held]]:
    """The channels that an output depends on, and the reasons that hold channels whether or not one does."""
    graph, constants = analysis.graph, analysis.constants
    alive = {group: np.zeros(group.size, np.bool_) for group in graph.groups}
    held: dict[ChannelGroup, Held] = {group: [] for group in graph.groups}
    for layer in constants.layers:
        home, known = graph.home[layer.source], constants.at(layer.source)
        labels, read = home.members[layer.source], layer.read(_staying(graph, layer, analysis.cuts))
        alive[home][labels[read & np.isnan(known)]] = True
        held[home].append((layer.uneven, labels[read & ~np.isnan(known) & ~layer.usable(known)]))
    for group in graph.groups:
        for block in group.blocks:
            labels = group.members[block.slot]
            held[group].append((block.reason, labels))
            if block.reads:
                alive[group][labels[np.isnan(constants.at(block.slot))]] = True
    for slot in graph.zeros:
        home, labels, known = graph.home[slot], graph.home[slot].members[slot], constants.at(slot)
        alive[home][labels[np.isnan(known)]] = True
        held[home].append(("a sum would miss a constant", labels[known != 0]))
    for quota in graph.quotas:
        for slot in (quota.inputs, quota.outputs):
            held[graph.home[slot]].append((_UNEVEN, graph.home[slot].members[slot]))
    for slot, least in graph.least.items():
        if least <= size_of(slot):
            held[graph.home[slot]].append((_FEW, graph.home[slot].members[slot]))
    return alive, held


def _counts(analysis: _Analysis) -> Iterator[ChannelCount]:
    """One count for every axis of a value that the weights shrink with."""
    produced = [v for node in analysis.graph.graph for v in node.outputs]
    order = {value: i for i, value in enumerate((*analysis.graph.graph.inputs, *produced))}
    slots = [slot for slot in analysis.graph.home if slot.use is None and slot.value in order]
    for slot in sorted(slots, key=lambda s: (order[s.value], s.axis)):
        known, leaving = analysis.constants.at(slot), analysis.graph.leaving(slot, analysis.cuts)
        zero, constant = int((known == 0).sum()), int((~np.isnan(known)).sum())
        unread = int((leaving & np.isnan(known)).sum())
        yield ChannelCount(
            value=slot.value.name or "",
            axis=slot.axis,
            channels=len(known),
            zero=zero,
            constant=constant - zero,
            unread=unread,
            removable=int(leaving.sum()),
        )
