"""Sines, cosines and their like."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from edgewise.training.operators.call import Operator, unary

OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Acos": unary(torch.acos),
        "Acosh": unary(torch.acosh),
        "Asin": unary(torch.asin),
        "Asinh": unary(torch.asinh),
        "Atan": unary(torch.atan),
        "Atanh": unary(torch.atanh),
        "Cos": unary(torch.cos),
        "Cosh": unary(torch.cosh),
        "Sin": unary(torch.sin),
        "Sinh": unary(torch.sinh),
        "Tan": unary(torch.tan),
    }
)
