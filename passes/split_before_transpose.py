"""A Reshape that splits axes after they were moved, and one that merged them before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.channel_links import Dim, dims_of
from edgewise.passes.channel_moves import aligned_axes
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    only_user,
    replace,
)


@dataclass(frozen=True)
class SplitBeforeTranspose(Rule):
    """Split axes before they are moved, where a Reshape made them just before.

    Given:   y = Reshape(Transpose(Reshape(x, r), p), s)    where s only splits axes, each into a run
    Result:  y = Transpose(Reshape(Reshape(x, r), t), q)    the two Reshapes in a row being one

    Exporters of attention merge samples and heads so that three axes are enough for the Transpose, and split
    them again behind it. With the axes apart a Transpose is only what it seems to be, and
    heads are seen for what they are.
    """

    name = "split-before-transpose"
    op_types = ("Reshape",)

    def rewrite(self, node: ir.Node) -> bool:
        moved = node.inputs[0]
        transpose = None if moved is None else _made_by(moved, "Transpose")
        merged = None if transpose is None else transpose.inputs[0]
        target = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if moved is None or transpose is None or merged is None or target is None:
            return False
        if _made_by(merged, "Reshape") is None or (attribute(node, "allowzero", 0) and 0 in target):
            return False
        if only_user(moved) is not node or only_user(merged) is not transpose:
            raise Refused("a value between the two Reshapes has another user")
        before, after = dims_of(moved), dims_of(node.outputs[0])
        runs = _runs(before, after)
        sizes = _sizes(target.dtype, after)
        perm = attribute(transpose, "perm", tuple(reversed(range(len(before)))))
        places = [o for axis in np.argsort(perm) for o in runs[axis]]
        split = _split(transpose, merged, sizes[places], [after[o] for o in places])
        whole = new_node(node, "Transpose", [split], {"perm": [places.index(o) for o in range(len(after))]})
        whole.shape = node.outputs[0].shape
        replace(node.outputs[0], whole)
        return True


def _made_by(value: ir.Value, op_type: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _runs(before: Sequence[Dim], after: Sequence[Dim]) -> list[range]:
    """The axes that each axis is split into."""
    runs: dict[int, range] = {}
    for ins, outs in aligned_axes(before, after):
        if len(ins) != 1:
            raise Refused("the Reshape merges axes")
        runs[ins.start] = outs
    if len(runs) != len(before):
        raise Refused("what the Reshape does to the axes is not known")
    return [runs[axis] for axis in range(len(before))]


def _sizes(dtype: np.dtype[Any], after: Sequence[Dim]) -> Array:
    """The sizes asked for, with those that are known written out and at most one that is inferred."""
    sizes = np.array([dim if isinstance(dim, int) else -1 for dim in after], dtype)
    if (sizes < 0).sum() > 1:
        raise Refused("the Reshape copies a dimension that is not known")
    return sizes


def _split(transpose: ir.Node, merged: ir.Value, sizes: Array, dims: Sequence[Dim]) -> ir.Value:
    shape = new_initializer(graph_of(transpose), f"{merged.name}.sizes", sizes)
    split = new_node(transpose, "Reshape", [merged, shape])
    split.shape = ir.Shape(dims)
    return split
