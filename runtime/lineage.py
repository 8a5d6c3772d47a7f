"""Which nodes of a file a node of the graph that onnxruntime executes stands for.

onnxruntime fuses nodes, changes layouts and inserts conversions. It keeps the names of most values,
and derives the names of its own nodes and values from those of the file. So every executed node is
given the value of the file where it ends, and stands for all that leads there from the ends of others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import onnx_ir as ir

_SEPARATORS = re.compile(r"[_/:]")
_QUANTIZED = ("QLinear", "QGemm")
_CUTS_OFF = ("Relu", "Clip")
_KEEP_THE_SHAPE = frozenset({"DequantizeLinear", "QuantizeLinear", "Cast", "Identity"})
_CAST = "InsertedPrecisionFreeCast_"  # put before the name of a float16 value that is computed in float32


def lineage(file: ir.Graph, executed: ir.Graph) -> dict[str, tuple[str, ...]]:
    """For the name of each executed node, the names of the nodes of `file` in it, in their order.

    Empty for a node that onnxruntime inserted, such as a change of layout. Constants are left out.
    Nodes must have unique names. Nodes inside bodies of If, Loop and Scan belong to that node.
    """
    ends = _ends(file, executed)
    order = {node: i for i, node in enumerate(file)}
    stops = {value for values in ends.values() for value in values}
    return {
        name: tuple(node.name or "" for node in sorted(_leading_to(values, stops), key=order.__getitem__))
        for name, values in ends.items()
    }


def _ends(file: ir.Graph, executed: ir.Graph) -> dict[str, list[ir.Value]]:
    """The values of the file that each executed node is the first to yield."""
    values = {v.name or "": v for node in file for v in node.outputs if v.name}
    nodes = {node.name or "": node for node in file}
    ends: dict[str, list[ir.Value]] = {}
    claimed: set[ir.Value] = set()
    for node in executed:
        found = [values[v.name] for v in node.outputs if v.name and v.name in values]
        if not found:
            found = [_behind_fused(node, v) for v in _by_name(node, values, nodes)]
        ends[node.name or ""] = [v for v in found if v not in claimed]
        claimed.update(found)
    return ends


def _by_name(node: ir.Node, values: Mapping[str, ir.Value], nodes: Mapping[str, ir.Node]) -> list[ir.Value]:
    """What the longest beginning of the node's name that the file knows stands for: a value, or a node."""
    for name in _beginnings(node.name or ""):
        if name in values:
            return [values[name]]
        if name in nodes:
            return [v for v in nodes[name].outputs if v.name]
    return []


def _behind_fused(node: ir.Node, end: ir.Value) -> ir.Value:
    """Where a node ends that is named before what it takes in.

    An operator on quantized values takes in the activation and the quantization behind it; a convolution
    in onnxruntime's blocked layout the sum and the activation, seen as a fourth input and an attribute.
    """
    if node.op_type.startswith(_QUANTIZED):
        return _behind_quantized(end)
    activation = node.attributes.get("activation")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        end = _after(end, "Add", "Sum")
    return end if activation is None else _after(end, activation.as_string())


def _behind_quantized(end: ir.Value) -> ir.Value:
    """The next QuantizeLinear; an activation that only cuts off may lie in between."""
    for value in (end, _after(end, *_CUTS_OFF)):
        quantized = _after(value, "QuantizeLinear")
        if quantized is not value:
            return quantized
    return end


def _after(value: ir.Value, *op_types: str) -> ir.Value:
    """The result of the user of `value` that is of one of the types; `value` itself if there is none."""
    users = [use.node for use in value.uses() if use.node.op_type in op_types]
    return users[0].outputs[0] if users else value


def _beginnings(name: str) -> Iterator[str]:
    """The name itself, then what is left of it before each separator, from the last."""
    name = name.removeprefix(_CAST)
    yield name
    for match in reversed(list(_SEPARATORS.finditer(name))):
        yield name[: match.start()]


def _leading_to(ends: list[ir.Value], stops: set[ir.Value]) -> set[ir.Node]:
    """The nodes between `ends` and the nearest `stops` above them."""
    found: set[ir.Node] = set()
    todo = [v.producer() for v in ends]
    while todo:
        node = todo.pop()
        if node is None or node in found or node.op_type == "Constant":
            continue
        found.add(node)
        todo += [v.producer() for v in _read_by(node) if v not in stops]
    return found


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """The values a node reads, those that its bodies read from outside included."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)


def weight_of_convolution(node: ir.Node) -> int | None:
    """How many numbers the weight of a convolution of the file holds; None for other nodes, or if it is
    computed."""
    if node.op_type != "Conv" or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "Constant" and "value" in producer.attributes:
            return producer.attributes["value"].as_tensor().size
        if producer.op_type not in _KEEP_THE_SHAPE:
            return None
        value = producer.inputs[0]
    return None if value is None or value.const_value is None else value.const_value.size
