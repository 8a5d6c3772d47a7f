"""The inner values of a model, as many at a time as memory holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgewise.passes.graph import new_initializer
from edgewise.passes.infer_shapes import shapes_on
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed

_AXES_ARE_INPUTS = 18  # of all reductions from this opset on


def tapped(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """What of `model` computes these values, with nothing else as output, so that the rest stays fused.

    Raises `InputError` on a name that is no output of a node of the main graph.
    """
    part = model.clone()
    produced = {v.name: v for node in part.graph for v in node.outputs}
    if unknown := [name for name in names if name not in produced]:
        raise InputError(f"the model's main graph computes no value named {unknown[0]!r}")
    part.graph.outputs[:] = [produced[name] for name in names]
    RemoveUnusedNodesPass()(part)
    return part


def sizes_on(model: ir.Model, names: Sequence[str], feed: Feed) -> dict[str, int]:
    """Bytes of each value in float32 on inputs like `feed`; unknown ones count as the largest known one."""
    shapes = shapes_on(model, {name: np.shape(array) for name, array in feed.items()})
    sizes = {name: 4 * math.prod(shapes[name]) for name in names if name in shapes}
    return dict.fromkeys(names, max(sizes.values(), default=0)) | sizes


def in_groups(sizes: Mapping[str, int], memory: int) -> list[list[str]]:
    """The names in order, cut where the next value would pass the bound. A value alone may pass it."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return groups


def open_taps(model: ir.Model, sizes: Mapping[str, int], memory: int, threads: int | None) -> list[Evaluator]:
    """What computes the values of these sizes: for each group that fits in `memory` bytes one."""
    return [
        Evaluator(tapped(model, group), outputs=group, threads=threads) for group in in_groups(sizes, memory)
    ]


def values_of(taps: Sequence[Evaluator], feed: Feed) -> Iterator[tuple[str, Any]]:
    """Every value on one feed; those of one tap are in memory together."""
    for tap in taps:
        yield from tap.run(feed).items()


def reduction(
    graph: ir.Graph, op_type: str, source: ir.Value, axes: Sequence[int], *, keepdims: bool, version: int
) -> ir.Node:
    """A reduction of `source` over `axes` as opset `version` writes it, to be inserted into `graph`."""
    if version < _AXES_ARE_INPUTS:
        return ir.node(op_type, [source], {"axes": list(axes), "keepdims": int(keepdims)})
    given = new_initializer(graph, f"{source.name}.axes", np.array(axes, np.int64))
    return ir.node(op_type, [source, given], {"keepdims": int(keepdims)})
