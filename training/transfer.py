"""A trained classifier for other classes: the same body, a new head."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgewise.calibration.kernels import Weights, weights_of
from edgewise.passes.base import Refused
from edgewise.passes.channel_links import op_types
from edgewise.passes.graph import attribute, constant_of, only_user
from edgewise.passes.infer_shapes import infer_shapes
from edgewise.passes.linear import set_constant
from edgewise.runtime.errors import InputError

_BEHIND = frozenset(
    op_types(
        "Softmax LogSoftmax Sigmoid Identity Flatten Squeeze Reshape Cast Relu GlobalAveragePool AveragePool "
        "ReduceMean Dropout Transpose Add"
    )
)
"""What may stand between the layer that makes the scores and the output."""


def replace_head(model: ir.Model, classes: int, seed: int = 0) -> ir.Model:
    """A copy whose last layer gives scores for `classes` classes: it starts anew, all others stay.

    The layer is the Gemm, MatMul or Conv that the first output comes from; what follows it, as a Softmax,
    stays. New weights are uniform within sqrt(3 / inputs), and biases zero (LeCun et al., 1998). Raises
    `InputError` where there is no such layer, naming what is in the way.
    """
    if classes < 2:
        raise InputError(f"a classifier needs two classes or more, not {classes}")
    changed = model.clone()
    output = changed.graph.outputs[0]
    head, behind = _head(output)
    weights = weights_of(head)
    assert weights is not None  # `_head` has seen to it
    before = weights.channels
    _expect_own(weights)
    array = weights.array
    shape = tuple(classes if axis == weights.axis else size for axis, size in enumerate(array.shape))
    limit = math.sqrt(3 * before / array.size)
    fresh = np.random.default_rng(seed).uniform(-limit, limit, shape).astype(array.dtype)
    set_constant(head, 1, fresh, "weight")
    for node in (head, *behind):
        _resize(node, before, classes)
        for value in node.outputs:
            if value.is_graph_output() and value.shape is not None:
                value.shape = ir.Shape([classes if d == before else d for d in value.shape])
            elif not value.is_graph_output():
                value.shape = None
    try:
        infer_shapes(changed)
    except Refused as refusal:
        raise InputError(
            f"the head cannot be replaced: with {classes} classes the model contradicts itself"
        ) from refusal
    return changed


def _head(output: ir.Value) -> tuple[ir.Node, tuple[ir.Node, ...]]:
    """The layer that makes the scores, and the nodes from there to the output."""
    behind: list[ir.Node] = []
    value: ir.Value | None = output
    while value is not None and (node := value.producer()) is not None:
        if node.domain == "" and weights_of(node) is not None and attribute(node, "group", 1) == 1:
            return node, tuple(behind[::-1])
        if node.domain != "" or node.op_type not in _BEHIND:
            raise InputError(
                f"output {output.name!r} has no head to replace: {node.op_type} {node.name!r} stands where a "
                "Gemm, MatMul or Conv of the classes' scores should"
            )
        behind.append(node)
        value = _data(node)
    raise InputError(f"output {output.name!r} has no head to replace: no Gemm, MatMul or Conv leads to it")


def _data(node: ir.Node) -> ir.Value | None:
    """The only input that is computed; None where there are several."""
    computed = [v for v in node.inputs if v is not None and constant_of(v) is None]
    return computed[0] if len(computed) == 1 else None


def _expect_own(weights: Weights) -> None:
    for value in (weights.value, weights.bias_value):
        if value is not None and (only_user(value) is None):
            raise InputError(
                f"the head's weights {value.name!r} are read elsewhere too: it cannot be replaced"
            )


def _resize(node: ir.Node, before: int, after: int) -> None:
    """Constants of a node that hold a number for each class: a bias starts at zero, a shape follows."""
    for index, value in enumerate(node.inputs):
        array = constant_of(value)
        if array is None or (index == 1 and weights_of(node) is not None):
            continue
        if array.dtype.kind == "f" and before in array.shape:
            shape = tuple(after if size == before else size for size in array.shape)
            set_constant(node, index, np.zeros(shape, array.dtype), "bias")
        elif node.op_type == "Reshape" and before in array:
            set_constant(node, index, np.where(array == before, after, array), "shape")
