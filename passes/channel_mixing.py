"""Layers that sum over channels: which output depends on which input, and what constants add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.channel_functions import Floats, uniform
from edgewise.passes.channel_links import Array, NodeView, Slot
from edgewise.passes.channel_recurrent import CELLS, R, W, X
from edgewise.passes.channel_rules import matrix_side
from edgewise.passes.channels import ChannelGraph, Mask
from edgewise.passes.graph import attribute, constant_of

_BLOCK = 2**22  # weights that are looked at in one go: what is made of them stays small


@dataclass(frozen=True, eq=False)
class Mixing:
    """A layer whose every output channel is a weighted sum over input channels plus an offset.

    `weight` is [group, output of the group, input of the group, tap], to be multiplied by `factor`. It is
    read anew each time, for a large one is in memory only as long as somebody holds it.
    `uneven` says why a constant other than zero does not come out as a constant, because some positions
    miss taps; "" where it does.
    """

    node: ir.Node
    source: Slot
    target: Slot
    read_weight: Callable[[], Array]
    factor: float
    offset: Floats
    uneven: str

    @property
    def weight(self) -> Array:
        """As above; of no use once the graph is edited."""
        return self.read_weight()

    def blocks(self) -> Iterator[Array]:
        """The weight, some outputs of each group at a time."""
        weight = self.weight
        step = max(1, _BLOCK // max(1, weight[:, :1].size))
        return (weight[:, start : start + step] for start in range(0, weight.shape[1], step))

    @cached_property
    def _nonzero(self) -> npt.NDArray[np.uint8]:
        """Whether an output depends on an input, [group, output, input], eight inputs a byte."""
        return np.concatenate([np.packbits((block != 0).any(3), axis=2) for block in self.blocks()], axis=1)

    def usable(self, constants: Floats) -> Mask:
        """The inputs, [inputs], whose part in every output is one known number."""
        mask: Mask = constants == 0 if self.uneven else ~np.isnan(constants)
        return mask

    def carrier(self, constants: Floats) -> int | None:
        """The input that can stand for all constant inputs of an uneven layer; None where none can.

        An image of one number is a multiple of an image of another one, border and all. The largest is
        taken: then no other is more than that times as large, nor is the rounding error of its column.
        Groups each see inputs of their own, and a weight that another layer reads cannot change.
        """
        weight = self.node.inputs[1]
        if not self.uneven or len(self.weight) > 1 or weight is None or len(weight.uses()) > 1:
            return None
        sizes = np.abs(np.nan_to_num(constants))
        return int(sizes.argmax()) if sizes.any() else None

    def needed(self, constants: Floats, outputs: Mask) -> Mask:
        """The inputs, [inputs], that the layer cannot do without as long as `outputs` stay."""
        needed: Mask = self.read(outputs) & ~self.usable(constants)
        spread, carrier = needed & ~np.isnan(constants), self.carrier(constants)
        if carrier is not None and spread.any():
            needed &= ~spread
            needed[carrier] = True
        return needed

    def read(self, outputs: Mask) -> Mask:
        """The inputs, [inputs], that any of `outputs` depends on."""
        groups, size, _ = self._nonzero.shape
        packed = np.bitwise_or.reduce(self._nonzero, axis=1, where=outputs.reshape(groups, size, 1))
        mask: Mask = np.unpackbits(packed, axis=1, count=self.weight.shape[2]).astype(np.bool_).reshape(-1)
        return mask

    def contribution(self, constants: Floats) -> Floats:
        """What inputs with these values add to the outputs; zero where an input is not to count."""
        groups, outputs, inputs, _ = self.weight.shape
        columns = np.flatnonzero(constants.reshape(groups, inputs).any(0))
        if not len(columns):
            return np.zeros(groups * outputs)
        chosen = constants.reshape(groups, inputs)[:, columns]
        sums = (block[:, :, columns].sum(3, dtype=np.float64) * self.factor for block in self.blocks())
        added = np.concatenate([np.einsum("goi,gi->go", each, chosen) for each in sums], axis=1)
        return added.reshape(groups * outputs)

    def combined(self, multiples: Floats) -> Floats:
        """The weight of one input that does the work of all, each of them a multiple of it, [output, tap].

        For layers of one group.
        """
        columns = np.flatnonzero(multiples)
        return np.tensordot(multiples[columns], self.weight[0][:, columns].astype(np.float64), (0, 1))

    def constants(self, known: Floats) -> Floats:
        """The outputs, given the inputs."""
        usable = self.usable(known)
        unknown = np.packbits(~usable.reshape(len(self._nonzero), 1, -1), axis=2)
        lost = (self._nonzero & unknown).any(2).reshape(-1)
        out = self.offset + self.contribution(np.where(usable, known, 0.0))
        return np.where(lost, np.nan, out)


@dataclass(frozen=True, eq=False)
class Gates(Mixing):
    """What the gates of a recurrent layer, [row], read of its input or of its state; taps are directions."""

    def contribution(self, constants: Floats) -> Floats:
        """As above, [row, direction]: directions have biases of their own."""
        columns = np.flatnonzero(constants)
        return np.tensordot(self.weight[0][:, columns].astype(np.float64), constants[columns], (1, 0))


def mixings(graph: ChannelGraph) -> dict[Slot, Mixing]:
    """The layers of a graph that sum over channels, by their target, from front to back."""
    found = (
        read(NodeView(node, graph.opset))
        for node, coupling in graph.couplings.items()
        if coupling.links or coupling.free
        for read in _MIXINGS.get(node.op_type, ())
    )
    return {mixing.target: mixing for mixing in found if mixing is not None}


def is_padded(node: ir.Node) -> bool:
    """Whether a window of a Conv or a pooling reaches over the border."""
    return any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")


def weight_of(view: NodeView, index: int) -> Array:
    """A constant input, which the coupling of the node has seen to be one."""
    weight = constant_of(view.data(index))
    assert weight is not None
    return weight


def _bias(view: NodeView, outputs: int) -> Floats:
    bias = constant_of(view.input(2))
    return np.zeros(outputs) if bias is None else bias.astype(np.float64)


def _conv(view: NodeView) -> Mixing:
    weight, groups = weight_of(view, 1), int(attribute(view.node, "group", 1))
    shape = groups, len(weight) // groups, weight.shape[1], -1
    uneven = "padding would meet a constant" if is_padded(view.node) else ""
    offset = _bias(view, len(weight))

    def read() -> Array:
        return weight_of(view, 1).reshape(shape)

    return Mixing(view.node, view.slot(0, 1), view.out(1), read, 1.0, offset, uneven)


def _conv_transpose(view: NodeView) -> Mixing:
    weight, groups = weight_of(view, 1), int(attribute(view.node, "group", 1))
    shape = groups, len(weight) // groups, weight.shape[1], -1
    offset = _bias(view, groups * weight.shape[1])
    reason = "ConvTranspose would spread a constant unevenly"

    def read() -> Array:
        return weight_of(view, 1).reshape(shape).swapaxes(1, 2)

    return Mixing(view.node, view.slot(0, 1), view.out(1), read, 1.0, offset, reason)


def _gemm(view: NodeView) -> Mixing:

    def read() -> Array:
        weight = weight_of(view, 1)
        matrix = weight if attribute(view.node, "transB", 0) else weight.T
        return matrix[None, :, :, None]

    bias, size = constant_of(view.input(2)), read().shape[1]
    offset = np.zeros(size)
    if bias is not None:
        whole = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, (1, size)))
        offset = uniform(whole, 1) * float(attribute(view.node, "beta", 1.0))
    factor = float(attribute(view.node, "alpha", 1.0))
    source = view.slot(0, 0 if attribute(view.node, "transA", 0) else 1)
    return Mixing(view.node, source, view.out(1), read, factor, offset, "")


def _matmul(view: NodeView) -> Mixing | None:
    """None for a product without weights."""
    side = matrix_side(view)
    if side is None:
        return None
    axis = len(view.dims(1 - side)) - 2 + side

    def read() -> Array:
        weight = weight_of(view, side)
        return (weight.T if side else weight)[None, :, :, None]

    source, target = view.slot(1 - side, axis), view.out(axis)
    return Mixing(view.node, source, target, read, 1.0, np.zeros(read().shape[1]), "")


def _input_gates(view: NodeView) -> Mixing:
    return _gates(view, W, view.slot(X, 2))


def _state_gates(view: NodeView) -> Mixing:
    """Units read each other: those that nobody else reads may all leave together."""
    shown = next(i for i, v in enumerate(view.node.outputs) if v.name)
    return _gates(view, R, view.out(len(view.out_dims(shown)) - 1, shown))


def _gates(view: NodeView, index: int, source: Slot) -> Mixing:
    def read() -> Array:
        return np.moveaxis(weight_of(view, index), 0, -1)[np.newaxis]

    return Gates(view.node, source, view.slot(index, 1), read, 1.0, np.zeros(read().shape[1]), "")


_MIXINGS: Mapping[str, tuple[Callable[[NodeView], Mixing | None], ...]] = MappingProxyType(
    {
        "Conv": (_conv,),
        "ConvTranspose": (_conv_transpose,),
        "Gemm": (_gemm,),
        "MatMul": (_matmul,),
        **dict.fromkeys(CELLS, (_input_gates, _state_gates)),
    }
)
"""By operator; a recurrent layer mixes twice."""
