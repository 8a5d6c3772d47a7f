"""Layers that are linear in their input, and how they absorb a scale and a shift per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes import graph as rewiring
from edgewise.passes.base import Refused
from edgewise.passes.graph import Array, attribute, constant_of, only_user

FLOATS = (np.float16, np.float32, np.float64)
_PIECE = 2**22  # numbers
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Channels:
    """Where the channels of a value lie: `size` of them, with `trailing` axes behind theirs.

    `rank` is that of the value, None where it is not known.
    """

    size: int
    trailing: int
    rank: int | None

    @property
    def axis(self) -> int | None:
        """The axis of the channels counted from the front, None where the rank is not known."""
        return None if self.rank is None else self.rank - 1 - self.trailing


Vectors = Callable[[Channels], tuple[Array, Array]]
"""Scale and shift, float64 of shape [channels.size], of a value with these channels; may raise `Refused`."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = op(x, weight) + bias, where op is one of `LAYERS`.

    `weight` is float64 [group, output of the group, input of the group, tap], the factor alpha of Gemm
    included. `bias` is float64 and broadcasts against [..., outputs], the factor beta of Gemm
    included; it is zero where the layer has none.
    """

    node: ir.Node  # holds the weight, as its second input
    tail: ir.Node  # holds the bias: `node`, or the Add after a MatMul
    weight: Array
    bias: Array

    @property
    def outputs(self) -> Channels:
        """The channels of what the layer produces."""
        size = self.weight.shape[0] * self.weight.shape[1]
        if self.node.op_type != "MatMul":
            rank = _weight_rank(self.node)
            return Channels(size, rank - 2, rank)
        data_rank = rank_of(self.node.inputs[0])
        return Channels(size, 0, data_rank and max(data_rank, self.bias.ndim))

    @property
    def inputs(self) -> Channels:
        """The channels of what the layer reads."""
        size = self.weight.shape[0] * self.weight.shape[2]
        if self.node.op_type == "MatMul":
            return Channels(size, 0, rank_of(self.node.inputs[0]))
        rank = _weight_rank(self.node)
        trailing = attribute(self.node, "transA", 0) if self.node.op_type == "Gemm" else rank - 2
        return Channels(size, trailing, rank)

    @np.errstate(over="ignore", invalid="ignore")  # `narrow` refuses what is not finite
    def scaled_after(self, scale: Array, shift: Array) -> Linear:
        """The layer that gives scale * y + shift; both vectors are [outputs]."""
        groups, outputs = self.weight.shape[:2]
        factor = scale.reshape(groups, outputs, 1, 1)
        return replace(self, weight=self.weight * factor, bias=self.bias * scale + shift)

    @np.errstate(over="ignore", invalid="ignore")  # `narrow` refuses what is not finite
    def scaled_before(self, scale: Array, shift: Array) -> Linear:
        """The layer that gives on x what this one gives on scale * x + shift; both vectors are [inputs]."""
        if shift.any():
            self._check_every_tap_meets_the_shift()
        groups, _, inputs, _ = self.weight.shape
        factor, offset = (v.reshape(groups, 1, inputs, 1) for v in (scale, shift))
        added = (self.weight * offset).sum((2, 3)).reshape(-1)
        return replace(self, weight=self.weight * factor, bias=self.bias + added)

    def _check_every_tap_meets_the_shift(self) -> None:
        """A shift becomes a bias only where every output sums the same taps."""
        if self.node.op_type == "ConvTranspose":
            raise Refused("ConvTranspose would spread the shift unevenly")
        padded = any(attribute(self.node, "pads", ()))
        if padded or attribute(self.node, "auto_pad", "NOTSET").startswith("SAME"):
            raise Refused("padding would meet the shift")

    def write(self) -> None:
        """Put weight and bias into the graph; `Refused` before any edit where they do not fit."""
        stored = _constant(self.node.inputs[1], "weight")
        weight = narrow(_as_stored(self.node, self.weight, stored.shape), stored.dtype)
        bias = narrow(self.bias, stored.dtype)
        index = _bias_index(self.tail)
        has_bias = index < len(self.tail.inputs) and self.tail.inputs[index] is not None
        becomes_gemm = self.tail.op_type == "MatMul" and bool(bias.any())
        if becomes_gemm and rank_of(self.node.inputs[0]) != 2:
            raise Refused("MatMul without a bias is not known to be of rank 2")
        if becomes_gemm:
            self.node.op_type = "Gemm"
        for factor in ("alpha", "beta"):
            self.node.attributes.pop(factor, None)
        set_constant(self.node, 1, weight, "weight")
        if has_bias or bias.any():
            set_constant(self.tail, index, bias, "bias")


def layer_ending_at(tail: ir.Node) -> Linear | None:
    """The layer whose last node is `tail`, or None. Raises `Refused` where it cannot be edited."""
    if tail.domain != "":
        return None
    if tail.op_type == "Add":
        matmul = _matmul_before(tail)
        return None if matmul is None else _read(matmul, tail)
    return _read(tail, tail) if tail.op_type in LAYERS else None


def layer_reading(value: ir.Value) -> Linear | None:
    """The layer that alone reads `value`, as its data, or None. Raises `Refused` as above."""
    node = only_user(value)
    if node is None or node.domain != "" or node.op_type not in LAYERS or node.inputs[0] is not value:
        return None
    after = only_user(node.outputs[0]) if node.op_type == "MatMul" else None
    has_add = after is not None and after.op_type == "Add" and _matmul_before(after) is node
    return _read(node, after if has_add and after is not None else node)


def first_success(*attempts: Callable[[], bool]) -> bool:
    """Whether one of the attempts edited; where none did, the first refusal of one is raised."""
    refusal: Refused | None = None
    for attempt in attempts:
        try:
            if attempt():
                return True
        except Refused as reason:
            refusal = refusal or reason
    if refusal is not None:
        raise refusal
    return False


def fold_into_producer(node: ir.Node, data: ir.Value, vectors: Vectors) -> bool:
    """Fold `node`, which gives scale * data + shift, into the layer that makes `data`."""
    tail = data.producer()
    layer = None if tail is None else layer_ending_at(tail)
    if layer is None:
        return False
    if layer.tail.graph is not node.graph:
        raise Refused("the layer is in another graph")
    if only_user(data) is not node:
        raise Refused("the layer's output has another user")
    layer.scaled_after(*vectors(layer.outputs)).write()
    rewiring.replace(node.outputs[0], data)
    return True


def fold_into_consumer(node: ir.Node, data: ir.Value, vectors: Vectors) -> bool:
    """Fold `node`, which gives scale * data + shift, into the layer that alone reads its result."""
    layer = layer_reading(node.outputs[0])
    if layer is None:
        return False
    if layer.node.graph is not node.graph:
        raise Refused("the layer is in another graph")
    layer.scaled_before(*vectors(layer.inputs)).write()
    rewiring.replace(node.outputs[0], data)
    return True


def _matmul_before(add: ir.Node) -> ir.Node | None:
    """The MatMul whose result only `add` reads, if what is added to it is constant."""
    other = constant_input(add)
    data = None if other is None else add.inputs[1 - other]
    node = None if data is None else data.producer()
    if data is None or node is None or node.op_type != "MatMul" or node.domain != "":
        return None
    return node if only_user(data) is add and node.graph is add.graph else None


def constant_input(node: ir.Node) -> int | None:
    """Which of the two inputs of `node` is constant; None where it is both or neither."""
    first, second = (constant_of(v) is not None for v in node.inputs)
    return None if first == second else int(second)


def _read(node: ir.Node, tail: ir.Node) -> Linear:
    weight = _constant(node.inputs[1], "weight")
    if weight.dtype not in FLOATS:
        raise Refused("weight is not of a float type")
    index = _bias_index(tail)
    given = tail.inputs[index] if index < len(tail.inputs) else None
    if "broadcast" in node.attributes or "broadcast" in tail.attributes:
        raise Refused("broadcasting of an opset before 7")
    canonical = _canonical(node, weight)
    outputs = canonical.shape[0] * canonical.shape[1]
    if given is None:
        return Linear(node, tail, canonical, np.zeros(outputs))
    bias = _constant(given, "bias") * np.float64(attribute(node, "beta", 1.0))
    if bias.ndim and bias.shape[-1] not in (1, outputs):
        raise Refused("bias is not per channel")
    return Linear(node, tail, canonical, bias)


def _bias_index(tail: ir.Node) -> int:
    """The input of `tail` that is the bias."""
    if tail.op_type != "Add":
        return 2
    index = constant_input(tail)
    assert index is not None  # `_matmul_before` has seen to it
    return index


def _constant(value: ir.Value | None, role: str) -> Array:
    array = constant_of(value)
    if array is None:
        raise Refused(f"{role} is not constant")
    return array


def _canonical(node: ir.Node, weight: Array) -> Array:
    """The weight as float64 [group, output of the group, input of the group, tap]."""
    if node.op_type in ("Gemm", "MatMul"):
        if weight.ndim != 2:
            raise Refused("weight is not a matrix")
        matrix = weight if attribute(node, "transB", 0) else weight.T
        alpha = np.float64(attribute(node, "alpha", 1.0))
        canonical: Array = matrix[np.newaxis, :, :, np.newaxis] * alpha
        return canonical
    groups, taps = int(attribute(node, "group", 1)), int(np.prod(weight.shape[2:]))
    wide = weight.astype(np.float64)
    grouped = wide.reshape(groups, weight.shape[0] // groups, weight.shape[1], taps)
    return grouped.swapaxes(1, 2) if node.op_type == "ConvTranspose" else grouped


def _as_stored(node: ir.Node, weight: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_canonical`, with alpha left in the weight."""
    if node.op_type in ("Gemm", "MatMul"):
        matrix = weight[0, :, :, 0]
        return matrix if attribute(node, "transB", 0) else matrix.T
    return (weight.swapaxes(1, 2) if node.op_type == "ConvTranspose" else weight).reshape(shape)


def _weight_rank(node: ir.Node) -> int:
    """The rank of a layer's weight, which is that of its input and output too, but for MatMul."""
    return _constant(node.inputs[1], "weight").ndim


def rank_of(value: ir.Value | None) -> int | None:
    """The number of dimensions, or None where it is not known."""
    return None if value is None or value.shape is None else value.shape.rank()


def narrow(array: Array, dtype: np.dtype[Any]) -> Array:
    """Round a float64 array to `dtype`; `Refused` where more than rounding would be lost.

    Weights that fall among the subnormals of float16 keep few bits. Measured over the whole tensor, so
    that a channel which is nearly zero beside the others does not count.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrowed = array.astype(dtype)
    if not np.isfinite(narrowed).all():
        raise Refused("folded weights would overflow")
    pieces = zip(_pieces(narrowed), _pieces(array), strict=True)
    lost = np.linalg.norm([np.linalg.norm(after - before) for after, before in pieces])
    if lost > np.finfo(dtype).eps * np.linalg.norm(array):
        raise Refused("folded weights would lose precision")
    return narrowed


def _pieces(array: Array) -> Iterator[Array]:
    """Some rows at a time: what is computed from them stays small."""
    rows = np.atleast_1d(array)
    step = max(1, _PIECE // max(1, rows[:1].size))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def set_constant(node: ir.Node, index: int, array: Array, role: str) -> None:
    """Let input `index` of `node` be `array`: a new tensor, for a constant of others stays as it is."""
    node.resize_inputs(max(index + 1, len(node.inputs)))
    old = node.inputs[index]
    if old is not None and old.is_initializer() and only_user(old) is node and not old.is_graph_input():
        tensor = ir.tensor(np.asarray(array, order="C"), name=old.name)
        old.const_value, old.shape, old.type = tensor, ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        return
    new = rewiring.new_initializer(rewiring.graph_of(node), f"{node.outputs[0].name}.{role}", array)
    node.replace_input_with(index, new)
    if old is not None:
        release(old)


def release(value: ir.Value) -> bool:
    """Drop a constant that nothing reads any more; whether it went."""
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return False
    producer = value.producer()
    if producer is not None:
        rewiring.remove_if_unused(producer)
    else:
        rewiring.drop_unused_initializer(value)
    return True
