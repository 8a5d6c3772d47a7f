"""What becomes of an operator when the axes of its data are put in another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_rules import BROADCAST, REDUCTIONS, UNARY
from edgewise.passes.graph import Array, attribute, constant_of
from edgewise.passes.linear import rank_of, set_constant

Order = tuple[int, ...]
"""Where the axes of a value go: axis i becomes axis order[i]."""

Edit = Callable[[], None]

Use = tuple[ir.Node, int]
"""A node that reads a value, and as which of its inputs."""


@dataclass(frozen=True)
class Relayout:
    """A node that works on another order of axes: the orders of what it reads and gives, and its own edit.

    Inputs that are not named stay as they are.
    """

    inputs: Mapping[int, Order]
    outputs: Order
    edit: Edit = lambda: None


def relayout(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    """What `node` becomes where `value`, which it reads or gives, has its axes in another order.

    None where the operator is bound to the order it has, or not enough is known of it.
    """
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    return None if rule is None else rule(node, value, order)


def identity(rank: int) -> Order:
    return tuple(range(rank))


def inverse(order: Sequence[int]) -> Order:
    result = [0] * len(order)
    for axis, place in enumerate(order):
        result[place] = axis
    return tuple(result)


def ordered(array: Array, order: Order) -> Array:
    """`array` with its axes in `order`; axes that broadcasting would add in front are written out."""
    padded = array.reshape((1,) * (len(order) - array.ndim) + array.shape)
    return padded.transpose(inverse(order))


def is_data(node: ir.Node, value: ir.Value) -> bool:
    """Whether `value` is the first input of `node` or one of its outputs."""
    return node.inputs[0] is value or value in node.outputs


def _rank(value: ir.Value | None) -> int | None:
    array = constant_of(value)
    return rank_of(value) if array is None else array.ndim


def _unary(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    return Relayout({0: order}, order) if is_data(node, value) else None


def _broadcast(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    """Operands of the full rank move along, constants of a lower one too; single numbers fit anywhere."""
    inputs: dict[int, Order] = {}
    for index, operand in enumerate(node.inputs):
        rank, array = _rank(operand), constant_of(operand)
        if rank is None or rank > len(order):
            return None
        if rank == 0 or (array is not None and array.size == 1):
            continue
        if rank < len(order) and array is None:
            return None
        inputs[index] = order
    return Relayout(inputs, order)


def _axis(node: ir.Node, order: Order, default: int) -> int:
    return int(attribute(node, "axis", default)) % len(order)


def _set_axis(node: ir.Node, axis: int) -> None:
    node.attributes.add(ir.AttrInt64("axis", axis))


def _concat(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    axis = order[_axis(node, order, 0)]
    return Relayout(dict.fromkeys(range(len(node.inputs)), order), order, lambda: _set_axis(node, axis))


def _along(default: int, *, stays_last: bool = False) -> Rule:
    """Operators that work along one axis."""

    def rule(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
        axis = _axis(node, order, default)
        if not is_data(node, value) or (stays_last and _leaves_the_end((axis,), order)):
            return None
        return Relayout({0: order}, order, lambda: _set_axis(node, order[axis]))

    return rule


def _leaves_the_end(axes: Sequence[int], order: Order) -> bool:
    """Whether what runs along the last axis, where memory is contiguous, would run along another.

    Kernels are slower there, and norms that are written out are no longer recognised.
    """
    last = len(order) - 1
    return tuple(axes) == (last,) and order[last] != last


def _quantize(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    rank = _rank(node.inputs[1])
    if not is_data(node, value) or rank is None or rank > 1 or attribute(node, "block_size", 0):
        return None
    if rank == 0:
        return Relayout({0: order}, order)
    axis = order[_axis(node, order, 1)]
    return Relayout({0: order}, order, lambda: _set_axis(node, axis))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _set_axes(node: ir.Node, index: int, axes: Array) -> None:
    set_constant(node, index, axes, "axes")


def _mapped(axes: Array, order: Order) -> Array:
    """Axes in the new order, in the type they are written in."""
    return np.array([order[axis] for axis in axes], axes.dtype)


def _slice(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    starts, written = _input(node, 1), _input(node, 3)
    if not is_data(node, value) or starts is None or starts.dtype is None or starts.shape is None:
        return None
    axes = constant_of(written)
    if written is None and isinstance(starts.shape[0], int):
        axes = np.arange(starts.shape[0], dtype=starts.dtype.numpy())
    if axes is None:
        return None
    moved = _mapped(axes, order)
    return Relayout({0: order}, order, lambda: _set_axes(node, 3, moved))


def _pad(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    pads, axes = constant_of(_input(node, 1)), constant_of(_input(node, 3))
    if not is_data(node, value):
        return None
    if axes is not None:
        moved = _mapped(axes, order)
        return Relayout({0: order}, order, lambda: _set_axes(node, 3, moved))
    if pads is None or _input(node, 3) is not None:
        return None
    spread = pads.reshape(2, -1)[:, inverse(order)].reshape(-1)
    return Relayout({0: order}, order, lambda: set_constant(node, 1, spread, "pads"))


def _without(order: Order, axes: Sequence[int]) -> Order:
    """The order of what is left when `axes` are dropped."""
    places = [place for axis, place in enumerate(order) if axis not in axes]
    return tuple(sorted(places).index(place) for place in places)


def _with(order: Order, axes: Sequence[int]) -> Order:
    """An order that leaves `order` when `axes` are dropped, and leaves these in their places."""
    rank = len(order) + len(axes)
    others = [axis for axis in range(rank) if axis not in axes]
    result = list(range(rank))
    for axis, place in zip(others, order, strict=True):
        result[axis] = others[place]
    return tuple(result)


def _dropping(order: Order, axes: Sequence[int], *, known: bool) -> tuple[tuple[int, ...], Order, Order]:
    """`axes` counted from the front, and the orders with and without them; `order` is one of the two.

    `known` says whether `order` is that of the value that has them.
    """
    rank = len(order) if known else len(order) + len(axes)
    axes = tuple(axis % rank for axis in axes)
    whole = order if known else _with(order, axes)
    return axes, whole, _without(whole, axes)


def _reduce(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    if len(node.inputs) > 1:
        written = constant_of(node.inputs[1])
        axes = None if written is None else written.tolist()
    else:
        axes = attribute(node, "axes")
    if not is_data(node, value) or not axes:
        return None

    def write(moved: Sequence[int]) -> None:
        if len(node.inputs) > 1:
            _set_axes(node, 1, np.array(moved, np.int64))
        else:
            node.attributes.add(ir.AttrInt64s("axes", moved))

    return _reduction(node, value, order, axes, write)


def _reduction(
    node: ir.Node, value: ir.Value, order: Order, axes: Sequence[int], write: Callable[[Sequence[int]], None]
) -> Relayout | None:
    if attribute(node, "keepdims", 1):
        axes = tuple(axis % len(order) for axis in axes)
        if node.op_type in REDUCTIONS and _leaves_the_end(axes, order):
            return None
        return Relayout({0: order}, order, lambda: write([order[axis] for axis in axes]))
    axes, whole, rest = _dropping(order, axes, known=value is node.inputs[0])
    return Relayout({0: whole}, rest, lambda: write([whole[axis] for axis in axes]))


def _extreme(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    """The index of a maximum or minimum along an axis."""
    if not is_data(node, value):
        return None
    axis = int(attribute(node, "axis", 0))
    return _reduction(node, value, order, (axis,), lambda moved: _set_axis(node, moved[0]))


def _gather(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    """Along an axis that stays, for a list of indices, or that goes, for a single one."""
    rank, axis = _rank(node.inputs[1]), int(attribute(node, "axis", 0))
    if not is_data(node, value) or rank is None or rank > 1:
        return None
    if rank == 1:
        place = order[axis % len(order)]
        return Relayout({0: order}, order, lambda: _set_axis(node, place))
    axes, whole, rest = _dropping(order, (axis,), known=value is node.inputs[0])
    return Relayout({0: whole}, rest, lambda: _set_axis(node, whole[axes[0]]))


def _squeeze(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    written = constant_of(_input(node, 1))
    if written is None or not is_data(node, value):
        return None
    axes, whole, rest = _dropping(order, written.ravel().tolist(), known=value is node.inputs[0])
    moved = np.array([whole[axis] for axis in axes], np.int64)
    return Relayout({0: whole}, rest, lambda: _set_axes(node, 1, moved))


def _unsqueeze(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    written = constant_of(_input(node, 1))
    if written is None or not is_data(node, value):
        return None
    axes, whole, rest = _dropping(order, written.ravel().tolist(), known=value is not node.inputs[0])
    moved = np.array([whole[axis] for axis in axes], np.int64)
    return Relayout({0: rest}, whole, lambda: _set_axes(node, 1, moved))


def _matmul(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    """A matrix on the right sees the last axis alone."""
    data, matrix = node.inputs
    if matrix is value or data is matrix or _rank(matrix) != 2 or not _fixes_the_end(order):
        return None
    return Relayout({0: order}, order)


def _layer_norm(node: ir.Node, value: ir.Value, order: Order) -> Relayout | None:
    axis = _axis(node, order, -1)
    if not is_data(node, value) or axis != len(order) - 1 or not _fixes_the_end(order):
        return None
    return Relayout({0: order}, order)


def _fixes_the_end(order: Order) -> bool:
    return order[-1] == len(order) - 1


Rule = Callable[[ir.Node, ir.Value, Order], Relayout | None]

_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(UNARY, _unary),
        **dict.fromkeys(BROADCAST, _broadcast),
        **dict.fromkeys(REDUCTIONS, _reduce),
        **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along(-1, stays_last=True)),
        **dict.fromkeys(("ArgMax", "ArgMin"), _extreme),
        **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
        "Concat": _concat,
        "Split": _along(0),
        "TopK": _along(-1),
        "Slice": _slice,
        "Pad": _pad,
        "Gather": _gather,
        "Squeeze": _squeeze,
        "Unsqueeze": _unsqueeze,
        "MatMul": _matmul,
        "LayerNormalization": _layer_norm,
    }
)
