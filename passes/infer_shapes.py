"""The shape and type of every value, from onnx's own inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused, graphs_of
from edgewise.passes.graph import opset, static_shape

_SMALL = 4096  # bytes: what may be a shape, a list of axes or of scales; anything larger is only data


@dataclass(frozen=True)
class InferShapes(Pass):
    """Write down the shapes and types that follow from the model's inputs, as `infer_shapes` does."""

    name = "infer-shapes"

    def apply(self, model: ir.Model) -> Outcome:
        try:
            return Outcome(infer_shapes(model))
        except Refused as refusal:
            return Outcome(0, MappingProxyType({str(refusal): 1}))


def infer_shapes(model: ir.Model) -> int:
    """Give the values inside the graphs the shape and type that follow from the model's inputs.

    The inputs and outputs of the model keep what they declare. What the file notes beside the outputs of
    standard operators is not believed: a file whose batch was made dynamic by hand still notes the old
    one there. Values that shapes are computed from are followed through the graph. Returns how many
    values changed; raises `Refused`, with the model as it was, where the model contradicts itself.
    """
    try:
        # Not strict: an operator that inference cannot handle leaves its outputs unknown, no more.
        inferred = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise Refused("onnx's shape inference cannot read the model") from error
    return _learn(model.graph, inferred.graph, frozenset(model.graph.outputs))


def shapes_on(model: ir.Model, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the values of the main graph when the inputs have these, as far as they are known."""
    sized = model.clone()
    for value in sized.graph.inputs:
        if (shape := inputs.get(value.name or "")) is not None:
            value.shape = ir.Shape(shape)
    values = [v for node in sized.graph for v in node.outputs]
    sized.graph.outputs.clear()  # they would keep the open dimensions that they declare
    InferShapes().apply(sized)  # where that is refused, shapes are those that the file declares
    shapes = {v.name or "": static_shape(v) for v in (*sized.graph.inputs, *values)}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """What inference has to read of a model: no large weights, no metadata, no shape that it will find."""
    domains = dict(model.opset_imports)
    for graph in graphs_of(model):
        for node in graph:  # onnx stops at a domain that is not imported, onnxruntime does not
            domains.setdefault(node.domain, opset(model) if node.domain == "" else 1)
    return onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=[onnx.helper.make_opsetid(domain, version) for domain, version in domains.items()],
        graph=_graph(model.graph),
        functions=[ir.serde.serialize_function(function) for function in model.functions.values()],
    )


def _graph(graph: ir.Graph) -> onnx.GraphProto:
    proto = onnx.GraphProto(name=graph.name or "graph")
    proto.input.extend(_note(v, v.shape) for v in graph.inputs)
    for weight in graph.initializers.values():
        _add_weight(proto, weight)
    for node in graph:
        _add_node(proto.node.add(), node)
        if node.domain != "":
            proto.value_info.extend(_note(v, v.shape) for v in node.outputs if v.name and v.type)
    for value in graph.outputs:
        producer = value.producer()
        found = producer is not None and producer.domain == ""
        proto.output.append(_note(value, None if found else value.shape))
    return proto


def _add_weight(proto: onnx.GraphProto, value: ir.Value) -> None:
    """Write down a weight that others may be computed from; of a large one only what it is.

    That is a note, because the body of an If takes no inputs.
    """
    name, tensor = value.name, value.const_value
    if name is None or tensor is None:
        return
    if not value.is_graph_input():
        proto.value_info.append(onnx.helper.make_tensor_value_info(name, tensor.dtype, tensor.shape.numpy()))
    if tensor.nbytes <= _SMALL:
        inside = ir.tensor(tensor.numpy()) if isinstance(tensor, ir.ExternalTensor) else tensor
        ir.serde.serialize_tensor_into(proto.initializer.add(), inside)
        proto.initializer[-1].name = name


def _add_node(proto: onnx.NodeProto, node: ir.Node) -> None:
    proto.op_type, proto.domain, proto.overload = node.op_type, node.domain, node.overload
    proto.input.extend("" if v is None else v.name or "" for v in node.inputs)
    proto.output.extend(v.name or "" for v in node.outputs)
    while proto.output and not proto.output[-1]:
        proto.output.pop()
    for attr in node.attributes.values():
        if attr.is_ref():
            proto.attribute.append(ir.serde.serialize_reference_attribute(attr))
        elif attr.type == ir.AttributeType.GRAPH:
            proto.attribute.add(name=attr.name, type=attr.type.value, g=_graph(attr.as_graph()))
        else:
            ir.serde.serialize_attribute_into(proto.attribute.add(), attr)


def _note(value: ir.Value, shape: ir.Shape | None) -> onnx.ValueInfoProto:
    """What is noted beside a value, with this shape."""
    proto = onnx.ValueInfoProto(name=value.name or "")
    if value.type is not None:
        ir.serde.serialize_type_into(proto.type, value.type)
        if shape is not None:
            ir.serde.serialize_shape_into(proto.type, _without_nonsense(shape))
    return proto


def _without_nonsense(shape: ir.Shape) -> ir.Shape:
    """The shape with no name for dimensions that are called -1 or "?": two of those need not be equal."""
    return ir.Shape([d if _is_meant(d) else None for d in shape])


def _is_meant(dim: int | ir.SymbolicDim) -> bool:
    return dim >= 0 if isinstance(dim, int) else symbol_of(dim) is not None


def symbol_of(dim: int | ir.SymbolicDim) -> str | None:
    """The name of an open dimension; two that are called "?", -1 or None need not be equal: no name."""
    name = None if isinstance(dim, int) else dim.value
    if name is None or name.lower() in ("none", "null") or not any(map(str.isalpha, name)):
        return None
    return name


def _learn(graph: ir.Graph, twin: onnx.GraphProto, fixed: frozenset[ir.Value]) -> int:
    """Take over what inference knows of the values in and below a graph; of how many that is news."""
    notes = {note.name: note.type for note in (*twin.value_info, *twin.output)}
    news = 0
    for node, proto in zip(graph, twin.node, strict=True):
        bodies = {attr.name: attr.g for attr in proto.attribute if attr.HasField("g")}
        news += sum(_learn(node.attributes[name].as_graph(), body, fixed) for name, body in bodies.items())
        for value in node.outputs:
            if value.name in notes and value not in fixed:
                news += _take_over(value, notes[value.name])
    return news


def _take_over(value: ir.Value, note: onnx.TypeProto) -> bool:
    """Give a value the type and shape that are noted; whether that is news."""
    kind, shape = (
        ir.serde.deserialize_type_proto_for_type(note),
        ir.serde.deserialize_type_proto_for_shape(note),
    )
    news = False
    if kind is not None and value.type != kind:
        value.type, news = kind, True
    if shape is not None and value.shape != shape:
        value.shape, news = shape, True
    return news
