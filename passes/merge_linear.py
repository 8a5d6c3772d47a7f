"""Write two layers in a row, with nothing between them, as one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import Array, attribute, constant_of, only_user, remove_if_unused
from edgewise.passes.linear import Linear, layer_ending_at, layer_reading, narrow, rank_of, set_constant
from edgewise.passes.window import Window

_LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class MergeLinear(Rule):
    """Multiply the weights of two layers in a row where their product is smaller than they are.

    Given:   y = V (W x + b) + c           two of Gemm, MatMul and MatMul with Add, with constants
    Result:  y = (V W) x + (V b + c)
    Given:   y = Conv(Conv(x, W, b), V, c)    of one group, and one of the kernels is a single tap at
                                              stride 1 without padding
    Result:  y = Conv(x, U, d)             through the window of the other one, where
             U[n, c, t] = sum over m of V[n, m] W[m, c, t], or of V[n, m, t] W[m, c]
             d[n] = c[n] + sum over m and t of V[n, m, t] b[m]
    Padding of the second one shows zeros and not b at the border, so there b has to be zero. The product
    must have fewer weights than the two together, and the second layer no more positions than the first:
    then it takes fewer multiplications as well. Neither weight is shared, for it would have to stay, and
    nothing else reads the result between. Products are computed in float64 and rounded once.
    """

    name = "merge-linear"
    op_types = (*_LAYERS, "Add")  # what a first layer ends with

    def rewrite(self, node: ir.Node) -> bool:
        between = node.outputs[0]
        if not any(use.idx == 0 and _is_layer(use.node) for use in between.uses()):
            return False
        first = layer_ending_at(node)
        if first is None:
            return False
        second = layer_reading(between)
        if second is None:
            raise Refused("the first layer has another user")
        if (first.node.op_type == "Conv") != (second.node.op_type == "Conv"):
            return False  # one mixes axis 1, the other the last
        if second.node.graph is not node.graph:
            raise Refused("the layers are in different graphs")
        merged = _product(first, second)
        if second.node.op_type == "Conv":
            _write_convolution(merged, _seen_through(first.node, second.node))
        else:
            merged.write()
        second.node.replace_input_with(0, first.node.inputs[0])
        remove_if_unused(node)
        return True


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in _LAYERS and node.domain == ""


def _product(first: Linear, second: Linear) -> Linear:
    """What `second` has to be to do the work of both; `Refused` where that is no layer, or no gain."""
    if any(attribute(layer.node, "transA", 0) for layer in (first, second)):
        raise Refused("Gemm transposes its input")
    if first.weight.shape[0] != 1 or second.weight.shape[0] != 1:
        raise Refused("grouped convolutions")
    if second.node.op_type == "Conv":
        _check_windows(Window.of(first.node), Window.of(second.node))
    _check_cost(first, second)
    absorbing = second.scaled_before(np.ones(second.inputs.size), _bias(first))
    inner, outer = first.weight[0], second.weight[0]  # [middle, input, tap], [output, middle, tap]
    with np.errstate(over="ignore", invalid="ignore"):  # `narrow` refuses what is not finite
        product = np.tensordot(outer, inner, (1, 0)).swapaxes(1, 2)
    outputs, inputs, *_ = product.shape
    return dataclasses.replace(absorbing, weight=product.reshape(1, outputs, inputs, -1))


def _check_windows(first: Window, second: Window) -> None:
    if second.is_point:
        return
    if not first.is_point:
        raise Refused("neither kernel is a single tap at stride 1 without padding")
    if any(second.surplus(axis) > 0 for axis in range(len(second.kernel))):
        raise Refused("the second layer has more positions than the first")


def _check_cost(first: Linear, second: Linear) -> None:
    """The first layer computes at least as many positions as the second, so weights tell all."""
    for layer in (first, second):
        weight = layer.node.inputs[1]
        if weight is None or only_user(weight) is not layer.node:
            raise Refused("a weight is shared")
    (_, _, inputs, taps), (_, outputs, _, more_taps) = first.weight.shape, second.weight.shape
    if inputs * outputs * taps * more_taps >= first.weight.size + second.weight.size:
        raise Refused("the merged layer would cost more")


def _bias(layer: Linear) -> Array:
    """The bias as [outputs]; `Refused` where it does more than shift channels."""
    bias, rank = layer.bias, rank_of(layer.node.inputs[0])
    if bias.ndim and bias.shape[-1] != bias.size:
        raise Refused("bias is not per channel")
    if bias.ndim > 1 and (rank is None or rank < bias.ndim):
        raise Refused("bias may change the rank of its data")
    return np.broadcast_to(bias.reshape(-1), (layer.outputs.size,))


def _seen_through(first: ir.Node, second: ir.Node) -> ir.Node:
    """The one of two convolutions that has the window of both together."""
    return first if Window.of(second).is_point else second


def _write_convolution(merged: Linear, shaped: ir.Node) -> None:
    """Put the merged layer in place of the second one, with the window of `shaped`."""
    node, stored = merged.node, constant_of(merged.node.inputs[1])
    assert stored is not None  # the layer has been read
    _, outputs, inputs, _ = merged.weight.shape
    weight = narrow(merged.weight.reshape(outputs, inputs, *Window.of(shaped).kernel), stored.dtype)
    bias = narrow(merged.bias, stored.dtype)
    attributes = list(shaped.attributes.values())
    node.attributes.clear()
    for attr in attributes:
        node.attributes.add(attr)
    set_constant(node, 1, weight, "weight")
    if bias.any() or (len(node.inputs) > 2 and node.inputs[2] is not None):
        set_constant(node, 2, bias, "bias")
