"""Attributes that say what would be so without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass
from edgewise.passes.graph import opset

# What the specification says in words, because its length depends on the operator's rank.
_WINDOWS: Mapping[str, int] = MappingProxyType({"dilations": 1, "strides": 1, "pads": 0})
_WINDOWED = frozenset({"Conv", "ConvTranspose", "QLinearConv", "MaxPool", "AveragePool", "LpPool"})


@dataclass(frozen=True)
class DropDefaultAttributes(Pass):
    """Remove attributes whose value is the one the operator's specification gives to nodes without them.

    Given:   y = Conv<dilations=[1, 1], group=1, kernel_shape=[3, 3], pads=[0, 0, 0, 0]>(x, W)
    Result:  y = Conv<kernel_shape=[3, 3]>(x, W)
    """

    name = "drop-default-attributes"
    helps = ("eliminate-common-subexpressions",)

    def apply(self, model: ir.Model) -> Outcome:
        version = opset(model)
        edits = 0
        for graph in model.graphs():
            for node in graph:
                if node.domain == "":
                    for name in _at_default(node, version):
                        del node.attributes[name]
                        edits += 1
        return Outcome(edits)


def _at_default(node: ir.Node, version: int) -> list[str]:
    """The attributes of `node` that could as well be left out."""
    defaults = _defaults(node.op_type, version)
    plain = {name: attr.value for name, attr in node.attributes.items() if not attr.is_ref()}
    return [n for n, value in plain.items() if _is_default(node, n, value, defaults)]


def _is_default(node: ir.Node, name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if name in defaults:
        default = defaults[name]
        if isinstance(default, float):  # the file holds 32 bits
            return bool(np.float32(value) == np.float32(default))
        return type(value) is type(default) and bool(value == default)
    return node.op_type in _WINDOWED and name in _WINDOWS and set(value) == {_WINDOWS[name]}


def _defaults(op_type: str, version: int) -> Mapping[str, Any]:
    """Scalar attributes with a default in the schema of `op_type`; none for an operator without one."""
    if not onnx.defs.has(op_type, version):
        return {}
    attributes = onnx.defs.get_schema(op_type, version).attributes.items()
    return {name: default for name, a in attributes if (default := _scalar(a.default_value)) is not None}


def _scalar(proto: onnx.AttributeProto) -> Any:
    if proto.type not in (onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT, onnx.AttributeProto.STRING):
        return None
    value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value
