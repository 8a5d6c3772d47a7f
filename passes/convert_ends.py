"""Inputs and outputs in the 16 bits that the model computes in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Pass, Refused, attempted
from edgewise.passes.graph import attribute, replace

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class ConvertEnds(Pass):
    """Let callers give and take what the Casts at the ends of the model make of float32.

    Given:   y = Cast(Conv(Cast(x), W))              x and y in float32, the Conv in 16 bits
    Result:  y = Conv(x, W)                          x and y in 16 bits

    An end that something in the model reads as float32 stays so. To be run after convert-floats.
    """

    name: ClassVar[str] = "convert-ends"
    contract: ClassVar[Contract] = Contract.LOSSY
    keeps_signature: ClassVar[bool] = False

    def apply(self, model: ir.Model) -> Outcome:
        inputs = [partial(_convert_input, v) for v in model.graph.inputs]
        return attempted([*inputs, *(partial(_convert_output, v) for v in model.graph.outputs)])


def _convert_input(value: ir.Value) -> bool:
    casts = [use.node for use in value.uses() if use.node.op_type == "Cast"]
    kinds = {ir.DataType(attribute(cast, "to")) for cast in casts}
    if value.dtype != ir.DataType.FLOAT or not kinds.intersection(_HALVES):
        return False
    if len(casts) < len(value.uses()) or len(kinds) > 1 or value.is_graph_output() or value.is_initializer():
        raise Refused("input is read as float32 too")
    if any(cast.outputs[0].is_graph_output() for cast in casts):
        raise Refused("input is an output in 16 bits")
    value.type = ir.TensorType(kinds.pop())
    for cast in casts:
        replace(cast.outputs[0], value)
    return True


def _convert_output(value: ir.Value) -> bool:
    cast = value.producer()
    source = None if cast is None or cast.op_type != "Cast" else cast.inputs[0]
    if value.dtype != ir.DataType.FLOAT or source is None or source.dtype not in _HALVES:
        return False
    if value.uses():
        raise Refused("output is read as float32 too")
    kind = ir.TensorType(source.dtype)
    replace(value, source)  # raises where the source has a name of its own to keep
    source.type = kind
    return True
