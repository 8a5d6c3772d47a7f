"""How channels couple where a node sums over all of them: zeros may leave, for they add nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_links import (
    Coupling,
    Indices,
    Keep,
    NodeView,
    Slot,
    dims_of,
    is_wide,
    op_types,
    size_of,
)
from edgewise.passes.graph import attribute, constant_of, graph_of, new_initializer, new_node
from edgewise.passes.linear import set_constant

# An eighth of the channels is worth the nodes that take care of it. Measured with onnxruntime 1.31: encoders
# that lost a tenth of their width ran at 1.04 to 1.08 of their speed, and at 1.25 with a quarter.
_WORTH = 8
_SUMS = op_types("ReduceL1 ReduceL2 ReduceSum ReduceSumSquare")


def layer_norm(view: NodeView) -> Coupling:
    """LayerNormalization over the last axis: inputs that are zero leave, and outputs apart from them.

    Given:   y = LayerNormalization(x, g, s)    where x[i] is zero for every i that leaves
    Result:  y = Gather(LayerNormalization(Pad(x'), g', s'), k)

    No channel is special to the operator. So those that stay come first, zeros take the place of the others
    behind them, and g and s are put in the same order. k says where the outputs are that stay: it is a Slice
    if the same channels stay on both sides.
    """
    view.expect_one_output("LayerNormalization statistics are read")
    rank = len(view.dims())
    axis = int(attribute(view.node, "axis", -1)) % rank
    passing = view.same((i, i) for i in range(axis))
    if axis != rank - 1 or not _is_per_channel(view):
        return Coupling(passing)
    x, y = view.slot(0, axis), view.out(axis)
    producer = x.value.producer()
    padded = producer is not None and _resizes(producer, "Pad")
    chosen = any(_resizes(use.node, "Gather", "Slice") for use in y.value.uses())
    # Where those nodes stand already, all that can leave has left: more than there are never leave.
    least = {x: _least(x) + padded * size_of(x), y: _least(y) + chosen * size_of(y)}
    return Coupling(passing, free=(y,), zeros=(x,), least=least, cut=partial(_cut_layer_norm, view))


def _is_per_channel(view: NodeView) -> bool:
    """Whether the last axis is one of data, and every parameter a constant with one number for each index."""
    size = view.dims()[-1]
    parameters = [constant_of(value) for value in view.node.inputs[1:] if value is not None]
    own = all(array is not None and array.shape == (size,) for array in parameters)
    return own and bool(parameters) and is_wide(size) and view.slot(0, 0).use is None


def _resizes(node: ir.Node, *kinds: str) -> bool:
    """Whether a node of one of these kinds gives the last axis another size."""
    source, result = node.inputs[0], node.outputs[0]
    return node.op_type in kinds and source is not None and dims_of(source)[-1:] != dims_of(result)[-1:]


def _least(slot: Slot) -> int:
    """How many indices leave if any do."""
    return -(-size_of(slot) // _WORTH)


def _cut_layer_norm(view: NodeView, keep: Keep) -> None:
    """Put the operator behind a Pad, and let its node become the choice that gives what it gave."""
    node, axis = view.node, len(view.dims()) - 1
    x, y = view.slot(0, axis), view.out(axis)
    kept_in, kept_out, every = keep(x), keep(y), np.arange(size_of(x))
    if kept_in is None and kept_out is None:
        return
    data, shape = x.value, _shape_left(y.value, keep, but=axis)
    if kept_in is not None:
        order = np.concatenate([kept_in, np.setdiff1d(every, kept_in)])
        for index, value in enumerate(node.inputs[1:], 1):
            parameter = constant_of(value)
            if parameter is not None:
                set_constant(node, index, parameter[order], "parameter")
        data = _padded(view, len(every) - len(kept_in), shape)
        every = np.argsort(order)
    whole = _moved_before(node, [data, *node.inputs[1:]], shape)
    _choose(node, whole, every if kept_out is None else every[kept_out], axis)


def _shape_left(value: ir.Value, keep: Keep, *, but: int | None = None) -> ir.Shape:
    """The shape of a value after the cut, along the axis `but` before it."""
    kept = [keep(Slot(value, axis)) if axis != but else None for axis in range(len(dims_of(value)))]
    return ir.Shape([dim if k is None else len(k) for dim, k in zip(dims_of(value), kept, strict=True)])


def _padded(view: NodeView, missing: int, shape: ir.Shape) -> ir.Value:
    """The data with so many zeros behind the channels that stay."""
    x = view.data()
    widths = np.zeros(2 * len(shape), np.int64)
    widths[-1] = missing
    pads = new_initializer(graph_of(view.node), f"{x.name}.pads", widths)
    padded = new_node(view.node, "Pad", [x, pads], hint=f"{x.name}.padded")
    padded.shape = shape
    return padded


def _moved_before(node: ir.Node, inputs: Sequence[ir.Value | None], shape: ir.Shape) -> ir.Value:
    """What the operator of `node` gives for `inputs`, computed in front of it."""
    attributes = {a.name: a.value for a in node.attributes.values()}
    out = node.outputs[0]
    whole = new_node(node, node.op_type, inputs, attributes, hint=f"{out.name}.whole", domain=node.domain)
    whole.shape, whole.type = shape.copy(), out.type
    return whole


def _choose(node: ir.Node, whole: ir.Value, places: Indices, axis: int) -> None:
    """Let `node` take those places of `whole`."""
    graph, name = graph_of(node), node.outputs[0].name
    if np.array_equal(places, np.arange(len(places))):
        numbers = {"starts": 0, "ends": len(places), "axes": axis}
        limits = [new_initializer(graph, f"{name}.{k}", np.array([n], np.int64)) for k, n in numbers.items()]
        _become(node, "Slice", [whole, *limits], {})
    else:
        indices = new_initializer(graph, f"{name}.places", places.astype(np.int64))
        _become(node, "Gather", [whole, indices], {"axis": axis})


def _become(node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, Any]) -> None:
    """Change what a node does, and not what it gives: others know its output, and how it shrinks."""
    node.op_type, node.domain = op_type, ""
    node.attributes.clear()
    node.attributes.update(
        {name: ir.convenience.convert_attribute(name, v) for name, v in attributes.items()}
    )
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def rms_norm(view: NodeView) -> Coupling:
    """RMSNormalization over the last axis: channels that are zero leave.

    Given:   y = x / sqrt(mean(x^2) + e) * g    over D channels, of which D' stay
    Result:  y' = x' / sqrt(mean(x'^2) + e D / D') * g' sqrt(D / D')

    The mean over D' is that over D times D / D', because what has left adds nothing.
    """
    view.expect_one_output("RMSNormalization statistics are read")
    rank = len(view.dims())
    axis = int(attribute(view.node, "axis", -1)) % rank
    if axis != rank - 1 or not _is_per_channel(view):
        return Coupling(view.same((i, i) for i in range(axis)))
    links = view.same((i, i) for i in range(rank))
    return Coupling(links, zeros=(view.slot(0, axis),), cut=partial(_cut_rms_norm, view))


def _cut_rms_norm(view: NodeView, keep: Keep) -> None:
    slot, scale = view.slot(0, len(view.dims()) - 1), constant_of(view.data(1))
    assert scale is not None  # `_is_per_channel` has seen to it
    kept = keep(slot)
    if kept is None:
        return
    ratio = size_of(slot) / len(kept)
    epsilon = float(attribute(view.node, "epsilon", 1e-5))
    view.node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon * ratio)
    set_constant(view.node, 1, (scale[kept] * np.sqrt(ratio)).astype(scale.dtype), "scale")


def reduction(view: NodeView) -> Coupling:
    """Axes that are not summed over pass through; of the others zeros leave, of which a mean counts fewer.

    Given:   y = ReduceMean(x)    over D channels, of which D' stay
    Result:  y = ReduceMean(x') * (D' / D)
    """
    rank = len(view.dims())
    given = view.ints("axes", 1)
    if not given and attribute(view.node, "noop_with_empty_axes", 0):
        return Coupling(view.same((i, i) for i in range(rank)))
    gone = sorted({a % rank for a in given}) if given else list(range(rank))
    kept = [i for i in range(rank) if i not in gone]
    place = kept if attribute(view.node, "keepdims", 1) else range(len(kept))
    links = view.same(zip(kept, place, strict=True))
    summed = tuple(view.slot(0, a) for a in gone if is_wide(view.dims()[a]) and view.slot(0, a).use is None)
    if view.node.op_type in _SUMS:
        return Coupling(links, zeros=summed)
    if view.node.op_type == "ReduceMean":
        least = {slot: _least(slot) for slot in summed}
        return Coupling(links, zeros=summed, least=least, cut=partial(_cut_mean, view, summed))
    return Coupling(links)


def _cut_mean(view: NodeView, summed: tuple[Slot, ...], keep: Keep) -> None:
    factor = 1.0
    for slot in summed:
        kept = keep(slot)
        factor *= 1.0 if kept is None else len(kept) / size_of(slot)
    if factor == 1:
        return
    node = view.node
    whole = _moved_before(node, node.inputs, _shape_left(node.outputs[0], keep))
    assert whole.dtype is not None  # otherwise nothing is known to be zero
    number = np.array(factor, whole.dtype.numpy())
    _become(node, "Mul", [whole, new_initializer(graph_of(node), f"{node.outputs[0].name}.part", number)], {})
