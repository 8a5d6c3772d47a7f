"""A Reshape of something that is only reshaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    drop_unused_initializer,
    graph_of,
    new_initializer,
    remove_if_unused,
    replace,
)

_RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_INVERSE = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}


@dataclass(frozen=True)
class MergeReshapes(Rule):
    """Let a Reshape read what an earlier Reshape, Flatten, Squeeze or Unsqueeze read.

    Given:   y = Reshape(f(x), s)                     with constant s; f keeps the order of the elements, as a
                                                      Transpose does that moves axes of size 1
    Result:  y = Reshape(x, s)                        a 0 in s, which copies a dimension of f(x) that x does
                                                      not have there, written out

    Given:   y = Squeeze(Unsqueeze(x, axes), axes)    or the other way round
    Result:  x in place of y
    """

    name = "merge-reshapes"
    op_types = ("Reshape", "Squeeze", "Unsqueeze")

    def rewrite(self, node: ir.Node) -> bool:
        middle = node.inputs[0]
        first = None if middle is None else middle.producer()
        if middle is None or first is None or first.domain != "" or not first.inputs:
            return False
        if node.op_type != "Reshape":
            return _cancel(first, node)
        target = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if target is None or not _keeps_elements(first):
            return False
        copies = not attribute(node, "allowzero", 0)
        source = first.inputs[0]
        if copies and 0 in target:
            _write_target(node, _without_copies(target, middle, _dims(source)))
        node.replace_input_with(0, source)
        remove_if_unused(first)
        return True


def _keeps_elements(node: ir.Node) -> bool:
    """Whether a node gives the elements of its first input in their order."""
    if node.op_type != "Transpose":
        return node.op_type in _RESHAPING
    source, order = node.inputs[0], attribute(node, "perm")
    if source is None or source.shape is None:
        return False
    moved = [axis for axis in order or reversed(range(source.shape.rank())) if source.shape[axis] != 1]
    return moved == sorted(moved)


def _cancel(first: ir.Node, second: ir.Node) -> bool:
    source = first.inputs[0]
    if source is None or first.op_type != _INVERSE[second.op_type]:
        return False
    axes = _axes(first)
    if axes is None or axes != _axes(second):
        return False
    replace(second.outputs[0], source)
    return True


def _axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes as written, in order; from the input, or from the attribute of operator sets before 13."""
    if len(node.inputs) < 2:
        written = attribute(node, "axes")
        return None if written is None else tuple(sorted(written))
    axes = constant_of(node.inputs[1])
    return None if axes is None else tuple(sorted(axes.tolist()))


def _dims(value: ir.Value | None) -> list[int | str | None]:
    """Sizes and symbols; nothing where not even the rank is known."""
    shape = None if value is None else value.shape
    return [] if shape is None else [d if isinstance(d, int) else d.value for d in shape]


def _without_copies(target: Array, value: ir.Value, source: Sequence[int | str | None]) -> Array:
    """`target` with the dimensions of `value` where it says 0, one of which may be unknown.

    Of more than one those stay 0 that copy the same from `source`, the dimensions of what is read instead.
    """
    dims = _dims(value)
    result, copied = target.copy(), [axis for axis, size in enumerate(target) if size == 0]
    for axis in copied:
        size = dims[axis] if axis < len(dims) else None
        result[axis] = size if isinstance(size, int) else -1
    if (result < 0).sum() > 1:
        same = [axis for axis in copied if dims[axis : axis + 1] == source[axis : axis + 1] != [None]]
        result[same] = 0
    if (result < 0).sum() > 1:
        raise Refused("the Reshape copies a dimension that is not known")
    return result


def _write_target(node: ir.Node, target: Array) -> None:
    old = node.inputs[1]
    node.replace_input_with(1, new_initializer(graph_of(node), f"{node.outputs[0].name}.shape", target))
    producer = None if old is None else old.producer()
    if producer is not None:
        remove_if_unused(producer)
    elif old is not None:
        drop_unused_initializer(old)
