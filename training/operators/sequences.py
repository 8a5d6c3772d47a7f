"""Sequences of tensors, as exporters write them for `split`, lists and loops: here they are Python lists."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import gathered


def sequence_construct(call: Call) -> Any:
    return [t for t in call.inputs if t is not None]


def sequence_empty(call: Call) -> Any:
    return []


def sequence_at(call: Call) -> Tensor:
    return _list(call)[int(call.input(1).item())]


def sequence_length(call: Call) -> Tensor:
    return torch.tensor(len(_list(call)), dtype=torch.int64)


def sequence_insert(call: Call) -> Any:
    items, position = list(_list(call)), call.optional(2)
    items.insert(len(items) if position is None else int(position.item()), call.input(1))
    return items


def sequence_erase(call: Call) -> Any:
    items, position = list(_list(call)), call.optional(1)
    del items[-1 if position is None else int(position.item())]
    return items


def split_to_sequence(call: Call) -> Any:
    """Parts of given sizes, of one size, or single slices, which lose the axis unless `keepdims`."""
    data, axis, sizes = call.input(0), call.attr("axis", 0), call.optional(1)
    if sizes is None:
        return list(torch.split(data, 1, axis) if call.attr("keepdims", 1) else data.unbind(axis))
    return list(torch.split(data, sizes.tolist(), axis))


def concat_from_sequence(call: Call) -> Tensor:
    join = torch.stack if call.attr("new_axis", 0) else torch.cat
    return join(gathered(_list(call)), call.attr("axis"))


def _list(call: Call) -> list[Tensor]:
    items: Any = call.input(0)
    return list(items)


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "ConcatFromSequence": concat_from_sequence,
        "SequenceAt": sequence_at,
        "SequenceConstruct": sequence_construct,
        "SequenceEmpty": sequence_empty,
        "SequenceErase": sequence_erase,
        "SequenceInsert": sequence_insert,
        "SequenceLength": sequence_length,
        "SplitToSequence": split_to_sequence,
    }
)
