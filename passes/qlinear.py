"""Operators on integers, for what stands between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import (
    MICROSOFT,
    attribute,
    graph_of,
    new_initializer,
    new_node,
    only_user,
    static_shape,
)
from edgewise.passes.grids import EIGHT_BITS, Grid, dequantizer

NOT_INTEGERS = "its result is read as floats"
"""Why a node is refused whose operator on integers gives only integers."""

_BIAS_TOLERANCE = 1e-5  # a product of two float32 scales, rounded


@dataclass(frozen=True)
class Operator:
    """An operator to be written; where its result is a matrix, `reshape` is the shape it is to have."""

    op_type: str
    inputs: Sequence[ir.Value | None]
    domain: str = MICROSOFT
    attributes: Mapping[str, Any] = field(default_factory=dict)
    reshape: tuple[int, ...] = ()


def integer_operator(node: ir.Node, y: Grid | None) -> Operator:
    """The operator that does the work of `node` on integers and gives those of the grid `y`, or else floats.

    Raises `Refused` where there is none. A Reshape of its input may have been put in front of `node`.
    """
    build = _matmul_with_bias if biased_product(node) is not None else _BUILDERS[node.op_type]
    return build(node, y)


def _read(node: ir.Node, *indices: int) -> list[Grid]:
    """The grids of the inputs at these places, each of 8 bits."""
    grids = [dequantizer(node.inputs[i]) for i in indices]
    found = [g for g in grids if g is not None]
    if len(found) < len(grids):
        raise Refused("an input is no DequantizeLinear")
    return found


def _alike(node: ir.Node, y: Grid | None, *indices: int) -> tuple[list[Grid], Grid]:
    """The grids of activations at `indices` and of the result, all of the same type."""
    if y is None:
        raise Refused(NOT_INTEGERS)
    grids = _read(node, *indices)
    for grid in grids:
        grid.require_tensor()
    if any(g.dtype != y.dtype for g in grids):
        raise Refused("inputs and output are of different types")
    return grids, y


def _unary(node: ir.Node, y: Grid | None) -> Operator:
    (x,), y = _alike(node, y, 0)
    attributes = attributes_of(node)
    if any(d != 1 for d in attributes.pop("dilations", ())):
        raise Refused("the windows are dilated")
    return Operator(f"QLinear{node.op_type}", [*x.operands(), *y.parameters()], attributes=attributes)


def _binary(node: ir.Node, y: Grid | None) -> Operator:
    (a, b), y = _alike(node, y, 0, 1)
    return Operator(f"QLinear{node.op_type}", [*a.operands(), *b.operands(), *y.parameters()])


def _concat(node: ir.Node, y: Grid | None) -> Operator:
    parts, y = _alike(node, y, *range(len(node.inputs)))
    operands = [v for part in parts for v in part.operands()]
    return Operator("QLinearConcat", [*y.parameters(), *operands], attributes=attributes_of(node))


def _factors(node: ir.Node, axis: int, rank: int | None = None) -> tuple[Grid, Grid]:
    """The grids of an activation and of what it is multiplied by, whose channels count along `axis`."""
    x, w = _read(node, 0, 1)
    x.require_tensor()
    if w.dtype not in EIGHT_BITS or (x.dtype, w.dtype) == (ir.DataType.INT8, ir.DataType.UINT8):
        raise Refused("weights are of a type that is not multiplied")
    if attribute(w.node, "block_size", 0):
        raise Refused("weights have a scale for every block")
    if w.scale.size > 1:
        shape = static_shape(w.integers)
        if shape is None or (rank is not None and len(shape) != rank):
            raise Refused("weights have scales and no known shape")
        if attribute(w.node, "axis", 1) % len(shape) != axis % len(shape):
            raise Refused("weights have scales along another axis than their channels")
    return x, w


def _bias(value: ir.Value | None, x: Grid, w: Grid, channels: int | None) -> ir.Value | None:
    """The int32 behind the bias `value`, which is in units of the products."""
    if value is None:
        return None
    bias = dequantizer(value)
    if bias is None or bias.integers.dtype != ir.DataType.INT32:
        raise Refused("bias is not int32")
    units = x.scale.astype(np.float64).reshape(-1) * w.scale.reshape(-1)
    if bias.zero.any() or not np.allclose(bias.scale.reshape(-1), units, rtol=_BIAS_TOLERANCE, atol=0):
        raise Refused("bias is not in units of input and weight")
    if static_shape(bias.integers) != (channels,):
        raise Refused("bias is not one number a channel")
    return bias.integers


def _conv(node: ir.Node, y: Grid | None) -> Operator:
    if y is None:
        raise Refused(NOT_INTEGERS)
    x, w = _factors(node, 0)
    bias = _bias(third_input(node), x, w, _size(w.integers, 0))
    inputs = [*x.operands(), *w.operands(), *y.parameters(), bias]
    return Operator("QLinearConv", inputs, "", attributes_of(node))


def _gemm(node: ir.Node, y: Grid | None) -> Operator:
    if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        raise Refused("alpha or beta is not 1")
    axis = 0 if attribute(node, "transB", 0) else 1
    x, w = _factors(node, axis)
    bias = _bias(third_input(node), x, w, _size(w.integers, axis))
    attributes = {name: value for name, value in attributes_of(node).items() if name != "beta"}
    return Operator("QGemm", [*x.operands(), *w.operands(), bias, *_ends(y)], attributes=attributes)


def _matmul(node: ir.Node, y: Grid | None) -> Operator:
    x, w = _factors(node, -1)
    if w.scale.size > 1 and static_shape(w.integers) is not None and _rank(w.integers) != 2:
        raise Refused("weights have scales and are no matrix")
    if y is not None:
        inputs = [*x.operands(), *w.operands(), *y.parameters()]
        return Operator("QLinearMatMul", inputs, "")
    return _to_float(x, w, None)


def _to_float(x: Grid, w: Grid, bias: ir.Value | None) -> Operator:
    (a, a_scale, a_zero), (b, b_scale, b_zero) = x.operands(), w.operands()
    return Operator("MatMulIntegerToFloat", [a, b, a_scale, b_scale, a_zero, b_zero, bias])


def _matmul_with_bias(node: ir.Node, y: Grid | None) -> Operator:
    """An Add of a row behind a MatMul: a Gemm, over rows that lie behind each other."""
    product = biased_product(node)
    assert product is not None
    x, w = _factors(product, 1, rank=2)
    if _rank(w.integers) != 2:
        raise Refused("weight is no matrix")
    row = node.inputs[1] if node.inputs[0] is product.outputs[0] else node.inputs[0]
    depth, channels = _size(w.integers, 0), _size(w.integers, 1)
    bias = _bias(row, x, w, channels)
    rank = _rank(node.outputs[0])
    if rank == 2:
        return Operator("QGemm", [*x.operands(), *w.operands(), bias, *_ends(y)])
    if y is None:
        return _to_float(x, w, row)
    sizes = _sizes(node.outputs[0])  # refuses before the first edit
    rows = reshaped(node, x.integers, (-1, depth or -1))
    inputs = [rows, *x.parameters(), *w.operands(), bias, *_ends(y)]
    return Operator("QGemm", inputs, reshape=sizes)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """The shape for a Reshape, in which one dimension may be unknown."""
    sizes = () if value.shape is None else tuple(d if isinstance(d, int) else -1 for d in value.shape)
    if not sizes or sizes.count(-1) > 1 or 0 in sizes:
        raise Refused("more than one dimension is unknown")
    return sizes


def reshaped(node: ir.Node, value: ir.Value, sizes: tuple[int, ...]) -> ir.Value:
    """`value` in another shape, one size of which may be -1, for `node` or a reader of it."""
    shape = new_initializer(graph_of(node), f"{value.name}.sizes", np.array(sizes, np.int64))
    result = new_node(node, "Reshape", [value, shape], hint=f"{value.name}.reshaped")
    result.shape = ir.Shape([None if s < 0 else s for s in sizes])
    return result


def biased_product(node: ir.Node) -> ir.Node | None:
    """The MatMul of integers to whose rows an Add adds an int32 bias; nothing else reads it."""
    if node.op_type != "Add":
        return None
    for product, row in (node.inputs, node.inputs[::-1]):
        grid, matmul = dequantizer(row), None if product is None else product.producer()
        if (
            product is not None
            and matmul is not None
            and matmul.op_type == "MatMul"
            and only_user(product) is node
            and grid is not None
            and grid.integers.dtype == ir.DataType.INT32
        ):
            return matmul
    return None


def is_biased_later(node: ir.Node) -> bool:
    reader = only_user(node.outputs[0])
    return node.op_type == "MatMul" and reader is not None and biased_product(reader) is node


_BUILDERS: Mapping[str, Callable[[ir.Node, Grid | None], Operator]] = MappingProxyType(
    {
        "Conv": _conv,
        "MatMul": _matmul,
        "Gemm": _gemm,
        "Add": _binary,
        "Mul": _binary,
        "Concat": _concat,
        "Sigmoid": _unary,
        "LeakyRelu": _unary,
        "AveragePool": _unary,
        "GlobalAveragePool": _unary,
    }
)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    return {name: attribute(node, name) for name in node.attributes}


def third_input(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _ends(y: Grid | None) -> list[ir.Value | None]:
    """The grid of the result as operands; without one it is given in floats."""
    return [] if y is None else y.parameters()


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise Refused("rank is unknown")
    return len(value.shape)


def _size(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None
