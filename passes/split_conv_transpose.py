"""Write a transposed convolution as a convolution and a shuffle, operators that can run in int8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Refused, Rule
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    opset,
    replace,
)
from edgewise.passes.linear import FLOATS

_OLDEST = 11  # the first in which DepthToSpace can read the positions of a channel side by side
_END = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class SplitConvTranspose(Rule):
    """Write ConvTranspose as Conv, an interleaving of its output channels, and a crop where one is left.

    Given:   y[o] = b + sum of w[t] x[n]  over taps t and inputs n with  s n + d t = o + p
             along every spatial axis, for stride s, dilation d and p positions cut off in front
    Result:  y[o] = z[o + c],   z[s m + r] = Conv(x)[r, m] = b + sum of w[t] x[m - q]  over taps t of phase r
             where  d t + c - p = s q + r  and  0 <= r < s  give every tap its phase r and its shift q
    The s phases of an axis are channels of the Conv, interleaved by DepthToSpace. Taps that a phase does
    not have are zero. Whole steps of p go into the Conv's padding; what is cut off at the end follows from
    the length of y alone, whatever that of x is. With s = 1 a Conv is all that is left.

    The crop c < s is free. It decides how many shifts there are, which is the Conv's kernel; the smallest
    is taken, then the smallest crop:
             kernel 2, stride 2                             Conv 1x1, nothing to crop
             kernel 3, stride 2, pads 1, output padding 1   Conv 2x2, nothing to crop
             kernel 4, stride 2, pads 1                     Conv 2x2, one position to crop on every side
    The last could do without its crop as a Conv 3x3 that has four taps of nine in every phase. That would
    read and multiply 2.25 times the weights, to spare one copy of y: measured on a DCGAN generator in int8,
    it takes 1.5 times as long.
    An x of one position has no stride: it is taken as large as the kernel, and the Conv is 1x1.

    In float this is no faster. With `channels_last` the interleaving is written for channels-last data,
    which onnxruntime's int8 kernels keep: there it moves s channels at a time instead of single numbers,
    and the Transposes around it cancel with those of the kernels. Strides that differ need that form.
    """

    name = "split-conv-transpose"
    op_types = ("ConvTranspose",)
    channels_last: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        if opset(model) >= _OLDEST:
            return super().apply(model)
        found = sum(n.op_type in self.op_types and n.domain == "" for n in model.graph.all_nodes())
        return Outcome(
            0, MappingProxyType({f"opset below {_OLDEST}: upgrade it first": found} if found else {})
        )

    def rewrite(self, node: ir.Node) -> bool:
        weight, bias = _constant(node, 1, "weight"), _constant(node, 2, "bias")
        if weight is None or weight.dtype not in FLOATS:
            raise Refused("weight is not of a float type")
        if weight.ndim not in (3, 4):
            raise Refused("neither one nor two spatial axes")
        axes, groups = _axes(node, weight.shape[2:]), int(attribute(node, "group", 1))
        strides, outputs = [a.stride for a in axes], groups * int(weight.shape[1])
        uneven = len(set(strides)) > 1
        if uneven and groups > 1:
            raise Refused("strides differ and there are groups")
        last = uneven or (self.channels_last and groups == 1)
        value = _convolution(node, weight, bias, axes, phases_first=last)
        crops = [a.crop for a in axes]
        if math.prod(strides) > 1 and last:
            value = _interleave_channels_last(node, value, strides, outputs, crops)
        elif math.prod(strides) > 1:
            value = _cropped(node, _interleave(node, value, strides, outputs), crops, 2)
        value.shape, value.type = node.outputs[0].shape, node.outputs[0].type or value.type
        replace(node.outputs[0], value)
        return True


@dataclass(frozen=True, eq=False)
class _Axis:
    """What becomes of one spatial axis: tap t of the kernel is tap `taps[t]` of phase `phases[t]`.

    `size`, `dilation` and `pads` are the Conv's. Of its `stride` interleaved phases, `crop` are the
    positions to cut off in front and behind.
    """

    stride: int
    phases: Array
    taps: Array
    size: int
    dilation: int
    pads: tuple[int, int]
    crop: tuple[int, int]


def _constant(node: ir.Node, index: int, role: str) -> Array | None:
    """The constant at input `index`, None where the input is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    array = constant_of(value)
    if value is not None and array is None:
        raise Refused(f"{role} is not constant")
    return array


def _axes(node: ir.Node, kernel: Sequence[int]) -> tuple[_Axis, ...]:
    """Every spatial axis, with the crop that makes the Conv's kernel and then the crop itself smallest."""
    ones = (1,) * len(kernel)
    strides, dilations = attribute(node, "strides", ones), attribute(node, "dilations", ones)
    added = attribute(node, "output_padding", (0,) * len(kernel))
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = _pads(node, strides, [e + a for e, a in zip(extents, added, strict=True)])
    if _sizes(node.inputs[0]) == ones:
        strides = (max(extents),) * len(kernel)
    return tuple(
        min(
            (_axis(s, k, d, p[0], e + a - sum(p), crop) for crop in range(s)),
            key=lambda axis: (axis.size, sum(axis.crop)),
        )
        for s, k, d, p, e, a in zip(strides, kernel, dilations, pads, extents, added, strict=True)
    )


def _pads(node: ir.Node, strides: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
    """What the operator cuts off in front and behind, per axis.

    `reach` is the length of the output, with nothing cut off, of an input of one position; each further
    one adds a stride. Where the operator is told a length, it spreads the difference over both ends.
    """
    mode, lengths = attribute(node, "auto_pad", "NOTSET"), attribute(node, "output_shape", ())
    if lengths:
        sizes = _sizes(node.inputs[0])
        if sizes is None:
            raise Refused("output_shape for an input of unknown size")
        wanted = lengths[-len(strides) :]
        total = [s * (n - 1) + r - w for s, n, r, w in zip(strides, sizes, reach, wanted, strict=True)]
    elif mode.startswith("SAME"):
        if any(attribute(node, "output_padding", ())):  # implementations differ in whether it counts
            raise Refused("auto_pad and output_padding")
        total = [r - s for s, r in zip(strides, reach, strict=True)]
    else:
        pads = attribute(node, "pads", ()) if mode == "NOTSET" else ()
        pads = pads or (0,) * (2 * len(strides))
        return list(zip(pads[: len(strides)], pads[len(strides) :], strict=True))
    if min(total) < 0:
        raise Refused("the output is longer than the kernel reaches")
    halves = [(t // 2, t - t // 2) for t in total]
    return halves if mode == "SAME_UPPER" else [(behind, front) for front, behind in halves]


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The lengths of the spatial axes, None where one is not known."""
    dims = () if value is None or value.shape is None else tuple(value.shape)[2:]
    known = tuple(d for d in dims if isinstance(d, int) and d > 0)
    return known if dims and len(known) == len(dims) else None


def _axis(stride: int, kernel: int, dilation: int, front: int, reach: int, crop: int) -> _Axis:
    """An axis that crops `crop` in front. `reach` is the length of y for an x of one position."""
    shifts, phases = np.divmod(dilation * np.arange(kernel) + crop - front, stride)
    grown = (reach + crop - 1) // stride  # positions that each phase has more than x
    low, high = min(0, -int(shifts.max())), max(-grown, -int(shifts.min()))  # no padding may be negative
    step = int(np.gcd.reduce([*(-shifts - low), high - low])) or 1
    return _Axis(
        stride=stride,
        phases=phases,
        taps=(-shifts - low) // step,
        size=(high - low) // step + 1,
        dilation=step,
        pads=(-low, grown + high),
        crop=(crop, stride * (grown + 1) - reach - crop),
    )


def _convolution(
    node: ir.Node, weight: Array, bias: Array | None, axes: Sequence[_Axis], *, phases_first: bool
) -> ir.Value:
    """The Conv that gives all phases: as the slowest part of its channels, or else as the fastest."""
    graph, name, groups = graph_of(node), node.outputs[0].name, int(attribute(node, "group", 1))
    kernel = _kernel(weight, groups, axes, phases_first=phases_first)
    inputs = [node.inputs[0], new_initializer(graph, f"{name}.weight", kernel)]
    if bias is not None:
        phases = math.prod(a.stride for a in axes)
        spread = np.tile(bias, phases) if phases_first else np.repeat(bias, phases)
        inputs.append(new_initializer(graph, f"{name}.bias", spread))
    attributes = {
        "group": groups,
        "kernel_shape": [a.size for a in axes],
        "dilations": [a.dilation for a in axes],
        "pads": [a.pads[end] for end in (0, 1) for a in axes],
    }
    return new_node(node, "Conv", inputs, attributes)


def _kernel(weight: Array, groups: int, axes: Sequence[_Axis], *, phases_first: bool) -> Array:
    """[inputs, outputs of a group, *taps] as [outputs and phases, inputs of a group, *taps of a phase]."""
    rank, (inputs, outputs, *taps) = len(axes), weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs, *taps)
    strides, sizes = [a.stride for a in axes], [a.size for a in axes]
    split = np.zeros((*strides, *sizes, groups, outputs, inputs // groups), weight.dtype)
    places = (*np.ix_(*(a.phases for a in axes)), *np.ix_(*(a.taps for a in axes)))
    split[places] = np.moveaxis(grouped, (0, 2, 1), (-3, -2, -1))
    phases, channels = range(rank), range(2 * rank, 2 * rank + 2)
    rows = (*phases, *channels) if phases_first else (*channels, *phases)
    ordered = split.transpose(*rows, 2 * rank + 2, *range(rank, 2 * rank))
    return ordered.reshape(-1, inputs // groups, *sizes)


def _interleave(node: ir.Node, value: ir.Value, strides: Sequence[int], channels: int) -> ir.Value:
    """[N, C s s, H, W] -> [N, C, H s, W s], or [N, C s, L] -> [N, C, L s]."""
    if len(strides) == 2:
        return new_node(node, "DepthToSpace", [value], {"blocksize": strides[0], "mode": "CRD"})
    split = _reshaped(node, value, [0, channels, strides[0], -1])
    return _reshaped(node, _transposed(node, split, [0, 1, 3, 2]), [0, 0, -1])


def _interleave_channels_last(
    node: ir.Node,
    value: ir.Value,
    strides: Sequence[int],
    channels: int,
    crops: Sequence[tuple[int, int]],
) -> ir.Value:
    """[N, r s C, H, W] -> [N, C, H r, W s], or [N, s C, L] -> [N, C, L s], cropped.

    The last axis needs no move: W, s C and W s, C are the same numbers in the same order. Sizes that are
    not known are copied by a 0, which does so at its own place only: hence the Reshape in two steps.
    """
    rank = len(strides)
    value = _transposed(node, value, [0, *range(2, rank + 2), 1])
    if rank == 2 and strides[0] > 1:
        run = strides[1] * channels
        rows = _transposed(node, _reshaped(node, value, [0, 0, 0, strides[0], run]), [0, 1, 3, 2, 4])
        value = _reshaped(node, rows, [0, -1, 1, 0, run])
    value = _reshaped(node, value, [*[0] * rank, -1, channels])
    value = _cropped(node, value, crops, 1)
    return _transposed(node, value, [0, rank + 1, *range(1, rank + 1)])


def _cropped(node: ir.Node, value: ir.Value, crops: Sequence[tuple[int, int]], first: int) -> ir.Value:
    """Cut off what `crops` says of the axes from `first` on."""
    cut = [
        (axis, front, -behind or _END) for axis, (front, behind) in enumerate(crops, first) if front or behind
    ]
    if not cut:
        return value
    axes, starts, ends = (list(numbers) for numbers in zip(*cut, strict=True))
    named = {"starts": starts, "ends": ends, "axes": axes}
    return new_node(node, "Slice", [value, *(_integers(node, role, n) for role, n in named.items())])


def _reshaped(node: ir.Node, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    return new_node(node, "Reshape", [value, _integers(node, "shape", shape)])


def _transposed(node: ir.Node, value: ir.Value, order: Sequence[int]) -> ir.Value:
    return new_node(node, "Transpose", [value], {"perm": list(order)})


def _integers(node: ir.Node, role: str, numbers: Sequence[int]) -> ir.Value:
    return new_initializer(graph_of(node), f"{node.outputs[0].name}.{role}", np.array(numbers, np.int64))
