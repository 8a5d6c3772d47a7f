"""Which channels hold one number for every input, found by following that number through the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.passes.channel_links import Array, Coupling, Link, NodeView, Slot, dims_of, op_types, size_of
from edgewise.passes.channel_moves import pad_widths
from edgewise.passes.channel_rules import MIXERS, POOLS, matrix_side
from edgewise.passes.channels import ChannelGraph, Mask
from edgewise.passes.graph import attribute, constant_of

Floats = npt.NDArray[np.float64]
"""One number an index of a slot, NaN where it is not one and the same everywhere."""

_FLOAT_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, eq=False)
class Mixing:
    """A layer whose every output channel is a weighted sum over input channels plus an offset.

    `weight` is [group, output of the group, input of the group, tap], to be multiplied by `factor`.
    `uneven` says why a constant other than zero does not come out as a constant; "" where it does.
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

    def constants(self, known: Floats) -> Floats:
        """The outputs, given the inputs."""
        usable = self.usable(known)
        lost = (self.nonzero & ~usable.reshape(len(self.nonzero), 1, -1)).any(2).reshape(-1)
        out = self.offset + self.contribution(np.where(usable, known, 0.0))
        return np.where(lost, np.nan, out)


@dataclass(frozen=True, eq=False)
class Constants:
    """What is known of the slots of a graph, and the layers that it was computed with."""

    known: dict[Slot, Floats] = field(default_factory=dict)
    mixings: dict[ir.Node, Mixing] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ChannelGraph) -> Constants:
        """Follow constants through the graph once, from front to back."""
        constants = cls()
        with np.errstate(all="ignore"):
            for node, coupling in graph.couplings.items():
                view = NodeView(node, graph.opset)
                if node.op_type in MIXERS and (coupling.links or coupling.free):
                    constants.mixings[node] = _MIXINGS[node.op_type](view)
                if all(v.dtype in _FLOAT_TYPES for v in node.outputs[:1]):
                    constants._follow(view, coupling)
        return constants

    @property
    def layers(self) -> list[Mixing]:
        """The layers that sum over channels, from front to back. Their slots are in a group each."""
        return list(self.mixings.values())

    def _follow(self, view: NodeView, coupling: Coupling) -> None:
        rule = CONSTANTS.get(view.node.op_type)
        if rule is None:
            return
        incoming: dict[Slot, list[Link]] = {s: [] for s in coupling.free if s.value in view.node.outputs}
        for link in coupling.links:
            if link.b.value in view.node.outputs:
                incoming.setdefault(link.b, []).append(link)
        for slot, own in incoming.items():
            found = rule(view, slot, own, self)
            if found is not None and not np.isnan(found).all():
                self.known[slot] = np.where(np.isfinite(found), found, np.nan)

    def get(self, slot: Slot) -> Floats | None:
        """What is known of a slot, None for nothing."""
        if slot.use is None:
            return self.known.get(slot)
        array = constant_of(slot.value)
        return None if array is None else _uniform(array, slot.axis)

    def at(self, slot: Slot) -> Floats:
        """What is known of a slot, all NaN for nothing."""
        found = self.get(slot)
        return np.full(size_of(slot), np.nan) if found is None else found


Rule = Callable[[NodeView, Slot, Sequence[Link], Constants], Floats | None]
"""The constants of one output slot of a node, given the links that lead to it; None for nothing known."""


def _uniform(array: Array, axis: int | None) -> Floats:
    """The number that each slice of `array` along `axis` (or all of it) holds throughout."""
    if not array.size:
        return np.full(1 if axis is None else array.shape[axis], np.nan)
    slices = (
        array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    )
    low, high = slices.min(1).astype(np.float64), slices.max(1).astype(np.float64)
    return np.where(low == high, low, np.nan)


def _weight(view: NodeView, index: int) -> Array:
    weight = constant_of(view.data(index))
    assert weight is not None  # the coupling has seen to it
    return weight


def _bias(view: NodeView, outputs: int) -> Floats:
    bias = constant_of(view.input(2))
    return np.zeros(outputs) if bias is None else bias.astype(np.float64)


def _conv(view: NodeView) -> Mixing:
    weight, groups = _weight(view, 1), int(attribute(view.node, "group", 1))
    blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    uneven = "padding would meet a constant" if is_padded(view.node) else ""
    offset = _bias(view, len(weight))
    return Mixing(view.node, view.slot(0, 1), view.out(1), blocks, 1.0, offset, uneven)


def is_padded(node: ir.Node) -> bool:
    """Whether a window of a Conv or a pooling reaches over the border."""
    return any(attribute(node, "pads", ())) or attribute(node, "auto_pad", "NOTSET").startswith("SAME")


def _conv_transpose(view: NodeView) -> Mixing:
    weight, groups = _weight(view, 1), int(attribute(view.node, "group", 1))
    blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).swapaxes(1, 2)
    offset = _bias(view, groups * weight.shape[1])
    reason = "ConvTranspose would spread a constant unevenly"
    return Mixing(view.node, view.slot(0, 1), view.out(1), blocks, 1.0, offset, reason)


def _gemm(view: NodeView) -> Mixing:
    weight = _weight(view, 1)
    matrix = weight if attribute(view.node, "transB", 0) else weight.T
    bias = constant_of(view.input(2))
    offset = np.zeros(len(matrix))
    if bias is not None:
        whole = np.broadcast_to(bias, np.broadcast_shapes(bias.shape, (1, len(matrix))))
        offset = _uniform(whole, 1) * float(attribute(view.node, "beta", 1.0))
    factor = float(attribute(view.node, "alpha", 1.0))
    source = view.slot(0, 0 if attribute(view.node, "transA", 0) else 1)
    return Mixing(view.node, source, view.out(1), matrix[None, :, :, None], factor, offset, "")


def _matmul(view: NodeView) -> Mixing:
    side = matrix_side(view)
    weight, axis = _weight(view, side), len(view.dims(1 - side)) - 2 + side
    matrix = weight.T if side else weight
    offset = np.zeros(len(matrix))
    source, target = view.slot(1 - side, axis), view.out(axis)
    return Mixing(view.node, source, target, matrix[None, :, :, None], 1.0, offset, "")


_MIXINGS = MappingProxyType(
    {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
)
"""One for each of `MIXERS`."""


def _mixed(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Along the channels the sum; along an axis that passes through, zeros stay zero."""
    mixing = known.mixings[view.node]
    return (
        mixing.constants(known.at(mixing.source))
        if slot == mixing.target
        else _zeros(view, slot, links, known)
    )


def _carried(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Elements are moved or averaged: an index is known where all that flows into it is the same."""
    facts = [known.get(link.a) for link in links]
    if all(fact is None for fact in facts):
        return None
    size = size_of(slot)
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    for link, fact in zip(links, facts, strict=True):
        values = np.full(size_of(link.a), np.nan) if fact is None else fact
        target = np.arange(size) if link.target is None else link.target
        source = values if link.source is None else values[link.source]
        np.minimum.at(low, target, source)
        np.maximum.at(high, target, source)
    return np.where(low == high, low, np.nan)


def _zeros(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """Sums, and averages over padding: only zeros stay what they are."""
    found = _carried(view, slot, links, known)
    return None if found is None else np.where(found == 0, 0.0, np.nan)


def _average_pool(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    over_border = is_padded(view.node) or attribute(view.node, "ceil_mode", 0)
    diluted = over_border and attribute(view.node, "count_include_pad", 0)
    return (_zeros if diluted else _carried)(view, slot, links, known)


def _pad(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    found = _carried(view, slot, links, known)
    if attribute(view.node, "mode", "constant") != "constant":
        return found
    filler, (begins, ends) = _filler(view), pad_widths(view)
    found = np.full(size_of(slot), np.nan) if found is None else found.copy()
    if begins[slot.axis] or ends[slot.axis]:
        found[: begins[slot.axis]] = filler
        found[len(found) - ends[slot.axis] :] = filler
    elsewhere = any(begins[i] or ends[i] for i in range(len(begins)) if i != slot.axis)
    return np.where(found == filler, found, np.nan) if elsewhere else found


def _filler(view: NodeView) -> float:
    """The number that a Pad puts around its input, NaN where it is computed."""
    if view.input(2) is None:
        return float(attribute(view.node, "value", 0.0))
    value = constant_of(view.input(2))
    return math.nan if value is None else float(value.ravel()[0])


def _batch_norm(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats:
    scale, shift, mean, variance = (_weight(view, i).astype(np.float64) for i in (1, 2, 3, 4))
    deviation = np.sqrt(variance + attribute(view.node, "epsilon", 1e-5))
    whitened = (known.at(Slot(view.data(), 1)) - mean) / deviation
    return np.where(scale == 0, shift, whitened * scale + shift)


def _instance_norm(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats:
    """Of a constant only zero is sure to lose its mean without a rounding error."""
    scale, shift = (_weight(view, i).astype(np.float64) for i in (1, 2))
    return np.where((scale == 0) | (known.at(Slot(view.data(), 1)) == 0), shift, np.nan)


def _computed(view: NodeView, slot: Slot, links: Sequence[Link], known: Constants) -> Floats | None:
    """The function of an elementwise operator on what is known of its operands."""
    if all(link.a.use is None and link.a not in known.known for link in links):
        return None
    operands = [_operand(view, index, slot, known) for index in range(len(view.node.inputs))]
    return np.broadcast_to(FUNCTIONS[view.node.op_type](view.node, *operands), size_of(slot))


def _operand(view: NodeView, index: int, slot: Slot, known: Constants) -> Floats:
    """What is known of an input along an axis of the output: [size], or [1] where it lacks the axis."""
    value = view.input(index)
    if value is None:
        return np.full(1, np.nan)
    dims = view.dims(index)
    axis = slot.axis - len(dims_of(slot.value)) + len(dims)
    if axis >= 0 and dims[axis] != 1:
        return known.at(view.slot(index, axis))
    array = constant_of(value)
    return np.full(1, np.nan) if array is None or not array.size else _uniform(array, None)


def _product(node: ir.Node, a: Floats, b: Floats) -> Floats:
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def _clip(node: ir.Node, x: Floats, *limits: Floats) -> Floats:
    """Limits are inputs, or attributes in old opsets; one that is left out is none."""
    bounds = [attribute(node, "min", -np.inf), attribute(node, "max", np.inf)]
    for i, limit in enumerate(limits):
        bounds[i] = bounds[i] if node.inputs[i + 1] is None else limit
    clipped: Floats = np.minimum(np.maximum(x, bounds[0]), bounds[1])
    return clipped


def _gelu(node: ir.Node, x: Floats) -> Floats:
    if attribute(node, "approximate", "none") == "tanh":
        gate = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        gate = _erf(x / math.sqrt(2))
    halved: Floats = 0.5 * x * (1 + gate)
    return halved


def _erf(x: Floats) -> Floats:
    return np.array([math.erf(v) for v in x])


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def _elu(x: Floats, alpha: float, scale: float = 1.0) -> Floats:
    return np.where(x < 0, scale * alpha * np.expm1(x), scale * x)


def _celu(node: ir.Node, x: Floats) -> Floats:
    alpha = float(attribute(node, "alpha", 1.0))
    return np.maximum(x, 0) + np.minimum(alpha * np.expm1(x / alpha), 0)


def _hard_sigmoid(x: Floats, alpha: float, beta: float) -> Floats:
    return np.clip(alpha * x + beta, 0, 1)


def _where(node: ir.Node, condition: Floats, a: Floats, b: Floats) -> Floats:
    chosen = np.where(condition != 0, a, b)
    return np.where(a == b, a, np.where(np.isnan(condition), np.nan, chosen))


_SELU_ALPHA, _SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

FUNCTIONS: Mapping[str, Callable[..., Floats]] = MappingProxyType(
    {
        "Abs": lambda n, x: np.abs(x),
        "Add": lambda n, a, b: a + b,
        "Celu": _celu,
        "Clip": _clip,
        "Div": lambda n, a, b: a / b,
        "Elu": lambda n, x: _elu(x, attribute(n, "alpha", 1.0)),
        "Erf": lambda n, x: _erf(x),
        "Exp": lambda n, x: np.exp(x),
        "Gelu": _gelu,
        "HardSigmoid": lambda n, x: _hard_sigmoid(x, attribute(n, "alpha", 0.2), attribute(n, "beta", 0.5)),
        "HardSwish": lambda n, x: x * _hard_sigmoid(x, 1 / 6, 0.5),
        "LeakyRelu": lambda n, x: np.where(x < 0, attribute(n, "alpha", 0.01) * x, x),
        "Log": lambda n, x: np.log(x),
        "Max": lambda n, *x: np.maximum.reduce(np.broadcast_arrays(*x)),
        "Mean": lambda n, *x: np.add.reduce(np.broadcast_arrays(*x)) / len(x),
        "Min": lambda n, *x: np.minimum.reduce(np.broadcast_arrays(*x)),
        "Mish": lambda n, x: x * np.tanh(np.logaddexp(0, x)),
        "Mul": _product,
        "Neg": lambda n, x: -x,
        "PRelu": lambda n, x, slope: np.where(x < 0, slope * x, x),
        "Pow": lambda n, x, y: np.power(x, y),
        "Reciprocal": lambda n, x: 1 / x,
        "Relu": lambda n, x: np.maximum(x, 0),
        "Selu": lambda n, x: _elu(x, attribute(n, "alpha", _SELU_ALPHA), attribute(n, "gamma", _SELU_GAMMA)),
        "Sigmoid": lambda n, x: _sigmoid(x),
        "Softplus": lambda n, x: np.logaddexp(0, x),
        "Softsign": lambda n, x: x / (1 + np.abs(x)),
        "Sqrt": lambda n, x: np.sqrt(x),
        "Sub": lambda n, a, b: a - b,
        "Sum": lambda n, *x: np.add.reduce(np.broadcast_arrays(*x)),
        "Swish": lambda n, x: x * _sigmoid(attribute(n, "alpha", 1.0) * x),
        "Tanh": lambda n, x: np.tanh(x),
        "Where": _where,
    }
)
"""float64 functions of (node, *operands) in which NaN stands for a number that is not known."""

_CARRIERS = op_types(
    "Cast Concat DepthToSpace Dropout Flatten Gather Identity ReduceMax ReduceMean ReduceMin Reshape Resize "
    "Slice SpaceToDepth Split Squeeze Transpose Unsqueeze Upsample"
)
_SUMMERS = op_types("ReduceL1 ReduceL2 ReduceSum ReduceSumSquare LpPool GlobalLpPool")

CONSTANTS: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(FUNCTIONS, _computed),
        **dict.fromkeys((*_CARRIERS, *POOLS), _carried),
        **dict.fromkeys(_SUMMERS, _zeros),
        **dict.fromkeys(MIXERS, _mixed),
        "AveragePool": _average_pool,
        "BatchNormalization": _batch_norm,
        "InstanceNormalization": _instance_norm,
        "Pad": _pad,
    }
)
"""Operators of the default domain, by type. The output of any other is not known."""
