"""Give the padding of a Pad to the convolutions and poolings that read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import Array, attribute, constant_of, replace
from edgewise.passes.linear import rank_of

_OWN_VALUE = {"Conv": 0.0, "AveragePool": 0.0, "MaxPool": -np.inf}
"""Operator -> the value it pads with by itself."""


@dataclass(frozen=True)
class FusePad(Rule):
    """Move constant padding into the Conv, AveragePool or MaxPool behind it.

    Given:   y = Conv(Pad(x, p, value 0), pads q)
    Result:  y = Conv(x, pads p + q)
    Given:   y = AveragePool(Pad(x, p, value 0), pads q)    counting its own padding, or q = 0
    Result:  y = AveragePool(x, pads p + q, count_include_pad 1)
    Given:   y = MaxPool(Pad(x, p, value -inf), pads q)
    Result:  y = MaxPool(x, pads p + q)
    Only where p is constant, nowhere negative and zero but on spatial axes, and where every user of the
    Pad can take it, since the Pad would have to stay for the others.
    """

    name = "fuse-pad"
    op_types = ("Pad",)

    def rewrite(self, node: ir.Node) -> bool:
        padded, data = node.outputs[0], node.inputs[0]
        uses = padded.uses()
        if data is None or not any(_takes_padding(use.node) for use in uses):
            return False
        if padded.is_graph_output() or not all(_takes_padding(u.node) and u.idx == 0 for u in uses):
            raise Refused("the padded value has another user")
        begin, end = _spatial_amounts(node)
        value = _value(node)
        pads = [_sum_of_pads(use.node, begin, end, value) for use in uses]
        for use, amounts in zip(uses, pads, strict=True):
            use.node.attributes.pop("auto_pad", None)
            use.node.attributes["pads"] = ir.AttrInt64s("pads", amounts)
            if use.node.op_type == "AveragePool":
                use.node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
        replace(padded, data)
        return True


def _takes_padding(node: ir.Node) -> bool:
    return node.op_type in _OWN_VALUE and node.domain == ""


def _spatial_amounts(pad: ir.Node) -> tuple[Array, Array]:
    """How much `pad` puts before and behind each spatial axis."""
    if attribute(pad, "mode", "constant") != "constant":
        raise Refused("Pad repeats its input instead of padding with a constant")
    amounts = _input(pad, 1) if "pads" not in pad.attributes else attribute(pad, "pads")
    if amounts is None:
        raise Refused("Pad of opset 1")
    pairs = np.array(amounts).reshape(2, -1)
    axes = _input(pad, 3)
    if axes is not None:
        pairs = _on_all_axes(pairs, axes, rank_of(pad.inputs[0]))
    if (pairs < 0).any():
        raise Refused("Pad crops")
    if pairs[:, :2].any():
        raise Refused("Pad pads batch or channels")
    return pairs[0, 2:], pairs[1, 2:]


def _on_all_axes(pairs: Array, axes: Array, rank: int | None) -> Array:
    """The amounts [2, rank], zero on the axes that are not named."""
    if rank is None:
        raise Refused("the rank of what is padded is not known")
    full = np.zeros((2, rank), pairs.dtype)
    full[:, axes] = pairs
    return full


def _value(pad: ir.Node) -> float:
    """What `pad` pads with, an attribute before opset 11."""
    value = _input(pad, 2)
    return float(attribute(pad, "value", 0.0) if value is None else value.item())


def _input(pad: ir.Node, index: int) -> Array | None:
    """The constant at input `index`, None where the input is left out."""
    value = pad.inputs[index] if index < len(pad.inputs) else None
    array = constant_of(value)
    if value is not None and array is None:
        raise Refused("amounts, axes or value of Pad are not constant")
    return array


def _sum_of_pads(node: ir.Node, begin: Array, end: Array, value: float) -> list[int]:
    """The attribute `pads` of `node` once it pads by itself; `Refused` where it would do it otherwise."""
    if value != _OWN_VALUE[node.op_type]:
        raise Refused(f"Pad pads with another value than {node.op_type}")
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    if auto_pad.startswith("SAME"):
        raise Refused("auto_pad depends on the size of the padded input")
    own = np.array(attribute(node, "pads", ()), np.int64)
    if auto_pad == "VALID" or not own.size:
        own = np.zeros(begin.size + end.size, np.int64)
    total = own + np.concatenate([begin, end])
    if node.op_type != "Conv":
        _check_pooling(node, own, total)
    return [int(n) for n in total]


def _check_pooling(pool: ir.Node, own: Array, total: Array) -> None:
    """Windows, and what is counted in them, have to stay as they were."""
    if attribute(pool, "ceil_mode", 0):
        raise Refused("the last windows of ceil_mode depend on who pads")
    if any(d != 1 for d in attribute(pool, "dilations", ())):
        raise Refused("dilated pooling")
    if (total >= np.tile(attribute(pool, "kernel_shape"), 2)).any():
        raise Refused("a pooling window would hold nothing but padding")
    if pool.op_type == "AveragePool" and own.any() and not attribute(pool, "count_include_pad", 0):
        raise Refused("AveragePool leaves its own padding out of the mean")
    if len(pool.outputs) > 1 and pool.outputs[1].name:
        raise Refused("MaxPool gives indices into the padded input")
