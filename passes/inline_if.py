"""An If whose condition is known."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import (
    attribute,
    constant_of,
    forget_names,
    graph_of,
    move_initializers,
    release_bodies,
    remove_if_unused,
    replace,
    unique_name,
)


@dataclass(frozen=True)
class InlineIf(Rule):
    """Put the branch that is always taken in place of the If.

    Given:   y = If(c){then: ... -> t; else: ... -> e}      with constant c
    Result:  the nodes and initializers of that branch in front, t or e in place of y
    """

    name = "inline-if"
    op_types = ("If",)

    def rewrite(self, node: ir.Node) -> bool:
        condition = constant_of(node.inputs[0])
        if condition is None:
            return False
        graph = graph_of(node)
        taken: ir.Graph = attribute(node, "then_branch" if condition.any() else "else_branch")
        results = list(taken.outputs)
        _check(node, taken, results)
        (other,) = (a for a in node.attributes.values() if a.as_graph() is not taken)
        _empty(node, other)
        taken.outputs.clear()
        forget_names(graph)
        move_initializers(taken, graph)
        _move_nodes(taken, node)
        for old, new in zip(node.outputs, results, strict=True):
            replace(old, new)
        remove_if_unused(node)
        return True


def _check(node: ir.Node, taken: ir.Graph, results: list[ir.Value]) -> None:
    """Refuse what cannot be wired without a node between."""
    if len(set(results)) < len(results):
        raise Refused("the branch gives one value twice")
    for old, new in zip(node.outputs, results, strict=True):
        if new.graph is not taken or (old.is_graph_output() and new.producer() is None):
            raise Refused("the branch gives a value that no node of it computes")


def _empty(node: ir.Node, other: ir.Attr) -> None:
    """Take the bodies off the node, and let the one that never runs release what it reads."""
    node.attributes.clear()
    node.attributes.add(other)
    release_bodies(node)
    node.attributes.clear()


def _move_nodes(source: ir.Graph, before: ir.Node) -> None:
    """Move all nodes; a name that another body of the target uses as well is changed."""
    target = graph_of(before)
    nodes = list(source)
    source.remove(nodes)
    for node in nodes:
        for value in node.outputs:
            if value.name:
                value.name = unique_name(target, value.name)
        target.insert_before(before, node)
