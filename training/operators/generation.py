"""Operators that make tensors: fills, ranges, random numbers (from torch's own generator)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import dtype_of


def constant_of_shape(call: Call) -> Tensor:
    value: Tensor = call.attr("value", torch.zeros(1))
    return value.reshape(()).expand(call.ints("shape", 0) or ()).clone()


def range_(call: Call) -> Tensor:
    start, limit, delta = (call.input(i).reshape(()) for i in range(3))
    count = max(0, math.ceil((limit - start).item() / delta.item()))
    steps = torch.arange(count, device=start.device)
    return start + steps.to(start.dtype) * delta


def eye_like(call: Call) -> Tensor:
    data, code = call.input(0), call.attr("dtype")
    rows, columns = (torch.arange(n, device=data.device) for n in data.shape)
    offset: int = call.attr("k", 0)
    ones = rows.unsqueeze(1) + offset == columns
    return ones.to(data.dtype if code is None else dtype_of(call, code))


def random_normal(call: Call) -> Tensor:
    return _normal(call, torch.empty(call.attr("shape"), dtype=dtype_of(call, call.attr("dtype", 1))))


def random_normal_like(call: Call) -> Tensor:
    return _normal(call, _like(call))


def random_uniform(call: Call) -> Tensor:
    return _uniform(call, torch.empty(call.attr("shape"), dtype=dtype_of(call, call.attr("dtype", 1))))


def random_uniform_like(call: Call) -> Tensor:
    return _uniform(call, _like(call))


def _like(call: Call) -> Tensor:
    data, code = call.input(0), call.attr("dtype")
    return torch.empty_like(data, dtype=data.dtype if code is None else dtype_of(call, code))


def _normal(call: Call, out: Tensor) -> Tensor:
    return out.normal_(call.attr("mean", 0.0), call.attr("scale", 1.0))


def _uniform(call: Call, out: Tensor) -> Tensor:
    return out.uniform_(call.attr("low", 0.0), call.attr("high", 1.0))


def bernoulli(call: Call) -> Tensor:
    data, code = call.input(0), call.attr("dtype")
    return torch.bernoulli(data).to(data.dtype if code is None else dtype_of(call, code))


def multinomial(call: Call) -> Tensor:
    """Draws from unnormalised log probabilities [batch, classes]."""
    drawn = torch.multinomial(call.input(0).softmax(-1), call.attr("sample_size", 1), replacement=True)
    return drawn.to(dtype_of(call, call.attr("dtype", 6)))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Bernoulli": bernoulli,
        "ConstantOfShape": constant_of_shape,
        "EyeLike": eye_like,
        "Multinomial": multinomial,
        "RandomNormal": random_normal,
        "RandomNormalLike": random_normal_like,
        "RandomUniform": random_uniform,
        "RandomUniformLike": random_uniform_like,
        "Range": range_,
    }
)
