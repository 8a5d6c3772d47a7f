"""Recurrent layers that begin with a state of zeros, which they do by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgewise.passes.base import Rule
from edgewise.passes.channel_links import op_types
from edgewise.passes.channel_recurrent import STATES
from edgewise.passes.graph import attribute, constant_of
from edgewise.passes.linear import release

_FILLS = op_types("Expand Gather Identity Reshape Slice Squeeze Tile Transpose Unsqueeze")


@dataclass(frozen=True)
class DropZeroStates(Rule):
    """Leave out the initial state of a recurrent layer where it is zero, as it is by default.

    Given:   y = LSTM(x, W, R, B, lengths, h, c)    where h is a constant of zeros, or what is made of zeros
             by Expand, ConstantOfShape, Slice and their like, of a size that may depend on the batch
    Result:  y = LSTM(x, W, R, B, lengths, , c)

    Frameworks write these zeros out, often one tensor for all layers, which ties the layers' units to each
    other and to what computes the size.
    """

    name: ClassVar[str] = "drop-zero-states"
    op_types: ClassVar[tuple[str, ...]] = ("GRU", "LSTM", "RNN")

    def rewrite(self, node: ir.Node) -> bool:
        given = [(i, node.inputs[i]) for i in STATES if i < len(node.inputs)]
        zeros = [(i, state) for i, state in given if state is not None and _is_zero(state)]
        for index, state in zeros:
            node.replace_input_with(index, None)
            release(state)
        return len(zeros) > 0


def _is_zero(value: ir.Value) -> bool:
    """Whether all elements are zero, however many there are."""
    array, node = constant_of(value), value.producer()
    if array is not None:
        return not array.any()
    if node is None or node.domain != "":
        return False
    if node.op_type == "ConstantOfShape":
        number = attribute(node, "value")
        return number is None or not number.numpy().any()
    source = node.inputs[0] if node.op_type in _FILLS else None
    return source is not None and _is_zero(source)
