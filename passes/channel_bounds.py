"""Between which numbers every channel lies whatever the input: interval arithmetic along the graph."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_functions import FUNCTIONS, Floats, extent, product
from edgewise.passes.channel_links import (
    Coupling,
    Indices,
    Link,
    NodeView,
    Slot,
    dims_of,
    op_types,
    size_of,
)
from edgewise.passes.channel_mixing import Mixing, is_padded, weight_of
from edgewise.passes.channel_moves import pad_widths
from edgewise.passes.channel_rules import MIXERS
from edgewise.passes.channels import ChannelGraph, Mask
from edgewise.passes.graph import attribute, constant_of


class Format(NamedTuple):
    """How far numbers next to each other are apart, relative to their size, and the largest one."""

    eps: float
    max: float


FORMATS: Mapping[ir.DataType, Format] = MappingProxyType(
    {
        ir.DataType.FLOAT: Format(2.0**-23, float(np.finfo(np.float32).max)),
        ir.DataType.DOUBLE: Format(2.0**-52, float(np.finfo(np.float64).max)),
        ir.DataType.FLOAT16: Format(2.0**-10, 65504.0),
        ir.DataType.BFLOAT16: Format(2.0**-7, (2 - 2.0**-7) * 2.0**127),
    }
)
"""The types of numbers that channels are followed in."""

_BLOCK = 2**22  # weights that are looked at in one go: their copies in float64 stay small


class Range(NamedTuple):
    """The least and the greatest number that a slice may hold, one of each an index of a slot."""

    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class Bounds:
    """The range of the slots of a graph that channels leave by.

    A range holds what a runtime computes, not only what exact arithmetic gives: the largest number of a
    range may be zero, and a channel lives or dies by its sign. A product, and each of the sums it goes
    through, is off by a factor of at most 1 + eps, so that a layer of n terms gives the sum of
    t[i] (1 + d[i]) with every |d[i]| below n eps / (1 - n eps), in whatever order it is summed (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, lemma 3.1). Hence each term is moved outwards by
    that part of itself. A term that is zero stays zero: terms that are all below or at zero have no
    positive sum, however it is rounded. eps is twice what rounding to nearest allows, which covers
    functions that are off in the last digit. A runtime of a coarser arithmetic than the file's types (tensor
    cores, Winograd's transforms) is off by its own error and no more: functions are continuous here.
    """

    known: dict[Slot, Range] = field(default_factory=dict)
    mixings: Mapping[Slot, Mixing] = field(default_factory=dict)
    _read: dict[tuple[ir.Value, int | None], Range | None] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ChannelGraph, mixings: Mapping[Slot, Mixing]) -> Bounds:
        """Follow ranges through the graph once, from front to back; `mixings` are its layers."""
        bounds = cls({}, mixings)
        with np.errstate(all="ignore"):
            for node, coupling in graph.couplings.items():
                rule = RANGES.get(node.op_type)
                if rule is None or not node.outputs or node.outputs[0].dtype not in FORMATS:
                    continue
                for slot, links in incoming(node, coupling).items():
                    if slot in graph.home:
                        bounds._learn(slot, rule(NodeView(node, graph.opset), slot, links, bounds))
        return bounds

    def _learn(self, slot: Slot, found: Range | None) -> None:
        """Keep what is a bound: not NaN, within the operator's own range, and no overflow in its type."""
        if found is None:
            return
        least, greatest = _outright(slot.value)
        largest = _format(slot.value).max
        low, high = np.fmax(found.low, least), np.fmin(found.high, greatest)
        low, high = np.where(low < -largest, -np.inf, low), np.where(high > largest, np.inf, high)
        if np.isfinite(low).any() or np.isfinite(high).any():
            self.known[slot] = Range(low, high)

    def get(self, slot: Slot) -> Range | None:
        """The range of a slot, None where nothing is known."""
        if slot.use is not None:
            return self.constant(slot.value, slot.axis)
        if slot in self.known:
            return self.known[slot]
        low, high = _outright(slot.value)
        if low == -math.inf and high == math.inf:
            return None
        return Range(*(np.full(size_of(slot), end) for end in (low, high)))

    def constant(self, value: ir.Value, axis: int | None) -> Range | None:
        """The range of the slices of a constant along `axis`, or of all of it; None of what is none."""
        if (value, axis) not in self._read:
            array = constant_of(value)
            self._read[value, axis] = None if array is None else Range(*extent(array, axis))
        return self._read[value, axis]

    def at(self, slot: Slot) -> Range:
        """The range of a slot, infinite where nothing is known."""
        found = self.get(slot)
        return _anything(size_of(slot)) if found is None else found

    def fixed(self, slot: Slot) -> Floats | None:
        """The number of every index whose range is that number, NaN for others; None where all are NaN."""
        found = self.known.get(slot)
        if found is None:
            return None
        same = found.low == found.high
        return np.where(same, found.low, np.nan) if same.any() else None


Rule = Callable[[NodeView, Slot, Sequence[Link], Bounds], Range | None]
"""The range of one output slot of a node, given the links that lead to it. NaN is no bound."""


def incoming(node: ir.Node, coupling: Coupling) -> dict[Slot, list[Link]]:
    """The slots of the outputs of a node that it names, each with the links that lead to it."""
    found: dict[Slot, list[Link]] = {s: [] for s in coupling.free if s.value in node.outputs}
    for link in coupling.links:
        if link.b.value in node.outputs:
            found.setdefault(link.b, []).append(link)
    return found


# Where the numbers of a value lie because of the operator that makes it. The least numbers of HardSwish,
# Gelu and Mish are rounded down.
_OWN: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        **dict.fromkeys(("HardSigmoid", "Hardmax", "Sigmoid", "Softmax"), (0.0, 1.0)),
        **dict.fromkeys(("Cos", "Erf", "Sin", "Softsign", "Tanh"), (-1.0, 1.0)),
        **dict.fromkeys(("Abs", "Exp", "Relu", "Softplus", "Sqrt"), (0.0, math.inf)),
        **dict.fromkeys(("GlobalLpPool", "LpPool"), (0.0, math.inf)),
        **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceSumSquare"), (0.0, math.inf)),
        "Gelu": (-0.1701, math.inf),
        "HardSwish": (-0.37501, math.inf),
        "LogSoftmax": (-math.inf, 0.0),
        "Mish": (-0.3089, math.inf),
    }
)
_INTEGERS = MappingProxyType(
    {
        ir.DataType.BOOL: (0.0, 1.0),
        ir.DataType.INT8: (-128.0, 127.0),
        ir.DataType.UINT8: (0.0, 255.0),
        ir.DataType.INT16: (-32768.0, 32767.0),
        ir.DataType.UINT16: (0.0, 65535.0),
    }
)


def _outright(value: ir.Value) -> tuple[float, float]:
    """The range of a value as far as its operator alone says it."""
    producer = value.producer()
    if producer is None or producer.domain != "":
        return -math.inf, math.inf
    if producer.op_type == "Cast":
        source = producer.inputs[0]
        kind = None if source is None else source.dtype
        return (-math.inf, math.inf) if kind is None else _INTEGERS.get(kind, (-math.inf, math.inf))
    return _OWN.get(producer.op_type, (-math.inf, math.inf))


def _anything(size: int) -> Range:
    return Range(np.full(size, -np.inf), np.full(size, np.inf))


def _format(value: ir.Value) -> Format:
    assert value.dtype is not None  # no other values are followed
    return FORMATS[value.dtype]


def _eps(view: NodeView) -> float:
    return _format(view.node.outputs[0]).eps


def _rounding(terms: float, eps: float) -> float:
    """How much of itself each of so many terms may be off in a sum."""
    return terms * eps / (1 - terms * eps) if terms * eps < 1 else math.inf


def _widened(inner: Range, part: float) -> Range:
    """Both ends moved outwards by that part of themselves; zero stays zero."""
    if not part:
        return inner
    low, high = inner
    return Range(
        np.where(low == 0, 0.0, low - part * np.abs(low)),
        np.where(high == 0, 0.0, high + part * np.abs(high)),
    )


def _with_zero(inner: Range) -> Range:
    return Range(np.minimum(inner.low, 0), np.maximum(inner.high, 0))


def _mixed(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """A weighted sum; where padding meets the window, taps see zero, or nothing."""
    mixing = bounds.mixings.get(slot)
    if mixing is None:
        return None
    part = _rounding(mixing.weight[0, 0].size + 2, _eps(view))  # the products, the offset and the factor
    source = bounds.at(mixing.source)
    low, high = _weighted(mixing, _widened(_with_zero(source) if mixing.uneven else source, part))
    ends = low * mixing.factor, high * mixing.factor
    offset = _widened(Range(mixing.offset, mixing.offset), part)
    return Range(np.minimum(*ends) + offset.low, np.maximum(*ends) + offset.high)


def _weighted(mixing: Mixing, inner: Range) -> Range:
    """Positive weights take the same end of the input, negative ones the other."""
    groups, outputs, inputs, taps = mixing.weight.shape
    low, high = np.full((groups, outputs), -np.inf), np.full((groups, outputs), np.inf)
    below, above = (np.repeat(end.reshape(groups, inputs), taps, axis=1) for end in inner)
    rows = _promising(mixing, np.isinf(inner.high))
    step = max(1, _BLOCK // max(1, groups * inputs * taps))
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        weight = mixing.weight[:, chosen].reshape(groups, len(chosen), inputs * taps)
        up, down = (half.astype(np.float64) for half in (np.maximum(weight, 0), np.minimum(weight, 0)))
        low[:, chosen] = _times(up, below) + _times(down, above)
        high[:, chosen] = _times(up, above) + _times(down, below)
    return Range(low.reshape(-1), high.reshape(-1))


def _times(weight: Floats, end: Floats) -> Floats:
    """Sums [group, output] of [group, output, n] times [group, n]; zero times infinity is zero.

    Weights are of one sign, as are infinite ends.
    """
    endless = np.isinf(end)
    lost = _summed(weight, np.where(endless, np.sign(end), 0.0))
    return np.where(lost == 0, _summed(weight, np.where(endless, 0.0, end)), np.sign(lost) * np.inf)


def _summed(weight: Floats, end: Floats) -> Floats:
    """A vector at a time: products of matrices start threads, which cost more than they gain here."""
    if not end.any():
        return np.zeros(weight.shape[:2])
    return (weight @ end[..., np.newaxis])[..., 0]


def _promising(mixing: Mixing, endless: Mask) -> Indices:
    """The outputs of a group that may have a bound: of inputs without an upper one all weights agree in sign.

    Most layers read what a Relu gives, and few of their filters are of one sign.
    """
    groups, outputs, inputs, _ = mixing.weight.shape
    open_ = endless.reshape(groups, inputs).all(0)
    if not open_.any():
        return np.arange(outputs)
    blocks = (block if open_.all() else block[:, :, open_] for block in mixing.blocks())
    mixed = [((block.min((2, 3)) < 0) & (block.max((2, 3)) > 0)).all(0) for block in blocks]
    return np.flatnonzero(~np.concatenate(mixed))


def _carried(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """Elements are moved, chosen or averaged: an index lies where all that flows into it does."""
    facts = [bounds.get(link.a) for link in links]
    if all(fact is None for fact in facts):
        return None
    if len(links) == 1 and links[0].source is None and links[0].target is None:
        return facts[0]
    size = size_of(slot)
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    for link, fact in zip(links, facts, strict=True):
        source = _anything(size_of(link.a)) if fact is None else fact
        target = np.arange(size) if link.target is None else link.target
        chosen = slice(None) if link.source is None else link.source
        np.minimum.at(low, target, source.low[chosen])
        np.maximum.at(high, target, source.high[chosen])
    reached = low <= high
    return Range(np.where(reached, low, -np.inf), np.where(reached, high, np.inf))


def _averaged(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """A mean lies between its terms, up to the rounding of their sum; counted padding brings in zero."""
    found = _carried(view, slot, links, bounds)
    if found is None:
        return None
    diluted = is_padded(view.node) or attribute(view.node, "ceil_mode", 0)
    return _widened(_with_zero(found) if diluted else found, _rounding(_pixels(view) + 1, _eps(view)))


def _pixels(view: NodeView) -> float:
    """How many numbers go into a mean, infinitely many where that is not known."""
    dims = view.dims()
    if view.node.op_type == "ReduceMean":
        given = view.ints("axes", 1)
        sizes = [dims[a] for a in given] if given else list(dims)
    else:
        sizes = list(attribute(view.node, "kernel_shape", dims[2:]))
    known = [d for d in sizes if isinstance(d, int)]
    return math.prod(known) if len(known) == len(sizes) else math.inf


def _resize(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """A linear interpolation lies between its terms; a cubic one overshoots."""
    if attribute(view.node, "mode", "nearest") == "cubic":
        return None
    found = _carried(view, slot, links, bounds)
    return None if found is None else _widened(found, 64 * _eps(view))  # two weights an axis, and their sums


def _pad(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """What is put around the slot is the filler; what is put around other axes joins every index."""
    found = _carried(view, slot, links, bounds)
    if attribute(view.node, "mode", "constant") != "constant":
        return found
    low, high = (end.copy() for end in (_anything(size_of(slot)) if found is None else found))
    number, (begins, ends) = filler(view), pad_widths(view)
    outside = np.ones(size_of(slot), np.bool_)
    outside[begins[slot.axis] : len(outside) - ends[slot.axis]] = False
    low[outside] = high[outside] = number
    if any(begins[i] or ends[i] for i in range(len(begins)) if i != slot.axis):
        low, high = np.minimum(low, number), np.maximum(high, number)
    return Range(low, high)


def filler(view: NodeView) -> float:
    """The number that a Pad puts around its input, NaN where it is computed."""
    if view.input(2) is None:
        return float(attribute(view.node, "value", 0.0))
    value = constant_of(view.input(2))
    return math.nan if value is None else float(value.ravel()[0])


def _batch_norm(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range:
    """An affine function, written in either of two ways, whose few roundings each term may take up."""
    scale, shift, mean, variance = (weight_of(view, i).astype(np.float64) for i in (1, 2, 3, 4))
    factor = scale / np.sqrt(variance + attribute(view.node, "epsilon", 1e-5))
    part = _rounding(8, _eps(view))
    x = _widened(bounds.at(Slot(view.data(), 1)), part)
    ends = product(factor, x.low), product(factor, x.high)
    terms = [_widened(Range(t, t), part) for t in (shift, -mean * factor)]
    return Range(
        np.minimum(*ends) + terms[0].low + terms[1].low, np.maximum(*ends) + terms[0].high + terms[1].high
    )


# Between these numbers and infinity a function only rises or only falls.
_TURNS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("Abs", "Celu", "Elu", "LeakyRelu", "PRelu", "Selu"), (0.0,)),
        "Gelu": (-0.7517915, -0.7524614),  # by erf, and by tanh
        "HardSwish": (-3.0, -1.5),
        "Mish": (-1.1924312,),
    }
)
_APPROXIMATED = op_types("Celu Elu Erf Gelu Log Mish Selu Sigmoid Softplus Softsign Tanh")  # of size one
_CROSSED = op_types("Div Mul PRelu Sub")  # the extremes may lie at any two ends of the operands
_LIMITING = op_types("Celu Clip Elu Max Min Selu")  # have bounds whatever they read
_COMPARING = op_types("Abs Clip Max Min Neg Relu")  # give one of their operands, up to its sign


def _computed(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """The extremes of a function that rises or falls in each operand, between its turning points.

    An end that has reached the end of the function's own range is there for good: it is not rounded away.
    """
    operator, own = view.node.op_type, _outright(slot.value)
    if operator not in _LIMITING and any(link.a.use is None and bounds.get(link.a) is None for link in links):
        return None
    part = 0.0 if operator in _COMPARING else _rounding(len(view.node.inputs) + 3, _eps(view))
    operands = [_widened(_operand(view, i, slot, bounds), part) for i in range(len(view.node.inputs))]
    found = [FUNCTIONS[operator](view.node, *corner) for corner in _corners(operator, operands)]
    low, high = (
        np.zeros(size_of(slot)) + end
        for end in (functools.reduce(np.minimum, found), functools.reduce(np.maximum, found))
    )
    rounded = _widened(Range(low, high), part)
    if operator in _APPROXIMATED:  # small numbers are differences of larger ones
        rounded = Range(rounded.low - part, rounded.high + part)
    return Range(np.where(low == own[1], low, rounded.low), np.where(high == own[0], high, rounded.high))


def _corners(operator: str, operands: Sequence[Range]) -> Iterator[tuple[Floats, ...]]:
    """The operands at which an operator may take its least or its greatest value."""
    first, *others = operands
    turns = (np.clip(turn, *first) for turn in _TURNS.get(operator, ()))
    if operator == "Div":
        others = [_without_zero(other) for other in others]
    if operator in _CROSSED or not others:
        return itertools.product((*first, *turns), *others)
    return zip(*operands, strict=True)


def _without_zero(divisor: Range) -> Range:
    crossing = (divisor.low <= 0) & (divisor.high >= 0)
    return Range(*(np.where(crossing, np.nan, end) for end in divisor))


def _operand(view: NodeView, index: int, slot: Slot, bounds: Bounds) -> Range:
    """The range of an input along an axis of the output: [size], or [1] where it lacks the axis."""
    value = view.input(index)
    if value is None:
        return Range(np.full(1, np.nan), np.full(1, np.nan))
    dims = view.dims(index)
    axis = slot.axis - len(dims_of(slot.value)) + len(dims)
    if axis >= 0 and dims[axis] != 1:
        return bounds.at(view.slot(index, axis))
    whole = bounds.constant(value, None)
    return Range(*(np.full(1, end) for end in _outright(value))) if whole is None else whole


def _chosen(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range:
    """One or the other, whatever the condition."""
    a, b = (_operand(view, i, slot, bounds) for i in (1, 2))
    ends = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    return Range(*(np.broadcast_to(end, size_of(slot)) for end in ends))


def _cast(view: NodeView, slot: Slot, links: Sequence[Link], bounds: Bounds) -> Range | None:
    """From a wider type rounded, from integers exact."""
    found = bounds.get(links[0].a)
    return None if found is None else _widened(found, _eps(view))


_MOVING = op_types(
    "Concat DepthToSpace Dropout Expand Flatten Gather Identity MaxPool GlobalMaxPool ReduceMax ReduceMin "
    "Reshape Slice SpaceToDepth Split Squeeze Transpose Unsqueeze"
)
_COMPUTING = op_types(
    "Abs Add Celu Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Max Mean Min Mish Mul Neg "
    "PRelu Relu Selu Sigmoid Softplus Softsign Sqrt Sub Sum Tanh"
)

RANGES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(_MOVING, _carried),
        **dict.fromkeys(_COMPUTING, _computed),
        **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), _averaged),
        **dict.fromkeys(("Resize", "Upsample"), _resize),
        **dict.fromkeys(MIXERS, _mixed),
        "BatchNormalization": _batch_norm,
        "Cast": _cast,
        "Pad": _pad,
        "Where": _chosen,
    }
)
"""Operators of the default domain, by type. The output of any other is known as far as `_OWN` says."""
