"""How channels couple in layers, normalization, pooling and elementwise operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.channel_links import (
    Coupling,
    Indices,
    Keep,
    Link,
    NodeView,
    Quota,
    Slot,
    dims_of,
    op_types,
)
from edgewise.passes.channel_norms import layer_norm, reduction, rms_norm
from edgewise.passes.channel_products import attention, product, rotary
from edgewise.passes.channel_recurrent import CELLS, recurrent
from edgewise.passes.graph import attribute, constant_of
from edgewise.passes.linear import set_constant

CouplingRule = Callable[[NodeView], Coupling]

UNARY = op_types(
    "Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid "
    "Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
BROADCAST = op_types(
    "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or PRelu Pow Sub Sum "
    "Where Xor"
)
POOLS = op_types("AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool")
REDUCTIONS = op_types(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare"
)


def _elementwise(view: NodeView) -> Coupling:
    """Axes aligned from the right; an operand of size one along an axis is no part of it."""
    return Coupling(view.broadcast(range(len(view.out_dims()))))


def _dropout(view: NodeView) -> Coupling:
    view.expect_one_output("Dropout mask is read")
    training = view.input(2)
    if training is not None and constant_of(training) != np.False_:
        raise Refused("Dropout in training mode")
    return Coupling(view.same((i, i) for i in range(len(view.dims()))))


def _conv(view: NodeView) -> Coupling:
    """Filters with outputs, their slices with inputs; depthwise: filter, input and outputs at once."""
    outputs, per_group = view.constant_dims(1, "weight")[:2]
    groups = int(attribute(view.node, "group", 1))
    x, y = view.slot(0, 1), view.out(1)
    view.expect(x, groups * per_group)
    view.expect(y, outputs)
    filters = (Link(view.slot(1, 0), y), *_per_channel(view, 2, y))
    if groups == 1:
        return Coupling((Link(view.slot(1, 1), x), *filters))
    if per_group == 1:
        every = np.arange(outputs)
        return Coupling(
            (Link(x, y, every // (outputs // groups), every), *filters),
            cut=lambda keep: _set_group(view, keep),
        )
    return _grouped(view, Quota(x, y, groups))


def _set_group(view: NodeView, keep: Keep) -> None:
    kept = keep(view.slot(0, 1))
    if kept is not None:
        view.node.attributes["group"] = ir.AttrInt64("group", len(kept))


def _grouped(view: NodeView, quota: Quota) -> Coupling:
    """Each group has a block of the weight to itself, so indices differ from group to group."""
    weight = view.data(1)
    if len(weight.uses()) > 1:
        raise Refused("shared weight")
    return Coupling(
        _per_channel(view, 2, quota.outputs),
        free=(quota.inputs, quota.outputs),
        quota=quota,
        cut=lambda keep: _cut_grouped(view, quota, keep),
    )


def _cut_grouped(view: NodeView, quota: Quota, keep: Keep) -> None:
    weight = constant_of(view.data(1))
    assert weight is not None  # `_conv` has seen to it
    outputs, per_group = weight.shape[:2]
    kept_in = _by_group(keep(quota.inputs), quota.groups, quota.groups * per_group)
    kept_out = _by_group(keep(quota.outputs), quota.groups, outputs)
    blocks = weight.reshape(quota.groups, -1, *weight.shape[1:])
    alive = np.flatnonzero(kept_out.any(1))
    shrunk = [blocks[g][kept_out[g]][:, kept_in[g]] for g in alive]
    set_constant(view.node, 1, np.concatenate(shrunk), "weight")
    view.node.attributes["group"] = ir.AttrInt64("group", len(alive))


def _by_group(
    kept: Indices | None, groups: int, size: int
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    mask = np.full(size, kept is None)
    if kept is not None:
        mask[kept] = True
    return mask.reshape(groups, -1)


def _conv_transpose(view: NodeView) -> Coupling:
    inputs, per_group = view.constant_dims(1, "weight")[:2]
    groups = int(attribute(view.node, "group", 1))
    x, y = view.slot(0, 1), view.out(1)
    view.expect(x, inputs)
    view.expect(y, groups * per_group)
    bias = _per_channel(view, 2, y)
    if groups == 1:
        return Coupling((Link(view.slot(1, 0), x), Link(view.slot(1, 1), y), *bias))
    if inputs == groups:
        every = np.arange(groups * per_group)
        return Coupling(
            (Link(x, y, every // per_group, every), Link(view.slot(1, 0), x), *bias),
            cut=lambda keep: _set_group(view, keep),
        )
    raise Refused("grouped ConvTranspose")


def _gemm(view: NodeView) -> Coupling:
    weight = view.constant_dims(1, "weight")
    out_axis = 0 if attribute(view.node, "transB", 0) else 1
    x, y = view.slot(0, 0 if attribute(view.node, "transA", 0) else 1), view.out(1)
    view.expect(x, weight[1 - out_axis])
    view.expect(y, weight[out_axis])
    links = (Link(view.slot(1, 1 - out_axis), x), Link(view.slot(1, out_axis), y))
    if view.input(2) is None:
        return Coupling(links)
    bias = view.constant_dims(2, "bias")
    if not bias or bias[-1] == 1:
        return Coupling(links)
    if bias[-1] != weight[out_axis]:
        raise Refused("bias is not per channel")
    return Coupling((*links, Link(view.slot(2, len(bias) - 1), y)))


def _matmul(view: NodeView) -> Coupling:
    """A constant matrix on either side; the other axes of the data pass through."""
    side = matrix_side(view)
    if side is None:
        return product(view)
    rank = len(view.dims(1 - side))
    if rank < 2:
        raise Refused("MatMul of a vector")
    shape, axis = view.constant_dims(side, "weight"), rank - 2 + side
    x, y = view.slot(1 - side, axis), view.out(axis)
    view.expect(x, shape[1 - side])
    view.expect(y, shape[side])
    passing = view.same(((i, i) for i in range(rank) if i != axis), index=1 - side)
    return Coupling((Link(view.slot(side, 1 - side), x), Link(view.slot(side, side), y), *passing))


def matrix_side(view: NodeView) -> int | None:
    """Which input of a MatMul is a constant matrix, None where it is neither or where both are constant."""
    constant = [view.slot(i, 0).use is not None for i in (0, 1)]
    if constant[0] == constant[1] or len(view.dims(int(constant[1]))) != 2:
        return None
    return int(constant[1])


def _batch_norm(view: NodeView) -> Coupling:
    view.expect_one_output("BatchNormalization in training mode")
    if attribute(view.node, "training_mode", 0):
        raise Refused("BatchNormalization in training mode")
    if not attribute(view.node, "spatial", 1):
        raise Refused("BatchNormalization of every pixel")
    return _normalized(view, 4)


def _normalized(view: NodeView, vectors: int) -> Coupling:
    y = view.out(1)
    links = [link for index in range(1, vectors + 1) for link in _per_channel(view, index, y)]
    return Coupling((*view.same([(1, 1)]), *links))


def _per_channel(view: NodeView, index: int, slot: Slot) -> tuple[Link, ...]:
    """The link of an optional constant vector with one entry a channel."""
    if view.input(index) is None:
        return ()
    if view.constant_dims(index, "bias" if index == 2 else "parameter") != (dims_of(slot.value)[slot.axis],):
        raise Refused("parameter is not per channel")
    return (Link(view.slot(index, 0), slot),)


def _pool(view: NodeView) -> Coupling:
    view.expect_one_output("MaxPool indices are read")
    return Coupling(view.same([(0, 0), (1, 1)]))


def _before_axis(view: NodeView) -> Coupling:
    """Softmax and its like mix along one axis, or, in old opsets, along all axes from one on."""
    rank = len(view.dims())
    modern = view.opset >= 13
    axis = int(attribute(view.node, "axis", -1 if modern else 1)) % rank
    return Coupling(view.same((i, i) for i in range(rank) if i < axis or (modern and i > axis)))


MIXERS: Mapping[str, CouplingRule] = MappingProxyType(
    {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
)
"""Layers that sum over channels: what they read need not leave when what they write does."""

RULES: Mapping[str, CouplingRule] = MappingProxyType(
    {
        **MIXERS,
        **dict.fromkeys((*UNARY, *BROADCAST), _elementwise),
        **dict.fromkeys(POOLS, _pool),
        **dict.fromkeys(REDUCTIONS, reduction),
        **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _before_axis),
        **dict.fromkeys(CELLS, recurrent),
        "Attention": attention,
        "BatchNormalization": _batch_norm,
        "Dropout": _dropout,
        "InstanceNormalization": lambda view: _normalized(view, 2),
        "LayerNormalization": layer_norm,
        "RMSNormalization": rms_norm,
        "RotaryEmbedding": rotary,
        "SimplifiedLayerNormalization": rms_norm,  # onnxruntime's, in the default domain
    }
)
"""Operators of the default domain, by type."""
