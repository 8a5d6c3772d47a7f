"""Large constants whose elements are all the same."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass
from edgewise.passes.graph import Array, new_initializer, new_node

# What ConstantOfShape makes since operator set 9.
_TYPES = frozenset(
    {ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BOOL}
    | {ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64}
    | {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
)
_QUANTIZED = frozenset(
    {"QuantizeLinear", "DequantizeLinear"}
)  # runtimes want their constants to be initializers
_GLANCE = 64  # elements that tell most constants apart from a fill


@dataclass(frozen=True)
class WriteFills(Pass):
    """Write an initializer whose elements are all equal as the number and the shape.

    Given:   initializer w of more than `over` bytes, every element v
    Result:  w = ConstantOfShape<value = v>(the shape of w)

    Runtimes make an initializer of it as they load the file, which is smaller by the size of w.
    """

    name = "write-fills"
    helps = ("eliminate-common-subexpressions", "dedupe-initializers")
    over: int = 4096

    def apply(self, model: ir.Model) -> Outcome:
        edits = 0
        for graph in model.graphs():
            if isinstance(graph, ir.Graph) and len(graph):
                edits += sum(_write(graph, value) for value in self._fills(graph))
        return Outcome(edits)

    def _fills(self, graph: ir.Graph) -> list[ir.Value]:
        """The initializers that no caller can see and that are worth writing otherwise."""
        return [
            value
            for value in graph.initializers.values()
            if not (value.is_graph_input() or value.is_graph_output())
            and not any(use.node.op_type in _QUANTIZED for use in value.uses())
            and value.const_value is not None
            and value.const_value.dtype in _TYPES
            and value.const_value.nbytes > self.over
            and _is_fill(value.const_value.numpy())
        ]


def _is_fill(array: Array) -> bool:
    """Whether all elements have the same bits; zeros of both signs do not."""
    bits = np.asarray(array, order="C").reshape(-1).view(f"u{array.itemsize}")
    return bool((bits[:_GLANCE] == bits[0]).all() and (bits == bits[0]).all())


def _write(graph: ir.Graph, value: ir.Value) -> bool:
    tensor, name, first = value.const_value, value.name, next(iter(graph))
    assert tensor is not None
    assert name is not None
    array = tensor.numpy()
    shape = new_initializer(graph, f"{name}.shape", np.array(array.shape, np.int64))
    element = ir.tensor(np.array(array.reshape(-1)[:1]), dtype=tensor.dtype)
    fill = new_node(first, "ConstantOfShape", [shape], {"value": element}, hint=name)
    fill.shape, fill.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    value.replace_all_uses_with(fill)
    graph.initializers.pop(name)
    fill.name = name
    return True
