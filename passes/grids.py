"""Integers and the floats they stand for, as QuantizeLinear and DequantizeLinear say."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import Array, constant_of, graph_of, new_initializer
from edgewise.passes.quant_plan import ValuePlan

EIGHT_BITS = MappingProxyType({ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8"})


@dataclass(frozen=True)
class Grid:
    """Integers, or the place for them, and the scale and zero point by which they are read."""

    node: ir.Node
    """The QuantizeLinear or DequantizeLinear."""

    @property
    def integers(self) -> ir.Value:
        value = self.node.inputs[0] if self.node.op_type == "DequantizeLinear" else self.node.outputs[0]
        assert value is not None
        return value

    @property
    def dtype(self) -> ir.DataType:
        zero_point = self._zero_point
        return (zero_point.dtype if zero_point is not None else self.integers.dtype) or ir.DataType.UINT8

    @property
    def scale(self) -> Array:
        scale = constant_of(self.node.inputs[1])
        if scale is None:
            raise Refused("a scale is not constant")
        return scale

    @property
    def zero(self) -> Array:
        """The zero point; zero where it is left out."""
        if self._zero_point is None:
            return np.zeros_like(self.scale, EIGHT_BITS.get(self.dtype, "int32"))
        zero_point = constant_of(self._zero_point)
        if zero_point is None:
            raise Refused("a zero point is not constant")
        return zero_point

    @property
    def _zero_point(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    def parameters(self) -> list[ir.Value | None]:
        """Scale and zero point as operands."""
        scale, zero_point = self.node.inputs[1], self._zero_point
        if zero_point is None:
            name = f"{self.integers.name}.zero_point"
            zero_point = new_initializer(graph_of(self.node), name, self.zero)
        return [scale, zero_point]

    def operands(self) -> list[ir.Value | None]:
        return [self.integers, *self.parameters()]

    def require_tensor(self) -> None:
        """Raise `Refused` unless this is one grid of 8 bits for a whole tensor."""
        if self.dtype not in EIGHT_BITS:
            raise Refused("only 8 bits have such an operator")
        if self.scale.size != 1 or self.zero.size != 1:
            raise Refused("an activation has a scale for every channel")

    def plan(self) -> ValuePlan:
        return ValuePlan("", EIGHT_BITS[self.dtype], (float(self.scale.item()),), int(self.zero.item()))

    def equals(self, other: Grid) -> bool:
        return self.dtype == other.dtype and self.plan() == other.plan()


def dequantizer(value: ir.Value | None) -> Grid | None:
    node = None if value is None else value.producer()
    return Grid(node) if node is not None and node.op_type == "DequantizeLinear" else None
