"""Which channels hold one number for every input, found by following that number through the graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_bounds import FORMATS, Bounds, filler, incoming
from edgewise.passes.channel_functions import FUNCTIONS as FUNCTIONS
from edgewise.passes.channel_functions import Floats as Floats
from edgewise.passes.channel_links import Coupling, Link, NodeView, Slot, dims_of, op_types, size_of
from edgewise.passes.channel_mixing import Mixing as Mixing
from edgewise.passes.channel_mixing import is_padded as is_padded
from edgewise.passes.channel_mixing import mixings, weight_of
from edgewise.passes.channel_moves import pad_widths
from edgewise.passes.channel_products import V, attended, head_axis
from edgewise.passes.channel_recurrent import CELLS, STATES, X, zero_units
from edgewise.passes.channel_rules import MIXERS, POOLS
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import attribute, constant_of


@dataclass(frozen=True, eq=False)
class Constants:
    """What is known of the slots of a graph, the layers that it was computed with, and their ranges.

    A number is known because it follows from numbers, or because nothing else lies in its range.
    """

    known: dict[Slot, Floats] = field(default_factory=dict)
    mixings: dict[Slot, Mixing] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=Bounds)

    @classmethod
    def of(cls, graph: ChannelGraph) -> Constants:
        """Follow constants through the graph once, from front to back."""
        layers = mixings(graph)
        constants = cls({}, layers, Bounds.of(graph, layers))
        with np.errstate(all="ignore"):
            for node, coupling in graph.couplings.items():
                if any(v.dtype in FORMATS for v in node.outputs):
                    constants._follow(NodeView(node, graph.opset), coupling, graph.home)
        return constants

    @property
    def layers(self) -> list[Mixing]:
        """The layers that sum over channels, from front to back. Their slots are in a group each."""
        return list(self.mixings.values())

    def _follow(self, view: NodeView, coupling: Coupling, home: Container[Slot]) -> None:
        rule = CONSTANTS.get(view.node.op_type)
        if rule is None:
            return
        for slot, links in incoming(view.node, coupling).items():
            if slot not in home:
                continue  # nothing leaves along it
            found, bounded = rule(view, slot, links, self), self.bounds.fixed(slot)
            if found is None:
                found = bounded
            elif bounded is not None:
                found = np.where(np.isfinite(found), found, bounded)
            if found is not None and not np.isnan(found).all():
                self.known[slot] = np.where(np.isfinite(found), found, np.nan)

    def get(self, slot: Slot) -> Floats | None:
        """What is known of a slot, None for nothing."""
        return self.known.get(slot) if slot.use is None else self.constant(slot.value, slot.axis)

    def constant(self, value: ir.Value, axis: int | None) -> Floats | None:
        """The number that each slice of a constant along `axis`, or all of it, holds throughout."""
        found = self.bounds.constant(value, axis)
        return None if found is None else np.where(found.low == found.high, found.low, np.nan)

    def at(self, slot: Slot) -> Floats:
        """What is known of a slot, all NaN for nothing."""
        found = self.get(slot)
        return np.full(size_of(slot), np.nan) if found is None else found


Rule = Callable[[NodeView, Slot, Sequence[Link], Constants], Floats | None]
"""The constants of one output slot of a node, given the links that lead to it; None for nothing known."""


def _mixed(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Along the channels the sum; along axes that pass through, zero where any factor of a product is."""
    mixing = known.mixings.get(slot)
    if mixing is not None:
        return mixing.constants(known.at(mixing.source))
    zero = np.logical_or.reduce([known.at(link.a) == 0 for link in links])
    return np.where(zero, 0.0, np.nan) if zero.any() else None


def _carried(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Elements are moved or averaged: an index is known where all that flows into it is the same."""
    facts = [known.get(link.a) for link in links]
    if all(fact is None for fact in facts):
        return None
    size = size_of(slot)
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    for link, fact in zip(links, facts, strict=True):
        values = np.full(size_of(link.a), np.nan) if fact is None else fact
        target = np.arange(size) if link.target is None else link.target
        source = values if link.source is None else values[link.source]
        np.minimum.at(low, target, source)
        np.maximum.at(high, target, source)
    return np.where(low == high, low, np.nan)


def _zeros(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Sums, and averages over padding: only zeros stay what they are."""
    found = _carried(view, slot, links, known)
    return None if found is None else np.where(found == 0, 0.0, np.nan)


def _average_pool(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    over_border = is_padded(view.node) or attribute(view.node, "ceil_mode", 0)
    diluted = over_border and attribute(view.node, "count_include_pad", 0)
    return (_zeros if diluted else _carried)(view, slot, links, known)


def _pad(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    found = _carried(view, slot, links, known)
    if attribute(view.node, "mode", "constant") != "constant":
        return found
    number, (begins, ends) = filler(view), pad_widths(view)
    found = np.full(size_of(slot), np.nan) if found is None else found.copy()
    if begins[slot.axis] or ends[slot.axis]:
        found[: begins[slot.axis]] = number
        found[len(found) - ends[slot.axis] :] = number
    elsewhere = any(begins[i] or ends[i] for i in range(len(begins)) if i != slot.axis)
    return np.where(found == number, found, np.nan) if elsewhere else found


def _batch_norm(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats:
    scale, shift, mean, variance = (weight_of(view, i).astype(np.float64) for i in (1, 2, 3, 4))
    deviation = np.sqrt(variance + attribute(view.node, "epsilon", 1e-5))
    whitened = (known.at(Slot(view.data(), 1)) - mean) / deviation
    return np.where(scale == 0, shift, whitened * scale + shift)


def _instance_norm(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats:
    """Of a constant only zero is sure to lose its mean without a rounding error."""
    scale, shift = (weight_of(view, i).astype(np.float64) for i in (1, 2))
    return np.where((scale == 0) | (known.at(Slot(view.data(), 1)) == 0), shift, np.nan)


def _recurrent(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats:
    """Only zero is what a state may be at every step, the first included."""
    states = [known.at(view.slot(i, 2)) for i in STATES if view.input(i) is not None]
    begun = np.where(np.all([state == 0 for state in states], axis=0), 0.0, np.nan)
    return zero_units(view, known.at(view.slot(X, 2)), begun)


def _attention(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Zero where the values that are averaged are, whatever their weights."""
    found = known.get(view.slot(V, slot.axis))
    if found is None:
        return None
    zero = found == 0 if slot.axis != head_axis(view) else found[attended(view)] == 0
    return np.where(zero, 0.0, np.nan)


def _layer_norm(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """The shift, where nothing is scaled; of an axis that passes through nothing."""
    if links:
        return None
    scale, shift = weight_of(view, 1), constant_of(view.input(2))
    return np.where(scale == 0, 0.0 if shift is None else shift.astype(np.float64), np.nan)


def _rms_norm(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Zeros, along the axis that is normalized."""
    scale = known.constant(view.data(1), 0)
    if slot.axis != len(view.dims()) - 1 or scale is None or len(scale) != size_of(slot):
        return None
    return np.where((scale == 0) | (known.at(links[0].a) == 0), 0.0, np.nan)


def _computed(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """The function of an elementwise operator on what is known of its operands."""
    if all(link.a.use is None and link.a not in known.known for link in links):
        return None
    operands = [_operand(view, index, slot, known) for index in range(len(view.node.inputs))]
    return np.broadcast_to(FUNCTIONS[view.node.op_type](view.node, *operands), size_of(slot))


def _operand(view: NodeView, index: int, slot: Slot, known: Constants) -> Floats:
    """What is known of an input along an axis of the output: [size], or [1] where it lacks the axis."""
    value = view.input(index)
    if value is None:
        return np.full(1, np.nan)
    dims = view.dims(index)
    axis = slot.axis - len(dims_of(slot.value)) + len(dims)
    if axis >= 0 and dims[axis] != 1:
        return known.at(view.slot(index, axis))
    whole = known.constant(value, None)
    return np.full(1, np.nan) if whole is None else whole


_CARRIERS = op_types(
    "Cast Concat DepthToSpace Dropout Expand Flatten Gather Identity ReduceMax ReduceMean ReduceMin Reshape "
    "Resize Slice SpaceToDepth Split Squeeze Transpose Unsqueeze Upsample"
)
_SUMMERS = op_types("RotaryEmbedding ReduceL1 ReduceL2 ReduceSum ReduceSumSquare LpPool GlobalLpPool")

CONSTANTS: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(FUNCTIONS, _computed),
        **dict.fromkeys((*_CARRIERS, *POOLS), _carried),
        **dict.fromkeys(_SUMMERS, _zeros),
        **dict.fromkeys(MIXERS, _mixed),
        **dict.fromkeys(CELLS, _recurrent),
        "Attention": _attention,
        "AveragePool": _average_pool,
        "BatchNormalization": _batch_norm,
        "InstanceNormalization": _instance_norm,
        "LayerNormalization": _layer_norm,
        "Pad": _pad,
        "RMSNormalization": _rms_norm,
        "SimplifiedLayerNormalization": _rms_norm,
    }
)
"""Operators of the default domain, by type. The output of any other is not known."""
