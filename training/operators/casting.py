"""Cast and CastLike: gradients pass between floats, and end where numbers become integers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import FLOAT8, dtype_of, unsupported

_WITHOUT_TYPE = frozenset({ir.DataType.INT2, ir.DataType.UINT2, ir.DataType.INT4, ir.DataType.UINT4})


def cast(call: Call) -> Tensor:
    return _to(call, dtype_of(call, call.attr("to")))


def cast_like(call: Call) -> Tensor:
    like = call.node.inputs[1]
    if like is not None and like.dtype in _WITHOUT_TYPE:
        raise unsupported(call, f"data type {like.dtype}")
    return _to(call, call.input(1).dtype)


def _to(call: Call, dtype: torch.dtype) -> Tensor:
    data = call.input(0)
    if dtype not in FLOAT8:
        return data.to(dtype)
    if call.attr("saturate", 1):
        return to_float8(data, dtype)
    if dtype == torch.float8_e4m3fn:  # torch saturates what is to become NaN here
        raise unsupported(call, "saturate=0 for float8e4m3fn")
    return data.to(dtype)


def to_float8(data: Tensor, dtype: torch.dtype) -> Tensor:
    """To eight bits; what is too large, infinity included, becomes the largest number there is."""
    largest = torch.finfo(dtype).max
    return data.float().clamp(-largest, largest).to(dtype)


OPERATORS: Mapping[str, Operator] = MappingProxyType({"Cast": cast, "CastLike": cast_like})
