"""Pad, in all its modes; a negative amount crops."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import unsupported


def pad(call: Call) -> Tensor:
    data, mode = call.input(0), call.attr("mode", "constant")
    axes = call.ints("axes", 3) or tuple(range(data.dim()))
    pads = call.ints("pads", 1) or call.attr("paddings") or (0,) * (2 * len(axes))
    amounts = {axis % data.dim(): (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    if mode == "constant":
        backwards = [n for axis in reversed(range(data.dim())) for n in amounts.get(axis, (0, 0))]
        return functional.pad(data, backwards, value=_fill(call))
    for axis, (before, after) in amounts.items():
        if before or after:
            data = data.index_select(
                axis, _places(call, mode, data.shape[axis], before, after).to(data.device)
            )
    return data


def _fill(call: Call) -> float:
    value = call.optional(2)
    return call.attr("value", 0.0) if value is None or not value.numel() else value.item()


def _places(call: Call, mode: str, size: int, before: int, after: int) -> Tensor:
    """Where each number of the padded axis comes from."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    if mode == "reflect":
        period = max(1, 2 * (size - 1))
        return (places % period - (size - 1)).abs().neg() + (size - 1)
    raise unsupported(call, f"mode {mode}")


OPERATORS: Mapping[str, Operator] = MappingProxyType({"Pad": pad})
