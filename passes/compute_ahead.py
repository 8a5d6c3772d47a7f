"""Run a part of a model that reads nothing but constants."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgewise.passes.freeze_inputs import FIRST_IR_WITH_DEFAULTS
from edgewise.passes.graph import Array, constant_of
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator

_LARGE = 2**20  # bytes: constants above it are inputs, which onnxruntime reads where they lie


def compute(model: ir.Model, nodes: Sequence[ir.Node], values: Sequence[ir.Value]) -> list[Array]:
    """The arrays that `values`, which `nodes` compute, always hold.

    `nodes` are in order, and read each other and constants only; they may come from several graphs of
    `model`. Raises `InputError` where onnxruntime does not run them.
    """
    if not values:
        return []
    copies: dict[ir.Value, ir.Value] = {}
    constants = [_copy_constant(v, copies) for v in _constants(nodes)]
    large = {v: t for v in constants if (t := v.const_value) is not None and t.nbytes > _LARGE}
    twins = [_copy_node(node, copies) for node in nodes]
    outputs = [copies[v] for v in values]
    for value in large:
        value.const_value = None
    small = [v for v in constants if v not in large]
    graph = ir.Graph(list(large), outputs, nodes=twins, initializers=small, name="constants")
    graph.opset_imports.update(model.opset_imports)
    part = ir.Model(graph, ir_version=max(model.ir_version, FIRST_IR_WITH_DEFAULTS))
    feed = {v.name or "": tensor.numpy() for v, tensor in large.items()}
    results = Evaluator(part, threads=1, optimize=False).run(feed)
    return [np.asarray(results[v.name or ""]) for v in outputs]


def first_failure(model: ir.Model, nodes: Sequence[ir.Node]) -> ir.Node:
    """The first of `nodes` that onnxruntime does not run, where it does not run all of them."""
    last = len(nodes) - 1  # if all the others run, it is that one
    return nodes[bisect.bisect_left(range(last), True, key=lambda n: _fails(model, nodes[: n + 1]))]


def _fails(model: ir.Model, nodes: Sequence[ir.Node]) -> bool:
    try:
        compute(model, nodes, [v for node in nodes for v in node.outputs if v.name])
    except InputError:
        return True
    return False


def _constants(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """What the nodes read and do not compute."""
    inside = set(nodes)
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None)
    return [v for v in read if v.producer() not in inside]


def _copy_constant(value: ir.Value, copies: dict[ir.Value, ir.Value]) -> ir.Value:
    """An initializer of the same content. The tensor is wrapped anew: its name is written to when saved."""
    array = constant_of(value)
    if array is None:
        raise ValueError(f"{value.name!r} is not constant")
    tensor = ir.tensor(array, name=f"c{len(copies)}")
    shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    copies[value] = ir.Value(name=tensor.name, shape=shape, type=kind, const_value=tensor)
    return copies[value]


def _copy_node(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    inputs = [None if v is None else copies[v] for v in node.inputs]
    attributes = list(node.attributes.values())
    twin = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
    for old, new in zip(node.outputs, twin.outputs, strict=True):
        new.name = f"v{len(copies)}" if old.name else ""
        new.type = old.type
        copies[old] = new
    return twin
