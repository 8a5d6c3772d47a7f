"""If, Loop and Scan: the body is run by whoever runs the graph around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import dtype_of, unsupported

_Values = tuple[Tensor | None, ...]


def if_(call: Call) -> _Values:
    branch = call.attr("then_branch" if bool(call.input(0).item()) else "else_branch")
    return call.run(branch, ())


def loop(call: Call) -> _Values:
    """The body reads (iteration, condition, carried..), gives (condition, carried.., slices of outputs..)."""
    body: ir.Graph = call.attr("body")
    limit, condition = call.optional(0), call.optional(1)
    trips = None if limit is None else int(limit.item())
    going = condition is None or bool(condition.item())
    carried: _Values = call.inputs[2:]
    slices: list[_Values] = []
    while going and (trips is None or len(slices) < trips):
        condition = torch.tensor(going)
        again, *rest = call.run(body, (torch.tensor(len(slices)), condition, *carried))
        going = again is None or bool(again.item())
        slices.append(tuple(rest[len(carried) :]))
        carried = tuple(rest[: len(carried)])
    return carried + _stacked(call, body.outputs[1 + len(carried) :], slices)


def scan(call: Call) -> _Values:
    """The body reads (states.., slices of the inputs..), gives (states.., slices of the outputs..)."""
    if call.opset < 9:
        raise unsupported(call, "the form with a batch axis of opset 8")
    body, count = call.attr("body"), call.attr("num_scan_inputs")
    states = call.inputs[: len(call.inputs) - count]
    inputs = [call.input(len(states) + i) for i in range(count)]
    axes, backwards = _each(call, "scan_input", count)
    sequences = [
        (x.flip(axis) if back else x).unbind(axis)
        for x, axis, back in zip(inputs, axes, backwards, strict=True)
    ]
    slices: list[_Values] = []
    for step in zip(*sequences, strict=True):
        results = call.run(body, (*states, *step))
        slices.append(results[len(states) :])
        states = results[: len(states)]
    outputs = _stacked(call, body.outputs[len(states) :], slices)
    axes, backwards = _each(call, "scan_output", len(outputs))
    return states + tuple(
        None if y is None else (y.flip(0) if back else y).movedim(0, axis)
        for y, axis, back in zip(outputs, axes, backwards, strict=True)
    )


def _each(call: Call, which: str, count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Of each scanned tensor the axis, and whether it runs backwards."""
    zeros = (0,) * count
    return call.attr(f"{which}_axes") or zeros, call.attr(f"{which}_directions") or zeros


def _stacked(call: Call, outputs: Sequence[ir.Value], slices: Sequence[_Values]) -> _Values:
    """The scan outputs [iterations, ..]; of no iterations, empty ones of the shape that the body declares."""
    if slices:
        return tuple(
            None if any(s is None for s in column) else torch.stack([s for s in column if s is not None])
            for column in zip(*slices, strict=True)
        )
    return tuple(_empty(call, value) for value in outputs)


def _empty(call: Call, value: ir.Value) -> Tensor:
    if value.dtype is None:
        raise unsupported(call, "a loop without iterations whose outputs have no type")
    dims = () if value.shape is None else value.shape
    return torch.empty(
        [0, *(d if isinstance(d, int) else 0 for d in dims)], dtype=dtype_of(call, value.dtype)
    )


OPERATORS: Mapping[str, Operator] = MappingProxyType({"If": if_, "Loop": loop, "Scan": scan})
