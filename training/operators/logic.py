"""Comparisons, logic and bits: nothing here has a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import computable, gathered


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(call: Call) -> Tensor:
        left, right = gathered([computable(call.input(0)), computable(call.input(1))])
        return function(left, right)

    return operator


def _bitwise(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    binary = _binary(function)

    def operator(call: Call) -> Tensor:
        result = binary(call)
        assert isinstance(result, Tensor)
        return result.to(call.input(0).dtype)

    return operator


def not_(call: Call) -> Tensor:
    return torch.logical_not(call.input(0))


def bitwise_not(call: Call) -> Tensor:
    data = call.input(0)
    return torch.bitwise_not(computable(data)).to(data.dtype)


def bit_shift(call: Call) -> Tensor:
    shift = torch.bitwise_left_shift if call.attr("direction") == "LEFT" else torch.bitwise_right_shift
    data = call.input(0)
    return shift(computable(data), computable(call.input(1))).to(data.dtype)


def is_nan(call: Call) -> Tensor:
    return torch.isnan(call.input(0))


def is_inf(call: Call) -> Tensor:
    data = call.input(0).float()
    positive = torch.isposinf(data) & bool(call.attr("detect_positive", 1))
    return positive | (torch.isneginf(data) & bool(call.attr("detect_negative", 1)))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "And": _binary(torch.logical_and),
        "BitShift": bit_shift,
        "BitwiseAnd": _bitwise(torch.bitwise_and),
        "BitwiseNot": bitwise_not,
        "BitwiseOr": _bitwise(torch.bitwise_or),
        "BitwiseXor": _bitwise(torch.bitwise_xor),
        "Equal": _binary(torch.eq),
        "Greater": _binary(torch.gt),
        "GreaterOrEqual": _binary(torch.ge),
        "IsInf": is_inf,
        "IsNaN": is_nan,
        "Less": _binary(torch.lt),
        "LessOrEqual": _binary(torch.le),
        "Not": not_,
        "Or": _binary(torch.logical_or),
        "Xor": _binary(torch.logical_xor),
    }
)
