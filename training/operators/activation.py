"""Activations: functions of one tensor, most of them of one element at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as nn

from edgewise.training.operators.call import Call, Operator, unary

_FIRST_OF_ONE_AXIS = 13  # before, Softmax and its kin work on all axes from `axis` on, as one
_FIRST_WITH_RATIO_INPUT = 12


def leaky_relu(call: Call) -> Tensor:
    return nn.leaky_relu(call.input(0), call.attr("alpha", 0.01))


def prelu(call: Call) -> Tensor:
    x, slope = call.input(0), call.input(1)
    by_channel = slope.dim() == x.dim() - 1 and slope.numel() == slope.shape[0] == x.shape[1]
    if x.is_floating_point() and (slope.numel() == 1 or by_channel):
        return torch.prelu(x, slope.reshape(-1))
    return torch.where(x < 0, x * slope, x)


def elu(call: Call) -> Tensor:
    return nn.elu(call.input(0), call.attr("alpha", 1.0))


def selu(call: Call) -> Tensor:
    alpha: float = call.attr("alpha", 1.6732632423543772)
    gamma: float = call.attr("gamma", 1.0507009873554805)
    return gamma * nn.elu(call.input(0), alpha)


def celu(call: Call) -> Tensor:
    return nn.celu(call.input(0), call.attr("alpha", 1.0))


def gelu(call: Call) -> Tensor:
    return nn.gelu(call.input(0), approximate=call.attr("approximate", "none"))


def biased_gelu(call: Call) -> Tensor:
    return nn.gelu(call.input(0) + call.input(1))


def fast_gelu(call: Call) -> Tensor:
    x, bias = call.input(0), call.optional(1)
    return nn.gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(call: Call) -> Tensor:
    x = call.input(0)
    return x * torch.sigmoid(call.attr("alpha", 1.702) * x)


def hard_sigmoid(call: Call) -> Tensor:
    return torch.clamp(call.attr("alpha", 0.2) * call.input(0) + call.attr("beta", 0.5), 0, 1)


def thresholded_relu(call: Call) -> Tensor:
    x = call.input(0)
    return torch.where(x > call.attr("alpha", 1.0), x, torch.zeros_like(x))


def shrink(call: Call) -> Tensor:
    x, edge, bias = call.input(0), call.attr("lambd", 0.5), call.attr("bias", 0.0)
    outside = torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, 0))
    return outside.to(x.dtype)


def swish(call: Call) -> Tensor:
    x, alpha = call.input(0), call.attr("alpha", 1.0)
    return nn.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def softmax(call: Call) -> Tensor:
    return _along_axis(call, lambda x, axis: torch.softmax(x, axis))


def log_softmax(call: Call) -> Tensor:
    return _along_axis(call, lambda x, axis: torch.log_softmax(x, axis))


def hardmax(call: Call) -> Tensor:
    """One at the first of the largest, zero elsewhere."""

    def function(x: Tensor, axis: int) -> Tensor:
        return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)

    return _along_axis(call, function)


def _along_axis(call: Call, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    x = call.input(0)
    if call.opset >= _FIRST_OF_ONE_AXIS:
        return function(x, call.attr("axis", -1))
    return function(x.flatten(call.attr("axis", 1)), -1).reshape(x.shape)


def dropout(call: Call) -> Tensor | tuple[Tensor | None, ...]:
    """Drops in training, or where the node's own input says so; the second output marks what stays."""
    x, ratio = call.input(0), call.attr("ratio", 0.5)
    if call.opset >= _FIRST_WITH_RATIO_INPUT:
        given, mode = call.optional(1), call.optional(2)
        ratio = 0.5 if given is None else given.item()
        drops = call.training or (mode is not None and bool(mode))
    else:
        drops = call.training
    keeps = torch.ones_like(x, dtype=torch.bool)
    if drops and ratio > 0:
        keeps = torch.rand_like(x) >= ratio
        x = x * keeps / (1 - ratio)
    return x if len(call.node.outputs) == 1 else (x, keeps)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Celu": celu,
        "Dropout": dropout,
        "Elu": elu,
        "Erf": unary(torch.erf),
        "Gelu": gelu,
        "HardSigmoid": hard_sigmoid,
        "HardSwish": unary(nn.hardswish),
        "Hardmax": hardmax,
        "LeakyRelu": leaky_relu,
        "LogSoftmax": log_softmax,
        "Mish": unary(nn.mish),
        "PRelu": prelu,
        "Relu": unary(torch.relu),
        "Selu": selu,
        "Shrink": shrink,
        "Sigmoid": unary(torch.sigmoid),
        "Softmax": softmax,
        "Softplus": unary(nn.softplus),
        "Softsign": unary(nn.softsign),
        "Swish": swish,
        "Tanh": unary(torch.tanh),
        "ThresholdedRelu": thresholded_relu,
        "com.microsoft.BiasGelu": biased_gelu,
        "com.microsoft.FastGelu": fast_gelu,
        "com.microsoft.Gelu": gelu,
        "com.microsoft.QuickGelu": quick_gelu,
    }
)
