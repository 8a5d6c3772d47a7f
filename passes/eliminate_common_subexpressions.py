"""The same thing computed twice."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Hashable
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.dedupe_initializers import content_key
from edgewise.passes.graph import replace
from edgewise.passes.purity import is_pure

# Runtimes recognise a quantized operator by the pairs around it, one pair for each edge. Constants are
# merged as initializers.
_LEFT_ALONE = frozenset({"QuantizeLinear", "DequantizeLinear", "Constant"})

_SMALL = 1024  # bytes: an axis, a shape, a scale; equal ones need not be the same initializer

Seen = ChainMap[Hashable, ir.Node]


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Compute once what several nodes compute.

    Given:   y = f(x), z = f(x)         one f with the same attributes and a result without chance
    Result:  y in place of z

    The first of them may be in a graph around that of the second.
    """

    name = "eliminate-common-subexpressions"

    def apply(self, model: ir.Model) -> Outcome:
        refused = Counter[str]()
        edits = _merge(model.graph, ChainMap(), refused)
        return Outcome(edits, MappingProxyType(dict(refused)))


def _merge(graph: ir.Graph, seen: Seen, refused: Counter[str]) -> int:
    edits = 0
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                edits += _merge(attr.as_graph(), seen.new_child(), refused)
        if node.op_type in _LEFT_ALONE or not is_pure(node):
            continue
        kept = seen.setdefault(_expression(node), node)
        if kept is node:
            continue
        try:
            _replace_outputs(node, kept)
        except Refused as refusal:
            refused[str(refusal)] += 1
        else:
            edits += 1
    return edits


def _expression(node: ir.Node) -> Hashable:
    """Equal for two nodes exactly if they compute the same, and leave out the same optional outputs."""
    attributes = frozenset((name, attr.type, _hashable(attr)) for name, attr in node.attributes.items())
    present = tuple(bool(v.name) for v in node.outputs)
    return (node.op_identifier(), tuple(map(_operand, node.inputs)), attributes, present)


def _operand(value: ir.Value | None) -> Hashable:
    """A value is equal to itself, and to others where they are small constants of the same content."""
    if value is None or value.is_graph_input() or value.const_value is None:
        return value
    return content_key(value.const_value) if value.const_value.nbytes <= _SMALL else value


def _hashable(attr: ir.Attr) -> Hashable:
    if attr.is_ref():
        return ("reference", attr.ref_attr_name)
    if attr.type == ir.AttributeType.TENSOR:
        return content_key(attr.as_tensor())
    if isinstance(attr.value, int | float | str | tuple):
        return attr.value
    return id(attr)  # types and sparse tensors: equal only to itself


def _replace_outputs(node: ir.Node, kept: ir.Node) -> None:
    """Let the users of `node` read `kept`, all outputs or none."""
    for old, new in zip(node.outputs, kept.outputs, strict=True):
        if old.is_graph_output() and (new.is_graph_output() or new.graph is not old.graph):
            raise Refused("the repeated result is a graph output that cannot be shared")
    for old, new in zip(node.outputs, kept.outputs, strict=True):
        replace(old, new)
