"""The shape and type of every value, from onnx's own inference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import onnx
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.graph import opset

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
    inferred = _inferred(model)
    changed = 0
    for graph, twin in zip(model.graphs(), inferred.graphs(), strict=True):
        known = {v.name: v for v in _results(twin)}
        for value in _results(graph):
            if value.name and not (graph is model.graph and value.is_graph_output()):
                changed += _learn(value, known[value.name])
    return changed


def _inferred(model: ir.Model) -> ir.Model:
    """A skeleton of the model, without its large weights, after inference."""
    skeleton = model.clone()
    for graph in skeleton.graphs():
        _forget(graph)
        for node in graph:  # onnx stops at a domain that is not imported, onnxruntime does not
            skeleton.opset_imports.setdefault(node.domain, opset(model) if node.domain == "" else 1)
    _drop_numbers(skeleton.graph)
    try:
        # Not strict: an operator that inference cannot handle leaves its outputs unknown, no more.
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(skeleton), data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise Refused("onnx's shape inference cannot read the model") from error
    return ir.from_proto(proto)


def _results(graph: ir.Graph) -> Iterator[ir.Value]:
    return (value for node in graph for value in node.outputs)


def _forget(graph: ir.Graph) -> None:
    """Drop what is noted beside the outputs of standard operators, and dimensions that say nothing."""
    for value in graph.inputs:
        value.shape = _without_nonsense(value.shape)
    for node in graph:
        for value in node.outputs:
            value.shape = None if node.domain == "" else _without_nonsense(value.shape)
            if node.domain == "" and not value.is_graph_output():
                value.type = None


def _without_nonsense(shape: ir.Shape | None) -> ir.Shape | None:
    """The shape with no name for dimensions that are called -1 or "?": two of those need not be equal."""
    if shape is None:
        return None
    return ir.Shape([d if _is_meant(d) else None for d in shape])


def _is_meant(dim: int | ir.SymbolicDim) -> bool:
    return dim >= 0 if isinstance(dim, int) else symbol_of(dim) is not None


def symbol_of(dim: int | ir.SymbolicDim) -> str | None:
    """The name of an open dimension; two that are called "?", -1 or None need not be equal: no name."""
    name = None if isinstance(dim, int) else dim.value
    if name is None or name.lower() in ("none", "null") or not any(map(str.isalpha, name)):
        return None
    return name


def _drop_numbers(graph: ir.Graph) -> None:
    """Turn large weights into inputs of their type and shape, and read the small ones from their files."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        if tensor.nbytes > _SMALL:
            graph.initializers.pop(name)
            if not value.is_graph_input():
                graph.inputs.append(value)
            value.const_value = None
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), name=name)


def _learn(value: ir.Value, twin: ir.Value) -> bool:
    """Take over what inference knows of a value; whether that is news."""
    news = False
    if twin.type is not None and value.type != twin.type:
        value.type, news = twin.type, True
    if twin.shape is not None and value.shape != twin.shape:
        value.shape, news = twin.shape, True
    return news
