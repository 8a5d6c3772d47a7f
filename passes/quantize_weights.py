"""The weights of matrix products in blocks of 4 or 8 bits; activations stay in float."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, PassError, Refused, Rule
from edgewise.passes.graph import (
    MICROSOFT,
    Array,
    graph_of,
    import_microsoft,
    new_initializer,
    new_node,
    opset,
    replace,
)
from edgewise.passes.quantize_dynamic import pays, weights_of_product
from edgewise.passes.weight_grids import in_blocks, packed

_BITS, _BLOCKS = (4, 8), (16, 32, 64, 128)
_FIRST_OPSET = 21  # whose DequantizeLinear knows blocks and 4 bits
_FEW_ROWS = 16
_IN_INTEGERS, _IN_FLOATS = 4, 0  # accuracy levels: what the kernel multiplies in


@dataclass(frozen=True)
class QuantizeWeights(Rule):
    """Store the constant matrix of a product in blocks along k, each with a scale and a zero point.

    Given:   y = MatMul(x, W)  or  Gemm(x, W, b)           W constant
    Result:  y = com.microsoft.MatMulNBits(x, W', s, z) (+ b)
    or, with `standard`, for any runtime that knows opset 21
             y = MatMul(x, DequantizeLinear(W', s, z, axis 0, block_size)) (+ b)
    which onnxruntime turns into MatMulNBits when it loads the file, as fast.

    It pays where few rows are multiplied at a time, because reading weights is what takes the time then.
    So where the rows are known to be many, 8 bits are refused, and 4 bits are multiplied in floats
    (accuracy level 0) and not in integers (level 4). `everything` takes small matrices and many rows too,
    for the size.
    """

    bits: int = 4
    block: int = 32
    standard: bool = False
    everything: bool = False

    name: ClassVar[str] = "quantize-weights"
    contract: ClassVar[Contract] = Contract.LOSSY
    op_types: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm")

    def __post_init__(self) -> None:
        if self.bits not in _BITS or self.block not in _BLOCKS:
            raise ValueError(f"{self.name}: bits is one of {_BITS}, block one of {_BLOCKS}")

    def apply(self, model: ir.Model) -> Outcome:
        if self.standard and opset(model) < _FIRST_OPSET:
            raise PassError(f"blocks need opset {_FIRST_OPSET}, the model has {opset(model)}: upgrade it")
        outcome = super().apply(model)
        import_microsoft(model)
        return outcome

    def rewrite(self, node: ir.Node) -> bool:
        weight = weights_of_product(node)
        if weight is None:
            return False
        rows = rows_of(node.inputs[0])
        if not (self.everything or pays(weight)):
            raise Refused("few weights are slower in blocks than in float")
        if self.bits == 8 and not self.everything and rows > _FEW_ROWS:
            raise Refused("many rows are slower with 8 bits in blocks than in float")
        product = self._standard(node, weight) if self.standard else self._blocked(node, weight, rows)
        product.type, product.shape = ir.TensorType(ir.DataType.FLOAT), node.outputs[0].shape
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            product = new_node(node, "Add", [product, bias], hint=f"{product.name}.biased")
            product.shape = node.outputs[0].shape
        replace(node.outputs[0], product)
        return True

    def _blocked(self, node: ir.Node, weight: Array, rows: int) -> ir.Value:
        integers, scale, zero_point = in_blocks(weight, self.block, self.bits)
        if self.bits == 4:
            integers, zero_point = packed(integers), packed(zero_point)
        in_floats = self.bits == 4 and rows > _FEW_ROWS
        attributes = {
            "K": weight.shape[0],
            "N": weight.shape[1],
            "bits": self.bits,
            "block_size": self.block,
            "accuracy_level": _IN_FLOATS if in_floats else _IN_INTEGERS,
        }
        constants = self._constants(node, integers, scale, zero_point)
        hint = f"{node.outputs[0].name}.product"
        return new_node(
            node, "MatMulNBits", [node.inputs[0], *constants], attributes, hint=hint, domain=MICROSOFT
        )

    def _standard(self, node: ir.Node, weight: Array) -> ir.Value:
        integers, scale, zero_point = in_blocks(weight, self.block, self.bits)
        kind = np.uint8 if self.bits == 8 else ml_dtypes.uint4
        rows = integers.reshape(len(integers), -1)[:, : len(weight)]
        constants = self._constants(node, rows.T.astype(kind), scale.T, zero_point.T.astype(kind))
        attributes = {"axis": 0, "block_size": self.block}
        name = node.outputs[0].name
        floats = new_node(node, "DequantizeLinear", constants, attributes, hint=f"{name}.weight")
        floats.type, floats.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weight.shape)
        return new_node(node, "MatMul", [node.inputs[0], floats], hint=f"{name}.product")

    def _constants(self, node: ir.Node, *arrays: Array) -> list[ir.Value]:
        name = "" if node.inputs[1] is None else node.inputs[1].name
        hints = ("quantized", "scale", "zero_point")
        return [
            new_initializer(graph_of(node), f"{name}.{hint}", a)
            for hint, a in zip(hints, arrays, strict=True)
        ]


def rows_of(value: ir.Value | None) -> int:
    """How many rows the first factor of a product has at least: a dimension that is not known counts as 1."""
    if value is None or value.shape is None:
        return 1
    return math.prod(d for d in tuple(value.shape)[:-1] if isinstance(d, int) and d > 0)
