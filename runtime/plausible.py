"""Inputs that make sense to a model, where nobody gave any.

What an integer means shows in where it goes: to a Gather it is an index of a table, to an LSTM the length
of a sequence, and what is subtracted from one is a mask. Only where the graph does not tell, names do.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard, cast

import numpy as np
import onnx
import onnx_ir as ir

from edgewise.runtime.evaluate import Array, TensorSpec, input_specs

_MOVES: Mapping[str, Sequence[int]] = MappingProxyType(
    {
        "Concat": range(2**31),
        "Expand": (0,),
        "Flatten": (0,),
        "Gather": (0,),
        "Identity": (0,),
        "Reshape": (0,),
        "Slice": (0,),
        "Split": (0,),
        "Squeeze": (0,),
        "Tile": (0,),
        "Transpose": (0,),
        "Unsqueeze": (0,),
        "Where": (1, 2),
    }
)
"""The inputs whose numbers an operator passes on as they are."""

_TABLES: Mapping[tuple[str, int], tuple[int, int | str]] = MappingProxyType(
    {
        ("EmbedLayerNormalization", 0): (2, 0),
        ("EmbedLayerNormalization", 1): (4, 0),
        ("EmbedLayerNormalization", 8): (3, 0),
        ("Gather", 1): (0, "axis"),
        ("GatherBlockQuantized", 1): (0, "gather_axis"),
        ("GatherElements", 1): (0, "axis"),
        ("GroupQueryAttention", 9): (7, 0),
        ("NegativeLogLikelihoodLoss", 1): (0, 1),
        ("QEmbedLayerNormalization", 0): (2, 0),
        ("QEmbedLayerNormalization", 1): (4, 0),
        ("RoiAlign", 2): (0, 0),
        ("RotaryEmbedding", 1): (2, 0),  # of onnxruntime
        ("RotaryEmbedding", 3): (1, 0),  # of ONNX
        ("ScatterElements", 1): (0, "axis"),
        ("SoftmaxCrossEntropyLoss", 1): (0, 1),
    }
)
"""Operator and input that holds indices -> the input they point into, and the axis or the attribute of it."""

_LENGTHS: Mapping[tuple[str, int], tuple[int, int | str]] = MappingProxyType(
    {
        ("GRU", 4): (0, "layout"),
        ("LSTM", 4): (0, "layout"),
        ("RNN", 4): (0, "layout"),
        ("ReverseSequence", 1): (0, "time_axis"),
    }
)
"""Operator and input that holds lengths -> the input with the sequences, the axis or the attribute of it."""

_PADDING: Mapping[tuple[str, int], tuple[int, int | str]] = MappingProxyType(
    {("Attention", 3): (0, 1), ("EmbedLayerNormalization", 7): (0, 1), ("MultiHeadAttention", 4): (1, 1)}
)
"""Operator and input that holds a mask, or in one dimension lengths of what the entry names."""

_COUNTS = frozenset({("ConstantOfShape", 0), ("Expand", 1), ("Loop", 0), ("Tile", 1), ("TopK", 1)})
_MASK = re.compile("mask(?!ed)", re.IGNORECASE)
_LENGTH = re.compile("len", re.IGNORECASE)
_SMALL = 4096  # bytes
_NO_NAMES = frozenset({"none", "null"})


class _Range(NamedTuple):
    """The integers from `low` to `high`, both included."""

    low: int
    high: int


_ONES, _UNKNOWN = _Range(1, 1), _Range(0, 1)


def plausible_feed(model: ir.Model, *, seed: int = 0, size: int = 1, batch: int = 1) -> dict[str, Array]:
    """Seeded inputs of the types and shapes that `model` declares, with values that it can work on.

    A dimension of open size is `batch` if it leads, else `size`; equal symbols and the sums and products
    of symbols agree. A length of the past is `size` where another dimension adds it up, else nothing is
    past. Floats are normal. Integers that point into a table or an axis are spread over all of it; masks
    and counts are one, lengths are whole, what is compared with a number is that number, and bytes take
    any value; integers of which nothing is known are zero or one. Booleans are true.

    The weights are not read. Raises `InputError` where an input is no tensor of known rank.
    """
    specs = input_specs(model)
    sizes = _Sizes.of(specs, size, batch)
    shapes = {spec.name: sizes.shape(spec) for spec in specs}
    found = _ranges(model, specs, shapes)
    rng = np.random.default_rng(seed)
    return {
        spec.name: _values(spec, shapes[spec.name], found.get(spec.name) or _by_name(spec, sizes), rng)
        for spec in specs
    }


@dataclass(frozen=True)
class _Sizes:
    """A size for every dimension that a model leaves open."""

    batches: frozenset[str]
    """The symbols that stand for the number of samples."""
    batch: int
    size: int
    past: int | None
    """What symbols of a past count; None if there are none."""
    many: bool
    """Whether any input leads with an open dimension."""

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], size: int, batch: int) -> _Sizes:
        symbols = {d for spec in specs for d in spec.shape if isinstance(d, str)}
        past = None
        if any("past" in s for s in symbols):
            added = any("total" in s or ("past" in s and not s.isidentifier()) for s in symbols)
            past = size if added else 0
        many = any(spec.shape and not isinstance(spec.shape[0], int) for spec in specs)
        return cls(_batch_symbols(specs), batch, size, past, many)

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return tuple(
            d if isinstance(d, int) else self.of_symbol(d) if _is_meant(d) else self._unnamed(spec, axis)
            for axis, d in enumerate(spec.shape)
        )

    def of_symbol(self, text: str) -> int:
        """The size of a symbol, or of a sum or a product of symbols and numbers."""
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return self._of_name(text)
        value = self._evaluate(tree)
        return self._of_name(text) if value is None else value

    def _evaluate(self, tree: ast.expr) -> int | None:
        match tree:
            case ast.Name(id=name):
                return self._of_name(name)
            case ast.Constant(value=int(number)):
                return number
            case ast.BinOp(left, ast.Add() | ast.Mult() as operation, right):
                a, b = self._evaluate(left), self._evaluate(right)
                if a is None or b is None:
                    return None
                return a + b if isinstance(operation, ast.Add) else a * b
        return None

    def _of_name(self, name: str) -> int:
        if name in self.batches:
            return self.batch
        if "total" in name:
            return self.size + (self.past or 0)
        return self.size if self.past is None or "past" not in name else self.past

    def _unnamed(self, spec: TensorSpec, axis: int) -> int:
        """The size of a dimension without a symbol; that in the middle of a recurrent state is the batch."""
        is_state = self.many and len(spec.shape) == 3 and axis == 1
        if axis == 0 or (is_state and isinstance(spec.shape[0], int) and isinstance(spec.shape[2], int)):
            return self.batch
        return 0 if "past" in spec.name else self.size


def _batch_symbols(specs: Sequence[TensorSpec]) -> frozenset[str]:
    """The leading symbols that are called batch, or else those that stand behind no other."""
    leading = {d for spec in specs for d in spec.shape[:1] if _is_meant(d)}
    if named := {d for d in leading if "batch" in d.lower()}:
        return frozenset(named)
    behind = {d for spec in specs for d in spec.shape[1:] if spec.shape[0] in leading and d != spec.shape[0]}
    return frozenset(leading - behind)


def _is_meant(dim: int | str | None) -> TypeGuard[str]:
    """Whether it is a symbol: two dimensions called "?" need not be equal."""
    return isinstance(dim, str) and any(c.isalpha() for c in dim) and dim.lower() not in _NO_NAMES


def _ranges(
    model: ir.Model, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, _Range]:
    """What the graph tells of the integers it wants, by input."""
    inputs = {value.name: value for value in model.graph.inputs}
    if not any(_is_traced(spec, inputs[spec.name]) for spec in specs):
        return {}
    sized = _with_shapes(model, shapes)
    found: dict[str, _Range] = {}
    for value in sized.graph.inputs:
        name = value.name or ""
        if name not in shapes or value.dtype is None:
            continue
        for node, i, integral in _readers(value):
            limits = _limits(node, i, shapes[name]) if integral else None
            if value.dtype.is_integer() and node.op_type == "Sub" and i == 1 and _scalar(node.inputs[0]) == 1:
                limits = _ONES
            if limits is not None:
                found[name] = _both(found.get(name, limits), limits)
    return found


def _is_traced(spec: TensorSpec, value: ir.Value) -> bool:
    """Whether it holds integers, be it as floats that are cast."""
    return spec.dtype.kind in "iu" or any(use.node.op_type == "Cast" for use in value.uses())


def _with_shapes(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """The model without its large weights, with inputs of these shapes and what follows from them."""
    proto = _skeleton(model)
    for value in proto.graph.input:
        if value.name in shapes:
            declared = value.type.tensor_type.shape
            declared.Clear()
            declared.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=d) for d in shapes[value.name])
    try:
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):  # then less is known
        return ir.from_proto(proto)


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The graph with large weights as inputs, which keep only their shape, and no notes on inner shapes."""
    graph = model.graph
    small = [value for value in graph.initializers.values() if _is_small(value.const_value)]
    known = {*small, *graph.inputs}
    large = [value for value in graph.initializers.values() if value not in known]
    view = ir.GraphView([*graph.inputs, *large], graph.outputs, nodes=tuple(graph), initializers=small)
    proto = onnx.ModelProto(ir_version=model.ir_version, graph=ir.serde.serialize_graph(cast(Any, view)))
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    custom = {v.name for node in graph if node.domain != "" for v in node.outputs}
    notes = [note for note in proto.graph.value_info if note.name in custom]
    del proto.graph.value_info[:]  # the file may note shapes of another batch
    proto.graph.value_info.extend(notes)
    imports = {node.domain: 1 for node in graph.all_nodes()} | dict(model.opset_imports)
    proto.opset_import.extend(onnx.helper.make_opsetid(*pair) for pair in imports.items())
    return proto


def _is_small(tensor: ir.TensorProtocol | None) -> bool:
    """Whether its numbers are at hand, and few enough to be a shape or a list of axes."""
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int, bool]]:
    """The nodes that read the numbers of `value`, where they do it, and whether they get integers."""
    todo = [(value, value.dtype is not None and value.dtype.is_integer())]
    seen: set[ir.Value] = set()
    while todo:
        value, integral = todo.pop()
        for node, i in value.uses():
            if node.op_type == "Cast":
                to = ir.DataType(node.attributes["to"].as_int())
                moved = [(node.outputs[0], to.is_integer() or to == ir.DataType.BOOL)]
            elif i in _MOVES.get(node.op_type, ()):
                moved = [(output, integral) for output in node.outputs]
            else:
                yield node, i, integral
                continue
            todo += [pair for pair in moved if pair[0] not in seen]
            seen.update(output for output, _ in moved)


def _limits(node: ir.Node, i: int, shape: tuple[int, ...]) -> _Range | None:
    """What input `i` of `node` may hold, if a model's input of this shape arrives there."""
    key = (node.op_type, i)
    if key in _TABLES:
        return _below(_length(node, *_TABLES[key]))
    if key in (("GatherND", 1), ("ScatterND", 1)):
        return _below(_shortest_indexed(node))
    if key in (("OneHot", 0),):
        return _below(_scalar(node.inputs[1]))
    if key in _LENGTHS or (key in _PADDING and len(shape) == 1):
        whole = _length(node, *(_LENGTHS.get(key) or _PADDING[key])) or 1
        return _Range(whole, whole)
    if key in _PADDING or key in _COUNTS or (key == ("Where", 0)):
        return _ONES
    return _compared(node.inputs[1 - i], shape) if node.op_type == "Equal" else None


def _compared(value: ir.Value | None, shape: tuple[int, ...]) -> _Range | None:
    """The range of the constants in `value`; of a single one only where a single integer is compared."""
    numbers = _constants(value)
    if numbers is None or (numbers.size == 1 and math.prod(shape) != 1):
        return None
    return _Range(int(numbers.min()), int(numbers.max()))


def _below(size: int | None) -> _Range:
    """The indices of `size` entries; zero where that is not known."""
    return _Range(0, max(size or 1, 1) - 1)


def _length(node: ir.Node, i: int, axis: int | str) -> int | None:
    """The size of an input along an axis, or along the axis that an attribute gives, by default 0."""
    if isinstance(axis, str):
        axis = node.attributes[axis].as_int() if axis in node.attributes else 0
    value = node.inputs[i] if i < len(node.inputs) else None
    return _size(value, axis)


def _size(value: ir.Value | None, axis: int) -> int | None:
    shape = None if value is None else value.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    dim = shape[axis]
    return dim if isinstance(dim, int) else None


def _shortest_indexed(node: ir.Node) -> int | None:
    """The shortest of the axes that the last axis of the indices of a GatherND or ScatterND counts."""
    first = node.attributes["batch_dims"].as_int() if "batch_dims" in node.attributes else 0
    indexed = _size(node.inputs[1], -1)
    sizes = [_size(node.inputs[0], axis) for axis in range(first, first + (indexed or 0))]
    known = [size for size in sizes if size is not None]
    return min(known) if known and len(known) == len(sizes) else None


def _scalar(value: ir.Value | None) -> int | None:
    """The single whole number that `value` always holds."""
    numbers = _constants(value)
    return None if numbers is None or numbers.size != 1 else int(numbers.flat[0])


def _constants(value: ir.Value | None) -> Array | None:
    """The whole numbers that `value` always holds, if they are few."""
    if value is None or value.is_graph_input():
        return None
    node, tensor = value.producer(), value.const_value
    if node is not None and node.op_type == "Constant":
        if "value_int" in node.attributes:
            return np.array(node.attributes["value_int"].as_int())
        tensor = node.attributes["value"].as_tensor() if "value" in node.attributes else None
    if tensor is None or tensor.dtype == ir.DataType.STRING or not 0 < tensor.nbytes <= _SMALL:
        return None
    array = tensor.numpy().astype(np.float64)
    return array if np.array_equal(array, np.rint(array)) else None


def _both(first: _Range, second: _Range) -> _Range:
    """What suits both; where nothing does, what is at most either."""
    high = min(first.high, second.high)
    return _Range(min(max(first.low, second.low), high), high)


def _by_name(spec: TensorSpec, sizes: _Sizes) -> _Range | None:
    """What names and types tell of the values; None if any float will do."""
    if _MASK.search(spec.name):
        return _ONES
    if spec.dtype.kind not in "iu":
        return None
    if len(spec.shape) < 2 and _LENGTH.search(spec.name):
        whole = sizes.of_symbol(spec.name)
        return _Range(whole, whole)
    if spec.dtype.itemsize == 1:
        return _Range(np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max)
    return _UNKNOWN


def _values(
    spec: TensorSpec, shape: tuple[int, ...], limits: _Range | None, rng: np.random.Generator
) -> Array:
    if spec.dtype == np.bool_:
        return np.ones(shape, np.bool_)
    if spec.dtype == np.object_ or spec.dtype.kind in "US":
        return np.full(shape, "a", dtype=np.object_)
    if limits is None:
        return np.asarray(rng.standard_normal(shape)).astype(spec.dtype)
    return np.asarray(rng.integers(*limits, shape, endpoint=True)).astype(spec.dtype)
