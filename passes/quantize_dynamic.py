"""Integers whose grids are found at run time: no samples are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Pass, Refused, attempted, graphs_of
from edgewise.passes.graph import (
    MICROSOFT,
    Array,
    attribute,
    constant_of,
    import_microsoft,
    new_initializer,
    new_node,
    replace,
    unique_name,
)
from edgewise.passes.graph import opset as opset_of
from edgewise.passes.weight_grids import around_128

_FIRST_OPSET = 11  # that has DynamicQuantizeLinear
_MATRIX, _RECURRENT = 2**16, 2**17  # weights from which integers pay
_NARROW = 128  # columns of a matrix
_LSTM_INPUTS = 8


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Multiply by constant weights in 8 bits; the grid of the other factor is found at every run.

    Given:   y = MatMul(x, W)                              or Gemm(x, W, b), W constant
    Result:  y = Cast(MatMulInteger(q, W', z, 128)) * (s * w) (+ b)      q, s, z = DynamicQuantizeLinear(x)

    Given:   LSTM(x, W, R, ...)
    Result:  com.microsoft.DynamicQuantizeLSTM(x, W', R', ..., scales and zero points of W' and R')

    Readers of one value share its DynamicQuantizeLinear. onnxruntime runs all of it as one kernel
    (DynamicQuantizeMatMul, or MatMulIntegerToFloat where the integers are shared).

    Weights have a scale w for each output channel, and are uint8 with zero point 128: on x86 without
    VNNI the kernels for int8 weights add pairs of products in saturating 16 bits, those for uint8 in 32.

    Small layers stay in float: finding the grid costs what the product gains. `everything` takes them too,
    for the size.
    """

    everything: bool = False

    name: ClassVar[str] = "quantize-dynamic"
    contract: ClassVar[Contract] = Contract.LOSSY

    def apply(self, model: ir.Model) -> Outcome:
        editors = [_Editor(graph, self.everything, opset_of(model)) for graph in graphs_of(model)]
        outcome = attempted(edit for editor in editors for edit in editor.edits())
        import_microsoft(model)
        return outcome


@dataclass
class _Editor:
    """The rewrite of one graph, and what nodes share there."""

    graph: ir.Graph
    everything: bool
    opset: int
    grids: dict[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)
    stored: dict[tuple[ir.Value, bool, float], tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def edits(self) -> Iterator[Callable[[], bool]]:
        for node in [n for n in self.graph if n.domain == "" and n.op_type in ("MatMul", "Gemm", "LSTM")]:
            yield partial(self._rewrite, node)

    def _rewrite(self, node: ir.Node) -> bool:
        if node.op_type == "LSTM":
            return self._lstm(node)
        weight = weights_of_product(node)
        if weight is None:
            return False
        if not (self.everything or pays(weight)):
            raise Refused("few weights are slower in integers than in float")
        if self.opset < _FIRST_OPSET:
            raise Refused(f"needs opset {_FIRST_OPSET}")
        replace(node.outputs[0], self._product(node, weight))
        return True

    def _product(self, node: ir.Node, weight: Array) -> ir.Value:
        """The result of a MatMul or Gemm, from integers."""
        out, x, name = node.outputs[0], node.inputs[0], node.outputs[0].name
        assert x is not None
        q, scale, zero_point = self._grid(x, node)
        integers, weight_scale = self._weight(node, weight)
        centre = new_initializer(self.graph, f"{name}.zero_point", np.array(128, np.uint8))
        sums = new_node(node, "MatMulInteger", [q, integers, zero_point, centre], hint=f"{name}.sums")
        sums.type, sums.shape = ir.TensorType(ir.DataType.INT32), out.shape
        floats = new_node(node, "Cast", [sums], {"to": ir.DataType.FLOAT}, hint=f"{name}.floats")
        factor = new_node(node, "Mul", [scale, weight_scale], hint=f"{name}.scale")
        factor.shape = weight_scale.shape
        product = new_node(node, "Mul", [floats, factor], hint=f"{name}.product")
        floats.type = product.type = ir.TensorType(ir.DataType.FLOAT)
        floats.shape = product.shape = out.shape
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return product
        total = new_node(node, "Add", [product, node.inputs[2]], hint=f"{name}.biased")
        total.shape = out.shape
        return total

    def _grid(self, x: ir.Value, node: ir.Node) -> tuple[ir.Value, ...]:
        """`x` in uint8, its scale and its zero point: found once, in front of the first reader."""
        if x not in self.grids:
            kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            made = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            hints = ("quantized", "scale", "zero_point")
            for out, kind, hint in zip(made.outputs, kinds, hints, strict=True):
                out.name = unique_name(self.graph, f"{x.name}.{hint}")
                out.type, out.shape = ir.TensorType(kind), ir.Shape(())
            made.outputs[0].shape = x.shape
            self.graph.insert_before(node, made)
            self.grids[x] = tuple(made.outputs)
        return self.grids[x]

    def _weight(self, node: ir.Node, weight: Array) -> tuple[ir.Value, ir.Value]:
        """The integers (k, n) and scales (n) of a weight, once for all nodes that read it alike."""
        source = node.inputs[1]
        assert source is not None
        key = (source, bool(attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0)))
        if key not in self.stored:
            integers, scale = around_128(weight, (0,))
            self.stored[key] = (
                new_initializer(self.graph, f"{source.name}.quantized", integers),
                new_initializer(self.graph, f"{source.name}.scale", scale.reshape(-1)),
            )
        return self.stored[key]

    def _lstm(self, node: ir.Node) -> bool:
        """The LSTM on integers; its weights are transposed there: (directions, inputs, 4 units)."""
        weights = [constant_of(v) for v in node.inputs[1:3]]
        if any(w is None for w in weights):
            raise Refused("weight is not constant")
        arrays = [w for w in weights if w is not None]
        if any(w.dtype != np.float32 or not np.isfinite(w).all() for w in arrays):
            raise Refused("weight is not float32, or NaN or infinite")
        if attribute(node, "layout", 0) != 0:
            raise Refused("LSTM has the batch in front")
        if not self.everything and sum(w.size for w in arrays) < _RECURRENT:
            raise Refused("few weights are slower in integers than in float")
        self._write_lstm(node, arrays)
        return True

    def _write_lstm(self, node: ir.Node, weights: list[Array]) -> None:
        sources = list(node.inputs[1:3])
        inputs = [*node.inputs, *[None] * (_LSTM_INPUTS - len(node.inputs))]
        for index, (source, array) in enumerate(zip(sources, weights, strict=True)):
            name = "" if source is None else source.name
            integers, scale = around_128(array.transpose(0, 2, 1), (1,))
            zero_point = np.full(scale.shape, 128, np.uint8)
            inputs[1 + index] = new_initializer(self.graph, f"{name}.quantized", integers)
            inputs += [
                new_initializer(self.graph, f"{name}.scale", scale[:, 0]),
                new_initializer(self.graph, f"{name}.zero_point", zero_point[:, 0]),
            ]
        attributes = [a for key, a in node.attributes.items() if key != "layout"]
        twin = ir.Node(MICROSOFT, "DynamicQuantizeLSTM", inputs, attributes, num_outputs=len(node.outputs))
        self.graph.insert_before(node, twin)
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.name, new.type, new.shape = "", old.type, old.shape
            if old.name:
                new.name = unique_name(self.graph, f"{old.name}.quantized")
                replace(old, new)


def weights_of_product(node: ir.Node) -> Array | None:
    """The matrix (k, n) that a MatMul or Gemm multiplies by; None where it is not constant.

    Raises `Refused` where it is, and the node does more than x W + b.
    """
    array = constant_of(node.inputs[1])
    if array is None:
        return None
    if array.ndim != 2:
        raise Refused("weight is no matrix")
    if array.dtype != np.float32:
        raise Refused("weight is not float32")
    if array.size == 0 or not np.isfinite(array).all():
        raise Refused("weight is empty, NaN or infinite")
    if constant_of(node.inputs[0]) is not None:
        raise Refused("both factors are constant")
    if node.op_type == "MatMul":
        return array
    if attribute(node, "transA", 0):
        raise Refused("the first factor of Gemm is transposed")
    if attribute(node, "beta", 1.0) != 1:
        raise Refused("beta of Gemm is not 1")
    matrix, alpha = array.T if attribute(node, "transB", 0) else array, attribute(node, "alpha", 1.0)
    return matrix if alpha == 1 else matrix * np.float32(alpha)


def pays(weight: Array) -> bool:
    """Whether a matrix (k, n) is large enough for integers to be faster."""
    return bool(weight.size >= _MATRIX and weight.shape[1] >= _NARROW)
