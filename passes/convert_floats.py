"""The whole model in float16 or bfloat16, but for what needs float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Pass, Refused, bodies_of, graphs_of
from edgewise.passes.graph import (
    Array,
    constant_of,
    drop_unused_initializer,
    new_initializer,
    opset,
    remove_if_unused,
    unique_name,
)
from edgewise.passes.infer_shapes import InferShapes
from edgewise.runtime.kernels import types_of_kernel

_KINDS: Mapping[str, tuple[ir.DataType, type]] = MappingProxyType(
    {
        "float16": (ir.DataType.FLOAT16, np.float16),
        "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
    }
)
_LOSS = 0.01  # of a constant's largest element, that its rounding may move any of them
_COARSE = frozenset(
    {"CumSum", "Exp", "GridSample", "NonMaxSuppression", "Pow", "Range", "ReduceL2", "ReduceLogSum"}
    | {"ReduceLogSumExp", "ReduceProd", "ReduceSum", "ReduceSumSquare", "RoiAlign", "Softplus"}
)
"""Operators whose results grow beyond float16, or are coordinates and counts that it does not resolve."""
_DIVISORS = frozenset({"Div", "Pow", "Reciprocal", "Log", "Sqrt", "Mod", "BatchNormalization"})
"""Operators for which every element of a constant has to be held, not just the largest."""
_BOUNDED = frozenset(
    {"ArgMax", "ArgMin", "Erf", "Greater", "Hardmax", "HardSigmoid", "InstanceNormalization"}
    | {"LayerNormalization", "Less", "LogSoftmax", "Sigmoid", "Softmax", "Softsign", "Tanh"}
)
"""Operators that give small numbers, however large those are that they get."""
_MOVERS = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class ConvertFloats(Pass):
    """Compute in float16 or bfloat16 what can be; inputs and outputs stay as they are.

    Given:   y = Relu(Conv(x, W))
    Result:  y = Cast(Relu(Conv(Cast(x), W')))             W' in 16 bits, Casts to 16 bits and back

    A node stays in float32, with the reason, where
    - the operator's schema, or with `provider` its kernels in the installed onnxruntime, know no such type;
    - its results leave the range of float16, or count or locate what 11 bits do not tell apart (`_COARSE`);
    - it reads a constant that float16 does not hold: above 65504, or so small that 1 % of it is lost;
    - it reads what was computed from such a constant (until a Softmax or the like bounds what is large, and
      until what is small was divided by), or a value named in `keep`: names, separated by commas, of values
      that were observed to exceed the range;
    - it is an If, Loop or Scan: what goes in and out of bodies is float32, in them is 16 bits.

    What only moves data follows its source. Every value has one type, and one Cast for all that read it as
    the other. A model that is quantized already is left alone.
    """

    to: str = "float16"
    keep: str = ""
    provider: str = ""

    name: ClassVar[str] = "convert-floats"
    contract: ClassVar[Contract] = Contract.LOSSY

    def __post_init__(self) -> None:
        if self.to not in _KINDS:
            raise ValueError(f"{self.name}: to is one of {', '.join(_KINDS)}")

    def apply(self, model: ir.Model) -> Outcome:
        graphs = graphs_of(model)
        if count := sum(_is_quantized(n) for g in graphs for n in g):
            return Outcome(0, MappingProxyType({"the model is quantized already": count}))
        InferShapes().apply(model)
        ports, refused = _Choice(self, opset(model)).of(graphs)
        _Writer(_KINDS[self.to], ports).write(graphs)
        return Outcome(len(ports), MappingProxyType(dict(refused)))


@dataclass(frozen=True)
class _Ports:
    """The inputs and outputs of a node, by index, that change their type."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class _Choice:
    """Which nodes are converted, and why the others are not."""

    options: ConvertFloats
    opset: int
    wide: set[ir.Value] = field(default_factory=set)
    """Values that may exceed the range of float16."""
    fine: set[ir.Value] = field(default_factory=set)
    """Values that may be zero in float16 and are not; the root or reciprocal of one is likewise."""

    def of(self, graphs: list[ir.Graph]) -> tuple[dict[ir.Node, _Ports], Counter[str]]:
        kept = {name.strip() for name in self.options.keep.split(",")} - {""}
        ports, refused, halved = dict[ir.Node, _Ports](), Counter[str](), set[ir.Value | None]()
        for node in (node for graph in graphs for node in graph):
            if not any(map(_is_float32, [*node.inputs, *node.outputs])) or node.op_type == "Constant":
                continue
            try:
                if any(v.name in kept for v in node.outputs):
                    self.wide.update(node.outputs)
                    raise Refused("kept: its results exceed the range")
                found = self._ports(node)
            except Refused as refusal:
                refused[str(refusal)] += 1
                continue
            if found.inputs and (node.op_type not in _MOVERS or halved.intersection(node.inputs)):
                ports[node] = found
                halved.update(node.outputs[i] for i in found.outputs)
        return ports, refused

    def _ports(self, node: ir.Node) -> _Ports:
        """What can be converted of `node`; `Refused` with the reason where it stays as it is."""
        if node.op_type == "Cast":
            return _Ports((), ())
        if node.domain != "" or any(True for _ in bodies_of(node)):
            raise Refused(f"{node.op_type} stays in float32")
        if any(v is not None and v.name and v.type is None for v in [*node.inputs, *node.outputs]):
            raise Refused("a type is not known")
        if self.options.to == "float16":
            self._check_range(node)
        if node.op_type in _COARSE:
            raise Refused(f"{node.op_type} exceeds 16 bits")
        inputs, outputs = _variables(node, self.opset, self.options.to, self.options.provider)
        if any(attr in node.attributes for attr in ("dtype", "output_datatype")):
            raise Refused(f"{node.op_type} writes a type of its own")
        return _Ports(
            tuple(i for i, v in enumerate(node.inputs) if _is_float32(v) and _at(inputs, i)),
            tuple(i for i, v in enumerate(node.outputs) if _is_float32(v) and _at(outputs, i)),
        )

    def _check_range(self, node: ir.Node) -> None:
        arrays = [a for v in node.inputs if _is_float32(v) and (a := constant_of(v)) is not None]
        if any(v in self.wide for v in node.inputs) or any(map(_overflows, arrays)):
            if node.op_type not in _BOUNDED:
                self.wide.update(node.outputs)
            raise Refused("a number may exceed float16")
        if any(_vanishes(a, each=node.op_type in _DIVISORS) for a in arrays):
            self.fine.update(node.outputs)
            raise Refused("a constant is too small for float16")
        if any(v in self.fine for v in node.inputs):
            if node.op_type in _DIVISORS:
                self.fine.update(node.outputs)
            raise Refused("a number may be too small for float16")


def _overflows(array: Array) -> bool:
    """Whether float16 makes an infinity of a finite number."""
    return bool(np.any(np.isfinite(array) & (np.abs(array) > float(np.finfo(np.float16).max))))


def _vanishes(array: Array, *, each: bool) -> bool:
    """Whether float16 loses 1 % of the largest element, or with `each` of any: below 6e-8 it has only 0."""
    finite = array[np.isfinite(array)]
    loss = np.abs(finite - finite.astype(np.float16).astype(np.float32))
    bound = np.abs(finite) if each else np.abs(finite).max(initial=0)
    return bool(np.any(loss > _LOSS * bound))


def _is_quantized(node: ir.Node) -> bool:
    return (
        "quantize" in node.op_type.lower() or node.op_type.startswith("QLinear") or "Integer" in node.op_type
    )


def _is_float32(value: ir.Value | None) -> bool:
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == ir.DataType.FLOAT


def _at(flags: tuple[bool, ...], index: int) -> bool:
    """The flag of a parameter; the last one is repeated where an operator takes any number."""
    return flags[min(index, len(flags) - 1)]


def _variables(node: ir.Node, version: int, kind: str, provider: str) -> tuple[tuple[bool, ...], ...]:
    """For every input and output whether the operator takes `kind` there. `Refused` if it does nowhere.

    A parameter that is float32 by the operator's definition, such as the scales of a Resize, stays so.
    """
    schema = _schema(node.op_type, version)
    if schema is None:
        raise Refused(f"{node.op_type} is not known")
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    if provider:
        kernel = types_of_kernel(provider, node.op_type, version)
        allowed = {name: kinds & kernel.get(name, kinds) for name, kinds in allowed.items()}
    flags = [
        tuple(f"tensor({kind})" in allowed.get(p.type_str, ()) for p in parameters)
        for parameters in (schema.inputs, schema.outputs)
    ]
    if not any(_at(flags[0], i) for i, v in enumerate(node.inputs) if _is_float32(v)):
        where = f" on {provider}" if provider else ""
        raise Refused(f"{node.op_type} has no {kind}{where}")
    return flags[0], flags[1]


@cache
def _schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    return onnx.defs.get_schema(op_type, version) if onnx.defs.has(op_type, version) else None


@dataclass(frozen=True)
class _Writer:
    """Changes the types of the chosen ports, with a Cast wherever two types meet."""

    kind: tuple[ir.DataType, type]
    ports: Mapping[ir.Node, _Ports]
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def write(self, graphs: list[ir.Graph]) -> None:
        halved: set[ir.Value] = set()
        for graph in graphs:
            for node in list(graph):
                ports = self.ports.get(node, _Ports((), ()))
                for index, value in enumerate(node.inputs):
                    if index in ports.inputs and value not in halved:
                        self._read_as(node, index, self.kind[0])
                    elif index not in ports.inputs and value in halved:
                        self._read_as(node, index, ir.DataType.FLOAT)
                for index in ports.outputs:
                    output = node.outputs[index]
                    output.type = ir.TensorType(self.kind[0])
                    halved.add(output)
        for graph in graphs:
            for index, value in enumerate(list(graph.outputs)):
                if value in halved:
                    graph.outputs[index] = self._as_output(value, named=graph is graphs[0])

    def _read_as(self, node: ir.Node, index: int, kind: ir.DataType) -> None:
        value = node.inputs[index]
        assert value is not None
        node.replace_input_with(index, self._cast(value, kind))
        drop_unused_initializer(value)
        if (producer := value.producer()) is not None and producer.op_type == "Constant":
            remove_if_unused(producer)

    def _cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        """`value` as the other type: a constant is rounded here, all else at run time, once."""
        if (source := _cast_from(value)) is not None and source.dtype == kind:
            return source  # 16 bits that were made 32
        if (value, kind) not in self.casts:
            self.casts[value, kind] = self._new_cast(value, kind)
        return self.casts[value, kind]

    def _new_cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        graph, name = value.graph, f"{value.name}.{kind.name.lower()}"
        assert isinstance(graph, ir.Graph)
        array = constant_of(value)
        if array is not None and (value.is_initializer() or _is_constant(value)):
            return new_initializer(graph, name, array.astype(self.kind[1]))
        node = ir.node("Cast", [value], {"to": kind})
        out = node.outputs[0]
        out.name, out.type, out.shape = unique_name(graph, name), ir.TensorType(kind), value.shape
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
        return out

    def _as_output(self, value: ir.Value, *, named: bool) -> ir.Value:
        """The float32 of an output in 16 bits; under the output's name where callers know it."""
        floats = self._cast(value, ir.DataType.FLOAT)
        if named:
            name, value.name = value.name, None
            value.name, floats.name = floats.name, name
        return floats


def _cast_from(value: ir.Value) -> ir.Value | None:
    """What a Cast to float32 made `value` of, or None if none did."""
    producer = value.producer()
    is_cast = producer is not None and producer.op_type == "Cast" and _is_float32(value)
    return producer.inputs[0] if producer is not None and is_cast else None


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"
