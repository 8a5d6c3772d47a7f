"""Write the sum of convolutions of one input as one convolution."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes import graph as rewiring
from edgewise.passes.base import Refused, Rule
from edgewise.passes.fuse_batch_norm import check_inference, scale_and_shift
from edgewise.passes.graph import Array, only_user
from edgewise.passes.linear import Linear, layer_ending_at
from edgewise.passes.window import Window


@dataclass(frozen=True, eq=False)
class _Branch:
    """A convolution of the common input: weight [group, output, input, tap] and bias [outputs], float64."""

    window: Window
    weight: Array
    bias: Array


@dataclass(frozen=True)
class MergeBranches(Rule):
    """Add up the kernels of convolutions of one input in place of their results, as RepVGG does.

    Given:   y = Add(f(x), g(x), ...)     each a Conv with constant W and b, x itself, or the
                                          BatchNormalization s * x + t of inference; at least one a Conv
    Result:  y = Conv(x, sum of W, sum of b)
             where x counts as W = 1, b = 0 and the normalization as W = diag(s), b = t, of one tap each
    The largest kernel takes up the others, whose taps lie on its own: with n taps more in front, and the
    padding to match, a tap t becomes the tap t + n. A dilated kernel may lie on every second tap of a
    dense one. All have the same strides, groups and channel counts, and outputs of the same size; nothing
    else reads their results. So the convolution that stays costs what it did, and the others nothing.
    Add takes two at a time: a chain of them is taken up from its first.
    Source: Ding et al., RepVGG: Making VGG-style ConvNets Great Again, 2021.
    """

    name = "merge-branches"
    op_types = ("Add", "Sum")

    def rewrite(self, node: ir.Node) -> bool:
        source = _common_input(node)
        if source is None:
            return False
        _check_users(node, source)
        producers = [None if v is source else v.producer() for v in node.inputs if v is not None]
        layers = [layer_ending_at(p) for p in producers if p is not None and p.op_type == "Conv"]
        largest = max((x for x in layers if x is not None), key=lambda x: x.weight.shape[3])
        branches = [_branch(p, largest) for p in producers]
        _sum(largest, branches).write()
        rewiring.replace(node.outputs[0], largest.node.outputs[0])
        return True


def _common_input(node: ir.Node) -> ir.Value | None:
    """What all inputs of `node` are branches of; None unless one of them is a Conv."""
    if node.attributes:  # how to broadcast, before opset 7
        return None
    producers = [None if v is None else v.producer() for v in node.inputs]
    convs = [p for p in producers if p is not None and p.op_type == "Conv" and p.domain == ""]
    for source in dict.fromkeys(conv.inputs[0] for conv in convs):
        if all(v is source or _reads(p, source) for v, p in zip(node.inputs, producers, strict=True)):
            return source
    return None


def _reads(node: ir.Node | None, source: ir.Value | None) -> bool:
    """Whether `node` may be a branch of `source`."""
    if node is None or node.domain != "" or node.op_type not in ("Conv", "BatchNormalization"):
        return False
    return node.inputs[0] is source


def _check_users(node: ir.Node, source: ir.Value) -> None:
    for value in node.inputs:
        if value is None or value is source:
            continue
        if only_user(value) is not node:
            raise Refused("a branch has another user")
        producer = value.producer()
        if producer is None or producer.graph is not node.graph:
            raise Refused("a branch is in another graph")


def _branch(node: ir.Node | None, largest: Linear) -> _Branch:
    """What `node`, or None for the input itself, adds to the layer `largest`."""
    groups, outputs, inputs, _ = largest.weight.shape
    if node is not None and node.op_type == "Conv":
        layer = layer_ending_at(node)
        assert layer is not None  # a Conv is one, or refused
        if layer.weight.shape[0] != groups:
            raise Refused("groups differ")
        if layer.weight.shape[:3] != largest.weight.shape[:3]:
            raise Refused("channel counts differ")
        return _Branch(Window.of(node), layer.weight, layer.bias)
    scale, shift = np.ones(groups * outputs), np.zeros(groups * outputs)
    if node is not None:
        check_inference(node)
        scale, shift = scale_and_shift(node)
    if inputs != outputs or scale.size != groups * outputs:
        raise Refused("channel counts differ")
    diagonal = np.where(np.eye(outputs, dtype=np.bool_), scale.reshape(groups, outputs, 1), 0.0)
    return _Branch(Window.point(largest.outputs.trailing), diagonal[..., np.newaxis], shift)


def _sum(largest: Linear, branches: list[_Branch]) -> Linear:
    """The layer `largest` with the weights of all branches, its own among them, in place of its own."""
    window, channels = Window.of(largest.node), largest.weight.shape[:3]
    weight = np.zeros((*channels, *window.kernel))
    for branch in branches:
        channels_and_taps = (slice(None),) * 3 + _taps(branch.window, window)
        weight[channels_and_taps] += branch.weight.reshape(*channels, *branch.window.kernel)
    bias = np.sum([branch.bias for branch in branches], axis=0)
    return dataclasses.replace(largest, weight=weight.reshape(largest.weight.shape), bias=bias)


def _taps(inner: Window, outer: Window) -> tuple[slice, ...]:
    """The taps of `outer` that are those of `inner`; `Refused` where not all of them are."""
    if inner.auto_pad or outer.auto_pad:
        raise Refused("auto_pad depends on the size of the input")
    if inner.strides != outer.strides:
        raise Refused("strides differ")
    return tuple(_taps_along(axis, inner, outer) for axis in range(len(outer.kernel)))


def _taps_along(axis: int, inner: Window, outer: Window) -> slice:
    if inner.surplus(axis) != outer.surplus(axis):
        raise Refused("the branches give different sizes")
    size, spacing = inner.kernel[axis], outer.dilations[axis]
    step, uneven = divmod(inner.dilations[axis], spacing) if size > 1 else (1, 0)
    first, between = divmod(outer.pads[axis] - inner.pads[axis], spacing)
    last = first + step * (size - 1)
    if uneven or between or first < 0 or last >= outer.kernel[axis]:
        raise Refused("no kernel covers the others")
    return slice(first, last + 1, step)
