"""What an operator of the trainable graph is: a function from a `Call` to tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.runtime.errors import InputError

Runner: TypeAlias = Callable[[ir.Graph, Sequence[Tensor | None]], tuple[Tensor | None, ...]]
"""Runs the body of an If, a Loop or a Scan on its inputs; what it captures from outside is in reach."""


def _no_bodies(body: ir.Graph, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    raise InputError(f"the body {body.name!r} can only run inside a graph module")


@dataclass(frozen=True, slots=True)
class Call:
    """One node with what goes into it. An operator reads it and writes into nothing of it.

    `opset` is the version of the node's own domain. `attributes` are the Python values of the node's
    attributes, prepared once a graph: int, float, str, tuple, Tensor or ir.Graph.
    """

    node: ir.Node
    inputs: tuple[Tensor | None, ...]
    opset: int
    training: bool = False
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    run: Runner = _no_bodies

    def input(self, index: int) -> Tensor:
        """The input that must be there."""
        value = self.optional(index)
        if value is None:
            raise InputError(f"{described(self.node)} lacks its input {index}")
        return value

    def optional(self, index: int) -> Tensor | None:
        """The input, or None where the node leaves it out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, or `default` where the node does not write it."""
        return self.attributes.get(name, default)

    def ints(self, name: str, index: int) -> tuple[int, ...] | None:
        """Integers that older opsets keep in attribute `name` and newer ones in input `index`."""
        value = self.optional(index)
        if value is not None:
            return tuple(int(i) for i in value.reshape(-1).tolist())
        found = self.attributes.get(name)
        if found is None:
            return None
        return (found,) if isinstance(found, int) else tuple(found)


Operator: TypeAlias = Callable[[Call], Tensor | tuple[Tensor | None, ...]]
"""A tensor for a node of one output, else a tuple with one entry an output, None for those not made."""


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """The operator that makes its one input into `function` of it."""
    return lambda call: function(call.input(0))


def described(node: ir.Node) -> str:
    """How a message names a node."""
    name = node.name or next((v.name for v in node.outputs if v.name), "") or "?"
    return f"{node.op_type} {name!r}"


def attributes_of(node: ir.Node) -> Mapping[str, Any]:
    """The Python values of a node's attributes; `InputError` on a parameter of a function body."""
    found: dict[str, Any] = {}
    for name, attr in node.attributes.items():
        if attr.is_ref():
            raise InputError(f"{described(node)} is inside a function: inline the functions first")
        found[name] = _plain(attr)
    return MappingProxyType(found)


def _plain(attr: ir.Attr) -> Any:
    if attr.type == ir.AttributeType.TENSOR:
        return as_tensor(attr.value)
    if isinstance(attr.value, bytes):
        return attr.value.decode()
    if attr.type == ir.AttributeType.STRINGS:
        return tuple(v.decode() if isinstance(v, bytes) else v for v in attr.value)
    return tuple(attr.value) if isinstance(attr.value, list | tuple) else attr.value


_AS_INTEGERS = MappingProxyType(  # types that numpy lacks travel as integers of the same width
    {
        ir.DataType.BFLOAT16: (torch.int16, torch.bfloat16),
        ir.DataType.FLOAT8E4M3FN: (torch.uint8, torch.float8_e4m3fn),
        ir.DataType.FLOAT8E4M3FNUZ: (torch.uint8, torch.float8_e4m3fnuz),
        ir.DataType.FLOAT8E5M2: (torch.uint8, torch.float8_e5m2),
        ir.DataType.FLOAT8E5M2FNUZ: (torch.uint8, torch.float8_e5m2fnuz),
    }
)
_WIDENED = MappingProxyType(
    {
        ir.DataType.INT4: "int8",
        ir.DataType.INT2: "int8",
        ir.DataType.UINT4: "uint8",
        ir.DataType.UINT2: "uint8",
    }
)


def as_tensor(tensor: ir.TensorProtocol) -> Tensor:
    """A torch tensor with numbers of its own. Integers of two or four bits take a byte; text is no tensor."""
    if tensor.dtype == ir.DataType.STRING:
        raise InputError(f"tensor {tensor.name!r} holds text, which has no counterpart in torch")
    array = tensor.numpy()
    if tensor.dtype in _AS_INTEGERS:
        carrier, dtype = _AS_INTEGERS[tensor.dtype]
        plain = array.view("int16" if carrier is torch.int16 else "uint8")
        return torch.tensor(plain).view(dtype)
    if array.dtype.isbuiltin == 2 and tensor.dtype not in _WIDENED:
        raise InputError(f"tensor {tensor.name!r} is {tensor.dtype}, which has no counterpart in torch")
    return torch.tensor(array.astype(_WIDENED.get(tensor.dtype, array.dtype)))
