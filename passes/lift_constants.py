"""Constant nodes become initializers."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Refused, Rule
from edgewise.passes.freeze_inputs import FIRST_IR_WITH_DEFAULTS
from edgewise.passes.graph import graph_of

_NUMBERS = MappingProxyType(
    {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
)


@dataclass(frozen=True)
class LiftConstants(Rule):
    """Turn a Constant node into an initializer of the graph it stands in, under the name it has.

    Given:   c = Constant<value = t>()
    Result:  initializer c = t

    Other passes and runtimes look for weights among the initializers.
    """

    name = "lift-constants"
    op_types = ("Constant",)

    def apply(self, model: ir.Model) -> Outcome:
        if model.ir_version < FIRST_IR_WITH_DEFAULTS:
            return Outcome(0, MappingProxyType({"IR version 3 wants every initializer to be an input": 1}))
        return super().apply(model)

    def rewrite(self, node: ir.Node) -> bool:
        output = node.outputs[0]
        if output.is_graph_output():
            raise Refused("the constant is a graph output")
        graph, tensor = graph_of(node), _tensor(node)
        constant = ir.Value(
            name=output.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
            metadata_props=dict(output.metadata_props),
        )
        constant.meta.update(output.meta)
        graph.register_initializer(constant)
        output.replace_all_uses_with(constant)
        graph.remove(node, safe=True)
        return True


def _tensor(node: ir.Node) -> ir.TensorProtocol:
    """The value of a Constant node, whichever of its attributes holds it."""
    (attr,) = node.attributes.values()
    if attr.is_ref():
        raise Refused("the constant is a function parameter")
    if attr.name == "value":
        return _own(attr.as_tensor())
    if attr.name in _NUMBERS:
        return ir.tensor(np.array(attr.value, _NUMBERS[attr.name]))
    if attr.name in ("value_string", "value_strings"):
        return _string_tensor(attr.value)
    raise Refused("the constant is sparse")


def _own(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same numbers in a tensor of their own: an initializer names its tensor, which clones share."""
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))


def _string_tensor(value: str | tuple[str, ...]) -> ir.StringTensor:
    """A scalar of one text, or a vector of several."""
    if isinstance(value, str):
        return ir.StringTensor([value.encode()], shape=ir.Shape(()))
    return ir.StringTensor([text.encode() for text in value], shape=ir.Shape((len(value),)))
