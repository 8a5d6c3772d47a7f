"""A Loop of a few turns whose number is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, PassError, Refused, Rule
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    move_initializers,
    new_initializer,
    new_node,
    opset,
    remove_if_unused,
    replace,
    static_shape,
    unique_name,
)
from edgewise.passes.linear import release

_OLDEST = 13  # from here on the axes of Unsqueeze are an input
_MAX_GROWTH = 1024  # bytes of weights in the nodes of the body that may be written again


@dataclass(frozen=True)
class UnrollLoop(Rule):
    """Put as many copies of the body as there are turns in place of a Loop.

    Given:   v', s = Loop(n, true, v){body: i, c, v -> true, f(i, v), g(i, v)}     with constant n
    Result:  v1 = f(0, v), v2 = f(1, v1), ... in place of the turns, v' = vn
             s = Concat(Unsqueeze(g(0, v)), Unsqueeze(g(1, v1)), ...)
    No turns at all leave v, and an empty s, for which there is no short form. The condition has to be true
    at first (or left out) and to stay so: constant, or handed on by the body. What the body reads from
    outside it goes on reading; its weights are written once. The turns together may have `max_nodes` nodes.
    """

    name = "unroll-loop"
    op_types = ("Loop",)
    max_nodes: int = 64

    def apply(self, model: ir.Model) -> Outcome:
        if opset(model) >= _OLDEST:
            return super().apply(model)
        found = any(n.op_type == "Loop" for n in model.graph.all_nodes())
        reason = f"opset below {_OLDEST}: upgrade it first"
        return Outcome(0, MappingProxyType({reason: 1} if found else {}))

    def rewrite(self, node: ir.Node) -> bool:
        turns, body = _turns(node), attribute(node, "body")
        if turns is None:
            return False
        self._check(node, body, turns)
        graph, results = graph_of(node), list(body.outputs)
        body.outputs.clear()
        move_initializers(body, graph)
        body.outputs.extend(v for v in results if _is_of(v, body))
        carried, width = list(node.inputs[2:]), len(node.inputs) - 2
        true = node.inputs[1] or new_initializer(graph, f"{node.outputs[0].name}.condition", np.array(True))
        stacked: list[list[ir.Value]] = [[] for _ in node.outputs[width:]]
        loose = [true]
        for turn in range(turns):
            count = _as_declared(body.inputs[0], np.array(turn, np.int64))
            number = new_initializer(graph, f"{node.outputs[0].name}.turn", count)
            condition, *given = _turn(node, body, results, (number, true, *carried))
            loose += [number, condition]
            carried = list(given[:width])
            for stack, value in zip(stacked, given[width:], strict=True):
                stack.append(value)
        finals = [*carried, *(_stack(node, v, s) for v, s in zip(node.outputs[width:], stacked, strict=True))]
        for old, new in zip(node.outputs, finals, strict=True):
            _put(node, old, new)
        remove_if_unused(node)
        for value in loose:
            release(value)
        return True

    def _check(self, node: ir.Node, body: ir.Graph, turns: int) -> None:
        """Refuse what would have to go on, take too much room, or cannot be wired."""
        if turns and not _goes_on(node, body):
            raise Refused("the condition may end the loop")
        count = len(node.inputs) - 2
        if not turns and any(v.uses() or v.is_graph_output() for v in node.outputs[count:]):
            raise Refused("a loop without turns gives something empty")
        if turns * sum(1 for _ in body.all_nodes()) > self.max_nodes:
            raise Refused("the turns together have too many nodes")
        if (turns - 1) * _nbytes(body) > _MAX_GROWTH:
            raise Refused("the turns together would take more room in the file")
        if any(v.graph is not inner for inner in body.subgraphs() for v in inner.outputs):
            raise Refused("a body inside the loop hands on a value from outside")


def _turns(node: ir.Node) -> int | None:
    """How often the body runs if nothing ends it, None where that is not known."""
    limit, start = constant_of(node.inputs[0]), constant_of(node.inputs[1])
    if start is not None and not start.all():
        return 0
    return None if limit is None else max(0, int(limit.item()))


def _goes_on(node: ir.Node, body: ir.Graph) -> bool:
    """Whether the condition is true at first and after every turn."""
    if node.inputs[1] is not None and constant_of(node.inputs[1]) is None:
        return False
    again = body.outputs[0]
    while (producer := again.producer()) is not None and producer.op_type == "Identity":
        source = producer.inputs[0]
        if source is None:
            return False
        again = source
    constant = constant_of(again)
    return again is body.inputs[1] or (constant is not None and bool(constant.all()))


def _as_declared(formal: ir.Value, number: Array) -> Array:
    """A scalar, or the vector of one that some bodies declare; runtimes give them what they ask for."""
    return number.reshape((1,)) if static_shape(formal) == (1,) else number


def _nbytes(body: ir.Graph) -> int:
    """The bytes of the weights in the body that each copy of it holds again."""
    attributes = [a for n in body.all_nodes() for a in n.attributes.values() if not a.is_ref()]
    tensors = [a.as_tensor() for a in attributes if a.type == ir.AttributeType.TENSOR]
    held = [v.const_value for inner in body.subgraphs() for v in inner.initializers.values()]
    return sum(t.nbytes for t in [*tensors, *held] if t is not None)


def _is_of(value: ir.Value, body: ir.Graph) -> bool:
    """Whether a node of `body` gives the value."""
    producer = value.producer()
    return producer is not None and producer.graph is body


def _turn(
    node: ir.Node, body: ir.Graph, results: Sequence[ir.Value], given: Sequence[ir.Value | None]
) -> list[ir.Value]:
    """Put a copy of the body, which reads `given`, in front of `node`; what it gives."""
    copy = body.clone(allow_outer_scope_values=True)
    known = dict(zip(body.outputs, copy.outputs, strict=True))
    for own, formal, value in zip(body.inputs, copy.inputs, given, strict=True):
        if value is None:
            raise PassError("a Loop carries nothing where its body expects a value")
        formal.replace_all_uses_with(value)
        known[own] = value
    copy.outputs.clear()
    _move_nodes(copy, node)
    return [known.get(value, value) for value in results]


def _move_nodes(copy: ir.Graph, before: ir.Node) -> None:
    """Move all nodes of a turn, under names of their own.

    The name of a dimension holds for one turn only, so it goes.
    """
    graph = graph_of(before)
    for node in copy.all_nodes():
        for value in node.outputs:
            value.shape = _nameless(value.shape)
    for inner in copy.subgraphs():
        for value in inner.inputs:
            value.shape = _nameless(value.shape)
    nodes = list(copy)
    copy.remove(nodes)
    for node in nodes:
        node.name = None  # the graph finds one
        for value in node.outputs:
            if value.name:
                value.name = unique_name(graph, value.name)
        graph.insert_before(before, node)


def _nameless(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([d if isinstance(d, int) else None for d in shape])


def _stack(node: ir.Node, output: ir.Value, values: Sequence[ir.Value]) -> ir.Value | None:
    """One value of all turns, along a new first axis; None where nobody asks for it."""
    if not (output.uses() or output.is_graph_output()):
        return None
    axes = new_initializer(graph_of(node), f"{output.name}.axes", np.array([0], np.int64))
    rows = [new_node(node, "Unsqueeze", [v, axes], hint=f"{output.name}.row") for v in values]
    if len(rows) == 1:
        return rows[0]
    return new_node(node, "Concat", rows, {"axis": 0}, hint=f"{output.name}.stack")


def _put(node: ir.Node, old: ir.Value, new: ir.Value | None) -> None:
    """Let the users of an output of the Loop read `new`."""
    if new is None or not (old.uses() or old.is_graph_output()):
        return
    if old.is_graph_output() and (
        new.producer() is None or new.graph is not old.graph or new.is_graph_output()
    ):
        new = new_node(node, "Identity", [new], hint=f"{old.name}.same")
    replace(old, new)
