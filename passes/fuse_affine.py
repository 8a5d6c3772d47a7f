"""Fold multiplications by and additions of constants into the layers beside them, and into each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.fuse_batch_norm import check_inference
from edgewise.passes.graph import Array, constant_of, only_user, remove_if_unused, replace
from edgewise.passes.linear import (
    FLOATS,
    Channels,
    Vectors,
    constant_input,
    first_success,
    fold_into_consumer,
    fold_into_producer,
    narrow,
    rank_of,
    set_constant,
)

_ARITHMETIC = ("Mul", "Div", "Add", "Sub")
_CANCELLATION = 2.0**8  # a sum of two constants may be this much smaller than they are


@dataclass(frozen=True, eq=False)
class _Affine:
    """scale * data + shift, float64, where the constant, input `index`, broadcasts against `data`.

    `kind` is the operator that does it with one constant; Sub of `data` from a constant has none.
    """

    data: ir.Value
    index: int
    dtype: np.dtype[Any]
    scale: Array
    shift: Array
    kind: str | None


@dataclass(frozen=True)
class FuseAffine(Rule):
    """Fold Mul, Div, Add and Sub by a constant that is a scalar or holds one number per channel.

    Given:   f(z) = s * z + t, and a layer L(x) = W x + b with constant W and b, which is one of Conv,
             ConvTranspose, Gemm, MatMul, MatMul with Add
    Result:  f(L(x)) = (s W) x + (s b + t)      s along the output channels of W
             L(f(x)) = (W s) x + (b + W t)      s along its input channels, where no zero padding
                                                takes part in W t
    Given:   f(BN(x)), a BatchNormalization of inference with constant scale g and shift h
    Result:  BN(x) with scale s * g and shift s * h + t
    Given:   (x * c) * d  or  (x + c) + d       constants of any shape; Div and Sub alike
    Result:  x * (c * d)  or  x + (c + d)       where the result is no larger than c or d
    A constant that would change the shape of its data by broadcasting is left alone. So are sums that
    round on purpose, where a far larger number is added and taken away, and GELU and LayerNorm written
    out before a layer: they end in a constant, and onnxruntime knows them by it.
    """

    name = "fuse-affine"
    op_types = _ARITHMETIC

    def rewrite(self, node: ir.Node) -> bool:
        affine = _read(node)
        if affine is None or _is_matmul_bias(node, affine):
            return False

        def of_output(channels: Channels) -> tuple[Array, Array]:
            return _per_channel(affine.scale, channels), _per_channel(affine.shift, channels)

        def of_input(channels: Channels) -> tuple[Array, Array]:
            _check_data(affine)
            return of_output(channels)

        return first_success(
            lambda: fold_into_producer(node, affine.data, of_output),
            lambda: fold_into_consumer(node, affine.data, of_input),
            lambda: _fold_into_norm(node, affine.data, of_output),
            lambda: _merge_with_producer(node, affine),
        )


def _read(node: ir.Node | None) -> _Affine | None:
    """What `node` does if it is an arithmetic operator with one constant of a float type."""
    if node is None or node.op_type not in _ARITHMETIC or node.domain != "" or node.attributes:
        return None  # only before opset 7 they have attributes
    index = constant_input(node)
    if index is None:
        return None
    data, constant = node.inputs[1 - index], constant_of(node.inputs[index])
    if data is None or constant is None or constant.dtype not in FLOATS or not constant.size:
        return None
    wide, one, zero = constant.astype(np.float64), np.ones(()), np.zeros(())
    if node.op_type == "Mul":
        return _Affine(data, index, constant.dtype, wide, zero, "Mul")
    if node.op_type == "Add":
        return _Affine(data, index, constant.dtype, one, wide, "Add")
    if node.op_type == "Sub" and index == 0:
        return _Affine(data, index, constant.dtype, -one, wide, None)
    if node.op_type == "Sub":
        return _Affine(data, index, constant.dtype, one, -wide, "Add")
    with np.errstate(divide="ignore"):
        return _Affine(data, index, constant.dtype, 1 / wide, zero, "Mul") if index == 1 else None


def _is_matmul_bias(node: ir.Node, affine: _Affine) -> bool:
    """A MatMul has no better place for its bias; fuse-matmul-add makes a Gemm where it can."""
    producer = affine.data.producer()
    return affine.kind == "Add" and producer is not None and producer.op_type == "MatMul"


def _per_channel(constant: Array, channels: Channels) -> Array:
    """The constant as [channels.size]; `Refused` where it is not one number per channel or one for all."""
    rank = channels.trailing + 1 if channels.rank is None else channels.rank
    shape = (1,) * (rank - constant.ndim) + constant.shape
    on_axis = shape[rank - 1 - channels.trailing]
    if len(shape) != rank or constant.size != on_axis or on_axis not in (1, channels.size):
        raise Refused("constant is not per channel")
    return np.broadcast_to(constant.reshape(-1), (channels.size,))


def _check_data(affine: _Affine) -> None:
    """Whether the layer after may read the data itself."""
    if not (_keeps_shape(affine.data, affine.scale) and _keeps_shape(affine.data, affine.shift)):
        raise Refused("constant may change the shape of its data")
    data = affine.data
    while (before := _read(data.producer())) is not None:
        data = before.data
    producer = data.producer()
    if producer is not None and producer.op_type in _ARITHMETIC:
        raise Refused("constant may end a GELU or a normalization written out")


def _keeps_shape(data: ir.Value, constant: Array) -> bool:
    """Whether `constant` is known to broadcast to the shape of `data`."""
    rank = rank_of(data)
    if rank is None or data.shape is None or constant.ndim > rank:
        return constant.ndim == 0
    dims = data.shape[rank - constant.ndim :]
    return all(size in (1, dim) for size, dim in zip(constant.shape, dims, strict=True))


def _fold_into_norm(node: ir.Node, data: ir.Value, vectors: Vectors) -> bool:
    """Fold `node`, which gives scale * data + shift, into the BatchNormalization that makes `data`."""
    norm = data.producer()
    if norm is None or norm.op_type != "BatchNormalization" or norm.domain != "":
        return False
    check_inference(norm)
    if only_user(data) is not node or norm.graph is not node.graph:
        raise Refused("the normalization has another user")
    gamma, beta, rank = constant_of(norm.inputs[1]), constant_of(norm.inputs[2]), rank_of(norm.inputs[0])
    if gamma is None or beta is None:
        raise Refused("BatchNormalization parameters are not constant")
    if rank is None or rank < 2:
        raise Refused("the rank of what is normalized is not known")
    scale, shift = vectors(Channels(gamma.size, rank - 2, rank))
    wide = scale * gamma.astype(np.float64), scale * beta.astype(np.float64) + shift
    scaled, shifted = narrow(wide[0], gamma.dtype), narrow(wide[1], beta.dtype)
    set_constant(norm, 1, scaled, "scale")
    set_constant(norm, 2, shifted, "shift")
    replace(node.outputs[0], data)
    return True


def _merge_with_producer(node: ir.Node, affine: _Affine) -> bool:
    """Fold the constant of the node before into that of `node`."""
    first = affine.data.producer()
    inner = _read(first)
    if first is None or inner is None or affine.kind is None or inner.kind != affine.kind:
        return False
    if only_user(affine.data) is not node or first.graph is not node.graph:
        raise Refused("the first of two constants has another user")
    merged = inner.scale * affine.scale if affine.kind == "Mul" else _sum(inner.shift, affine.shift)
    larger = max(inner.scale.size, inner.shift.size, affine.scale.size, affine.shift.size)
    if merged.size > larger:
        raise Refused("the merged constant would be larger")
    set_constant(node, affine.index, narrow(merged, affine.dtype), "constant")
    node.op_type = affine.kind
    node.replace_input_with(1 - affine.index, inner.data)
    remove_if_unused(first)
    return True


def _sum(first: Array, second: Array) -> Array:
    total: Array = first + second
    if max(np.abs(first).max(), np.abs(second).max()) > _CANCELLATION * np.abs(total).max():
        raise Refused("the constants cancel")
    return total
