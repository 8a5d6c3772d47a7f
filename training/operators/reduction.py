"""Reductions over axes, the places of extremes, running sums, and the determinant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator

_Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(reduce: _Reduce, unreduced: Callable[[Tensor], Tensor] = lambda data: data) -> Operator:
    """An operator over the axes of the attribute or the input; all of them where none are named.

    With `noop_with_empty_axes` nothing is summed, and `unreduced` is what is left to do to each number.
    """

    def operator(call: Call) -> Tensor:
        data, axes = call.input(0), call.ints("axes", 1) or ()
        if not axes and call.attr("noop_with_empty_axes", 0):
            return unreduced(data)
        axes = tuple(a % data.dim() for a in axes) or tuple(range(data.dim()))
        if not axes:
            return unreduced(data)
        return reduce(data, axes, bool(call.attr("keepdims", 1)))

    return operator


def _sum(data: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return data.sum(axes, keep, dtype=data.dtype)


def _mean(data: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if data.is_floating_point():
        return data.mean(axes, keep)
    return data.sum(axes, keep, dtype=data.dtype) // math.prod(data.shape[a] for a in axes)


def _prod(data: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        data = data.prod(axis, keep, dtype=data.dtype)
    return data


def _extreme(function: _Reduce, least: bool) -> _Reduce:
    """The largest or the `least`; of nothing, the number that any other beats."""

    def reduce(data: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
        if all(data.shape[a] for a in axes):
            return function(data, axes, keep)
        return torch.full_like(data.sum(axes, keep), _beaten(data.dtype, least), dtype=data.dtype)

    return reduce


def _beaten(dtype: torch.dtype, least: bool) -> float:
    if dtype.is_floating_point:
        return math.inf if least else -math.inf
    if dtype == torch.bool:
        return least
    return torch.iinfo(dtype).max if least else torch.iinfo(dtype).min


def _logsumexp(data: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(data, axes, keep)


def _square(data: Tensor) -> Tensor:
    return data * data


def _l2(data: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if data.is_floating_point():
        norm: Tensor = torch.linalg.vector_norm(data, 2, axes, keep)  # whose gradient at zero is zero
        return norm
    return _sum(_square(data), axes, keep).double().sqrt().to(data.dtype)


def _arg(function: Callable[[Tensor, int, bool], Tensor]) -> Operator:
    """The place of an extreme: the first of equal ones, or the last."""

    def operator(call: Call) -> Tensor:
        data, axis, keep = call.input(0), call.attr("axis", 0), bool(call.attr("keepdims", 1))
        if not call.attr("select_last_index", 0):
            return function(data, axis, keep)
        from_the_end: Tensor = data.shape[axis] - 1 - function(data.flip(axis), axis, keep)
        return from_the_end

    return operator


def cum_sum(call: Call) -> Tensor:
    data, axis = call.input(0), int(call.input(1).item())
    backwards = bool(call.attr("reverse", 0))
    data = data.flip(axis) if backwards else data
    total = data.cumsum(axis, dtype=data.dtype)
    if call.attr("exclusive", 0) and total.shape[axis]:
        start = torch.zeros_like(total.narrow(axis, 0, 1))
        total = torch.cat([start, total.narrow(axis, 0, total.shape[axis] - 1)], axis)
    return total.flip(axis) if backwards else total


def det(call: Call) -> Tensor:
    determinant: Tensor = torch.linalg.det(call.input(0))
    return determinant


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "ArgMax": _arg(torch.argmax),
        "ArgMin": _arg(torch.argmin),
        "CumSum": cum_sum,
        "Det": det,
        "ReduceL1": _reduction(lambda d, a, k: _sum(d.abs(), a, k), torch.abs),
        "ReduceL2": _reduction(_l2, torch.abs),
        "ReduceLogSum": _reduction(lambda d, a, k: _sum(d, a, k).log(), torch.log),
        "ReduceLogSumExp": _reduction(_logsumexp),
        "ReduceMax": _reduction(_extreme(torch.amax, least=False)),
        "ReduceMean": _reduction(_mean),
        "ReduceMin": _reduction(_extreme(torch.amin, least=True)),
        "ReduceProd": _reduction(_prod),
        "ReduceSum": _reduction(_sum),
        "ReduceSumSquare": _reduction(lambda d, a, k: _sum(_square(d), a, k), _square),
    }
)
