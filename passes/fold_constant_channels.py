"""Values that hold one number a channel, whatever the input, as those numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.channel_constants import Constants
from edgewise.passes.channel_functions import Floats
from edgewise.passes.channel_links import Array, Dim, Slot, Use, dims_of, op_types
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import (
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    opset,
    remove_if_unused,
    replace,
    static_shape,
)

_BROADCAST = op_types("Add Div Max Mean Min Mul Pow Sub Sum Where")  # not those that tell numbers apart
_FIRST_EXPAND = 8  # the opset
_TOO_LARGE = "the constant is larger than what it replaces"

Found = dict[ir.Value, tuple[int, Floats]]
"""Values that are constant as a whole: the axis of their channels, and the number of each."""


@dataclass(frozen=True)
class FoldConstantChannels(Pass):
    """Put the numbers in place of a value that holds one number a channel for every input.

    Given:   y = f(x, v)    where v[n, c, ...] is k[c] for every input, f is an elementwise operator,
                            and x alone gives y its shape
    Result:  y = f(x, k)    with k of shape [C, 1, ...], or of a single number where all are the same
    Given:   y = g(v, ...)  with a g that channels cannot leave through, or v an output; v of static shape
    Result:  y = g(Expand(k, shape of v), ...)

    So a residual branch that is dead and a gate that is stuck leave with all that computes them. Of a
    value whose channels may leave one by one, all but the last do so (see `PruneChannels`), and the layers
    that read it become narrower; the numbers would only stand in their way. A result that grows the file by
    more than `max_growth` bytes is refused, as is one whose shape is not known.
    """

    name = "fold-constant-channels"
    waits = True  # and with it the other passes over channels, which come next
    max_growth: int = 1024

    def apply(self, model: ir.Model) -> Outcome:
        edits, refused = 0, Counter[str]()
        for graph in list(model.graphs()):
            while True:
                done, refusals = self._fold(ChannelGraph.of(graph, opset(model)))
                edits += done
                if not done:
                    break
            refused += refusals
        return Outcome(edits, MappingProxyType(dict(refused)))

    def _fold(self, channels: ChannelGraph) -> tuple[int, Counter[str]]:
        """Fold every value once, the last ones first: what computes them is gone when its turn comes."""
        found, refused, edits = _constant_values(channels), Counter[str](), 0
        for value, (axis, numbers) in reversed(found.items()):
            producer = value.producer()
            if producer is None or producer.graph is None:
                continue  # it went with a later value
            try:
                edits += self._fold_value(channels, found, value, _compact(value, axis, numbers))
            except Refused as refusal:
                refused[str(refusal)] += 1
        return edits, refused

    def _fold_value(self, channels: ChannelGraph, found: Found, value: ir.Value, array: Array) -> int:
        """Fold `value` where it meets something that is not constant; the number of places."""
        open_ = [Use(n, i) for n, i in value.uses() if not any(v in found for v in n.outputs)]
        light = [use for use in open_ if use.node.graph is channels.graph and _is_dispensable(use)]
        whole = _must_be_whole(channels, value, found[value][0], [use for use in open_ if use not in light])
        if not light and not whole:
            return 0
        shape = static_shape(value)
        if whole and shape is None and not light:
            raise Refused("a constant value has a dynamic shape")
        leaves = len(light) == len(value.uses()) and not value.is_graph_output()
        freed = _freed(value) if leaves or (whole and shape is not None) else 0
        if array.nbytes + 8 * len(shape or ()) - freed > self.max_growth:
            raise Refused(_TOO_LARGE)
        _write(value, light, array, shape if whole else None)
        return len(light) + (whole and shape is not None)


def _constant_values(channels: ChannelGraph) -> Found:
    """In the order of the graph. What depends on constants alone is another pass's business."""
    known: Found = {}
    for slot, numbers in Constants.of(channels).known.items():
        if slot.use is None and slot in channels.home and not np.isnan(numbers).any():
            known.setdefault(slot.value, (slot.axis, numbers))
    fixed = set[ir.Value]()
    for node in channels.graph:
        if all(v is None or v in fixed or constant_of(v) is not None for v in node.inputs):
            fixed.update(node.outputs)
    return {v: known[v] for node in channels.graph for v in node.outputs if v in known and v not in fixed}


def _compact(value: ir.Value, axis: int, numbers: Floats) -> Array:
    """The numbers in the shape in which they broadcast to that of `value`, in its type."""
    assert value.dtype is not None  # channels are followed in values of known type only
    array: Array = numbers.astype(value.dtype.numpy())
    if (array == array[0]).all():
        return array[:1].reshape(())
    return array.reshape(-1, *(1,) * (len(dims_of(value)) - 1 - axis))


def _is_dispensable(use: Use) -> bool:
    """Whether the other operands alone give the result its shape."""
    node = use.node
    if node.domain != "" or node.op_type not in _BROADCAST:
        return False
    try:
        shapes = [dims_of(v) for i, v in enumerate(node.inputs) if v is not None and i != use.position]
        out = dims_of(node.outputs[0])
    except Refused:
        return False
    return all(
        size is not None and size in _aligned(shapes, len(out) - axis) for axis, size in enumerate(out)
    )


def _aligned(shapes: Sequence[tuple[Dim, ...]], from_end: int) -> list[Dim]:
    """The sizes along an axis that is counted from the end."""
    return [shape[-from_end] for shape in shapes if len(shape) >= from_end]


def _must_be_whole(channels: ChannelGraph, value: ir.Value, axis: int, uses: Sequence[Use]) -> bool:
    """Whether somebody reads all of `value`, and its channels cannot leave one by one either."""
    group = channels.home[Slot(value, axis)]
    stuck = channels.opset >= _FIRST_EXPAND and bool(group.blocked[group.members[Slot(value, axis)]].all())
    return stuck and (bool(uses) or value.is_graph_output())


def _freed(value: ir.Value) -> int:
    """The bytes of the constants that nothing but `value` is computed from."""
    producer = value.producer()
    assert producer is not None  # it is the result of a node
    if any(v.uses() or v.is_graph_output() for v in producer.outputs if v is not value):
        return 0
    dead, waiting, read = {producer}, [producer], dict[ir.Value, None]()
    while waiting:
        for source in (v for v in waiting.pop().inputs if v is not None):
            before = source.producer()
            if before is None or before.op_type == "Constant":
                read[source] = None
            elif before not in dead and _is_read_by(before, dead):
                dead.add(before)
                waiting.append(before)
    gone = [v for v in read if all(use.node in dead for use in v.uses())]
    arrays = [constant_of(v) for v in gone if not v.is_graph_output()]
    return sum(array.nbytes for array in arrays if array is not None)


def _is_read_by(node: ir.Node, readers: set[ir.Node]) -> bool:
    """Whether nothing but `readers` reads what `node` gives."""
    return all(not v.is_graph_output() and all(u.node in readers for u in v.uses()) for v in node.outputs)


def _write(value: ir.Value, light: Sequence[Use], array: Array, shape: tuple[int, ...] | None) -> None:
    """Let `light` readers read `array`, and with a `shape` the others too, expanded to it."""
    producer = value.producer()
    assert producer is not None  # as above
    graph = graph_of(producer)
    numbers = new_initializer(graph, f"{value.name}.channels", array)
    for node, index in light:
        node.replace_input_with(index, numbers)
    if shape is None:
        remove_if_unused(producer)
        return
    sizes = new_initializer(graph, f"{value.name}.shape", np.array(shape, np.int64))
    whole = new_node(producer, "Expand", [numbers, sizes], hint=f"{value.name}.expanded")
    whole.shape, whole.type = ir.Shape(shape), value.type
    replace(value, whole)
