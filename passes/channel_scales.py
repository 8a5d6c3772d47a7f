"""Which channels may be multiplied by a factor of their own, and what takes the factor in and out again.

A positive factor passes through operators f with f(s x) = s f(x): what is between a layer that writes a
channel and the layers that read it. The writer's weights take the factor in, the readers' its inverse.
Factors are powers of two, so products and sums round as they did and the outputs stay the same bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.channel_links import Array, Coupling, Link, NodeView, Quota, Slot, size_of
from edgewise.passes.channel_ranges import ChannelRange
from edgewise.passes.channel_rules import POOLS, RULES, CouplingRule
from edgewise.passes.channels import COUPLINGS, ChannelGraph, ChannelGroup
from edgewise.passes.graph import attribute, constant_of, only_user
from edgewise.passes.linear import LAYERS, Linear, layer_ending_at, set_constant

Exponents = npt.NDArray[np.int64]
"""The factors of a group's channels as powers of two, [size]."""

Observed = Mapping[str, ChannelRange]

_PASSED = ("Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu", *POOLS)
_REDUCED = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
_ADDED = ("Add", "Max", "Mean", "Min", "Sub", "Sum")
_GATES = ("HardSigmoid", "Sigmoid", "Softmax", "Tanh")
_LARGEST = 2.0**60  # of a weight: no factor makes it overflow
_END = "graph output"
_FREE = 2**16  # no exponent gets there
_CLEARANCE = 4.0  # a channel that came closer to a Clip's bound may reach it on other samples


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer that takes factors in and out.

    `magnitude` is [group, output of the group, input of the group], the largest of the `taps`.
    """

    node: ir.Node
    inputs: Slot
    outputs: Slot
    magnitude: Array
    taps: int

    @classmethod
    def of(cls, node: ir.Node, quota: Quota) -> Layer:
        """Read the weight of a node that its rule has looked at."""
        weight = _linear(node).weight
        largest = np.abs(weight).max(axis=3, initial=0.0)
        return cls(node, quota.inputs, quota.outputs, largest, weight.shape[3])

    @property
    def is_depthwise(self) -> bool:
        """Whether no output sums over several inputs."""
        return bool(self.magnitude.shape[2] == 1)


@dataclass(frozen=True, eq=False)
class ScaleGraph:
    """The channels of one graph that may be multiplied, until it is edited.

    `reach` is the largest magnitude that each channel of an observed value may come to. `caps` bound the
    exponents of a group's channels from below and above; both are 0 where nothing may change.
    """

    graph: ChannelGraph
    layers: tuple[Layer, ...]
    reach: Mapping[Slot, Array]
    caps: Mapping[ChannelGroup, tuple[Exponents, Exponents]]

    @classmethod
    def of(cls, graph: ir.Graph, opset: int, observed: Observed | None = None) -> ScaleGraph:
        """Read the graph, whose values must have shapes. Only what was observed says if a Clip cuts."""
        seen = {} if observed is None else observed
        channels = ChannelGraph.of(graph, opset, rules=_rules(seen))
        quotas = ((node, c.quota) for node, c in channels.couplings.items())
        layers = tuple(Layer.of(node, quota) for node, quota in quotas if quota is not None)
        reach = _reach(channels, layers, seen)
        return cls(channels, layers, reach, _caps(channels, reach))

    @cached_property
    def writers(self) -> Mapping[ChannelGroup, Sequence[Layer]]:
        """The layers that write channels of each group."""
        return self._by_group(lambda layer: layer.outputs)

    @cached_property
    def readers(self) -> Mapping[ChannelGroup, Sequence[Layer]]:
        """The layers that read channels of each group."""
        return self._by_group(lambda layer: layer.inputs)

    def _by_group(self, slot_of: Callable[[Layer], Slot]) -> dict[ChannelGroup, list[Layer]]:
        found: dict[ChannelGroup, list[Layer]] = {group: [] for group in self.graph.groups}
        for layer in self.layers:
            found[self.graph.home[slot_of(layer)]].append(layer)
        return found

    def labels(self, slot: Slot) -> Array:
        """The channel of each index of a slot of a layer."""
        return self.graph.home[slot].members[slot]

    def scale(self, exponents: Mapping[ChannelGroup, Exponents]) -> int:
        """Multiply the channels of each group by 2 ** exponents; how many layers and constants changed.

        This object is of no use afterwards.
        """
        edits = 0
        for layer in self.layers:
            into, out = (exponents[self.graph.home[s]][self.labels(s)] for s in (layer.inputs, layer.outputs))
            if into.any() or out.any():
                _rescale(layer.node, np.exp2(-into), np.exp2(out))
                edits += 1
        for group, factors in exponents.items():
            for slot, labels in group.members.items():
                if slot.use is not None and factors[labels].any():
                    _multiply(slot, np.exp2(factors[labels]))
                    edits += 1
        return edits


def observable(graph: ir.Graph, opset: int) -> dict[str, int]:
    """The values of which `ScaleGraph` may want to know ranges, and the axes of their channels."""
    channels = ChannelGraph.of(graph, opset, rules=_rules(None))
    wanted = [c.quota.inputs for c in channels.couplings.values() if c.quota is not None]
    wanted += [slot for node in graph for slot in _cut_slots(node, channels)]
    made = (slot for slot in reversed(wanted) if slot.value.producer() is not None)
    return {slot.value.name or "": slot.axis for slot in made}


def _linear(node: ir.Node) -> Linear:
    linear = layer_ending_at(node)
    assert linear is not None  # its rule has read it
    return linear


def _rescale(node: ir.Node, inputs: Array, outputs: Array) -> None:
    zeros = np.zeros_like
    _linear(node).scaled_after(outputs, zeros(outputs)).scaled_before(inputs, zeros(inputs)).write()


def _multiply(slot: Slot, factors: Array) -> None:
    """Multiply a constant along an axis, for one of its readers."""
    assert slot.use is not None  # it is a constant's
    node, position = slot.use
    array = constant_of(node.inputs[position])
    assert array is not None
    along = factors.reshape([-1 if axis == slot.axis else 1 for axis in range(array.ndim)])
    set_constant(node, position, array * along.astype(array.dtype), "parameter")


def _reach(graph: ChannelGraph, layers: Sequence[Layer], observed: Observed) -> dict[Slot, Array]:
    """The largest magnitudes seen; more of a channel that stayed low for what writes it.

    Samples may miss what makes a channel large. Then its weights and the values that they meet tell: it is
    taken to come as close to their product as the median channel does.
    """
    seen: dict[Slot, Array] = {}
    for slot in graph.home:
        own = observed.get(slot.value.name or "") if slot.use is None else None
        if own is not None and own.axis == slot.axis and len(own.low) == size_of(slot):
            seen[slot] = own.magnitude.astype(np.float64)
    expected = {group: np.zeros(group.size) for group in graph.groups}
    for layer in layers:
        group = graph.home[layer.outputs]
        np.maximum.at(expected[group], group.members[layer.outputs], _product(layer, seen.get(layer.inputs)))
    return {s: _raised(own, expected[graph.home[s]][graph.home[s].members[s]]) for s, own in seen.items()}


def _product(layer: Layer, values: Array | None) -> Array:
    """The largest product of a weight and a value in each output channel, [outputs]."""
    groups, _, inputs = layer.magnitude.shape
    met = np.ones((groups, 1, inputs)) if values is None else values.reshape(groups, 1, inputs)
    largest: Array = (layer.magnitude * met).max(axis=2, initial=0.0).reshape(-1)
    return largest


def _raised(seen: Array, expected: Array) -> Array:
    live = (seen > 0) & (expected > 0)
    if not live.any():
        return seen
    return np.maximum(seen, expected * np.median(seen[live] / expected[live]))


def _caps(
    graph: ChannelGraph, reach: Mapping[Slot, Array]
) -> dict[ChannelGroup, tuple[Exponents, Exponents]]:
    caps = {}
    for group in graph.groups:
        most = np.where(group.blocked, 0, _FREE)
        caps[group] = -most, most
    for node in graph.graph:
        for slot in _cut_slots(node, graph):
            group = graph.home[slot]
            room = _room(reach[slot], _bound(node, 2, math.inf)) if slot in reach else 0
            least, most = caps[group]
            np.minimum.at(most, group.members[slot], room)
            np.maximum.at(least, group.members[slot], np.where(room == 0, 0, -_FREE))
    return caps


def _room(highest: Array, bound: float) -> Exponents:
    """How often each channel may be doubled below a Clip's bound; 0 where it may not be touched."""
    least = np.maximum(highest, bound / _FREE)
    room: Exponents = np.floor(np.log2(bound / (_CLEARANCE * least))).astype(np.int64)
    return np.maximum(room, 0)


def _cut_slots(node: ir.Node, graph: ChannelGraph) -> Iterator[Slot]:
    """The channels that a Clip may cut from above."""
    if node.op_type == "Clip" and node.domain == "" and node in graph.couplings:
        rank = 0 if node.outputs[0].shape is None else len(node.outputs[0].shape)
        slots = (Slot(node.outputs[0], axis) for axis in range(rank))
        if math.isfinite(_bound(node, 2, math.inf)):
            yield from (slot for slot in slots if slot in graph.home)


def _bound(node: ir.Node, index: int, default: float) -> float:
    """A bound of a Clip; `Refused` where it is not a known number."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return float(attribute(node, ("", "min", "max")[index], default))
    array = constant_of(value)
    if array is None or array.size != 1:
        raise Refused("Clip bounds are not constant")
    return float(array.reshape(()))


def _rules(observed: Observed | None) -> Mapping[str, CouplingRule]:
    """Which channels have to have one factor. Without `observed` no Clip is taken to cut from above."""
    passed = {op: COUPLINGS[op] for op in (*_PASSED, *_REDUCED)}
    return {
        **{op: rule for op, rule in COUPLINGS.items() if op not in RULES},  # what only moves elements
        **{op: partial(_data_only, rule) for op, rule in passed.items()},
        **dict.fromkeys(LAYERS, _layer),
        **dict.fromkeys(_ADDED, _added),
        "BatchNormalization": partial(_normalized, axis=1),
        "Clip": partial(_clip, observed),
        "InstanceNormalization": partial(_normalized, axis=1),
        "LayerNormalization": partial(_normalized, axis=-1),
        "Mul": _mul,
        "Pad": _pad,
        "RMSNormalization": partial(_normalized, axis=-1),
        "Resize": _resize,
        "Shape": lambda view: Coupling(free=tuple(view.slot(0, i) for i in range(len(view.dims())))),
        "SimplifiedLayerNormalization": partial(_normalized, axis=-1),
    }


def _layer(view: NodeView) -> Coupling:
    """Its inputs and its outputs each have factors of their own."""
    linear = layer_ending_at(view.node)
    if linear is None or linear.inputs.axis is None or linear.outputs.axis is None:
        raise Refused("the rank of a layer's data is not known")
    if only_user(view.data(1)) is not view.node:
        raise Refused("a weight is shared")
    for array in (linear.weight, linear.bias):
        if not (np.isfinite(array).all() and np.abs(array).max(initial=0) < _LARGEST):
            raise Refused("weights are enormous or not finite")
    if view.data(1).dtype == ir.DataType.FLOAT16:
        raise Refused("weights in float16 would lose digits")
    x, y = view.slot(0, linear.inputs.axis), view.out(linear.outputs.axis)
    view.expect(x, linear.inputs.size)
    view.expect(y, linear.outputs.size)
    return Coupling(free=(x, y), quota=Quota(x, y, len(linear.weight)))


def _data_only(rule: CouplingRule, view: NodeView) -> Coupling:
    """A PRelu's slopes and the like stay as they are."""
    return Coupling(tuple(link for link in rule(view).links if link.a.use is None))


def _added(view: NodeView) -> Coupling:
    """All operands have to have the channels: what is spread over them would need a factor for each."""
    links = COUPLINGS["Add"](view).links
    operands = sum(value is not None for value in view.node.inputs)
    whole = (link for link in links if sum(other.b == link.b for other in links) == operands)
    return Coupling(tuple(whole))


def _normalized(view: NodeView, axis: int) -> Coupling:
    """Scale and bias of a norm take the factors in; whatever it reads is normalized anyway."""
    y = view.out(axis % len(view.out_dims()))
    if axis == -1 and int(attribute(view.node, "axis", -1)) not in (-1, y.axis):
        raise Refused("normalized over several axes")
    links = []
    for index in (1, 2):
        if view.input(index) is not None:
            if view.constant_dims(index, "parameter") != (size_of(y),):
                raise Refused("parameter is not per channel")
            links.append(Link(view.slot(index, 0), y))
    return Coupling(tuple(links))


def _mul(view: NodeView) -> Coupling:
    """A constant with a number for every channel takes the factors in; otherwise they come with the data."""
    if view.data(0) is view.data(1):
        raise Refused("Mul of a value and itself")
    links = COUPLINGS["Mul"](view).links
    constant = [link for link in links if link.a.use is not None]
    taken = {link.b for link in constant}
    data = max(view.node.inputs, key=_is_data)
    return Coupling((*constant, *(link for link in links if link.a.value is data and link.b not in taken)))


def _is_data(value: ir.Value | None) -> bool:
    """Whether an operand of a Mul is no gate."""
    if value is None or constant_of(value) is not None:
        return False
    producer = value.producer()
    return producer is None or producer.op_type not in _GATES


def _clip(observed: Observed | None, view: NodeView) -> Coupling:
    """What is cut at zero is cut with any factor, what is cut elsewhere must not be cut at all."""
    low, high = _bound(view.node, 1, -math.inf), _bound(view.node, 2, math.inf)
    if low not in (0.0, -math.inf) or high <= 0:
        raise Refused("Clip may cut at another number than zero")
    if observed is not None and math.isfinite(high) and view.node.outputs[0].name not in observed:
        raise Refused("Clip may cut from above")
    return Coupling(tuple(link for link in COUPLINGS["Clip"](view).links if link.a.use is None))


def _pad(view: NodeView) -> Coupling:
    filler = view.input(2)
    value = attribute(view.node, "value", 0.0) if filler is None else constant_of(filler)
    if attribute(view.node, "mode", "constant") == "constant" and (value is None or np.any(value)):
        raise Refused("padding is not zero")
    return COUPLINGS["Pad"](view)


def _resize(view: NodeView) -> Coupling:
    if attribute(view.node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise Refused("Resize may fill in a number")
    return COUPLINGS["Resize"](view)


def refusals(groups: Iterable[ChannelGroup]) -> Iterator[str]:
    """For each of `groups` that may not be touched at all a reason, unless it only ends the graph."""
    for group in groups:
        reasons = [block.reason for block in group.blocks]
        if group.blocked.all() and (set(reasons) != {_END} or len(group.members) > 1):
            yield reasons[0]
