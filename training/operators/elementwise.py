"""Arithmetic, element by element, with ONNX's broadcasting and its rules for integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator, unary
from edgewise.training.operators.tensors import LACKS_ARITHMETIC, gathered


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(call: Call) -> Tensor:
        return computed(function, call.input(0), call.input(1))

    return operator


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def operator(call: Call) -> Tensor:
        values = [call.input(i) for i in range(len(call.inputs))]
        return reduce(lambda a, b: computed(function, a, b), values)

    return operator


def computed(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """`function` of two tensors of one type, on one device, in a type that torch can compute in."""
    if a.device != b.device:  # integers that describe shapes stay on the processor
        a, b = gathered([a, b])
    if a.dtype in LACKS_ARITHMETIC:
        return function(a.long(), b.long()).to(a.dtype)
    return function(a, b)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Integers divide towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def modulo(call: Call) -> Tensor:
    """The remainder has the sign of the divisor, or with `fmod` that of the dividend."""
    function = torch.fmod if call.attr("fmod", 0) else torch.remainder
    return computed(function, call.input(0), call.input(1))


def power(call: Call) -> Tensor:
    """The result has the type of the base, whatever the exponent's is."""
    base, exponent = call.input(0), call.input(1)
    if exponent.numel() == 1 and exponent.dim() <= base.dim() and not exponent.requires_grad:
        number = exponent.item()
        if base.is_floating_point() or isinstance(number, int):
            return base**number
    return torch.pow(base, exponent.to(base.device)).to(base.dtype)


def mean(call: Call) -> Tensor:
    total = reduce(torch.add, [call.input(i) for i in range(len(call.inputs))])
    return total / len(call.inputs)


def clip(call: Call) -> Tensor:
    """Bounds are attributes before opset 11, inputs since; where they cross, the upper one wins."""
    x, low, high = call.input(0), call.optional(1), call.optional(2)
    if low is None and high is None:
        least, most = call.attr("min"), call.attr("max")
        return x if least is None and most is None else torch.clamp(x, least, most)
    if any(bound is not None and bound.requires_grad for bound in (low, high)):
        x = x if low is None else torch.maximum(x, low)
        return x if high is None else torch.minimum(x, high)
    numbers = (None if bound is None else bound.item() for bound in (low, high))
    if x.dtype in LACKS_ARITHMETIC:
        return torch.clamp(x.long(), *numbers).to(x.dtype)
    return torch.clamp(x, *numbers)


def absolute(x: Tensor) -> Tensor:
    return x if x.dtype in (*LACKS_ARITHMETIC, torch.uint8) else x.abs()


def sign(x: Tensor) -> Tensor:
    return x.long().sign().to(x.dtype) if x.dtype in LACKS_ARITHMETIC else x.sign()


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Abs": unary(absolute),
        "Add": _binary(torch.add),
        "Ceil": unary(torch.ceil),
        "Clip": clip,
        "Div": _binary(_quotient),
        "Exp": unary(torch.exp),
        "Floor": unary(torch.floor),
        "Log": unary(torch.log),
        "Max": _variadic(torch.maximum),
        "Mean": mean,
        "Min": _variadic(torch.minimum),
        "Mod": modulo,
        "Mul": _binary(torch.mul),
        "Neg": unary(torch.neg),
        "Pow": power,
        "Reciprocal": unary(torch.reciprocal),
        "Round": unary(torch.round),
        "Sign": unary(sign),
        "Sqrt": unary(torch.sqrt),
        "Sub": _binary(torch.sub),
        "Sum": _variadic(torch.add),
    }
)
