"""Layers that take up another order of axes in their weights, or in how they read a matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.channel_rules import UNARY
from edgewise.passes.graph import Array, attribute, constant_of, only_user
from edgewise.passes.layouts import Edit, Order, Use, inverse
from edgewise.passes.linear import Linear, layer_ending_at, layer_reading, rank_of, set_constant

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
_SWAPPED = (1, 0)
_SIDES = ("transA", "transB")
_FLATTENING = ("Flatten", "Reshape")


def reader_sink(use: Use, order: Order, taken: Container[ir.Value]) -> Callable[[ir.Value], None] | None:
    """How the reader of `use` does with data in `order`, which the edit is given; None where it cannot.

    It may edit nodes that come later, but none that reads or gives a value in `taken`.
    """
    node, index = use
    if _is_product(node) and index < 2 and order == _SWAPPED:
        return lambda value: _swap(node, index, value)
    if node.op_type not in _FLATTENING or node.domain != "" or index or not _flattens(node, order):
        return None
    features = _last_alike(node.outputs[0])
    if features in taken or node.outputs[0] in taken or _reading(features) is None:
        return None
    source = node.inputs[0]
    assert source is not None  # it is what the use reads
    rows = _places(source, order)

    def edit(value: ir.Value) -> None:
        layer = _reading(features)
        assert layer is not None  # nothing of it has changed but its weights
        node.replace_input_with(0, value)
        dataclasses.replace(layer, weight=layer.weight[:, :, rows]).write()

    return edit


def producer_sink(value: ir.Value, order: Order, taken: Container[ir.Value]) -> Edit | None:
    """How the layer that makes `value`, reshaped, makes it in `order`; None where it cannot."""
    node = value.producer()
    if node is None or node.op_type != "Reshape" or node.domain != "" or order[0] != 0:
        return None
    features, target, dims = node.inputs[0], constant_of(node.inputs[1]), _rest(value)
    if features is None or target is None or dims is None or target.size != len(order) or 0 in target[1:]:
        return None
    if rank_of(features) != 2 or _width(features) != math.prod(dims) or only_user(features) is not node:
        return None
    first = _first_alike(features)
    if first in taken or features in taken or first is None or _ending(first) is None:
        return None
    columns = _places(value, order)
    shape = target[list(inverse(order))]

    def edit() -> None:
        layer = _ending(first)
        assert layer is not None  # nothing of it has changed but its weights
        bias = layer.bias[..., columns] if layer.bias.shape[-1:] == columns.shape else layer.bias
        dataclasses.replace(layer, weight=layer.weight[:, columns], bias=bias).write()
        set_constant(node, 1, shape, "shape")

    return edit


def _is_product(node: ir.Node) -> bool:
    """Whether `node` is a product of two float matrices that is not part of a quantized operator."""
    if node.domain != "" or node.op_type not in ("Gemm", "MatMul"):
        return False
    return all(_is_float_matrix(value) for value in node.inputs[:2])


def _is_float_matrix(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    if value is None or (producer is not None and producer.op_type == "DequantizeLinear"):
        return False
    return rank_of(value) == 2 and value.dtype in _FLOATS


def _swap(node: ir.Node, index: int, value: ir.Value) -> None:
    swapped = 1 - int(attribute(node, _SIDES[index], 0))
    node.op_type = "Gemm"
    node.attributes.add(ir.AttrInt64(_SIDES[index], swapped))
    node.replace_input_with(index, value)


def _flattens(node: ir.Node, order: Order) -> bool:
    """Whether `node` makes one axis of all but the first, which stays where it is."""
    source, flat = node.inputs[0], node.outputs[0]
    dims = None if source is None else _rest(source)
    if dims is None or order[0] != 0 or rank_of(flat) != 2 or _width(flat) != math.prod(dims):
        return False
    if node.op_type == "Flatten":
        return bool(attribute(node, "axis", 1) in (1, 1 - len(order)))
    target = constant_of(node.inputs[1])
    return target is not None and target[1] != 0 and not attribute(node, "allowzero", 0)


def _rest(value: ir.Value) -> tuple[int, ...] | None:
    """All dimensions but the first, None where one is not known."""
    if value.shape is None or value.shape.rank() == 0:
        return None
    dims = tuple(d for d in value.shape[1:] if isinstance(d, int) and d >= 0)
    return dims if len(dims) == value.shape.rank() - 1 else None


def _width(value: ir.Value) -> object:
    return None if value.shape is None else value.shape[-1]


def _places(value: ir.Value, order: Order) -> Array:
    """For each feature of the flattened value in the new order, where it was in the old one."""
    dims = _rest(value)
    assert dims is not None  # has been seen to
    axes = [axis - 1 for axis in inverse(order)[1:]]
    return np.arange(math.prod(dims)).reshape(dims).transpose(axes).ravel()


def _last_alike(value: ir.Value) -> ir.Value:
    """Behind the elementwise functions of `value` that nothing else reads."""
    node = only_user(value)
    while node is not None and _is_function(node):
        value = node.outputs[0]
        node = only_user(value)
    return value


def _first_alike(value: ir.Value) -> ir.Value | None:
    """In front of the elementwise functions that give `value`; None where something else reads it."""
    node = value.producer()
    while node is not None and _is_function(node):
        source = node.inputs[0]
        if source is None or only_user(source) is not node:
            return None
        value, node = source, source.producer()
    return value


def _is_function(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in UNARY


def _reading(value: ir.Value) -> Linear | None:
    """The layer that reads `value` as [samples, features], alone and with a weight of its own."""
    try:
        layer = layer_reading(value)
    except Refused:
        return None
    if layer is None or layer.node.op_type not in ("Gemm", "MatMul") or attribute(layer.node, "transA", 0):
        return None
    return layer if _owns_constants(layer) and rank_of(value) == 2 else None


def _ending(value: ir.Value) -> Linear | None:
    """The layer that gives `value` as [samples, features], with a weight of its own."""
    tail = value.producer()
    try:
        layer = None if tail is None else layer_ending_at(tail)
    except Refused:
        return None
    if layer is None or layer.node.op_type not in ("Gemm", "MatMul") or not _owns_constants(layer):
        return None
    return layer if rank_of(value) == 2 else None


def _owns_constants(layer: Linear) -> bool:
    weight = layer.node.inputs[1]
    return weight is not None and only_user(weight) is layer.node
