"""Layers that sum over channels: which output depends on which input, and what constants add to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.channel_functions import Floats, uniform
from edgewise.passes.channel_links import Array, NodeView, Slot
from edgewise.passes.channel_rules import MIXERS, matrix_side
from edgewise.passes.channels import ChannelGraph, Mask
from edgewise.passes.graph import attribute, constant_of


@dataclass(frozen=True, eq=False)
class Mixing:
    """A layer whose every output channel is a weighted sum over input channels plus an offset.

    `weight` is [group, output of the group, input of the group, tap], to be multiplied by `factor`.
    `uneven` says why a constant other than zero does not come out as a constant, because some positions
    miss taps; "" where it does.
    """

    node: ir.Node
    source: Slot
    target: Slot
    weight: Array
    factor: float
    offset: Floats
    uneven: str

    @cached_property
    def nonzero(self) -> Mask:
        """Whether an output depends on an input, [group, output, input]."""
        mask: Mask = (self.weight != 0).any(3)
        return mask

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
        wanted = outputs.reshape(len(self.nonzero), -1, 1)
        mask: Mask = (self.nonzero & wanted).any(1).reshape(-1)
        return mask

    def contribution(self, constants: Floats) -> Floats:
        """What inputs with these values add to the outputs; zero where an input is not to count."""
        groups, outputs, inputs, _ = self.weight.shape
        columns = np.flatnonzero(constants.reshape(groups, inputs).any(0))
        if not len(columns):
            return np.zeros(groups * outputs)
        sums = self.weight[:, :, columns].sum(3, dtype=np.float64) * self.factor
        chosen = constants.reshape(groups, inputs)[:, columns]
        added: Floats = np.einsum("goi,gi->go", sums, chosen).reshape(groups * outputs)
        return added

    def combined(self, multiples: Floats) -> Floats:
        """The weight of one input that does the work of all, each of them a multiple of it, [output, tap].

        For layers of one group.
        """
        columns = np.flatnonzero(multiples)
        return np.tensordot(multiples[columns], self.weight[0][:, columns].astype(np.float64), (0, 1))

    def constants(self, known: Floats) -> Floats:
        """The outputs, given the inputs."""
        usable = self.usable(known)
        lost = (self.nonzero & ~usable.reshape(len(self.nonzero), 1, -1)).any(2).reshape(-1)
        out = self.offset + self.contribution(np.where(usable, known, 0.0))
        return np.where(lost, np.nan, out)


def mixings(graph: ChannelGraph) -> dict[ir.Node, Mixing]:
    """The layers of a graph that sum over channels, from front to back."""
    return {
        node: _MIXINGS[node.op_type](NodeView(node, graph.opset))
        for node, coupling in graph.couplings.items()
        if node.op_type in MIXERS and (coupling.links or coupling.free)
    }


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
    blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    uneven = "padding would meet a constant" if is_padded(view.node) else ""
    offset = _bias(view, len(weight))
    return Mixing(view.node, view.slot(0, 1), view.out(1), blocks, 1.0, offset, uneven)


def _conv_transpose(view: NodeView) -> Mixing:
    weight, groups = weight_of(view, 1), int(attribute(view.node, "group", 1))
    blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).swapaxes(1, 2)
    offset = _bias(view, groups * weight.shape[1])
    reason = "ConvTranspose would spread a constant unevenly"
    return Mixing(view.node, view.slot(0, 1), view.out(1), blocks, 1.0, offset, reason)


def _gemm(view: NodeView) -> Mixing:
    weight = weight_of(view, 1)
    matrix = weight if attribute(view.node, "transB", 0) else weight.T
    bias = constant_of(view.input(2))
    offset = np.zeros(len(matrix))
    if bias is not None:
        whole = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, (1, len(matrix))))
        offset = uniform(whole, 1) * float(attribute(view.node, "beta", 1.0))
    factor = float(attribute(view.node, "alpha", 1.0))
    source = view.slot(0, 0 if attribute(view.node, "transA", 0) else 1)
    return Mixing(view.node, source, view.out(1), matrix[None, :, :, None], factor, offset, "")


def _matmul(view: NodeView) -> Mixing:
    side = matrix_side(view)
    weight, axis = weight_of(view, side), len(view.dims(1 - side)) - 2 + side
    matrix = weight.T if side else weight
    offset = np.zeros(len(matrix))
    source, target = view.slot(1 - side, axis), view.out(axis)
    return Mixing(view.node, source, target, matrix[None, :, :, None], 1.0, offset, "")


_MIXINGS: Mapping[str, Callable[[NodeView], Mixing]] = MappingProxyType(
    {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
)
"""One for each of `MIXERS`."""
