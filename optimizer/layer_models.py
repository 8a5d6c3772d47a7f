"""Models of nothing but one layer, at many widths side by side, to time them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgewise.optimizer.width_table import Kind
from edgewise.passes.graph import constant_of
from edgewise.runtime.costs import Call, Operand
from edgewise.runtime.evaluate import Array
from edgewise.training.costs import Tensor

Grid = tuple[tuple[int, ...], ...]
Point = tuple[int, ...]

_IR_VERSION = 10
_EMPTY = 16
_SCALE = 0.02  # of quantized numbers: what they stand for does not matter
_FLOATS = {"float32": np.float32, "float16": np.float16, "float64": np.float64}


def points_of(grid: Grid) -> tuple[Point, ...]:
    """All combinations of widths, in C order."""
    return tuple(itertools.product(*grid))


def empty_nodes() -> ir.Model:
    """A model of nodes that do next to nothing."""
    x = ir.Value(name="x", shape=ir.Shape([1]), type=_type("float32"))
    outputs = [ir.Value(name=f"y{i}", type=_type("float32")) for i in range(_EMPTY)]
    nodes = [ir.Node("", "Neg", [x], outputs=[y], name=y.name) for y in outputs]
    return ir.Model(ir.Graph([x], outputs, nodes=nodes, opset_imports={"": 13}, name="empty"), ir_version=8)


def side_by_side(kind: Kind, points: Sequence[Point], opset: int, *, int8: bool = False) -> ir.Model | None:
    """A model with the layer at every point, each node called after its point; None if it cannot be made.

    Weights are drawn; data of one shape is one input. With `int8` a layer reads and writes what is quantized,
    and only Conv, ConvTranspose, Gemm and MatMul have such a form.
    """
    node = kind.layer.node
    if any(v is not None and t is None for v, t in zip(node.inputs, kind.layer.inputs, strict=True)):
        return None
    builder = _Builder(kind, int8 and node.op_type in _QUANTIZED)
    for point in points:
        builder.add(point)
    graph = ir.Graph(
        list(builder.inputs.values()),
        builder.outputs,
        nodes=builder.nodes,
        initializers=builder.initializers,
        opset_imports={"": opset},
        name="layers",
    )
    return ir.Model(graph, ir_version=_IR_VERSION)


_QUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class _Builder:
    """Collects the parts of the model."""

    def __init__(self, kind: Kind, int8: bool) -> None:
        self._kind, self._int8, self._rng = kind, int8, np.random.default_rng(0)
        self._data: dict[tuple[int, tuple[int, ...]], ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def add(self, point: Point) -> None:
        """The layer at one point."""
        layer = self._kind.layer
        call = layer.call(self._kind.widths(point))
        given = [
            None if tensor is None or operand is None else self._input(i, tensor, operand, str(point))
            for i, (tensor, operand) in enumerate(zip(layer.inputs, call.inputs, strict=True))
        ]
        outputs = [ir.Value(name=f"{point}.{i}", type=_type(o.dtype)) for i, o in enumerate(call.outputs)]
        kept = [a for a in layer.node.attributes.values() if a.name not in ("group", "hidden_size")]
        sizes = [ir.AttrInt64(name, size) for name, size in _sizes(call).items()]
        name = str(point)
        self.nodes.append(ir.Node("", layer.node.op_type, given, [*kept, *sizes], outputs=outputs, name=name))
        if self._int8:
            outputs = [self._through("uint8", outputs[0], name)]
        self.outputs += outputs

    def _input(self, index: int, tensor: Tensor, operand: Operand, name: str) -> ir.Value:
        stored = constant_of(tensor.value)
        if stored is not None:
            return self._constant(index, operand, stored, f"{name}.{index}")
        key = index, operand.shape
        if key not in self._data:
            name = f"x{index}.{'x'.join(map(str, operand.shape))}"
            value = ir.Value(name=name, shape=ir.Shape(operand.shape), type=_type(operand.dtype))
            self.inputs[name] = value
            self._data[key] = self._through("uint8", value, name) if self._int8 else value
        return self._data[key]

    def _constant(self, index: int, operand: Operand, stored: Array, name: str) -> ir.Value:
        if operand.dtype not in _FLOATS:
            return self._store(name, stored)
        if not self._int8:
            drawn = self._rng.normal(0, _SCALE, operand.shape).astype(_FLOATS[operand.dtype])
            return self._store(name, drawn)
        if index == 2:  # a bias, in the products' scale
            bias = self._rng.integers(-99, 99, operand.shape).astype(np.int32)
            return self._dequantized(self._store(name, bias), _SCALE**2, np.int32(0), name)
        weight = self._rng.integers(-64, 64, operand.shape).astype(np.int8)
        return self._dequantized(self._store(name, weight), _SCALE, np.int8(0), name)

    def _through(self, dtype: str, value: ir.Value, name: str) -> ir.Value:
        """The value quantized and back."""
        zero = np.array(128, np.uint8)
        scale = self._store(f"{name}.scale", np.array(_SCALE, np.float32))
        point = self._store(f"{name}.zero", zero)
        quantized = ir.Value(name=f"{name}.q", type=_type(dtype))
        self.nodes.append(ir.Node("", "QuantizeLinear", [value, scale, point], outputs=[quantized]))
        return self._dequantized(quantized, _SCALE, zero, name)

    def _dequantized(self, value: ir.Value, scale: float, zero: Array | np.generic, name: str) -> ir.Value:
        given = [value, self._store(f"{name}.s", np.array(scale, np.float32)), self._store(f"{name}.z", zero)]
        out = ir.Value(name=f"{name}.dq", type=_type("float32"))
        self.nodes.append(ir.Node("", "DequantizeLinear", given, outputs=[out]))
        return out

    def _store(self, name: str, array: Array | np.generic) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(np.shape(array))
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        self.initializers.append(value)
        return value


def _type(dtype: str) -> ir.TensorType:
    names = {"float32": "FLOAT", "float64": "DOUBLE"}
    return ir.TensorType(ir.DataType[names.get(dtype, dtype.upper())])


def _sizes(call: Call) -> dict[str, int]:
    """The attributes that follow from the widths."""
    data, weight = call.operand(0), call.operand(1)
    if data is None or weight is None:
        return {}
    if call.op_type == "Conv":
        return {"group": data.shape[1] // weight.shape[1]}
    if call.op_type == "ConvTranspose":
        return {"group": call.outputs[0].shape[1] // weight.shape[1]}
    state = call.operand(2) if call.op_type in ("LSTM", "GRU", "RNN") else None
    return {} if state is None else {"hidden_size": state.shape[2]}
