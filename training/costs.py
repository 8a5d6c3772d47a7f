"""What a graph costs as a function of how many indices of its slots stay.

The cost of a graph is the sum of the costs of its parts, its nodes or its constants, and that of a part
depends on the widths of a few slots. So a change of one width asks a few parts for their new cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_links import Slot, Use, dims_of, is_constant
from edgewise.passes.channels import ChannelGraph
from edgewise.runtime.costs import Call, Operand, macs

_LONG_NAMES = {"float": "float32", "double": "float64"}
_NOTE_BYTES = 12  # of a tensor's dimensions, type and lengths in the file


class Width(NamedTuple):
    """The size of an axis that may shrink: the width of a slot, shared out evenly among `among` groups."""

    slot: Slot
    among: int = 1


Size = int | Width
Widths = Mapping[Slot, int]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that a node reads or writes, of a size that depends on widths."""

    value: ir.Value
    dtype: str
    sizes: tuple[Size, ...]

    def shape(self, widths: Widths) -> tuple[int, ...]:
        return tuple(s if isinstance(s, int) else widths[s.slot] // s.among for s in self.sizes)

    @property
    def slots(self) -> Iterator[Slot]:
        return (size.slot for size in self.sizes if isinstance(size, Width))


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with the tensors that it reads, None where one is absent or of unknown shape, and writes."""

    node: ir.Node
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that its shapes depend on."""
        return tuple(
            dict.fromkeys(s for t in (*self.inputs, *self.outputs) if t is not None for s in t.slots)
        )

    def call(self, widths: Widths) -> Call:
        """The node's call when its slots are as wide as that."""
        inputs = tuple(None if t is None else Operand(t.dtype, t.shape(widths)) for t in self.inputs)
        outputs = tuple(Operand(t.dtype, t.shape(widths)) for t in self.outputs)
        return Call(self.node.op_type, inputs, outputs, self._attributes)

    @cached_property
    def _attributes(self) -> Mapping[str, object]:
        return {a.name: a.value for a in self.node.attributes.values() if not a.is_ref()}


def layers_of(graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """The nodes of a graph whose values have these shapes (see `shapes_on`), in its order."""
    return tuple(Layer(node, *_tensors(graph, shapes, node)) for node in graph.graph)


def _tensors(
    graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]], node: ir.Node
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    inputs = [_tensor(graph, shapes, v, Use(node, i)) for i, v in enumerate(node.inputs)]
    coupling = graph.couplings.get(node)
    if coupling is not None and coupling.quota is not None and inputs[1] is not None:
        quota, weight = coupling.quota, inputs[1]  # the one constant that shrinks without a slot of its own
        blocks = (Width(quota.outputs), Width(quota.inputs, quota.groups))
        inputs[1] = Tensor(weight.value, weight.dtype, (*blocks, *weight.sizes[2:]))
    outputs = (_tensor(graph, shapes, v, None) for v in node.outputs)
    return tuple(inputs), tuple(t for t in outputs if t is not None)


def _tensor(
    graph: ChannelGraph, shapes: Mapping[str, tuple[int, ...]], value: ir.Value | None, use: Use | None
) -> Tensor | None:
    if value is None or value.dtype is None:
        return None
    known = shapes.get(value.name or "")
    if use is not None and is_constant(value):
        known = tuple(d for d in dims_of(value) if isinstance(d, int))
    else:
        use = None
    if known is None:
        return None
    slots = [Slot(value, axis, use) for axis in range(len(known))]
    sizes = tuple(Width(s) if s in graph.home else d for s, d in zip(slots, known, strict=True))
    dtype = value.dtype.name.lower()
    return Tensor(value, _LONG_NAMES.get(dtype, dtype), sizes)


@dataclass(frozen=True, eq=False)
class Part:
    """What costs something: `cost` of the widths of `slots`, in their order, and nothing without `nodes`."""

    slots: tuple[Slot, ...]
    cost: Callable[[tuple[int, ...]], float]
    nodes: frozenset[ir.Node] = frozenset()


class Cost(Protocol):
    """A kind of cost: the parts of a graph that have one. `unit` is what it is counted in, in words."""

    @property
    def unit(self) -> str: ...

    def parts(self, graph: ChannelGraph) -> Iterable[Part]: ...


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one run, where the values have these `shapes` (see `shapes_on`)."""

    shapes: Mapping[str, tuple[int, ...]]

    unit = "multiply-accumulates"

    def parts(self, graph: ChannelGraph) -> Iterator[Part]:
        for layer in layers_of(graph, self.shapes):
            part = part_of(layer, partial(_macs, layer))
            if part.cost(tuple(map(full_width, part.slots))):
                yield part


def part_of(layer: Layer, cost: Callable[[Widths], float]) -> Part:
    """The part that costs what a layer does; it remembers the answers, which a search asks for again."""
    slots, known = layer.slots, dict[tuple[int, ...], float]()

    def recalled(widths: tuple[int, ...]) -> float:
        if widths not in known:
            known[widths] = cost(dict(zip(slots, widths, strict=True)))
        return known[widths]

    return Part(slots, recalled, frozenset([layer.node]))


def full_width(slot: Slot) -> int:
    """The size of a slot of which nothing has left."""
    size = dims_of(slot.value)[slot.axis]
    assert isinstance(size, int)  # only slots of known size are in a group
    return size


def whole_of(parts: Iterable[Part]) -> float:
    """What they cost together while nothing has left."""
    return sum(part.cost(tuple(map(full_width, part.slots))) for part in parts)


def _macs(layer: Layer, widths: Widths) -> float:
    return float(macs(layer.call(widths)) or 0)


@dataclass(frozen=True)
class Parameters:
    """Numbers of floating point that the nodes of the graph read from constants."""

    unit = "parameters"

    def parts(self, graph: ChannelGraph) -> Iterator[Part]:
        return _constants(graph, lambda tensor: 1.0 if tensor.value.dtype in _FLOATS else 0.0)


@dataclass(frozen=True)
class FileBytes:
    """Bytes of the file: constants that nodes of the graph read, and what tells of nodes and values.

    With `weight`, a float constant of two axes or more takes so many bytes a number, as weights do that will
    be quantized.
    """

    weight: float | None = None

    unit = "bytes"

    def parts(self, graph: ChannelGraph) -> Iterator[Part]:
        nodes = sum(ir.serde.serialize_node(node).ByteSize() for node in graph.graph)
        notes = sum(len(v.name or "") + _NOTE_BYTES for v in graph.graph.initializers.values())
        yield Part((), lambda widths: float(nodes + notes))
        yield from _constants(graph, self._item)

    def _item(self, tensor: Tensor) -> float:
        dtype = tensor.value.dtype
        if self.weight is not None and dtype in _FLOATS and len(tensor.sizes) > 1:
            return self.weight
        return 0.0 if dtype is None or dtype == ir.DataType.STRING else dtype.itemsize


@dataclass(frozen=True)
class Shares:
    """Several costs that count alike: each in shares of what the whole graph has of it."""

    costs: tuple[Cost, ...]

    @property
    def unit(self) -> str:
        return " and ".join(cost.unit for cost in self.costs)

    def parts(self, graph: ChannelGraph) -> Iterator[Part]:
        for cost in self.costs:
            parts = tuple(cost.parts(graph))
            whole = whole_of(parts)
            for part in parts if whole > 0 else ():
                yield replace(part, cost=partial(_share, part.cost, whole))


def _share(cost: Callable[[tuple[int, ...]], float], whole: float, widths: tuple[int, ...]) -> float:
    return cost(widths) / whole


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def _constants(graph: ChannelGraph, item: Callable[[Tensor], float]) -> Iterator[Part]:
    """One part for each constant that costs something an `item`."""
    readers: dict[ir.Value, list[Tensor]] = defaultdict(list)
    for tensor in (tensor for layer in layers_of(graph, {}) for tensor in layer.inputs):
        if tensor is not None:  # without shapes only constants have one
            readers[tensor.value].append(tensor)
    for value, tensors in readers.items():
        each = item(tensors[0])
        if each:
            yield replace(_constant(graph, tensors, each), nodes=frozenset(node for node, _ in value.uses()))


def _constant(graph: ChannelGraph, readers: Sequence[Tensor], each: float) -> Part:
    """Readers of which other indices leave get copies of their own (see `ChannelGraph.remove`)."""
    alike = {tuple(_identity(graph, size) for size in t.sizes): t for t in readers}.values()
    slots = tuple(dict.fromkeys(slot for t in alike for slot in t.slots))
    whole = tuple(t.shape(dict(zip(slots, map(full_width, slots), strict=True))) for t in alike)

    def cost(widths: tuple[int, ...]) -> float:
        now = dict(zip(slots, widths, strict=True))
        shapes = [t.shape(now) for t in alike]
        cut = [math.prod(shape) for shape, full in zip(shapes, whole, strict=True) if shape != full]
        uncut = math.prod(whole[0]) if len(cut) < len(shapes) else 0
        return each * (sum(cut) + uncut)

    return Part(slots, cost)


def _identity(graph: ChannelGraph, size: Size) -> object:
    """The same for sizes of which the same indices leave."""
    if isinstance(size, int):
        return size
    group = graph.home[size.slot]
    return id(group), np.asarray(group.members[size.slot]).tobytes(), size.among
