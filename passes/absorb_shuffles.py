"""A constant order of channels that the weights around it can have instead."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.channel_links import Dim, dims_of
from edgewise.passes.channel_rules import BROADCAST, POOLS, REDUCTIONS, UNARY
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    only_user,
    replace,
)
from edgewise.passes.linear import rank_of, set_constant

_SMALL = 1024  # bytes: a weight that others read too may be written twice


@dataclass(frozen=True)
class AbsorbShuffles(Rule):
    """Write the weights around a shuffle of channels in the order that makes it superfluous.

    Given:   y = Transpose of two parts of the channels, between two Reshapes: a shuffle;
             or Gather(x, k) along the channels, with constant k that names each of them once
             so that  y[c] = x[k[c]]
    Result:  x in place of y; weights w[.., c] of the readers of y become v with v[.., k[c]] = w[.., c]
             or else the readers as they are, and the layers that make x give its channel k[c] as the c-th
    The order is carried through elementwise functions, pooling, reductions of other axes, normalization,
    convolutions of single channels and Flatten, forwards and backwards, until dense layers (Conv of one
    group, Gemm, MatMul) have taken it up everywhere. Where anything is left that sees the order, such as
    a convolution of several groups, Concat, Split or an output, the order has to be made:
    Result:  y = Gather(x, k), which copies a channel at a time; Transpose copies numbers. Measured on one
             core it takes 0.55 to 0.8 of the time of the three, in float and in uint8. Where a channel is a
             single number it takes longer, and the shuffle stays as it is.
    """

    name = "absorb-shuffles"
    op_types = ("Reshape", "Gather")  # what a shuffle ends with

    def rewrite(self, node: ir.Node) -> bool:
        found = _shuffle(node)
        if found is None:
            return False
        source, first, index = found
        result = node.outputs[0]
        try:
            spread = _Spread.over(result, index, source, node)
        except Refused as refusal:
            try:
                spread = _Spread.over(source, np.argsort(index), result, first)
            except Refused:
                if node.op_type == "Reshape" and _is_private(node) and _is_wide(source):
                    return _gather(node, source, index)
                raise refusal from None
        for edit in spread.edits.values():
            edit()
        replace(result, source)
        return True


def _is_private(node: ir.Node) -> bool:
    """Whether nothing but `node` reads what the shuffle that ends with it computes on the way."""
    turned = node.inputs[0]
    parts = None if turned is None or (turn := turned.producer()) is None else turn.inputs[0]
    return all(value is not None and only_user(value) is not None for value in (turned, parts))


def _is_wide(value: ir.Value) -> bool:
    """Whether a channel is more than one number."""
    return any(dim != 1 for dim in dims_of(value)[2:])


def _gather(node: ir.Node, source: ir.Value, index: Array) -> bool:
    """Write a shuffle as the one node that does it."""
    result = node.outputs[0]
    channels = new_initializer(graph_of(node), f"{result.name}.channels", index)
    gathered = new_node(node, "Gather", [source, channels], {"axis": 1})
    gathered.shape, gathered.type = result.shape, result.type or source.type
    replace(result, gathered)
    return True


def _shuffle(node: ir.Node) -> tuple[ir.Value, ir.Node, Array] | None:
    """What a shuffle that ends with `node` reads, its first node, and which channel each of its own is."""
    source, result = node.inputs[0], node.outputs[0]
    if node.op_type == "Gather":
        index = _permutation(node)
        return None if source is None or index is None else (source, node, index)
    turn = None if source is None else source.producer()
    split = None if turn is None or turn.op_type != "Transpose" else _producer(turn)
    if turn is None or split is None or split.op_type != "Reshape":
        return None
    origin, parts, perm = split.inputs[0], split.outputs[0], attribute(turn, "perm")
    if origin is None or any(v.shape is None for v in (origin, parts, result)) or perm is None:
        return None
    before, between, after = dims_of(origin), dims_of(parts), dims_of(result)
    if len(between) < 3 or tuple(perm) != (0, 2, 1, *range(3, len(between))):
        return None
    groups, size = between[1], between[2]
    if not isinstance(groups, int) or not isinstance(size, int) or len(before) < 2:
        return None
    merged = (between[0], groups * size, *between[3:])
    if before[1] != groups * size or not (_are_same(before, merged) and _are_same(before, after)):
        return None
    return origin, split, np.arange(groups * size).reshape(groups, size).T.ravel()


def _producer(node: ir.Node) -> ir.Node | None:
    return None if node.inputs[0] is None else node.inputs[0].producer()


def _are_same(first: tuple[Dim, ...], second: tuple[Dim, ...]) -> bool:
    """Whether two shapes of as many elements are the same: then one pair of dimensions may be unknown."""
    if len(first) != len(second):
        return False
    pairs = list(zip(first, second, strict=True))
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        return False
    return sum(a is None or a != b for a, b in pairs) <= 1


def _permutation(node: ir.Node) -> Array | None:
    """The order of channels that a Gather gives, None where it gives anything else."""
    source, index = node.inputs[0], constant_of(node.inputs[1])
    if source is None or source.shape is None or index is None or index.ndim != 1:
        return None
    dims = dims_of(source)
    if len(dims) < 2 or attribute(node, "axis", 0) % len(dims) != 1 or dims[1] != index.size:
        return None
    channels = index % index.size if index.size else index
    same = np.array_equal(np.sort(channels), np.arange(index.size))
    return channels if same and not np.array_equal(channels, np.arange(index.size)) else None


Edit = Callable[[], None]
_READ, _GIVEN = 0, -1  # the operand of a node through which the order reaches it


@dataclass(frozen=True, eq=False)
class _Spread:
    """Values whose channels are in another order, v[c] = v'[orders[v][c]], and the edits that make it so."""

    graph: ir.Graph
    orders: dict[ir.Value, Array]
    edits: dict[tuple[ir.Node, int], Edit] = field(default_factory=dict)
    waiting: deque[ir.Value] = field(default_factory=deque)

    @classmethod
    def over(cls, seed: ir.Value, order: Array, fixed: ir.Value, shuffle: ir.Node) -> _Spread:
        """Carry `order` from `seed` to everything that sees it but `shuffle`; `fixed` stays as it is."""
        spread = cls(graph_of(shuffle), {fixed: np.arange(order.size)})
        spread.want(seed, order)
        while spread.waiting:
            spread._visit(spread.waiting.popleft(), shuffle)
        return spread

    def want(self, value: ir.Value | None, order: Array) -> None:
        """Let `value` have its channels in `order`."""
        if value is None or value.is_graph_output():
            raise Refused("an output of the graph sees the order of the channels")
        if value not in self.orders:
            self.orders[value] = order
            self.waiting.append(value)
        elif not np.array_equal(self.orders[value], order):
            raise Refused("a value would need two orders of its channels")

    def want_all(self, node: ir.Node, order: Array) -> None:
        """Carry `order` through a node from its data to its only result."""
        if any(v.name and (v.uses() or v.is_graph_output()) for v in node.outputs[1:]):
            raise Refused(f"another result of {node.op_type} is read")
        self.want(node.inputs[0], order)
        self.want(node.outputs[0], order)

    def _visit(self, value: ir.Value, shuffle: ir.Node) -> None:
        producer = value.producer()
        if producer is None:
            raise Refused("an input of the graph sees the order of the channels")
        places = [(producer, _GIVEN), *((use.node, use.idx) for use in value.uses())]
        for node, place in places:
            if node is shuffle:
                continue
            rule = _RULES.get(node.op_type) if node.domain == "" else None
            if node.graph is not self.graph or rule is None:
                raise Refused(f"{node.op_type} sees the order of the channels")
            rule(self, node, place, self.orders[value])

    def permute(self, node: ir.Node, inputs: Mapping[int, int], order: Array, place: int = _READ) -> None:
        """Put axes of constants of `node` in `order`: those at the keys, along the axes at the values."""
        for index, axis in inputs.items():
            value = node.inputs[index] if index < len(node.inputs) else None
            array = constant_of(value)
            if value is None:
                continue
            if array is None or array.shape[axis] != order.size:
                raise Refused(f"a weight of {node.op_type} is not constant, or of another size")
            if array.nbytes > _SMALL and only_user(value) is not node:
                raise Refused("a weight is shared")
        self.edits[node, place] = lambda: _permute(node, inputs, order)


def _permute(node: ir.Node, inputs: Mapping[int, int], order: Array) -> None:
    for index, axis in inputs.items():
        array = constant_of(node.inputs[index]) if index < len(node.inputs) else None
        if array is not None:
            set_constant(node, index, array.take(np.argsort(order), axis), "shuffled")


def _check_data(node: ir.Node, place: int) -> None:
    if place > _READ:
        raise Refused(f"{node.op_type} sees the order of the channels")


def _alike(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    _check_data(node, place)
    spread.want_all(node, order)


def _quantize(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    scale = node.inputs[1]
    if scale is None or math.prod(d if isinstance(d, int) else 0 for d in dims_of(scale)) != 1:
        raise Refused(f"{node.op_type} has a scale for each channel")
    _alike(spread, node, place, order)


def _broadcast(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    operands = [(i, dims_of(v)) for i, v in enumerate(node.inputs) if v is not None]
    rank = max(len(dims) for _, dims in operands)
    constants: dict[int, int] = {}
    for index, dims in operands:
        axis = 1 - rank + len(dims)
        if axis < 0 or dims[axis] == 1:
            continue
        if constant_of(node.inputs[index]) is not None:
            constants[index] = axis
        elif axis == 1 and dims[axis] == order.size:
            spread.want(node.inputs[index], order)
        else:
            raise Refused(f"{node.op_type} has operands of unknown or different channels")
    spread.want(node.outputs[0], order)
    spread.permute(node, constants, order)


def _reduce(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
    rank = rank_of(node.inputs[0])
    if axes is None or rank is None or any(axis % rank < 2 for axis in axes):
        raise Refused(f"{node.op_type} sees the order of the channels")
    _alike(spread, node, place, order)


def _flatten(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    """[N, C, 1, 1] or [N, C, H, W] as [N, features]; a Reshape or Squeeze may do the same."""
    _check_data(node, place)
    source, result = node.inputs[0], node.outputs[0]
    if source is None:
        return
    before, after = dims_of(source), dims_of(result)
    rest = math.prod(d if isinstance(d, int) else 0 for d in before[2:])
    channels = order.size // (1 if place == _READ else max(rest, 1))
    if not rest or before[1] != channels or after[1:] != (channels * rest,):
        raise Refused(f"{node.op_type} sees the order of the channels")
    base = order if place == _READ else order[::rest] // rest
    features = (base[:, np.newaxis] * rest + np.arange(rest)).ravel()
    if place == _GIVEN and not np.array_equal(features, order):
        raise Refused("features of one channel would part")
    spread.want(source, base)
    spread.want(result, features)


def _convolution(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    _check_data(node, place)
    weight, groups = constant_of(node.inputs[1]), int(attribute(node, "group", 1))
    if weight is None:
        raise Refused("a weight of Conv is not constant, or of another size")
    if groups == 1:
        spread.permute(node, {1: 1} if place == _READ else {1: 0, 2: 0}, order, place)
    elif groups == weight.shape[0] == order.size and weight.shape[1] == 1:
        spread.want_all(node, order)
        spread.permute(node, {1: 0, 2: 0}, order)
    else:
        raise Refused("a convolution of several groups sees the order of the channels")


def _product(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    """Gemm, and MatMul, of [N, channels] and a constant matrix."""
    _check_data(node, place)
    weight, bias = constant_of(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.ndim != 2 or rank_of(node.inputs[0]) != 2 or attribute(node, "transA", 0):
        raise Refused(f"{node.op_type} sees the order of the channels")
    inputs_axis = int(attribute(node, "transB", 0))
    if place == _READ:
        spread.permute(node, {1: inputs_axis}, order, place)
        return
    axes = {1: 1 - inputs_axis}
    if bias is not None and dims_of(bias)[-1:] == (order.size,):
        axes[2] = len(dims_of(bias)) - 1
    elif bias is not None and dims_of(bias)[-1:] not in ((), (1,)):
        raise Refused(f"{node.op_type} sees the order of the channels")
    spread.permute(node, axes, order, place)


def _norm(spread: _Spread, node: ir.Node, place: int, order: Array) -> None:
    _alike(spread, node, place, order)
    spread.permute(node, dict.fromkeys(range(1, 5), 0), order)


_RULES: Mapping[str, Callable[[_Spread, ir.Node, int, Array], None]] = MappingProxyType(
    {
        **dict.fromkeys((*UNARY, *POOLS), _alike),
        **dict.fromkeys(BROADCAST, _broadcast),
        **dict.fromkeys(REDUCTIONS, _reduce),
        **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
        **dict.fromkeys(("Flatten", "Reshape", "Squeeze"), _flatten),
        **dict.fromkeys(("Gemm", "MatMul"), _product),
        "Conv": _convolution,
        "BatchNormalization": _norm,
    }
)
