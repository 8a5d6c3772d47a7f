"""The words in which an operator says whose channels leave together: slots, links, couplings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import attribute, constant_of

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Dim = int | str | None


class Use(NamedTuple):
    """Where a constant is read: input `position` of `node`."""

    node: ir.Node
    position: int


class Slot(NamedTuple):
    """One axis of one value, along which it may shrink.

    A constant has slots for each of its readers, because each may get a smaller copy of its own.
    """

    value: ir.Value
    axis: int
    use: Use | None = None


@dataclass(frozen=True, eq=False)
class Link:
    """Index `source[k]` of slot `a` leaves if and only if index `target[k]` of slot `b` does.

    None stands for every index in order. `a` is what a node reads (data or a constant) and `b` what
    the data flows into; a constant of a layer may also be linked to the data that the layer reads.
    """

    a: Slot
    b: Slot
    source: Indices | None = None
    target: Indices | None = None


@dataclass(frozen=True, eq=False)
class Quota:
    """A grouped convolution: of every group the same number of inputs and of outputs stay, or none at all.

    Slots `inputs` and `outputs` fall into `groups` equal runs.
    """

    inputs: Slot
    outputs: Slot
    groups: int


class Keep(Protocol):
    """The indices of a slot that stay, ascending, or None where all of them do."""

    def __call__(self, slot: Slot, /) -> Indices | None: ...


@dataclass(frozen=True, eq=False)
class Coupling:
    """What one node asks of the slots it reads and writes. A slot it does not name may not shrink.

    Of each tuple of `options` one link applies: where a Reshape merges channels and pixels, one of the two
    may shrink, not both. `free` slots may shrink without a link, and `zeros` by indices that hold nothing but
    zeros. Of a slot in `least` so many indices leave or none, because it takes nodes of its own.
    `cut` lets the node's own attributes and shape inputs follow; it runs while values and constants are
    still whole.
    """

    links: tuple[Link, ...] = ()
    options: tuple[tuple[Link, ...], ...] = ()
    free: tuple[Slot, ...] = ()
    zeros: tuple[Slot, ...] = ()
    least: Mapping[Slot, int] = field(default_factory=lambda: MappingProxyType({}))
    quota: Quota | None = None
    cut: Callable[[Keep], None] | None = None


@dataclass(frozen=True)
class NodeView:
    """A node as the rules see it. Everything here raises `Refused` where it is not known."""

    node: ir.Node
    opset: int

    def input(self, index: int) -> ir.Value | None:
        """Input `index`, or None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def data(self, index: int = 0) -> ir.Value:
        """Input `index`, which must be there."""
        value = self.input(index)
        if value is None:
            raise Refused(f"{self.node.op_type} lacks an input")
        return value

    def dims(self, index: int = 0) -> tuple[Dim, ...]:
        """The dimensions of input `index`."""
        return dims_of(self.data(index))

    def out_dims(self, index: int = 0) -> tuple[Dim, ...]:
        """The dimensions of output `index`."""
        return dims_of(self.node.outputs[index])

    def slot(self, index: int, axis: int) -> Slot:
        """An axis of input `index`."""
        value = self.data(index)
        return Slot(value, axis, Use(self.node, index) if is_constant(value) else None)

    def out(self, axis: int, index: int = 0) -> Slot:
        """An axis of output `index`."""
        return Slot(self.node.outputs[index], axis)

    def constant_dims(self, index: int, role: str) -> tuple[int, ...]:
        """The shape of a constant input."""
        value = self.data(index)
        if not is_constant(value):
            raise Refused(f"{role} is not constant")
        return tuple(d for d in dims_of(value) if isinstance(d, int))

    def ints(self, name: str, index: int) -> tuple[int, ...] | None:
        """An integer list that is attribute `name` or constant input `index`, or None without either."""
        value = self.input(index)
        if value is None:
            given = attribute(self.node, name)
            return None if given is None else tuple(int(i) for i in np.ravel(given))
        array = constant_of(value)
        if array is None:
            raise Refused(f"{self.node.op_type} with computed {name}")
        return tuple(int(i) for i in array.ravel())

    def same(self, pairs: Iterable[tuple[int, int]], index: int = 0, output: int = 0) -> tuple[Link, ...]:
        """Links index by index from axes of an input to axes of an output, where both have one size."""
        before, after = self.dims(index), self.out_dims(output)
        return tuple(
            Link(self.slot(index, i), self.out(o, output))
            for i, o in pairs
            if i < len(before) and o < len(after) and is_wide(before[i]) and before[i] == after[o]
        )

    def broadcast(self, axes: Iterable[int]) -> tuple[Link, ...]:
        """Links to axes of output 0 from the inputs, aligned from the right; an axis of size one is none."""
        out = self.out_dims()
        inputs = {i: self.dims(i) for i, value in enumerate(self.node.inputs) if value is not None}
        links: list[Link] = []
        for axis in axes:
            own = {i: axis - len(out) + len(dims) for i, dims in inputs.items()}
            having = [i for i, dims in inputs.items() if own[i] >= 0 and dims[own[i]] != 1]
            # An input of unknown size may or may not have the axis: then it is named by no link.
            if is_wide(out[axis]) and all(inputs[i][own[i]] == out[axis] for i in having):
                links += [Link(self.slot(i, own[i]), self.out(axis)) for i in having]
        return tuple(links)

    def expect_one_output(self, reason: str) -> None:
        """Refuse where an optional output is read: it may depend on how many channels there are."""
        if any(v.uses() or v.is_graph_output() for v in self.node.outputs[1:]):
            raise Refused(reason)

    def expect(self, slot: Slot, size: int) -> None:
        """Refuse unless the slot is known to have `size` indices."""
        dims = dims_of(slot.value)
        if slot.axis >= len(dims) or dims[slot.axis] != size:
            raise Refused("channel axis is dynamic")


def op_types(text: str) -> tuple[str, ...]:
    """The words of a list of operator types."""
    return tuple(text.split())


def is_constant(value: ir.Value) -> bool:
    """Whether `constant_of` has an answer, without decoding the tensor."""
    if value.is_graph_input():
        return False
    producer = value.producer()
    if producer is None:
        return value.const_value is not None and value.const_value.dtype != ir.DataType.STRING
    return producer.op_type in ("Constant", "ConstantOfShape") and constant_of(value) is not None


def is_wide(dim: Dim) -> bool:
    """Whether an axis of this size is known and has something to lose."""
    return isinstance(dim, int) and dim > 1


def dims_of(value: ir.Value) -> tuple[Dim, ...]:
    """Sizes, symbols' names, and None where nothing is known; `Refused` where even the rank is not."""
    if value.shape is None:
        array = constant_of(value)
        if array is None:
            raise Refused("shape is unknown")
        return array.shape
    return tuple((d if d > 0 else None) if isinstance(d, int) else d.value for d in value.shape)


def size_of(slot: Slot) -> int:
    """The number of indices of a slot that a rule has named."""
    size = dims_of(slot.value)[slot.axis] if slot.value.shape is None else slot.value.shape[slot.axis]
    assert isinstance(size, int)  # rules name axes of known size only
    return size
