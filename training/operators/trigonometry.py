"""Sines, cosines and their like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Operator


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call.input(0))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Acos": _unary(torch.acos),
        "Acosh": _unary(torch.acosh),
        "Asin": _unary(torch.asin),
        "Asinh": _unary(torch.asinh),
        "Atan": _unary(torch.atan),
        "Atanh": _unary(torch.atanh),
        "Cos": _unary(torch.cos),
        "Cosh": _unary(torch.cosh),
        "Sin": _unary(torch.sin),
        "Sinh": _unary(torch.sinh),
        "Tan": _unary(torch.tan),
    }
)
