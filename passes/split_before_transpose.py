"""A Reshape that splits axes after they were moved, and one that merged them before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.channel_links import Dim, dims_of
from edgewise.passes.channel_moves import aligned_axes
from edgewise.passes.graph import (
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
        if moved is None or transpose is None or merged is None or _made_by(merged, "Reshape") is None:
            return False
        if attribute(node, "allowzero", 0) and (target is None or 0 in target):
            return False
        if only_user(moved) is not node or only_user(merged) is not transpose:
            raise Refused("a value between the two Reshapes has another user")
        before, after = dims_of(moved), dims_of(node.outputs[0])
        perm = attribute(transpose, "perm", tuple(reversed(range(len(before)))))
        given = _runs(before, after)
        runs = [given[axis] for axis in np.argsort(perm)]
        places = [o for run in runs for o in run]
        split = _split(transpose, merged, _sizes(runs, after), [after[o] for o in places])
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


def _sizes(runs: Sequence[range], after: Sequence[Dim]) -> list[int]:
    """The sizes to ask for: those that are known, 0 for what stays in its place, and one to be inferred."""
    sizes: list[int] = []
    for axis, run in enumerate(runs):
        unknown = 0 if len(run) == 1 and len(sizes) == axis else -1
        sizes += [dim if isinstance(dim := after[o], int) else unknown for o in run]
    if sizes.count(-1) > 1:
        raise Refused("the Reshape makes two dimensions that are not known")
    return sizes


def _split(transpose: ir.Node, merged: ir.Value, sizes: Sequence[int], dims: Sequence[Dim]) -> ir.Value:
    shape = new_initializer(graph_of(transpose), f"{merged.name}.sizes", np.array(sizes, np.int64))
    split = new_node(transpose, "Reshape", [merged, shape])
    split.shape = ir.Shape(dims)
    return split
