"""The layers of a graph, and the sums that they write into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import attribute, constant_of, only_user
from edgewise.passes.linear import layer_ending_at

Floats = npt.NDArray[np.float64]

_EPSILON = 1e-5  # of BatchNormalization where the file does not say


def layers_of(graph: ir.Graph) -> dict[str, tuple[ir.Node, ir.Node]]:
    """The layers with constant weights, as the node and the last node, by the name of the node's output."""
    found: dict[str, tuple[ir.Node, ir.Node]] = {}
    for tail in graph:
        try:
            layer = layer_ending_at(tail)
        except Refused:
            continue
        if layer is not None:  # an Add behind a MatMul comes later, and takes its place
            found[layer.node.outputs[0].name or ""] = (layer.node, layer.tail)
    return found


@dataclass(frozen=True, eq=False)
class Total:
    """`result` = `branch` + `other`, where `branch` is scale * output + shift of a layer, per channel."""

    branch: ir.Value
    other: ir.Value
    result: ir.Value
    scale: Floats


def total_behind(tail: ir.Node) -> Total | None:
    """The sum of activations behind a layer, with at most a BatchNormalization in between."""
    value = tail.outputs[0]
    reader, scale = only_user(value), np.ones(1)
    if reader is not None and reader.op_type == "BatchNormalization":
        found = _scale(reader)
        if found is None:
            return None
        scale, value = found, reader.outputs[0]
        reader = only_user(value)
    if reader is None or reader.op_type != "Add" or reader.domain != "":
        return None
    other = next((v for v in reader.inputs if v is not value), None)
    if other is None or constant_of(other) is not None or other.shape != value.shape:
        return None
    return Total(value, other, reader.outputs[0], scale)


def _scale(norm: ir.Node) -> Floats | None:
    """What a BatchNormalization multiplies by, if that is constant."""
    gamma, variance = (constant_of(norm.inputs[i]) for i in (1, 4))
    if gamma is None or variance is None:
        return None
    scale: Floats = gamma / np.sqrt(variance.astype(np.float64) + attribute(norm, "epsilon", _EPSILON))
    return scale
