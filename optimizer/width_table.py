"""How long every layer of a model takes on the target as a function of its widths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

from edgewise.passes.channel_links import Slot
from edgewise.passes.channels import ChannelGraph
from edgewise.runtime.costs import Call, macs, moved_bytes
from edgewise.training.costs import Layer, Part, Size, Tensor, Widths, full_width, layers_of, part_of


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one kind of layer.

    `alone` are those of the layer in a model of its own at every combination of the widths in `axes`, in C
    order. Kernels work in blocks: along an axis all widths up to a multiple of its `blocks` take as long as
    that. `network` leads from there to what it took in the network, in pairs that ascend. For a kind without
    `axes` its multiply-accumulates, or the bytes that it moves, stand for the time alone.
    """

    axes: tuple[tuple[int, ...], ...]
    alone: tuple[float, ...]
    network: tuple[tuple[float, float], ...]
    blocks: tuple[int, ...] = ()

    def at(self, widths: Sequence[int], call: Call) -> float:
        """What a layer takes in the network."""
        base = self.base(widths, call)
        bases, times = np.array([(0.0, 0.0), *self.network]).T
        if base > bases[-1] > 0:
            return float(times[-1] * base / bases[-1])
        return float(np.interp(base, bases, times))

    def base(self, widths: Sequence[int], call: Call) -> float:
        """Milliseconds of a layer alone, or what stands for them."""
        return self._between(widths) if self.axes else float(macs(call) or moved_bytes(call))

    def _between(self, widths: Sequence[int]) -> float:
        """From the corners of the cell of the grid in which the widths lie, linear along each axis."""
        blocks = self.blocks or (1,) * len(self.axes)
        whole = (-(-width // block) * block for width, block in zip(widths, blocks, strict=True))
        corners = [_cell(axis, width) for axis, width in zip(self.axes, whole, strict=True)]
        strides = np.cumprod([1, *(len(axis) for axis in self.axes[:0:-1])])[::-1].tolist()
        total = 0.0
        for corner in itertools.product(*corners):
            index = sum(i * stride for (i, _), stride in zip(corner, strides, strict=True))
            total += self.alone[index] * float(np.prod([share for _, share in corner]))
        return total


def _cell(axis: tuple[int, ...], width: int) -> tuple[tuple[int, float], tuple[int, float]]:
    """The two positions on an axis around a width, with their shares; beyond its ends the end."""
    width = min(max(width, axis[0]), axis[-1])
    high = max(int(np.searchsorted(axis, width)), 1) if len(axis) > 1 else 0
    low = max(high - 1, 0)
    share = (width - axis[low]) / (axis[high] - axis[low]) if high > low else 0.0
    return (low, 1.0 - share), (high, share)


@dataclass(frozen=True)
class WidthTable:
    """A timing for every kind of layer of a model, on a `machine`; a `Cost` in milliseconds.

    It holds for the model that it was measured for, run on inputs of the same shapes.
    """

    machine: str
    provider: str
    threads: int | None
    shapes: Mapping[str, tuple[int, ...]]
    """Of all values, by name."""
    timings: Mapping[str, Timing]

    unit = "milliseconds"

    def parts(self, graph: ChannelGraph) -> Iterator[Part]:
        """One part for each layer whose kind has been timed."""
        for layer in layers_of(graph, self.shapes):
            kind = Kind.of(graph, layer)
            if kind.text in self.timings:
                yield self._part(kind, self.timings[kind.text])

    def _part(self, kind: Kind, timing: Timing) -> Part:
        def cost(widths: Widths) -> float:
            return timing.at([widths[slot] for slot in kind.variables], kind.layer.call(widths))

        return part_of(kind.layer, cost)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        data = {name: getattr(self, name) for name in ("machine", "provider", "threads")}
        timings = {kind: asdict(timing) for kind, timing in self.timings.items()}
        return {**data, "shapes": dict(self.shapes), "timings": timings}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WidthTable:
        """The table that `to_dict` wrote."""
        shapes = MappingProxyType({name: tuple(shape) for name, shape in data["shapes"].items()})
        timings = {
            kind: Timing(
                tuple(map(tuple, t["axes"])),
                tuple(t["alone"]),
                tuple((b, ms) for b, ms in t["network"]),
                tuple(t["blocks"]),
            )
            for kind, t in data["timings"].items()
        }
        return cls(**{**data, "shapes": shapes, "timings": MappingProxyType(timings)})


@dataclass(frozen=True, eq=False)
class Kind:
    """What layers have in common that take as long: all but the names. Slots that widen together are one
    variable, for which the first of them stands."""

    layer: Layer
    variables: tuple[Slot, ...]
    text: str
    channels: tuple[int, ...]
    """How many each variable has; it may have several indices of each."""
    _of: Mapping[Slot, tuple[int, Fraction]]
    """For each slot its variable, and how many times as wide it is."""

    @classmethod
    def of(cls, graph: ChannelGraph, layer: Layer) -> Kind:
        first: dict[tuple[int, bytes], Slot] = {}
        of: dict[Slot, tuple[int, Fraction]] = {}
        for slot in layer.slots:
            group = graph.home[slot]
            lead = first.setdefault((id(group), np.unique(group.members[slot]).tobytes()), slot)
            of[slot] = list(first.values()).index(lead), Fraction(full_width(slot), full_width(lead))
        channels = tuple(len(np.unique(graph.home[s].members[s])) for s in first.values())
        return cls(layer, tuple(first.values()), _text(layer, of), channels, of)

    @property
    def computes(self) -> bool:
        """Whether it multiplies and adds along an axis that may shrink, rather than move numbers."""
        full = {slot: full_width(slot) for slot in self.layer.slots}
        return bool(full and macs(self.layer.call(full)))

    @property
    def written(self) -> tuple[bool, ...]:
        """Of each variable whether what the layer writes is as wide, rather than only what it reads."""
        written = {self._of[slot][0] for tensor in self.layer.outputs for slot in tensor.slots}
        return tuple(i in written for i in range(len(self.variables)))

    def widths(self, values: Sequence[int]) -> Widths:
        """The widths of all slots when the variables have these."""
        return {slot: int(values[i] * ratio) for slot, (i, ratio) in self._of.items()}


def _text(layer: Layer, of: Mapping[Slot, tuple[int, Fraction]]) -> str:
    def size(size: Size) -> str:
        if isinstance(size, int):
            return str(size)
        variable, ratio = of[size.slot]
        scale = ratio / size.among
        return f"{'abcdefgh'[variable % 8]}:{full_width(size.slot) // size.among}" + f"*{scale}" * (
            scale != 1
        )

    def tensor(tensor: Tensor | None) -> str:
        return "-" if tensor is None else f"{tensor.dtype}[{' '.join(map(size, tensor.sizes))}]"

    node = layer.node
    attributes = sorted((a.name, str(a.value)) for a in node.attributes.values() if _is_plain(a.value))
    given = f"{{{', '.join(f'{name}={value}' for name, value in attributes)}}}" if attributes else ""
    tensors = f"{', '.join(map(tensor, layer.inputs))} -> {', '.join(map(tensor, layer.outputs))}"
    return f"{node.op_type}{given} {tensors}"


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str | bytes) or (
        isinstance(value, Sequence) and all(isinstance(v, int | float) for v in value)
    )
