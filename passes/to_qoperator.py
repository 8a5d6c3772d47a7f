"""DequantizeLinear, an operator and QuantizeLinear become one operator on integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Refused, Rule
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    only_user,
    replace,
    static_shape,
    unique_name,
)
from edgewise.passes.insert_qdq import on_integers
from edgewise.passes.quant_plan import LIMITS, ValuePlan

MICROSOFT = "com.microsoft"

_MOVERS = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "GatherElements",
    "Identity",
    "MaxPool",
    "Pad",
    "ReduceMax",
    "ReduceMin",
    "Reshape",
    "Resize",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
_CUTS = ("Relu", "Clip")
_EIGHT_BITS = MappingProxyType({ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8"})
_BIAS_TOLERANCE = 1e-5  # a product of two float32 scales, rounded
_NOT_INTEGERS = "its result is read as floats"


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
        *("AveragePool", "GlobalAveragePool", *_CUTS, *_MOVERS),
    )

    def apply(self, model: ir.Model) -> Outcome:
        outcome = super().apply(model)
        if outcome.edits and any(n.domain == MICROSOFT for n in model.graph.all_nodes()):
            model.opset_imports.setdefault(MICROSOFT, 1)
        return outcome

    def rewrite(self, node: ir.Node) -> bool:
        if node.op_type in _CUTS or node.op_type in _MOVERS:
            return _move(node)
        product = _biased_product(node)
        if product is None and (_is_biased_later(node) or not any(map(_dequantizer, node.inputs))):
            return False
        sink = _sink(node.outputs[0])
        build = _BUILDERS[node.op_type] if product is None else _matmul_with_bias
        if sink is None and build not in (_gemm, _matmul, _matmul_with_bias):
            raise Refused(_NOT_INTEGERS)
        _put(node, build(node, sink), sink)
        return True


@dataclass(frozen=True)
class _Grid:
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
            return np.zeros_like(self.scale, _EIGHT_BITS.get(self.dtype, "int32"))
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
        if self.dtype not in _EIGHT_BITS:
            raise Refused("only 8 bits have such an operator")
        if self.scale.size != 1 or self.zero.size != 1:
            raise Refused("an activation has a scale for every channel")

    def plan(self) -> ValuePlan:
        return ValuePlan("", _EIGHT_BITS[self.dtype], (float(self.scale.item()),), int(self.zero.item()))

    def equals(self, other: _Grid) -> bool:
        return self.dtype == other.dtype and self.plan() == other.plan()


@dataclass(frozen=True)
class _Sink:
    """Where a result becomes integers, and as integers the bounds of the Relu or Clip before that."""

    grid: _Grid
    bounds: tuple[Array | None, ...] = ()


@dataclass(frozen=True)
class _Operator:
    """An operator to be written; where its result is a matrix, `reshape` is the shape it is to have."""

    op_type: str
    inputs: Sequence[ir.Value | None]
    domain: str = MICROSOFT
    attributes: Mapping[str, Any] = field(default_factory=dict)
    reshape: tuple[int, ...] = ()


def _dequantizer(value: ir.Value | None) -> _Grid | None:
    node = None if value is None else value.producer()
    return _Grid(node) if node is not None and node.op_type == "DequantizeLinear" else None


def _sink(value: ir.Value) -> _Sink | None:
    """Where `value` becomes integers, if it does and nothing else reads it."""
    reader, cut = only_user(value), None
    if reader is not None and reader.op_type in _CUTS and reader.inputs[0] is value:
        reader, cut = only_user(reader.outputs[0]), reader
    if reader is None or reader.op_type != "QuantizeLinear":
        return None
    grid = _Grid(reader)
    grid.require_tensor()
    return _Sink(grid, () if cut is None else _bounds(cut, grid))


def _read(node: ir.Node, *indices: int) -> list[_Grid]:
    """The grids of the inputs at these places, each of 8 bits."""
    grids = [_dequantizer(node.inputs[i]) for i in indices]
    found = [g for g in grids if g is not None]
    if len(found) < len(grids):
        raise Refused("an input is no DequantizeLinear")
    return found


def _alike(node: ir.Node, sink: _Sink | None, *indices: int) -> tuple[list[_Grid], _Grid]:
    """The grids of activations at `indices` and of the result, all of the same type."""
    assert sink is not None
    grids = _read(node, *indices)
    for grid in grids:
        grid.require_tensor()
    if any(g.dtype != sink.grid.dtype for g in grids):
        raise Refused("inputs and output are of different types")
    return grids, sink.grid


def _unary(node: ir.Node, sink: _Sink | None) -> _Operator:
    (x,), y = _alike(node, sink, 0)
    attributes = _attributes(node)
    if any(d != 1 for d in attributes.pop("dilations", ())):
        raise Refused("the windows are dilated")
    return _Operator(f"QLinear{node.op_type}", [*x.operands(), *y.parameters()], attributes=attributes)


def _binary(node: ir.Node, sink: _Sink | None) -> _Operator:
    (a, b), y = _alike(node, sink, 0, 1)
    return _Operator(f"QLinear{node.op_type}", [*a.operands(), *b.operands(), *y.parameters()])


def _concat(node: ir.Node, sink: _Sink | None) -> _Operator:
    parts, y = _alike(node, sink, *range(len(node.inputs)))
    operands = [v for part in parts for v in part.operands()]
    return _Operator("QLinearConcat", [*y.parameters(), *operands], attributes=_attributes(node))


def _factors(node: ir.Node, axis: int, rank: int | None = None) -> tuple[_Grid, _Grid]:
    """The grids of an activation and of what it is multiplied by, whose channels count along `axis`."""
    x, w = _read(node, 0, 1)
    x.require_tensor()
    if w.dtype not in _EIGHT_BITS or (x.dtype, w.dtype) == (ir.DataType.INT8, ir.DataType.UINT8):
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


def _bias(value: ir.Value | None, x: _Grid, w: _Grid, channels: int | None) -> ir.Value | None:
    """The int32 behind the bias `value`, which is in units of the products."""
    if value is None:
        return None
    bias = _dequantizer(value)
    if bias is None or bias.integers.dtype != ir.DataType.INT32:
        raise Refused("bias is not int32")
    units = x.scale.astype(np.float64).reshape(-1) * w.scale.reshape(-1)
    if bias.zero.any() or not np.allclose(bias.scale.reshape(-1), units, rtol=_BIAS_TOLERANCE, atol=0):
        raise Refused("bias is not in units of input and weight")
    if static_shape(bias.integers) != (channels,):
        raise Refused("bias is not one number a channel")
    return bias.integers


def _conv(node: ir.Node, sink: _Sink | None) -> _Operator:
    x, w = _factors(node, 0)
    if sink is None:
        raise Refused(_NOT_INTEGERS)
    bias = _bias(_third(node), x, w, _size(w.integers, 0))
    inputs = [*x.operands(), *w.operands(), *sink.grid.parameters(), bias]
    return _Operator("QLinearConv", inputs, "", _attributes(node))


def _gemm(node: ir.Node, sink: _Sink | None) -> _Operator:
    if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        raise Refused("alpha or beta is not 1")
    axis = 0 if attribute(node, "transB", 0) else 1
    x, w = _factors(node, axis)
    bias = _bias(_third(node), x, w, _size(w.integers, axis))
    attributes = {name: value for name, value in _attributes(node).items() if name != "beta"}
    return _Operator("QGemm", [*x.operands(), *w.operands(), bias, *_ends(sink)], attributes=attributes)


def _matmul(node: ir.Node, sink: _Sink | None) -> _Operator:
    x, w = _factors(node, -1)
    if w.scale.size > 1 and static_shape(w.integers) is not None and _rank(w.integers) != 2:
        raise Refused("weights have scales and are no matrix")
    if sink is not None:
        inputs = [*x.operands(), *w.operands(), *sink.grid.parameters()]
        return _Operator("QLinearMatMul", inputs, "")
    return _to_float(x, w, None)


def _to_float(x: _Grid, w: _Grid, bias: ir.Value | None) -> _Operator:
    (a, a_scale, a_zero), (b, b_scale, b_zero) = x.operands(), w.operands()
    return _Operator("MatMulIntegerToFloat", [a, b, a_scale, b_scale, a_zero, b_zero, bias])


def _matmul_with_bias(node: ir.Node, sink: _Sink | None) -> _Operator:
    """An Add of a row behind a MatMul: a Gemm, over rows that lie behind each other."""
    product = _biased_product(node)
    assert product is not None
    x, w = _factors(product, 1, rank=2)
    if _rank(w.integers) != 2:
        raise Refused("weight is no matrix")
    row = node.inputs[1] if node.inputs[0] is product.outputs[0] else node.inputs[0]
    depth, channels = _size(w.integers, 0), _size(w.integers, 1)
    bias = _bias(row, x, w, channels)
    rank = _rank(node.outputs[0])
    if rank == 2:
        return _Operator("QGemm", [*x.operands(), *w.operands(), bias, *_ends(sink)])
    if sink is None:
        return _to_float(x, w, row)
    rows = _flattened(node, x, depth)
    inputs = [rows, *x.parameters(), *w.operands(), bias, *_ends(sink)]
    return _Operator("QGemm", inputs, reshape=_sizes(node.outputs[0]))


def _flattened(node: ir.Node, x: _Grid, depth: int | None) -> ir.Value:
    """The integers of an activation as the rows of a matrix."""
    _sizes(node.outputs[0])  # refuses before the first edit
    return _reshaped(node, x.integers, (-1, depth or -1))


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """The shape for a Reshape, in which one dimension may be unknown."""
    sizes = () if value.shape is None else tuple(d if isinstance(d, int) else -1 for d in value.shape)
    if not sizes or sizes.count(-1) > 1 or 0 in sizes:
        raise Refused("more than one dimension is unknown")
    return sizes


def _reshaped(node: ir.Node, value: ir.Value, sizes: tuple[int, ...]) -> ir.Value:
    graph = graph_of(node)
    shape = new_initializer(graph, f"{value.name}.sizes", np.array(sizes, np.int64))
    made = ir.node("Reshape", [value, shape])
    shapes = ir.Shape([None if s < 0 else s for s in sizes])
    return _inserted(node, made, f"{value.name}.reshaped", value.dtype, shapes)


def _biased_product(node: ir.Node) -> ir.Node | None:
    """The MatMul of integers to whose rows an Add adds an int32 bias; nothing else reads it."""
    if node.op_type != "Add":
        return None
    for product, row in (node.inputs, node.inputs[::-1]):
        grid, matmul = _dequantizer(row), None if product is None else product.producer()
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


def _is_biased_later(node: ir.Node) -> bool:
    reader = only_user(node.outputs[0])
    return node.op_type == "MatMul" and reader is not None and _biased_product(reader) is node


_BUILDERS: Mapping[str, Callable[[ir.Node, _Sink | None], _Operator]] = MappingProxyType(
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


def _put(node: ir.Node, operator: _Operator, sink: _Sink | None) -> None:
    """Write the operator in front of `node`, and let its result be read."""
    source, sizes = node.outputs[0], operator.reshape
    shape = ir.Shape([None, sizes[-1]]) if sizes else source.shape
    made = ir.node(operator.op_type, operator.inputs, operator.attributes, domain=operator.domain)
    if sink is None:
        replace(source, _inserted(node, made, f"{source.name}.floats", ir.DataType.FLOAT, shape))
        return
    result = _inserted(node, made, f"{source.name}.integers", sink.grid.dtype, shape)
    if sizes:
        result = _reshaped(node, result, sizes)
    replace(sink.grid.integers, _cut(node, result, sink))


def _cut(node: ir.Node, result: ir.Value, sink: _Sink) -> ir.Value:
    """`result` behind a Clip on integers; `result` itself where the grid ends no later than the bounds."""
    ends = LIMITS[_EIGHT_BITS[sink.grid.dtype]]
    if all(b is None or b == end for b, end in zip(sink.bounds, ends, strict=False)):
        return result
    made = ir.node("Clip", [result, *_stored(node, sink.bounds)])
    return _inserted(node, made, f"{result.name}.cut", sink.grid.dtype, result.shape)


def _bounds(cut: ir.Node, grid: _Grid) -> tuple[Array | None, ...]:
    """The bounds of a Relu or Clip as integers."""
    if any(v is not None and constant_of(v) is None for v in cut.inputs[1:]):
        raise Refused("bounds are not constant")
    _, bounds = on_integers(cut, grid.plan())
    return tuple(b if isinstance(b, np.ndarray) else None for b in bounds)


def _move(node: ir.Node) -> bool:
    """Let an operator that moves or cuts elements read and give integers, if all are on one grid."""
    x = _dequantizer(node.inputs[0])
    if x is None:
        return False
    x.require_tensor()
    read = [v for v in node.outputs if v.uses() or v.is_graph_output()]
    grids = [_quantizer(v) for v in read]
    if any(not y.equals(x) for y in grids):
        raise Refused("it moves elements to another grid")
    if node.op_type in _CUTS:
        _bounds(node, x)
    if node.op_type == "Pad" and not _fills_with_constant(node):
        raise Refused("padding is not constant")
    op_type, operands = on_integers(node, x.plan())
    made = ir.node(
        op_type, [x.integers, *_stored(node, operands)], _attributes(node), num_outputs=len(node.outputs)
    )
    for old, new in zip(node.outputs, made.outputs, strict=True):
        new.name = unique_name(graph_of(node), f"{old.name}.integers")
        new.type, new.shape = ir.TensorType(x.dtype), old.shape
    graph_of(node).insert_before(node, made)
    moved = dict(zip(node.outputs, made.outputs, strict=True))
    for value, grid in zip(read, grids, strict=True):
        replace(grid.integers, moved[value])
    return True


def _quantizer(value: ir.Value) -> _Grid:
    """The grid on which alone `value` is read."""
    reader = only_user(value)
    if reader is None or reader.op_type != "QuantizeLinear":
        raise Refused(_NOT_INTEGERS)
    grid = _Grid(reader)
    grid.require_tensor()
    return grid


def _fills_with_constant(node: ir.Node) -> bool:
    """Whether the number that a Pad fills with is known to be zero."""
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    if filler is None or attribute(node, "mode", "constant") != "constant":
        return True
    number = constant_of(filler)
    return number is not None and not number.any()


def _stored(node: ir.Node, operands: Sequence[ir.Value | Array | None]) -> list[ir.Value | None]:
    graph, hint = graph_of(node), f"{node.outputs[0].name}.bound"
    return [new_initializer(graph, hint, v) if isinstance(v, np.ndarray) else v for v in operands]


def _inserted(
    node: ir.Node, made: ir.Node, hint: str, dtype: ir.DataType | None, shape: ir.Shape | None
) -> ir.Value:
    """`made` in front of `node`; its output."""
    output = made.outputs[0]
    output.name = unique_name(graph_of(node), hint)
    output.type, output.shape = None if dtype is None else ir.TensorType(dtype), shape
    graph_of(node).insert_before(node, made)
    return output


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute(node, name) for name in node.attributes}


def _third(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _ends(sink: _Sink | None) -> list[ir.Value | None]:
    """The grid of the result as operands; without one it is given in floats."""
    return [] if sink is None else sink.grid.parameters()


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise Refused("rank is unknown")
    return len(value.shape)


def _size(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None
