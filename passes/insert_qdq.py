"""Write a quantization plan into the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import yaml

from edgewise.passes.base import Contract, Outcome, Pass, PassError
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    drop_unused_initializer,
    forget_names,
    opset,
    remove_if_unused,
    replace,
)
from edgewise.passes.quant_plan import LARGEST, LIMITS, SMALLEST, QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError

_TYPES: Mapping[str, ir.DataType] = MappingProxyType({name: ir.DataType[name.upper()] for name in LIMITS})
_SIXTEEN_BITS = frozenset({"int16", "uint16"})
_FIRST_WITH_SIXTEEN_BITS = 21
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Surround the nodes of a plan with QuantizeLinear (Q) and DequantizeLinear (DQ).

    Given:   y = Relu(Conv(x, W, b))                   with grids for x, W, b and y in the plan
    Result:  y' = DQ(Q(Relu(Conv(DQ(Q(x)), DQ(W'), DQ(b')))))    W' in int8, b' in int32; y' is read for y

    A runtime fuses each node with the DQs before and the Q behind it into one kernel on integers. What
    comes out of float is still read as it was by readers in float.

    Activations of 16 bits take the operators of opset 21, and below it onnxruntime's own (domain
    com.microsoft).
    """

    plan: QuantPlan = field(default_factory=QuantPlan)

    name: ClassVar[str] = "insert-qdq"
    contract: ClassVar[Contract] = Contract.LOSSY

    def apply(self, model: ir.Model) -> Outcome:
        if not self.plan.quantized:
            return Outcome()
        if opset(model) < 13:
            raise PassError(f"int8 needs opset 13, the model has {opset(model)}: upgrade it first")
        older = opset(model) < _FIRST_WITH_SIXTEEN_BITS
        if older and any(v.dtype in _SIXTEEN_BITS for v in self.plan.values):
            model.opset_imports.setdefault(_MICROSOFT, 1)
        return _Writer(model.graph, self.plan, _MICROSOFT if older else "").write()

    @property
    def spec(self) -> str:
        if self.plan == QuantPlan():
            return self.name
        options = {"plan": self.plan.to_dict()}
        return self.name + yaml.safe_dump(options, default_flow_style=True, width=2**31).strip()

    @property
    def label(self) -> str:
        """A plan fills pages."""
        return self.name

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Pass:
        for key in options:
            if key != "plan":
                raise ValueError(f"{cls.name} has no option {key!r}, only ['plan']")
        try:
            return cls(QuantPlan.from_dict(options.get("plan", {})))
        except InputError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class _Pair:
    """A value as integers, and as the floats they stand for."""

    integers: ir.Value
    floats: ir.Value
    grid: ValuePlan


class _Editor:
    """Adds nodes and initializers to a graph under free names, which are looked up once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._names = {
            v.name for g in (graph, *graph.subgraphs()) for v in (*g.inputs, *g.initializers.values())
        }
        self._names |= {v.name for n in graph.all_nodes() for v in n.outputs}
        self._shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def name(self, hint: str) -> str:
        name, n = hint, 1
        while name in self._names:
            name, n = f"{hint}_{n}", n + 1
        self._names.add(name)
        return name

    def stored(self, array: Array, hint: str) -> ir.Value:
        """An initializer of its own."""
        tensor = ir.tensor(np.asarray(array, order="C"), name=self.name(hint))
        shape, dtype = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=shape, type=dtype, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def shared(self, array: Array, hint: str) -> ir.Value:
        """One initializer for all that hold the same numbers."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.stored(array, f"quantization.{hint}")
        return self._shared[key]

    def insert(
        self, node: ir.Node, after: ir.Node | None, name: str, dtype: ir.DataType, shape: ir.Shape | None
    ) -> ir.Value:
        """Put `node` behind `after`, or in front of everything, and return its output."""
        output = node.outputs[0]
        output.name, output.type, output.shape = self.name(name), ir.TensorType(dtype), shape
        if after is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(after, node)
        return output


class _Writer:
    """One application of a plan to a graph."""

    def __init__(self, graph: ir.Graph, plan: QuantPlan, sixteen_bits: str) -> None:
        self._graph = graph
        self._sixteen_bits = sixteen_bits  # the domain that has operators of 16 bits
        self._editor = _Editor(graph)
        self._grids = {v.name: v for v in plan.values}
        self._nodes = plan.quantized
        self._pairs: dict[ir.Value, _Pair] = {}  # by the value itself and by the floats read for it

    def write(self) -> Outcome:
        refused = Counter[str]()
        known = {n.outputs[0].name: n for n in self._graph if n.outputs}
        pending = []
        for plan in self._nodes:
            node = known.get(plan.output)
            if node is None or node.op_type != plan.op_type:
                refused["not in the model"] += 1
            elif _is_quantized(node):
                refused["already quantized"] += 1
            else:
                pending.append((node, plan.form))
        for node, form in pending:
            self._write(node, form)
        forget_names(self._graph)  # the editor has given names of its own
        return Outcome(len(pending), MappingProxyType(dict(refused)))

    def _write(self, node: ir.Node, form: str) -> None:
        source = node.inputs[0]
        pair = None if source is None or form == "int8" else self._pair_of(source)
        if pair is None:
            self._surround(node)
        elif form == "integer":
            self._run_on_integers(node, pair)
        else:
            replace(node.outputs[0], pair.floats)

    def _surround(self, node: ir.Node) -> None:
        """Let `node`, and the readers of its outputs, read what integers stand for."""
        for index, value in enumerate(node.inputs):
            pair = None if value is None else self._bias_pair(node, index, value) or self._pair_of(value)
            if value is not None and pair is not None:
                node.replace_input_with(index, pair.floats)
                _drop_unused(value)
        for output in node.outputs:
            if (grid := self._grids.get(output.name or "")) is not None:
                self._write_as_pair(output, grid)

    def _pair_of(self, value: ir.Value) -> _Pair | None:
        """The pair for `value`, made if need be; None if the plan wants none."""
        grid = self._grids.get(value.name or "")
        if value not in self._pairs and grid is not None and grid.dtype != "int32":
            array = constant_of(value)
            pair = self._new_pair(value, grid) if array is None else self._stored_pair(array, grid)
            self._pairs[value] = self._pairs[pair.floats] = pair
        return self._pairs.get(value)

    def _bias_pair(self, node: ir.Node, index: int, value: ir.Value) -> _Pair | None:
        """The pair for a bias, in units of the products it is added to: by `node`, or by an Add behind it."""
        grid, array = self._grids.get(value.name or ""), constant_of(value)
        if grid is None or grid.dtype != "int32" or array is None:
            return None
        product = node if index == 2 else _producer(node.inputs[1 - index])
        factors = [None if v is None else self._pairs.get(v) for v in product.inputs[:2]]
        inputs, weights = (None if f is None else f.grid for f in factors)
        if inputs is None or weights is None:
            return None
        scale = tuple(inputs.scale[0] * s for s in weights.scale)
        if not all(SMALLEST <= s <= LARGEST for s in scale):
            raise PassError(f"scales of {inputs.name!r} and {weights.name!r} have a product beyond float32")
        axis = None if weights.axis is None else 0
        row = np.broadcast_to(array.reshape(-1), max(array.size, len(scale)))
        return self._stored_pair(row, ValuePlan(grid.name, "int32", scale, axis=axis))

    def _write_as_pair(self, value: ir.Value, grid: ValuePlan) -> None:
        """Let all that read `value` read its pair; a graph output keeps its name."""
        pair = self._new_pair(value, grid)
        self._pairs[pair.floats] = pair
        if value.is_graph_output():
            name, value.name = value.name, self._editor.name(f"{value.name}.float")
            pair.floats.name = name
        value.replace_all_uses_with(pair.floats, replace_graph_outputs=True)
        _producer(pair.integers).replace_input_with(0, value)

    def _new_pair(self, value: ir.Value, grid: ValuePlan) -> _Pair:
        if grid.axis is not None:
            raise PassError(
                f"the plan has an axis for {grid.name!r}, which is no constant: give it one scale"
            )
        node = ir.node("QuantizeLinear", [value, *self._parameters(grid)], domain=self._domain(grid))
        name, dtype = f"{grid.name}.quantized", _TYPES[grid.dtype]
        integers = self._editor.insert(node, value.producer(), name, dtype, value.shape)
        return self._dequantized(integers, grid, grid.name)

    def _stored_pair(self, array: Array, grid: ValuePlan) -> _Pair:
        """A constant as integers in the file."""
        if grid.axis is not None and array.shape[grid.axis : grid.axis + 1] != (len(grid.scale),):
            raise PassError(f"the plan has {len(grid.scale)} scales for {grid.name!r} of shape {array.shape}")
        scale = np.array(grid.scale).reshape([-1 if i == grid.axis else 1 for i in range(array.ndim)])
        integers = (np.rint(array / scale) + grid.zero_point).clip(*LIMITS[grid.dtype]).astype(grid.dtype)
        return self._dequantized(self._editor.stored(integers, f"{grid.name}.quantized"), grid, grid.name)

    def _dequantized(self, integers: ir.Value, grid: ValuePlan, name: str) -> _Pair:
        axis = {} if grid.axis is None else {"axis": grid.axis}
        node = ir.node(
            "DequantizeLinear", [integers, *self._parameters(grid)], axis, domain=self._domain(grid)
        )
        name, dtype = f"{name}.dequantized", ir.DataType.FLOAT
        floats = self._editor.insert(node, integers.producer(), name, dtype, integers.shape)
        return _Pair(integers, floats, grid)

    def _domain(self, grid: ValuePlan) -> str:
        return self._sixteen_bits if grid.dtype in _SIXTEEN_BITS else ""

    def _parameters(self, grid: ValuePlan) -> list[ir.Value]:
        """Scale and zero point, as scalars or one a channel; a bias has no zero point."""
        shape = () if grid.axis is None else (len(grid.scale),)
        scale = self._editor.shared(np.array(grid.scale, np.float32).reshape(shape), "scale")
        zero_point = np.full(shape, grid.zero_point, grid.dtype)
        if grid.dtype == "int32":
            return [scale]
        if grid.axis is None:
            return [scale, self._editor.shared(zero_point, "zero_point")]
        # onnxruntime's session.x64quantprecision fails where weights share a zero point
        return [scale, self._editor.stored(zero_point, f"{grid.name}.zero_point")]

    def _run_on_integers(self, node: ir.Node, pair: _Pair) -> None:
        """Write `node` as one that is given the integers, and dequantize what it gives."""
        output = node.outputs[0]
        op_type, operands = on_integers(node, pair.grid)
        inputs = [self._editor.shared(v, "constant") if isinstance(v, np.ndarray) else v for v in operands]
        attributes = {name: attr.value for name, attr in node.attributes.items()}
        twin = ir.node(op_type, [pair.integers, *inputs], attributes)
        name, dtype = f"{output.name}.quantized", _TYPES[pair.grid.dtype]
        integers = self._editor.insert(twin, node, name, dtype, output.shape)
        moved = self._dequantized(integers, pair.grid, output.name or "")
        self._pairs[moved.floats] = moved
        replace(output, moved.floats)


def on_integers(node: ir.Node, grid: ValuePlan) -> tuple[str, Sequence[ir.Value | Array | None]]:
    """The operator, and its operands behind the first, that do on integers what `node` does on floats."""
    rest = node.inputs[1:]
    if node.op_type == "Pad" and attribute(node, "mode", "constant") == "constant":
        return "Pad", [rest[0], _integers(grid, 0.0), *rest[2:]]
    if node.op_type == "Relu":
        return "Clip", [_integers(grid, 0.0)]
    if node.op_type == "Clip":
        bounds = [constant_of(v) for v in rest]
        return "Clip", [None if b is None else _integers(grid, float(b.reshape(()))) for b in bounds]
    return node.op_type, rest


def _integers(grid: ValuePlan, number: float) -> Array:
    """`number` on the grid of an activation, as a scalar; the end of the grid if it lies outside."""
    low, high = LIMITS[grid.dtype]
    level = np.clip(number / grid.scale[0], low - grid.zero_point, high - grid.zero_point)
    return np.array(np.rint(level) + grid.zero_point).astype(grid.dtype)


def _is_quantized(node: ir.Node) -> bool:
    """Whether `node` reads or writes what is already on a grid."""
    sources = (v.producer() for v in node.inputs if v is not None)
    readers = (use.node for v in node.outputs for use in v.uses())
    return any(n is not None and n.op_type == "DequantizeLinear" for n in sources) or any(
        n.op_type == "QuantizeLinear" for n in readers
    )


def _producer(value: ir.Value | None) -> ir.Node:
    """The node that makes `value`, where it is known that one does."""
    producer = None if value is None else value.producer()
    if producer is None:
        raise PassError(f"the plan takes {None if value is None else value.name!r} for the result of a node")
    return producer


def _drop_unused(value: ir.Value) -> None:
    """Remove a constant that nothing reads any more."""
    if value.producer() is None:
        drop_unused_initializer(value)
    elif constant_of(value) is not None:
        remove_if_unused(_producer(value))
