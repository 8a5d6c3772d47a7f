"""Quantization with straight-through gradients (Bengio, Leonard, Courville 2013).

    q = clamp(round(x / scale) + zero, low, high)         x' = (q - zero) * scale

Rounding passes the gradient as it is, the clamp only within the grid; so an input beyond the grid gets
none, and the scale gets the gradient of a learned step size (Esser et al. 2020).

Integers carry no gradient in torch. Where one is wanted, the numbers of the grid therefore stay floats
between the two operators, with the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.casting import to_float8
from edgewise.training.operators.convolution import convolved
from edgewise.training.operators.tensors import FLOAT8, beside, dtype_of, unsupported


@dataclass(frozen=True)
class _Grid:
    """The numbers a quantized type has. Types of two and four bits travel in bytes."""

    dtype: torch.dtype
    low: int
    high: int


_NARROW: Mapping[int, _Grid] = MappingProxyType(
    {
        ir.DataType.UINT4: _Grid(torch.uint8, 0, 15),
        ir.DataType.INT4: _Grid(torch.int8, -8, 7),
        ir.DataType.UINT2: _Grid(torch.uint8, 0, 3),
        ir.DataType.INT2: _Grid(torch.int8, -2, 1),
    }
)


def _grid(call: Call, zero_at: int) -> _Grid:
    """What the output is stored as: the type of the zero point, else the attribute, else uint8."""
    zero, known = call.optional(zero_at), None
    if zero is not None:
        value = call.node.inputs[zero_at]
        known = None if value is None else value.dtype
    code = int(known or call.attr("output_dtype", 0))
    if code in _NARROW:
        return _NARROW[code]
    if code == 0:
        return _grid_of(torch.uint8 if zero is None else zero.dtype)
    return _grid_of(dtype_of(call, code))


def _grid_of(dtype: torch.dtype) -> _Grid:
    if dtype in FLOAT8:
        return _Grid(dtype, 0, 0)
    limits = torch.iinfo(dtype)
    return _Grid(dtype, limits.min, limits.max)


def quantize_linear(call: Call) -> Tensor:
    x, grid = call.input(0), _grid(call, 2)
    scale, zero = _spread(call, call.input(1), x), _spread(call, call.optional(2), x)
    precision = call.attr("precision", 0)
    ratio = x.to(dtype_of(call, precision) if precision else scale.dtype) / scale
    return _stored(ratio, zero, grid, saturate=bool(call.attr("saturate", 1)))


def dequantize_linear(call: Call) -> Tensor:
    x = call.input(0)
    scale, zero = _spread(call, call.input(1), x), _spread(call, call.optional(2), x)
    code = call.attr("output_dtype", 0)
    return _real(x, scale, zero).to(dtype_of(call, code) if code else scale.dtype)


def dynamic_quantize_linear(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    x = call.input(0)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255).to(torch.uint8)
    return _stored(x / scale, zero, _grid_of(torch.uint8)), scale, zero


def conv_integer(call: Call) -> Tensor:
    weight = call.input(1)
    zero = _number(call.optional(3))
    shifted = weight.double() - (zero.reshape(-1, *(1,) * (weight.dim() - 1)) if zero.dim() else zero)
    return convolved(call, call.input(0).double() - _number(call.optional(2)), shifted, None).to(torch.int32)


def qlinear_matmul(call: Call) -> Tensor:
    left = (call.input(0).double() - _rows(call.input(2))) * _rows(call.input(1))
    right = (call.input(3).double() - _number(call.input(5))) * call.input(4).double()
    return _stored(left @ right / call.input(6).double(), call.input(7), _grid(call, 7))


def qlinear_conv(call: Call) -> Tensor:
    """x, w and y with scale and zero point, w by output channel; the bias counts in x's scale times w's."""
    x = (call.input(0).double() - call.input(2).double()) * call.input(1).double()
    weight, column = call.input(3), (-1,) + (1,) * (call.input(3).dim() - 1)
    real = (weight.double() - call.input(5).double().reshape(column)) * call.input(4).double().reshape(column)
    bias, step = call.optional(8), call.input(1).double() * call.input(4).double()
    y = convolved(call, x, real, None if bias is None else bias.double() * step)
    return _stored(y / call.input(6).double(), call.input(7), _grid(call, 7))


def _number(zero: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if zero is None else zero.double()


def _rows(given: Tensor | None) -> Tensor:
    """One number, or one a row of a matrix [rows, columns]."""
    number = _number(given)
    return number.unsqueeze(-1) if number.dim() == 1 else number


def _spread(call: Call, given: Tensor | None, x: Tensor) -> Tensor:
    """A scale or zero point [], [channels] or [.., blocks, ..] so that it broadcasts against `x`."""
    if given is None:
        return torch.zeros((), device=x.device)
    (given,) = beside(x, given)
    axis, block = call.attr("axis", 1), call.attr("block_size", 0)
    if block:
        if given.dim() != x.dim():
            raise unsupported(call, "a block size with a scale of another rank")
        return given.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if given.numel() == 1:
        return given.reshape(())
    return given.reshape((-1,) + (1,) * (x.dim() - 1 - axis % x.dim()))


def _stored(ratio: Tensor, zero: Tensor, grid: _Grid, *, saturate: bool = True) -> Tensor:
    """The grid's numbers next to `ratio + zero`: floats where a gradient is wanted, else in its own type."""
    if grid.dtype in FLOAT8:
        stored = to_float8(ratio, grid.dtype) if saturate else ratio.to(grid.dtype)
        return _straight_through(ratio, stored.to(ratio.dtype)) if ratio.requires_grad else stored
    number = _straight_through(ratio, ratio.round()) + zero.to(ratio.dtype)
    number = number.clamp(grid.low, grid.high)
    return number if number.requires_grad else number.to(grid.dtype)


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach() if value.requires_grad else rounded


def _real(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (x.to(wide) - zero.to(wide)) * scale.to(wide)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "ConvInteger": conv_integer,
        "DequantizeLinear": dequantize_linear,
        "DynamicQuantizeLinear": dynamic_quantize_linear,
        "QLinearConv": qlinear_conv,
        "QLinearMatMul": qlinear_matmul,
        "QuantizeLinear": quantize_linear,
    }
)
