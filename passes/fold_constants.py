"""Everything that does not depend on the inputs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused, graphs_of
from edgewise.passes.compute_ahead import compute, first_failure
from edgewise.passes.fold_shapes import FoldShapes, substitute
from edgewise.passes.graph import (
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    replace,
    static_shape,
)
from edgewise.passes.infer_shapes import infer_shapes
from edgewise.passes.purity import is_pure
from edgewise.runtime.errors import InputError

# Folding these would turn a quantized weight back into the float one that it stands for.
_LEFT_ALONE = frozenset({"Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
# The result of these may be of any size, whatever the size of what they read.
_EXPANDING = frozenset({"ConstantOfShape", "EyeLike", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile"})
# What onnxruntime hands back as an array of the same type.
_TYPES = frozenset(
    {"FLOAT", "FLOAT16", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64"}
    | {"UINT8", "UINT16", "UINT32", "UINT64"}
)
_MOVES = frozenset({"Expand", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_SCRATCH = 2**24  # bytes that a result on the way may take beyond what it is computed from
_TOO_LARGE = "the result is larger than what it is computed from"

Nodes = Mapping[ir.Node, None]  # a set that keeps its order, which is the one of computation


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute ahead whatever depends on weights and known shapes alone.

    Given:   y = f(c1, c2, ...), all of them constant, f without chance and without a body
    Result:  an initializer in place of y

    All of it is computed in one run of onnxruntime, without graph optimizations. A result stays in the
    file, so it is left to be computed where it would take more than `max_growth` bytes beyond the
    initializers that it makes superfluous. Quantized weights stay quantized.

    Given:   y = Unsqueeze(ConstantOfShape<value = v>(s)), or another operator that only moves elements
    Result:  y = ConstantOfShape<value = v>(the shape of y), which is of no size
    """

    name = "fold-constants"
    max_growth: int = 1024

    def apply(self, model: ir.Model) -> Outcome:
        edits = 0
        while True:
            refused = Counter[str]()
            try:
                infer_shapes(model)
            except Refused as refusal:
                refused[str(refusal)] += 1
            shapes = FoldShapes().apply(model)
            fills = sum(_write_fill(node) for graph in graphs_of(model) for node in list(graph))
            done = shapes.edits + fills + self._fold(model, refused)
            edits += done
            if not done:
                return Outcome(edits, MappingProxyType(dict(refused + Counter(shapes.refused))))

    def _fold(self, model: ir.Model, refused: Counter[str]) -> int:
        """Fold what can be folded by one run; how many values."""
        computable = _computable(model, refused)
        while True:
            allowed, too_large = _worthwhile(computable, self.max_growth)
            cone = _cone(allowed, computable)
            nodes = [n for n in computable if n in cone]
            try:
                arrays = compute(model, nodes, list(allowed))
                break
            except InputError:
                culprit = first_failure(model, nodes)
                refused[f"onnxruntime cannot compute {culprit.op_type} ahead"] += 1
                computable = _without(culprit, computable)
        small = [(v, a) for v, a in zip(allowed, arrays, strict=True) if a.nbytes <= allowed[v]]
        for value, array in small:
            substitute(value, array)
        refused[_TOO_LARGE] += too_large + len(allowed) - len(small)
        return len(small)


def _write_fill(node: ir.Node) -> bool:
    """Give a node that only moves the elements of a fill, all the same, a fill of its own shape."""
    if node.op_type not in _MOVES or node.domain != "" or node.inputs[0] is None:
        return False
    out, fill = node.outputs[0], node.inputs[0].producer()
    shape, array = static_shape(out), constant_of(node.inputs[0])
    if fill is None or fill.op_type != "ConstantOfShape" or array is None or shape is None:
        return False
    if out.is_graph_output():
        return False
    sizes = new_initializer(graph_of(node), f"{out.name}.shape", np.array(shape, np.int64))
    new = new_node(node, "ConstantOfShape", [sizes], hint=f"{out.name}.fill")
    if (producer := new.producer()) is not None:
        producer.attributes.update(fill.attributes)
    new.shape, new.type = out.shape, out.type
    replace(out, new)
    return True


def _computable(model: ir.Model, refused: Counter[str]) -> Nodes:
    """The nodes, of all graphs, that can be computed ahead."""
    found: dict[ir.Node, None] = {}
    for node in model.graph.all_nodes():
        sources = [v for v in node.inputs if v is not None]
        if node.op_type in _LEFT_ALONE or not sources or not is_pure(node):
            continue
        if not all(v.producer() in found or constant_of(v) is not None for v in sources):
            continue
        if obstacle := _obstacle(node):
            refused[obstacle] += 1
        else:
            found[node] = None
    return found


def _obstacle(node: ir.Node) -> str:
    """Why a node that reads only constants cannot be computed ahead, or nothing."""
    if any(v.is_graph_output() for v in node.outputs):
        return "the constant result is a graph output"
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    if not all(isinstance(v.type, ir.TensorType) and v.type.dtype.name in _TYPES for v in values):
        return "the result is of a type that onnxruntime does not hand out"
    sizes = [_nbytes(v) for v in node.outputs if v.name]
    if None in sizes and node.op_type in _EXPANDING:
        return "the size of the result is not known"
    read = sum(_nbytes(v) or 0 for v in node.inputs if v is not None)
    return _TOO_LARGE if sum(s or 0 for s in sizes) > read + _SCRATCH else ""


def _nbytes(value: ir.Value) -> int | None:
    """The size of a value in bytes, as far as it is known."""
    constant, shape = constant_of(value), static_shape(value)
    if constant is not None:
        return constant.nbytes
    if shape is None or value.dtype is None:
        return None
    return math.ceil(math.prod(shape) * value.dtype.itemsize)


def _worthwhile(computable: Nodes, growth: int) -> tuple[dict[ir.Value, int], int]:
    """The values to keep as initializers, with the bytes each may take, and how many would take more."""
    folded = dict(computable)
    while True:
        outputs = (v for node in folded for v in node.outputs)
        frontier = dict.fromkeys(v for v in outputs if any(u.node not in folded for u in v.uses()))
        freed = _freed(frontier, folded)
        large = {v.producer() for v in frontier if (_nbytes(v) or 0) > freed[v] + growth}
        if not large:
            return {v: freed[v] + growth for v in frontier}, len(computable) - len(folded)
        folded = {n: None for n in folded if n not in large}


def _freed(frontier: Collection[ir.Value], folded: Nodes) -> Mapping[ir.Value, int]:
    """The bytes of the initializers that only this or that value of the frontier is computed from."""
    reached: dict[ir.Node, set[ir.Value]] = {}
    for node in reversed(list(folded)):
        own = {v for v in node.outputs if v in frontier}
        users = {u.node for v in node.outputs for u in v.uses()}
        reached[node] = own.union(*(reached[n] for n in users if n in folded))
    freed = defaultdict[ir.Value, int](int)
    for value in dict.fromkeys(v for node in folded for v in node.inputs if v is not None):
        users, producer = {u.node for u in value.uses()}, value.producer()
        stored = producer is None or producer.op_type == "Constant"
        if not stored or not users <= folded.keys():
            continue
        reaches = set[ir.Value]().union(*(reached[n] for n in users))
        if len(reaches) == 1 and constant_of(value) is not None:
            freed[reaches.pop()] += _nbytes(value) or 0
    return freed


def _cone(values: Collection[ir.Value], computable: Nodes) -> set[ir.Node]:
    """The nodes that `values` are computed by."""
    cone = set[ir.Node]()
    waiting = [v.producer() for v in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node in computable and node not in cone:
            cone.add(node)
            waiting += [v.producer() for v in node.inputs if v is not None]
    return cone


def _without(node: ir.Node, computable: Nodes) -> Nodes:
    """`computable` without `node` and everything computed from it."""
    kept: dict[ir.Node, None] = {}
    for other in computable:
        inside = [v.producer() for v in other.inputs if v is not None and v.producer() in computable]
        if other is not node and all(p in kept for p in inside):
            kept[other] = None
    return kept
