"""Transposes that the operators between them can do without."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass
from edgewise.passes.channel_links import is_constant
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    only_user,
    opset,
    remove_if_unused,
    replace,
    unique_name,
)
from edgewise.passes.layout_sinks import producer_sink, reader_sink
from edgewise.passes.layouts import Edit, Order, Relayout, Use, identity, inverse, ordered, relayout
from edgewise.passes.linear import rank_of, set_constant

_OLDEST = 13  # from here on axes are inputs, and Softmax is along one of them
_OPEN = 64  # what a dimension of unknown size counts as
_SMALL = 1024  # bytes: a constant that others read too may be written twice
_NO_GAIN = "the operators around the Transpose would need as many at their other ends"


@dataclass(frozen=True)
class PushTransposes(Pass):
    """Let operators that can work on any order of axes work on the order that needs the fewest Transposes.

    Given:   y = Transpose(f(Transpose(x, p)), q)        with q the inverse of p
    Result:  y = f'(x)                                   f' is f with its axes and constants in the order of x

    From a Transpose on, a region grows: values in the other order, and the operators between them. It goes
    on through whatever works along named axes (elementwise functions, broadcasting, Concat, Split, Slice,
    Pad, Gather, reductions, ArgMax, Softmax, Squeeze, Unsqueeze, quantization) and through what leaves the
    last axis alone (MatMul with a matrix, LayerNormalization), downwards and upwards. At its border,
             a Transpose into the region goes, if it is of the order that the region drops
             a Transpose out of it goes, if it is the inverse of that
             a product of matrices reads its operand transposed, by transA or transB
             a layer behind a Reshape or Flatten, or in front of a Reshape, takes the order into its weights
             everything else needs a Transpose
    All of the region changes its order, or nothing: it does if there are fewer elements to transpose
    afterwards, in no more Transposes. So each change brings the end nearer, and none is undone by another.
    Dimensions need not be known, ranks have to be. Convolution, pooling and Resize are bound to their
    order, and so is what runs along the last axis: there kernels are fast, and norms are recognised.
    """

    name = "push-transposes"

    def apply(self, model: ir.Model) -> Outcome:
        if opset(model) < _OLDEST:
            found = any(n.op_type == "Transpose" for n in model.graph.all_nodes())
            reason = f"opset below {_OLDEST}: upgrade it first"
            return Outcome(0, MappingProxyType({reason: 1} if found else {}))
        edits = 0
        while True:
            refused = Counter[str]()
            done = sum(_sweep(graph, refused) for graph in list(model.graphs()))
            edits += done
            if not done:
                return Outcome(edits, MappingProxyType(dict(refused)))


def _sweep(graph: ir.Graph, refused: Counter[str]) -> int:
    """Change the order of every region around a Transpose of `graph` that is better off; how many."""
    done, seen = 0, set[tuple[ir.Value, Order]]()
    for node in [n for n in graph if _is_transpose(n)]:
        for seed, order in _seeds(node):
            if (seed, order) in seen:
                continue
            region = _grow(graph, seed, order)
            crossings = [_crossing(region, v) for v, o in region.orders.items() if _moves(o)]
            if _pays(crossings):
                _change(region, crossings)
                done += 1
                seen.clear()
                break
            seen.update(region.orders.items())
            if region.inside:
                refused[_NO_GAIN] += 1
    return done


def _pays(crossings: Sequence[_Crossing]) -> bool:
    """Whether there are fewer elements to transpose afterwards, in no more Transposes."""
    number = sum(c.saved for c in crossings)
    are_sizes_known = all(c.value.shape is not None for c in crossings if c.saved)
    is_split = any(c.source is not None and c.restored for c in crossings)
    fewer_elements = sum(c.saved * c.size for c in crossings) > 0
    return fewer_elements and (number > 0 or (number == 0 and are_sizes_known and not is_split))


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.domain == ""


def _perm(node: ir.Node) -> Order | None:
    """Where a Transpose takes each axis from; None where that depends on a rank that is not known."""
    written, rank = attribute(node, "perm"), rank_of(node.inputs[0])
    if written is not None:
        return tuple(written)
    return None if rank is None else tuple(reversed(range(rank)))


def _moves(order: Order) -> bool:
    return order != identity(len(order))


def _seeds(node: ir.Node) -> Iterator[tuple[ir.Value, Order]]:
    """The result of a Transpose in the order of its source, and the source in the order of the result."""
    perm, source = _perm(node), node.inputs[0]
    if node.graph is None or perm is None or source is None or not _moves(perm):
        return
    yield node.outputs[0], perm
    if not is_constant(source):
        yield source, inverse(perm)


@dataclass(frozen=True, eq=False)
class _Region:
    """Values of a graph in another order of axes, and the nodes that then work on it.

    A value whose order is the identity stays as it is: a node of the region wants it so.
    """

    graph: ir.Graph
    orders: Mapping[ir.Value, Order]
    inside: Mapping[ir.Node, Relayout]

    def holds(self, use: Use) -> bool:
        """Whether a node of the region reads its operand in another order."""
        node, index = use
        return node in self.inside and index in self.inside[node].inputs

    def moves(self, value: ir.Value | None) -> bool:
        return value is not None and value in self.orders and _moves(self.orders[value])


def _grow(graph: ir.Graph, seed: ir.Value, order: Order) -> _Region:
    orders: dict[ir.Value, Order] = {seed: order}
    inside: dict[ir.Node, Relayout] = {}
    waiting = deque([seed])
    while waiting:
        value = waiting.popleft()
        for node in _neighbours(graph, value):
            changed = None if node in inside else relayout(node, value, orders[value])
            wanted = None if changed is None else _wanted(node, changed)
            if changed is None or wanted is None or any(orders.get(v, o) != o for v, o in wanted.items()):
                continue
            inside[node] = changed
            waiting += [v for v, o in wanted.items() if v not in orders and _moves(o)]
            orders.update(wanted)
    return _Region(graph, orders, inside)


def _neighbours(graph: ir.Graph, value: ir.Value) -> list[ir.Node]:
    """The nodes of `graph` that give or read `value`."""
    nodes = dict.fromkeys([value.producer(), *(user for user, _ in value.uses())])
    return [n for n in nodes if n is not None and n.graph is graph]


def _wanted(node: ir.Node, changed: Relayout) -> dict[ir.Value, Order] | None:
    """The orders of what `node` reads and gives; None where one value would need two, or be copied."""
    wanted: dict[ir.Value, Order] = {}
    pairs = [(node.inputs[index], order) for index, order in changed.inputs.items()]
    for value, order in [*pairs, *((v, changed.outputs) for v in node.outputs if v.name)]:
        if value is None:
            continue
        if is_constant(value):
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _SMALL and only_user(value) is not node:
                return None
        elif wanted.setdefault(value, order) != order:
            return None
    return wanted


@dataclass(frozen=True, eq=False)
class _Crossing:
    """A value of a region, and what is at the region's border there."""

    value: ir.Value
    order: Order
    own: bool
    """Whether the node that gives it can give it in the new order."""
    edit: Edit | None
    """What makes it do so, where the node is not in the region."""
    source: ir.Node | None
    """The Transpose that gives it."""
    cancelled: tuple[ir.Node, ...]
    """Transposes of it whose results are the value in the new order."""
    turned: tuple[tuple[ir.Node, Order], ...]
    """The other Transposes of it, and what they become."""
    sinks: tuple[Callable[[ir.Value], None], ...]
    """Readers that can read it in the new order."""
    others: tuple[Use, ...]

    @property
    def restored(self) -> bool:
        """Whether something needs the value as it was."""
        return bool(self.others) or self.value.is_graph_output()

    @property
    def saved(self) -> int:
        """How many Transposes fewer there would be."""
        if self.own:
            return len(self.cancelled) - self.restored
        if self.source is None:
            return len(self.cancelled) - 1
        return len(self.cancelled) + (_perm(self.source) == self.order) - self.restored

    @property
    def size(self) -> int:
        """The number of elements, as far as it is known."""
        dims = [None] * len(self.order) if self.value.shape is None else list(self.value.shape)
        return math.prod(max(d, 1) if isinstance(d, int) and d >= 0 else _OPEN for d in dims)


def _crossing(region: _Region, value: ir.Value) -> _Crossing:
    order, producer = region.orders[value], value.producer()
    inside = producer in region.inside
    near = producer is not None and producer.graph is region.graph
    edit = producer_sink(value, order, region.orders) if near and not inside else None
    own = inside or edit is not None
    source = producer if near and producer is not None and _is_source(region, producer) else None
    cancelled: list[ir.Node] = []
    turned: list[tuple[ir.Node, Order]] = []
    sinks: list[Callable[[ir.Value], None]] = []
    others: list[Use] = []
    for use in value.uses():
        if region.holds(use):
            continue
        turn = _turn(region, use, order)
        node = use[0]
        sink = reader_sink(use, order, region.orders) if node.graph is region.graph else None
        if turn is None and sink is None:
            others.append(use)
        elif turn is None:
            sinks += [] if sink is None else [sink]
        elif not _moves(turn) and _may_go(node, cancelled, own=own):
            cancelled.append(node)
        else:
            turned.append((node, turn))
    return _Crossing(
        value, order, own, edit, source, tuple(cancelled), tuple(turned), tuple(sinks), tuple(others)
    )


def _is_source(region: _Region, node: ir.Node) -> bool:
    return _is_transpose(node) and _perm(node) is not None and not region.moves(node.inputs[0])


def _turn(region: _Region, use: Use, order: Order) -> Order | None:
    """What a Transpose that reads a value becomes where the value is in `order`; None for other readers."""
    node, _ = use
    perm = _perm(node) if _is_transpose(node) and node.graph is region.graph else None
    if perm is None or region.moves(node.outputs[0]):
        return None
    return tuple(order[axis] for axis in perm)


def _may_go(node: ir.Node, gone: list[ir.Node], *, own: bool) -> bool:
    """Whether the value in the new order can take over the name of the result, where that is an output."""
    if not node.outputs[0].is_graph_output():
        return True
    return own and not any(n.outputs[0].is_graph_output() for n in gone)


def _change(region: _Region, crossings: Sequence[_Crossing]) -> None:
    """Bring a region into its new order."""
    for node, changed in region.inside.items():
        changed.edit()
        for index, order in changed.inputs.items():
            array = constant_of(node.inputs[index])
            if array is not None:
                set_constant(node, index, _moved(array, order), "transposed")
    for crossing in crossings:
        if crossing.own:
            moved = _keep(crossing)
        else:
            moved = _enter(crossing, region)
            for node, index in list(crossing.value.uses()):
                if region.holds((node, index)):
                    node.replace_input_with(index, moved)
        _leave(crossing, moved)


def _moved(array: Array, order: Order) -> Array:
    """A constant in another order, without axes in front that broadcasting adds."""
    moved = ordered(array, order)
    added = next((i for i, d in enumerate(moved.shape) if d != 1), len(order) - 1)
    return moved if array.ndim == len(order) else moved.reshape(moved.shape[added:])


def _keep(crossing: _Crossing) -> ir.Value:
    """Let a node give the value in the new order, and restore the old one for those who need it."""
    value, shape = crossing.value, crossing.value.shape
    if crossing.edit is not None:
        crossing.edit()
    producer = value.producer()
    assert producer is not None  # it is the one that changed
    if shape is not None:
        value.shape = ir.Shape([shape[axis] for axis in inverse(crossing.order)])
    if not crossing.restored:
        return value
    restored = _transposed(value, crossing.order, graph_of(producer))
    restored.shape = shape
    for node, index in crossing.others:
        node.replace_input_with(index, restored)
    if value.is_graph_output():
        _hand_over(value, restored, graph_of(producer))
    return value


def _hand_over(old: ir.Value, new: ir.Value, graph: ir.Graph) -> None:
    """Let `new` be the output of the graph that `old` was, under its name."""
    name, old.name = old.name, unique_name(graph, f"{old.name}.transposed")
    new.name = name
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new


def _enter(crossing: _Crossing, region: _Region) -> ir.Value:
    """The value in the new order, in front of the region."""
    source, order = crossing.source, crossing.order
    if source is None:
        return _transposed(crossing.value, inverse(order), region.graph)
    perm, origin = _perm(source), source.inputs[0]
    assert perm is not None  # else it would not count as a Transpose
    assert origin is not None
    if perm == order:
        return origin
    return _transposed(origin, tuple(perm[axis] for axis in inverse(order)), region.graph)


def _transposed(value: ir.Value, perm: Order, graph: ir.Graph) -> ir.Value:
    """A new Transpose right behind the node that gives `value`, or in front of all where there is none."""
    node = ir.node("Transpose", [value], {"perm": list(perm)})
    out, producer = node.outputs[0], value.producer()
    out.name, out.type = unique_name(graph, f"{value.name}.transposed"), value.type
    if value.shape is not None:
        out.shape = ir.Shape([value.shape[axis] for axis in perm])
    if producer is not None and producer.graph is graph:
        graph.insert_after(producer, node)
    else:
        graph.insert_before(graph[0], node)
    return out


def _leave(crossing: _Crossing, moved: ir.Value) -> None:
    """Let the readers outside the region that can read the value in the new order do so."""
    for node in crossing.cancelled:
        replace(node.outputs[0], moved)
    if not crossing.own and crossing.source is None:
        return  # they read what they read before
    for node, perm in crossing.turned:
        node.replace_input_with(0, moved)
        if _moves(perm):
            node.attributes.add(ir.AttrInt64s("perm", perm))
        else:
            node.op_type = "Identity"
            node.attributes.clear()
    for sink in crossing.sinks:
        sink(moved)
    if crossing.source is not None:
        remove_if_unused(crossing.source)
