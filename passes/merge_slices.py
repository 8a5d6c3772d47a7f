"""A Slice of a Slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import (
    Array,
    constant_of,
    drop_unused_initializer,
    graph_of,
    new_initializer,
    only_user,
    remove_if_unused,
)
from edgewise.passes.linear import rank_of

_NAMES = ("starts", "ends", "axes", "steps")

Bounds = tuple[Array, Array, Array, Array]
"""Starts, ends, axes that are not negative, and steps, one number each for every axis that is cut."""


@dataclass(frozen=True)
class MergeSlices(Rule):
    """Cut all axes at once.

    Given:   y = Slice(Slice(x, along p), along q)    constant bounds, p and q without a common axis, where
                                                      nothing else reads the inner one
    Result:  y = Slice(x, along p and q)
    What the first would leave is never copied.
    """

    name = "merge-slices"
    op_types = ("Slice",)

    def rewrite(self, node: ir.Node) -> bool:
        middle = node.inputs[0]
        first = None if middle is None else middle.producer()
        if middle is None or first is None or first.op_type != "Slice" or first.domain != "":
            return False
        inner, outer = _bounds(first), _bounds(node)
        if set(inner[2].tolist()) & set(outer[2].tolist()):
            raise Refused("both cut the same axis")
        if only_user(middle) is not node or first.graph is not node.graph:
            raise Refused("the first Slice has another user")
        graph, old = graph_of(node), node.inputs[1:]
        node.resize_inputs(5)
        for i, name in enumerate(_NAMES):
            both = np.concatenate([inner[i], outer[i]])
            node.replace_input_with(i + 1, new_initializer(graph, f"{node.outputs[0].name}.{name}", both))
        node.replace_input_with(0, first.inputs[0])
        remove_if_unused(first)
        for value in old:
            _release(value)
        return True


def _bounds(node: ir.Node) -> Bounds:
    """`Refused` where they are not constant, or where the axes are not known."""
    given = [constant_of(v) for v in node.inputs[1:]] + [None] * (5 - len(node.inputs))
    missing = [v is None for v in node.inputs[1:]] + [True] * (5 - len(node.inputs))
    if len(node.inputs) < 3 or any(a is None and not gone for a, gone in zip(given, missing, strict=True)):
        raise Refused("the bounds are not constant")
    starts, ends, axes, steps = (None if a is None else a.astype(np.int64) for a in given)
    assert starts is not None
    assert ends is not None
    axes = np.arange(starts.size) if axes is None else axes
    rank = rank_of(node.inputs[0])
    if rank is None and (axes < 0).any():
        raise Refused("the rank of what is cut is not known")
    return (
        starts,
        ends,
        axes if rank is None else axes % rank,
        np.ones_like(starts) if steps is None else steps,
    )


def _release(value: ir.Value | None) -> None:
    """Drop a bound that nothing reads any more."""
    producer = None if value is None else value.producer()
    if producer is not None:
        remove_if_unused(producer)
    elif value is not None:
        drop_unused_initializer(value)
