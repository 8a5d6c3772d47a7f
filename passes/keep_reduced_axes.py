"""Axes that a reduction takes away and the next node brings back, or the other way round."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import attribute, constant_of, only_user, replace
from edgewise.passes.linear import rank_of

_REDUCTIONS = frozenset(
    {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"}
    | {"ReduceProd", "ReduceSum", "ReduceSumSquare", "ArgMax", "ArgMin"}
)


@dataclass(frozen=True)
class KeepReducedAxes(Rule):
    """Let a reduction keep its axes, or drop them, by itself.

    Given:   y = Unsqueeze(Reduce<keepdims = 0>(x, axes), axes)      any reduction, ArgMax and ArgMin included
    Result:  y = Reduce<keepdims = 1>(x, axes)
    Given:   y = Squeeze(Reduce<keepdims = 1>(x, axes), axes)
    Result:  y = Reduce<keepdims = 0>(x, axes)
    Nothing else reads what the reduction gives.
    """

    name = "keep-reduced-axes"
    op_types = ("Squeeze", "Unsqueeze")

    def rewrite(self, node: ir.Node) -> bool:
        middle = node.inputs[0]
        reduction = None if middle is None else middle.producer()
        if middle is None or reduction is None or reduction.domain != "":
            return False
        keeps = node.op_type == "Unsqueeze"
        if reduction.op_type not in _REDUCTIONS or bool(attribute(reduction, "keepdims", 1)) == keeps:
            return False
        rank = rank_of(reduction.inputs[0])
        reduced, moved = _axes(reduction, rank), _axes(node, rank)
        if reduced is None or moved is None or reduced != moved:
            return False
        if only_user(middle) is not node or reduction.graph is not node.graph:
            raise Refused("what the reduction gives has another user")
        reduction.attributes.add(ir.AttrInt64("keepdims", int(keeps)))
        shape, kind = node.outputs[0].shape, node.outputs[0].type
        replace(node.outputs[0], middle)
        middle.shape, middle.type = shape, kind
        return True


def _axes(node: ir.Node, rank: int | None) -> frozenset[int] | None:
    """The axes that a node names, counted from the front; None where they are not known."""
    written: tuple[int, ...] | None
    if node.op_type in ("ArgMax", "ArgMin"):
        written = (attribute(node, "axis", 0),)
    elif len(node.inputs) > 1:
        array = constant_of(node.inputs[1])
        written = None if array is None else tuple(array.tolist())
    else:
        written = attribute(node, "axes")
    if written is None or (rank is None and any(axis < 0 for axis in written)):
        return None
    return frozenset(axis if rank is None else axis % rank for axis in written)
