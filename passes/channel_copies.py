"""Which channels are copies or multiples of others on every input: value numbering, channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.channel_bounds import FORMATS, filler, incoming
from edgewise.passes.channel_links import Array, Indices, Link, NodeView, Slot, dims_of, op_types, size_of
from edgewise.passes.channel_mixing import Mixing, mixings, weight_of
from edgewise.passes.channel_rules import BROADCAST, MIXERS, POOLS, REDUCTIONS, UNARY
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import attribute

Factors = npt.NDArray[np.float64]

_FOLLOWED = (*FORMATS, ir.DataType.BOOL)
_FEW = 4  # of the inputs and taps of a row: so many are looked at first
# Odd numbers far apart: sums of their multiples seldom collide, and where they do it costs time only.
_ODD = (np.arange(1, 2 * (_FEW**2 + 3), 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


@dataclass(frozen=True, eq=False)
class Alike:
    """Index k of a slot holds `factors[k] / factors[like[k]]` times what index `like[k]` holds, on any input.

    `like[k]` is the first index of which that is known, k itself if there is no other. Factors are powers of
    two and their negatives. Multiplying by them rounds nothing, so the bits of two weights tell for sure that
    what is computed with them is a multiple. Other multiples are so only nearly.
    """

    like: Indices
    factors: Factors

    @classmethod
    def nothing(cls, size: int) -> Alike:
        """No index is like another."""
        return cls(np.arange(size), np.ones(size))


@dataclass(frozen=True, eq=False)
class Copies:
    """What is alike in the slots of a graph, and the layers that it follows from.

    A slot of which no index is like another is not in `known`.
    """

    layers: Mapping[Slot, Mixing]
    known: dict[Slot, Alike] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ChannelGraph) -> Copies:
        """Follow what is alike through the graph once, from front to back."""
        copies = cls(mixings(graph))
        with np.errstate(all="ignore"):
            for node, coupling in graph.couplings.items():
                rule = RULES.get(node.op_type)
                if rule is None or node.outputs[0].dtype not in _FOLLOWED:
                    continue
                for slot, links in incoming(node, coupling).items():
                    found = rule(NodeView(node, graph.opset), slot, links, copies)
                    if found is not None and (found.like != np.arange(len(found.like))).any():
                        copies.known[slot] = found
        return copies


Rule = Callable[[NodeView, Slot, Sequence[Link], Copies], Alike | None]
"""What is alike in one output slot of a node, given the links that lead to it; None for nothing."""


def numbered(table: Array) -> Indices:
    """For each row of `table` the first row that has the same bytes."""
    rows = np.ascontiguousarray(table)
    whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first[inverse]


def ranks(numbers: Indices) -> Indices:
    """How often each entry has come before."""
    order = np.argsort(numbers, kind="stable")
    ascending = numbers[order]
    found = np.empty_like(order)
    found[order] = np.arange(len(order)) - np.searchsorted(ascending, ascending)
    return found


def _normal(rows: Factors, marks: Indices) -> tuple[Array, Factors]:
    """The bits of rows divided by their factors, with their marks; a row of zeros has the factor zero.

    Rows with numbers that are not finite, which stand for what is not known too, are like no other.
    """
    every, size = np.arange(len(rows)), np.abs(rows).max(1)
    first = rows[every, (rows != 0).argmax(1)]
    finite = np.isfinite(size)
    factors = np.where(finite, np.sign(first) * np.ldexp(1.0, np.frexp(size)[1]), 1.0)
    normal = rows / np.where(factors == 0, 1.0, factors)[:, np.newaxis] + 0.0
    own = np.where(finite, -1, every)
    return np.column_stack([marks, own, normal.view(np.int64)]), factors


def _multiples(rows: Factors, marks: Indices) -> Alike:
    """Rows of the same mark that are equal but for a factor."""
    table, factors = _normal(rows, marks)
    return Alike(numbered(table), factors)


def _repeated(table: Array) -> Indices:
    """The rows that may have an equal."""
    codes = table @ _ODD[: table.shape[1]]
    ordered = np.sort(codes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(codes, twice)) if len(twice) else np.empty(0, np.int64)


def _mixed(view: NodeView, slot: Slot, links: Sequence[Link], copies: Copies) -> Alike | None:
    """Rows that are alike, weights and offset, of groups that read the same.

    Weights may be many, and rows that are alike are few: so all rows are compared by a few weights, and
    as a whole only those that these do not tell apart.
    """
    layer = copies.layers.get(slot)
    if layer is None:  # a product is linear in each of its factors, but not in both
        return _moved(view, slot, links, copies) if len(links) == 1 else None
    groups, outputs = layer.weight.shape[:2]
    read = _groups(copies.known.get(layer.source), groups)
    marks, factors = np.repeat(read.like, outputs), np.repeat(read.factors, outputs)
    offset = layer.offset / factors
    few = layer.weight[:, :, :_FEW, :_FEW].reshape(len(marks), -1).astype(np.float64)
    close = _repeated(_normal(np.column_stack([few, offset]), marks)[0])
    if not len(close):
        return None
    whole = layer.weight[close // outputs, close % outputs].reshape(len(close), -1).astype(np.float64)
    found = _multiples(np.column_stack([whole, offset[close]]), marks[close])
    like = np.arange(len(marks))
    like[close] = close[found.like]
    factors[close] *= found.factors
    return Alike(like, np.where(factors == 0, 1.0, factors))


def _groups(read: Alike | None, groups: int) -> Alike:
    """Which groups of a layer read the same, but for a factor."""
    if read is None or groups == 1:
        return Alike.nothing(groups)
    return _combined(read.like.reshape(groups, -1).T, read.factors.reshape(groups, -1).T, _linear)


Scaling = Callable[[Factors], tuple[Factors, Factors]]
"""(factor of the result, factors that are left), given the factors of all arguments, [argument, index]."""


def _combined(like: Indices, factors: Factors, scaling: Scaling) -> Alike:
    """What one operation makes of its arguments, [argument, index], at every index."""
    common, left = scaling(factors)
    table = np.column_stack([like.T, (left.T + 0.0).view(np.int64)])
    return Alike(numbered(table), np.where(common == 0, 1.0, common))


def _unscaled(factors: Factors) -> tuple[Factors, Factors]:
    """Any function: of equal arguments it is equal."""
    return np.ones(factors.shape[1]), factors


def _linear(factors: Factors) -> tuple[Factors, Factors]:
    """f(c x, c y) = c f(x, y)."""
    common = np.where(factors[0] == 0, 1.0, factors[0])
    return common, factors / common


def _positive(factors: Factors) -> tuple[Factors, Factors]:
    """f(c x, c y) = c f(x, y) for positive c."""
    common = np.where(factors[0] == 0, 1.0, np.abs(factors[0]))
    return common, factors / common


def _odd(factors: Factors) -> tuple[Factors, Factors]:
    """f(-x) = -f(x)."""
    common = np.where(factors[0] < 0, -1.0, 1.0)
    return common, factors / common


def _norm(factors: Factors) -> tuple[Factors, Factors]:
    """f(c x) = |c| f(x)."""
    return np.abs(factors[0]), 0 * factors


def _product(factors: Factors) -> tuple[Factors, Factors]:
    """f(c x, d y) = c d f(x, y)."""
    return factors.prod(0), 0 * factors


def _quotient(factors: Factors) -> tuple[Factors, Factors]:
    """f(c x, d y) = c / d f(x, y)."""
    return (factors[0] / factors[1], 0 * factors) if factors[1].all() else _unscaled(factors)


def _slope(factors: Factors) -> tuple[Factors, Factors]:
    """f(c x, y) = c f(x, y) for positive c."""
    common, _ = _positive(factors)
    return common, np.stack([factors[0] / common, factors[1]])


_LINEAR = op_types(
    "Add AveragePool Concat DepthToSpace Dropout Expand Flatten Gather GlobalAveragePool Identity MatMul "
    "Mean Neg Pad ReduceMean ReduceSum Reshape Resize Slice SpaceToDepth Split Squeeze Sub Sum Transpose "
    "Unsqueeze Upsample"
)
_POSITIVE = op_types("GlobalMaxPool LeakyRelu Max MaxPool Min ReduceMax ReduceMin Relu")

_SCALINGS: Mapping[str, Scaling] = MappingProxyType(
    {
        **dict.fromkeys(_LINEAR, _linear),
        **dict.fromkeys(_POSITIVE, _positive),
        **dict.fromkeys(op_types("Erf Softsign Tanh"), _odd),
        **dict.fromkeys(op_types("Abs GlobalLpPool LpPool ReduceL1 ReduceL2"), _norm),
        "Div": _quotient,
        "Mul": _product,
        "PRelu": _slope,
    }
)
"""How factors pass through an operator; `_unscaled` where nothing is said."""


def _scaling(view: NodeView) -> Scaling:
    constant = view.node.op_type == "Pad" and attribute(view.node, "mode", "constant") == "constant"
    if constant and filler(view) != 0:
        return _unscaled
    return _SCALINGS.get(view.node.op_type, _unscaled)


def _computed(view: NodeView, slot: Slot, links: Sequence[Link], copies: Copies) -> Alike | None:
    """An elementwise operator on operands that are alike."""
    if any(link.a.use is None and link.a not in copies.known for link in links):
        return None
    present = [i for i, value in enumerate(view.node.inputs) if value is not None]
    operands = [_operand(view, index, slot, copies) for index in present]
    like, factors = np.stack([o.like for o in operands]), np.stack([o.factors for o in operands])
    return _combined(like, factors, _scaling(view))


def _operand(view: NodeView, index: int, slot: Slot, copies: Copies) -> Alike:
    """What is alike in an input along an axis of the output: everything where it lacks the axis."""
    dims, size = view.dims(index), size_of(slot)
    axis = slot.axis - len(dims_of(slot.value)) + len(dims)
    if axis < 0 or dims[axis] == 1:
        return Alike(np.zeros(size, np.int64), np.ones(size))
    own = view.slot(index, axis)
    if own.use is None:
        return copies.known[own]
    rows = np.moveaxis(weight_of(view, index), axis, 0).reshape(size, -1).astype(np.float64)
    return _multiples(rows, np.zeros(size, np.int64)) if rows.size else Alike.nothing(size)


def _moved(view: NodeView, slot: Slot, links: Sequence[Link], copies: Copies) -> Alike | None:
    """An index is made of what leads to it, in order; of one that leads to several each is another part."""
    sources = dict.fromkeys(link.a for link in links)
    if len(sources) == len(links) and copies.known.keys().isdisjoint(sources):
        return None
    size, start, starts = size_of(slot), 0, {}
    for source in sources:
        starts[source], start = start, start + size_of(source)
    parts = [_part(link, starts[link.a], size, copies) for link in links]
    targets, codes, given = (np.concatenate(column) for column in zip(*parts, strict=True))
    place = ranks(targets)
    like = np.full((place.max(initial=0) + 1, size), -1)
    factors = np.zeros(like.shape)
    like[place, targets], factors[place, targets] = codes, given
    return _combined(like, factors, _scaling(view))


def _part(link: Link, start: int, size: int, copies: Copies) -> tuple[Indices, Indices, Factors]:
    """Where a link leads to, and what it brings there: a number for it, and its factor."""
    own = copies.known.get(link.a) or Alike.nothing(size_of(link.a))
    source = np.arange(len(own.like)) if link.source is None else link.source
    target = np.arange(size) if link.target is None else link.target
    return target, (start + own.like[source]) * size + ranks(source), own.factors[source]


def _batch_norm(view: NodeView, slot: Slot, links: Sequence[Link], copies: Copies) -> Alike | None:
    read = copies.known.get(Slot(view.data(), 1))
    if read is None:
        return None
    scale, shift, mean, variance = (weight_of(view, i).astype(np.float64) for i in (1, 2, 3, 4))
    gain = scale / np.sqrt(variance + attribute(view.node, "epsilon", 1e-5))
    return _affine(read, gain, shift - mean * gain)


def _instance_norm(view: NodeView, slot: Slot, links: Sequence[Link], copies: Copies) -> Alike | None:
    """What is added to the variance stays, so that only signs pass."""
    read = copies.known.get(Slot(view.data(), 1))
    if read is None:
        return None
    scale, shift = (weight_of(view, i).astype(np.float64) for i in (1, 2))
    return _affine(_combined(read.like[np.newaxis], read.factors[np.newaxis], _odd), scale, shift)


def _affine(read: Alike, gain: Factors, offset: Factors) -> Alike:
    """A gain and an offset for every index."""
    rows = _multiples(np.column_stack([gain, offset / read.factors]), read.like)
    factors = rows.factors * read.factors
    return Alike(rows.like, np.where(factors == 0, 1.0, factors))


_MOVERS = op_types(
    "Concat DepthToSpace Dropout Expand Flatten Gather Hardmax LayerNormalization LogSoftmax Pad Reshape "
    "Resize Slice Softmax SpaceToDepth Split Squeeze Transpose Unsqueeze Upsample"
)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys((*UNARY, *BROADCAST), _computed),
        **dict.fromkeys((*_MOVERS, *POOLS, *REDUCTIONS), _moved),
        **dict.fromkeys(MIXERS, _mixed),
        "BatchNormalization": _batch_norm,
        "InstanceNormalization": _instance_norm,
    }
)
"""Operators of the default domain, by type. What comes out of any other is not known to be alike."""
