"""Operators that pick numbers by place, and put numbers into places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import beside, gathered, unsupported, wrapped

_REDUCTIONS = MappingProxyType({"add": "sum", "mul": "prod", "max": "amax", "min": "amin"})


def slice_(call: Call) -> Tensor:
    data, starts, ends = call.input(0), call.ints("starts", 1) or (), call.ints("ends", 2) or ()
    axes = call.ints("axes", 3) or range(len(starts))
    steps = call.ints("steps", 4) or (1,) * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        picked = range(*slice(start, end, step).indices(data.shape[axis]))
        data = _picked(data, axis % data.dim(), picked)
    return data


def _picked(data: Tensor, axis: int, picked: range) -> Tensor:
    """The places of a range along an axis. Torch steps forwards alone: a backward range is turned round."""
    if not picked:
        return data.narrow(axis, 0, 0)
    forward = picked if picked.step > 0 else picked[::-1]
    window = (slice(None),) * axis + (slice(forward[0], forward[-1] + 1, forward.step),)
    return data[window] if picked.step > 0 else data[window].flip(axis)


def gather(call: Call) -> Tensor:
    data, axis = call.input(0), call.attr("axis", 0) % max(1, call.input(0).dim())
    (indices,) = beside(data, wrapped(call.input(1), data.shape[axis]))
    picked = data.index_select(axis, indices.reshape(-1))
    return picked.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


def gather_elements(call: Call) -> Tensor:
    data, axis = call.input(0), call.attr("axis", 0)
    (indices,) = beside(data, wrapped(call.input(1), data.shape[axis]))
    return data.gather(axis, indices)


def gather_nd(call: Call) -> Tensor:
    """Slices at index tuples: [batch.., d1..dk, rest..] at [batch.., n.., k] is [batch.., n.., rest..]."""
    data, indices = call.input(0), call.input(1)
    batches, k = call.attr("batch_dims", 0), indices.shape[-1]
    batch, kept = data.shape[:batches], indices.shape[batches:-1]
    flat = data.reshape(math.prod(batch), math.prod(data.shape[batches : batches + k]), -1)
    places = _linear(indices, data.shape[batches : batches + k]).reshape(math.prod(batch), -1)
    (places,) = beside(data, places)
    picked = torch.stack([part.index_select(0, at) for part, at in zip(flat, places, strict=True)])
    return picked.reshape((*batch, *kept, *data.shape[batches + k :]))


def _linear(indices: Tensor, sizes: torch.Size) -> Tensor:
    """Index tuples along the last axis as places in the flattened axes of `sizes`."""
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for i, size in enumerate(sizes):
        place = place * size + wrapped(indices[..., i], size)
    return place


def scatter_elements(call: Call) -> Tensor:
    data, axis = call.input(0), call.attr("axis", 0)
    indices, updates = beside(data, wrapped(call.input(1), data.shape[axis]), call.input(2))
    return _scattered(data, axis, indices, updates, call.attr("reduction", "none"))


def scatter_nd(call: Call) -> Tensor:
    data, indices = call.input(0), call.input(1)
    k = indices.shape[-1]
    flat = data.reshape(math.prod(data.shape[:k]), -1)
    places, updates = beside(data, _linear(indices, data.shape[:k]).reshape(-1, 1), call.input(2))
    places, updates = places.expand(-1, flat.shape[1]), updates.reshape(places.shape[0], flat.shape[1])
    return _scattered(flat, 0, places, updates, call.attr("reduction", "none")).reshape(data.shape)


def _scattered(data: Tensor, axis: int, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return data.scatter(axis, indices, updates)
    return data.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


def compress(call: Call) -> Tensor:
    data, axis = call.input(0), call.attr("axis")
    data, axis = (data.reshape(-1), 0) if axis is None else (data, axis)
    (places,) = beside(data, call.input(1).nonzero().reshape(-1))
    return data.index_select(axis, places)


def non_zero(call: Call) -> Tensor:
    return call.input(0).nonzero().t().contiguous()


def top_k(call: Call) -> tuple[Tensor, Tensor]:
    """The largest or smallest; of equal ones the first, which torch's own topk does not promise."""
    (k,) = call.ints("k", 1) or (1,)
    axis, largest = call.attr("axis", -1), bool(call.attr("largest", 1))
    values, indices = torch.sort(call.input(0), dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)


def unique(call: Call) -> tuple[Tensor, ...]:
    data, axis = call.input(0), call.attr("axis")
    data, axis = (data.reshape(-1), 0) if axis is None else (data, axis)
    values, inverse, counts = torch.unique(data, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel(), device=inverse.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not call.attr("sorted", 1):
        order = first.argsort()
        values, first, counts = values.index_select(axis, order), first[order], counts[order]
        inverse = order.argsort()[inverse]
    return values, first, inverse, counts


def one_hot(call: Call) -> Tensor:
    indices, (depth,) = call.input(0), call.ints("depth", 1) or (0,)
    off, on = beside(indices, *call.input(2).unbind())
    axis = call.attr("axis", -1) % (indices.dim() + 1)
    column = (depth,) + (1,) * (indices.dim() - axis)
    classes = torch.arange(depth, device=indices.device).reshape(column)
    return torch.where(wrapped(indices, depth).unsqueeze(axis) == classes, on, off)


def where(call: Call) -> Tensor:
    condition, yes, no = gathered([call.input(0), call.input(1), call.input(2)])
    return torch.where(condition, yes, no)


def trilu(call: Call) -> Tensor:
    (k,) = call.ints("k", 1) or (0,)
    data = call.input(0)
    k = max(-data.shape[-2], min(k, data.shape[-1]))  # far off the matrix torch's offset overflows
    return data.triu(k) if call.attr("upper", 1) else data.tril(k)


def reverse_sequence(call: Call) -> Tensor:
    data, lengths = call.input(0), call.input(1)
    batch, time = call.attr("batch_axis", 1), call.attr("time_axis", 0)
    if {batch, time} != {0, 1}:
        raise unsupported(call, f"batch axis {batch} with time axis {time}")
    moved = data.movedim((time, batch), (0, 1))
    (lengths,) = beside(data, lengths.long())
    steps = torch.arange(moved.shape[0], device=data.device).unsqueeze(1)
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    columns = torch.arange(moved.shape[1], device=data.device)
    return moved[places, columns].movedim((0, 1), (time, batch))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Compress": compress,
        "Gather": gather,
        "GatherElements": gather_elements,
        "GatherND": gather_nd,
        "NonZero": non_zero,
        "OneHot": one_hot,
        "ReverseSequence": reverse_sequence,
        "Scatter": scatter_elements,
        "ScatterElements": scatter_elements,
        "ScatterND": scatter_nd,
        "Slice": slice_,
        "TopK": top_k,
        "Trilu": trilu,
        "Unique": unique,
        "Where": where,
    }
)
