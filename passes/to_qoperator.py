"""DequantizeLinear, an operator and QuantizeLinear become one operator on integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Refused, Rule
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    import_microsoft,
    new_initializer,
    new_node,
    only_user,
    replace,
    unique_name,
)
from edgewise.passes.grids import EIGHT_BITS, Grid, dequantizer
from edgewise.passes.insert_qdq import on_integers
from edgewise.passes.movers import CUTS, MOVERS
from edgewise.passes.qlinear import (
    NOT_INTEGERS,
    Operator,
    attributes_of,
    biased_product,
    integer_operator,
    is_biased_later,
    reshaped,
    third_input,
)
from edgewise.passes.quant_plan import LIMITS


@dataclass(frozen=True)
class ToQOperator(Rule):
    """Write QDQ groups in the QOperator format, in which integers go from operator to operator.

    Given:   y = Q(Relu(Conv(DQ(x), DQ(w), DQ(b))))   the grid of y ends at zero, b counts products
    Result:  y = QLinearConv(x, grid of x, w, grid of w, grid of y, b)

    Given:   y = Q(Transpose(DQ(x)))                       x and y on the same grid
    Result:  y = Transpose(x)

    Conv and MatMul become operators of the standard; Gemm, a MatMul with a bias, Add, Mul, Concat, Sigmoid,
    LeakyRelu and average pools become onnxruntime's own (domain com.microsoft), which its fusion of QDQ
    writes as well. Where it fuses all, the same comes out to the last bit; every operator by itself is one
    level of its grid away at most from what QDQ says in floats. A cut that the grid does not do becomes a
    Clip on integers. A MatMul or Gemm may give floats. What has no such operator keeps its Q and DQ.
    """

    name = "to-qoperator"
    contract: ClassVar[Contract] = Contract.LOSSY
    op_types: ClassVar[tuple[str, ...]] = (
        *("Conv", "MatMul", "Gemm", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu"),
        *("AveragePool", "GlobalAveragePool", *sorted(CUTS | MOVERS)),
    )

    def apply(self, model: ir.Model) -> Outcome:
        outcome = super().apply(model)
        import_microsoft(model)
        return outcome

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type in CUTS or node.op_type in MOVERS:
            return _move(node)
        if not _reads_integers(node):
            return False
        sink = _sink(node.outputs[0])
        _put(node, integer_operator(node, None if sink is None else sink.grid), sink)
        return True


@dataclass(frozen=True)
class _Sink:
    """Where a result becomes integers, and as integers the bounds of the Relu or Clip before that."""

    grid: Grid
    bounds: tuple[Array | None, ...] = ()


def _reads_integers(node: ir.Node) -> bool:
    """Whether `node` computes on integers; a MatMul whose bias comes behind it does so there."""
    if biased_product(node) is not None:
        return True
    return not is_biased_later(node) and any(map(dequantizer, node.inputs))


def _sink(value: ir.Value) -> _Sink | None:
    """Where `value` becomes integers, if it does and nothing else reads it."""
    reader, cut = only_user(value), None
    if reader is not None and reader.op_type in CUTS and reader.inputs[0] is value:
        reader, cut = only_user(reader.outputs[0]), reader
    if reader is None or reader.op_type != "QuantizeLinear":
        return None
    grid = Grid(reader)
    grid.require_tensor()
    return _Sink(grid, () if cut is None else _bounds(cut, grid))


def _put(node: ir.Node, operator: Operator, sink: _Sink | None) -> None:
    """Write the operator in front of `node`, and let its result be read."""
    source, sizes = node.outputs[0], operator.reshape
    hint = f"{source.name}.floats" if sink is None else f"{source.name}.integers"
    result = new_node(
        node, operator.op_type, operator.inputs, operator.attributes, hint=hint, domain=operator.domain
    )
    result.type = ir.TensorType(ir.DataType.FLOAT if sink is None else sink.grid.dtype)
    result.shape = ir.Shape([None, sizes[-1]]) if sizes else source.shape
    if sink is None:
        replace(source, result)
        return
    if sizes:
        result = reshaped(node, result, sizes)
    replace(sink.grid.integers, _cut(node, result, sink))


def _cut(node: ir.Node, result: ir.Value, sink: _Sink) -> ir.Value:
    """`result` behind a Clip on integers; `result` itself where the grid ends no later than the bounds."""
    ends = LIMITS[EIGHT_BITS[sink.grid.dtype]]
    if all(b is None or b == end for b, end in zip(sink.bounds, ends, strict=False)):
        return result
    cut = new_node(node, "Clip", [result, *_stored(node, sink.bounds)], hint=f"{result.name}.cut")
    cut.shape = result.shape
    return cut


def _bounds(cut: ir.Node, grid: Grid) -> tuple[Array | None, ...]:
    """The bounds of a Relu or Clip as integers."""
    if any(v is not None and constant_of(v) is None for v in cut.inputs[1:]):
        raise Refused("bounds are not constant")
    _, bounds = on_integers(cut, grid.plan())
    return tuple(b if isinstance(b, np.ndarray) else None for b in bounds)


def _move(node: ir.Node) -> bool:
    """Let an operator that moves or cuts elements read and give integers, if all are on one grid."""
    x = dequantizer(node.inputs[0])
    if x is None:
        return False
    x.require_tensor()
    read = [v for v in node.outputs if v.uses() or v.is_graph_output()]
    grids = [_quantizer(v) for v in read]
    if any(not y.equals(x) for y in grids):
        raise Refused("it moves elements to another grid")
    if node.op_type in CUTS:
        _bounds(node, x)
    if node.op_type == "Pad" and not _fills_with_constant(node):
        raise Refused("padding is not constant")
    op_type, operands = on_integers(node, x.plan())
    made = ir.node(
        op_type, [x.integers, *_stored(node, operands)], attributes_of(node), num_outputs=len(node.outputs)
    )
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name = unique_name(graph_of(node), f"{old.name}.integers")
        new.type, new.shape = ir.TensorType(x.dtype), old.shape
    graph_of(node).insert_before(node, made)
    moved = dict(zip(node.outputs, made.outputs, strict=True))
    for value, grid in zip(read, grids, strict=True):
        replace(grid.integers, moved[value])
    return True


def _quantizer(value: ir.Value) -> Grid:
    """The grid on which alone `value` is read."""
    reader = only_user(value)
    if reader is None or reader.op_type != "QuantizeLinear":
        raise Refused(NOT_INTEGERS)
    grid = Grid(reader)
    grid.require_tensor()
    return grid


def _fills_with_constant(node: ir.Node) -> bool:
    """Whether the number that a Pad fills with is known to be zero."""
    filler = third_input(node)
    if filler is None or attribute(node, "mode", "constant") != "constant":
        return True
    number = constant_of(filler)
    return number is not None and not number.any()


def _stored(node: ir.Node, operands: Sequence[ir.Value | Array | None]) -> list[ir.Value | None]:
    graph, hint = graph_of(node), f"{node.outputs[0].name}.bound"
    return [new_initializer(graph, hint, v) if isinstance(v, np.ndarray) else v for v in operands]
