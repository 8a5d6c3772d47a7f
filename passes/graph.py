"""Reading and rewiring an onnx-ir graph: the few moves every pass is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.base import Refused, bodies_of, graphs_of

Array = npt.NDArray[Any]

MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""

_DTYPES_OF_CONSTANT = MappingProxyType(
    {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
)
_NAMES = "edgewise.names"  # where a graph keeps the names in and below it: a walk for each would be slow


def opset(model: ir.Model) -> int:
    """The version of the default operator set the model imports."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def import_microsoft(model: ir.Model) -> None:
    """Declare the version of onnxruntime's own operators in a model that has come to hold any."""
    if any(node.domain == MICROSOFT for graph in graphs_of(model) for node in graph):
        model.opset_imports.setdefault(MICROSOFT, 1)


def constant_of(value: ir.Value | None) -> Array | None:
    """The array `value` always holds, read-only, or None.

    An initializer that is also a graph input may be overridden by the caller and is no constant.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        return _array_of_constant(value.producer())
    return None if tensor.dtype == ir.DataType.STRING else _read_only(tensor.numpy())


def _array_of_constant(node: ir.Node | None) -> Array | None:
    """The numbers of a Constant node. onnx-ir's own reader renames the tensor, which clones share."""
    if node is not None and node.op_type == "ConstantOfShape" and node.domain == "":
        return _array_of_fill(node)
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    (attr,) = node.attributes.values()
    if attr.is_ref():
        return None
    if attr.name == "value":  # `as_tensor` looks at everything that a tensor has to have, which is slow
        return None if attr.value.dtype == ir.DataType.STRING else _read_only(attr.value.numpy())
    dtype = _DTYPES_OF_CONSTANT.get(attr.name)
    return None if dtype is None else _read_only(np.array(attr.value, dtype))


def _array_of_fill(node: ir.Node) -> Array | None:
    """What a ConstantOfShape of a constant shape gives: a view of one number that takes no memory."""
    shape, attr = constant_of(node.inputs[0]), node.attributes.get("value")
    if shape is None or (attr is not None and attr.is_ref()):
        return None
    number = np.zeros(1, np.float32) if attr is None else attr.value.numpy()
    return np.broadcast_to(number.reshape(()), tuple(shape.tolist()))


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The Python value of an attribute, or `default` where the node does not write it.

    Raises `Refused` on a reference attribute of a function body: its value is not known here.
    """
    attr = node.attributes.get(name)
    if attr is None:
        return default
    if attr.is_ref():
        raise Refused("attribute is a function parameter")
    return attr.value


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape as integers, or None where any dimension is unknown (some exporters write -1 for that)."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    shape = value.shape.numpy()
    return None if any(d < 0 for d in shape) else shape


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, or None if there are more, none, or it is a graph output."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    return next(iter(uses)).node


def unique_name(graph: ir.Graph, hint: str) -> str:
    """`hint`, or `hint` with a number, so that no value of `graph` or of a graph below has that name.

    Make the hint from a name the model already holds (`conv1.out` -> `conv1.out.weight`): then it is
    free in the graphs above as well.
    """
    taken = graph.meta.get(_NAMES)
    if taken is None:
        taken = frozenset(_value_names(graph))
    name, n = hint, 1
    while name in taken:
        name, n = f"{hint}_{n}", n + 1
    graph.meta[_NAMES] = taken | {name}  # a new set, for clones share the old one
    return name


def forget_names(graph: ir.Graph) -> None:
    """To be called when nodes come into `graph` from another, or leave it with names that are to be free."""
    graph.meta.pop(_NAMES, None)


def _value_names(graph: ir.Graph) -> set[str]:
    """Every value name of the graph and of all graphs below it, in one walk: names are asked for often."""
    names = {*graph.initializers, *(v.name for v in graph.inputs if v.name)}
    for node in graph:
        names.update([v.name for v in node.outputs if v.name])
        names.update(*map(_value_names, bodies_of(node)))
    return names


def move_initializers(source: ir.Graph, target: ir.Graph) -> None:
    """Let `target` hold the initializers of `source`, under names that are free there."""
    for name, value in list(source.initializers.items()):
        source.initializers.pop(name)
        value.name = unique_name(target, name)
        target.register_initializer(value)


def new_initializer(graph: ir.Graph, hint: str, array: Array) -> ir.Value:
    """Register `array` as an initializer of `graph` under a name that is free."""
    name = unique_name(graph, hint)
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)  # ascontiguousarray makes scalars vectors
    shape = ir.Shape(array.shape)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def new_node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    hint: str = "",
    domain: str = "",
) -> ir.Value:
    """Insert a node with one output in front of `before` and return that output, named after `hint`.

    The output's type is that of the first input; set `type` and `shape` where that is not so.
    """
    graph = graph_of(before)
    node = ir.node(op_type, inputs, attributes, domain=domain)
    out = node.outputs[0]
    out.name = unique_name(graph, hint or f"{before.outputs[0].name}.{op_type}")
    first = next((v for v in inputs if v is not None), None)
    out.type = None if first is None else first.type
    graph.insert_before(before, node)
    return out


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that holds `node`; a node outside any graph is a bug of the caller."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise Refused("inside a model-local function")
    return graph


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every user of `old` read `new` and remove the node of `old` once nothing reads it.

    If `old` is a graph output, `new` takes over its name and what it declares. Raises `Refused`,
    before any edit, where the name cannot move because `new` is itself an input, an initializer or
    an output.
    """
    producer = old.producer()
    if old.is_graph_output():
        if new.is_graph_output() or new.is_graph_input() or new.is_initializer():
            raise Refused("the result is a graph output and its source has a fixed name")
        if old.graph is not new.graph:
            raise Refused("the result is an output of another graph than its source")
        name = old.name
        old.name = None if producer is None else unique_name(graph_of(producer), f"{name}.replaced")
        new.name = name
        new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if producer is not None:
        remove_if_unused(producer)


def remove_if_unused(node: ir.Node) -> None:
    """Remove `node` if nothing reads its outputs, then what only it read."""
    pending = [node]  # a chain may be longer than the interpreter's stack is deep
    while pending:
        last = pending.pop()
        if last.graph is None or any(v.uses() or v.is_graph_output() for v in last.outputs):
            continue
        release_bodies(last)
        sources = [v for v in last.inputs if v is not None]
        last.graph.remove(last, safe=True)
        for value in sources:
            producer = value.producer()
            if producer is not None:
                pending.append(producer)
            else:
                drop_unused_initializer(value)


def release_bodies(node: ir.Node) -> None:
    """Let go of what the bodies of `node` read, so that a removed If or Loop counts as no user any more."""
    for body in bodies_of(node):
        for inner in body.all_nodes():
            for i in range(len(inner.inputs)):
                inner.replace_input_with(i, None)


def drop_unused_initializer(value: ir.Value) -> None:
    """Unregister `value` if it is an initializer that nothing reads and no caller can see."""
    graph = value.graph
    if not value.is_initializer() or not isinstance(graph, ir.Graph) or value.name is None:
        return
    if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
        graph.initializers.pop(value.name)
