"""The few moves that several operator families share."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from edgewise.runtime.errors import InputError
from edgewise.training.operators.call import Call, described

_DTYPES = MappingProxyType(
    {
        1: torch.float32,
        2: torch.uint8,
        3: torch.int8,
        4: torch.uint16,
        5: torch.int16,
        6: torch.int32,
        7: torch.int64,
        9: torch.bool,
        10: torch.float16,
        11: torch.float64,
        12: torch.uint32,
        13: torch.uint64,
        14: torch.complex64,
        15: torch.complex128,
        16: torch.bfloat16,
        17: torch.float8_e4m3fn,
        18: torch.float8_e4m3fnuz,
        19: torch.float8_e5m2,
        20: torch.float8_e5m2fnuz,
    }
)
LACKS_ARITHMETIC = frozenset({torch.uint16, torch.uint32, torch.uint64})
"""Types for which torch has hardly any; in int64 it comes out the same, modulo their width."""
FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})


def unsupported(call: Call, variant: str) -> InputError:
    """The error for a variant of an operator that has no counterpart here."""
    return InputError(f"{described(call.node)} cannot be trained: {variant} is not supported")


def dtype_of(call: Call, code: Any) -> torch.dtype:
    """The torch type of an ONNX data type's number."""
    dtype = _DTYPES.get(int(code))
    if dtype is None:
        raise unsupported(call, f"data type {code}")
    return dtype


def beside(data: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`others` on the device of `data`: shapes and small integers live on the CPU."""
    return tuple(t if t.device == data.device else t.to(data.device) for t in others)


def gathered(tensors: list[Tensor]) -> list[Tensor]:
    """All tensors on one device: the first that is not the CPU, if any is."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    return [t if t.device == device else t.to(device) for t in tensors]


def wrapped(indices: Tensor, size: int) -> Tensor:
    """int64 indices with the negative ones counted from the end."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def computable(data: Tensor) -> Tensor:
    """`data`, or int64 where torch has no arithmetic for its unsigned type."""
    return data.long() if data.dtype in LACKS_ARITHMETIC else data
