"""What a layer multiplies by its weights, at some positions of its output."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.calibration.integer_products import geometry
from edgewise.passes.graph import Array, attribute
from edgewise.runtime.evaluate import Feed

_MOST_PATCHES = 64  # of one sample and layer: neighbours tell little new, and inference stays dearer
_FEWEST_PATCHES = 16  # small moments are known from few


@dataclass(frozen=True)
class Reader:
    """A Conv, ConvTranspose, Gemm or MatMul as a product of patches of its input with its weights.

    Each of `groups` reads `inputs` channels through a window of the shape `kernel`, which is () for a matrix.
    A patch has `length` elements, all channels of the first tap before those of the second.
    """

    node: ir.Node
    groups: int
    inputs: int
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, node: ir.Node, weight: Array) -> Reader:
        """`weight` is what is stored as the node's second input."""
        if node.op_type not in ("Conv", "ConvTranspose"):
            return cls(node, 1, weight.shape[1 if attribute(node, "transB", 0) else 0])
        groups = int(attribute(node, "group", 1))
        inputs = weight.shape[1] if node.op_type == "Conv" else weight.shape[0] // groups
        return cls(node, groups, inputs, weight.shape[2:])

    @property
    def length(self) -> int:
        """Products that an output element is the sum of."""
        return self.inputs * math.prod(self.kernel)

    @property
    def patches(self) -> int:
        """How many patches of one sample are worth taking."""
        return max(_FEWEST_PATCHES, min(self.length, _MOST_PATCHES))

    def positions(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output but for its channels, for an input of `shape`."""
        if not self.kernel:
            at = self._matrix_axis
            return tuple(size for axis, size in enumerate(shape) if axis != at % len(shape))
        return (shape[0], *(axis.out for axis in self._axes(shape[2:])))

    def read(self, array: Array, at: Array) -> Array:
        """The patches at the positions of these flat indices, [groups, patch, length], float32."""
        if not self.kernel:
            rows = np.moveaxis(array, self._matrix_axis, -1).reshape(-1, self.inputs)
            return rows[at][None].astype(np.float32, copy=False)
        batch, channels, *sizes = array.shape
        image, *positions = np.unravel_index(at, self.positions(array.shape))
        count = len(image)
        index, inside = np.zeros((count, 1), np.int64), np.ones((count, 1), np.bool_)
        for axis, position in zip(self._axes(sizes), positions, strict=True):
            seen, valid = axis.seen(position)
            index = (index[:, :, None] * axis.size + seen[:, None, :]).reshape(count, -1)
            inside = (inside[:, :, None] & valid[:, None, :]).reshape(count, -1)
        pixels = array.reshape(batch, channels, -1)[image[:, None], :, index] * inside[:, :, None]
        grouped = pixels.reshape(count, index.shape[1], self.groups, -1).transpose(2, 0, 1, 3)
        return grouped.reshape(self.groups, count, -1).astype(np.float32, copy=False)

    @property
    def _matrix_axis(self) -> int:
        return 0 if self.node.op_type == "Gemm" and attribute(self.node, "transA", 0) else -1

    def _axes(self, sizes: Sequence[int]) -> list[_Axis]:
        node = self.node
        dilations = attribute(node, "dilations", [1] * len(self.kernel))
        if node.op_type == "ConvTranspose":
            return _transposed_axes(node, self.kernel, sizes, dilations)
        return [
            _Axis(
                size, (size + before + after - reach) // stride + 1, stride, np.arange(k) * dilation - before
            )
            for size, k, dilation, (before, after), reach, stride in zip(
                sizes, self.kernel, dilations, *geometry(node, sizes, self.kernel), strict=True
            )
        ]


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution: output i looks at the elements i * stride + offsets of the input."""

    size: int
    out: int
    stride: int
    offsets: Array
    apart: int = 1
    """Of a transposed one: elements lie so far apart, with nothing in between."""

    def seen(self, position: Array) -> tuple[Array, Array]:
        """What the outputs at `position` look at, and whether there is something; positions x taps."""
        at, between = np.divmod(position[:, None] * self.stride + self.offsets, self.apart)
        return at.clip(0, self.size - 1), (at >= 0) & (at < self.size) & (between == 0)


def _transposed_axes(
    node: ir.Node, kernel: Sequence[int], sizes: Sequence[int], dilations: Sequence[int]
) -> list[_Axis]:
    """Tap t of input i falls on output i * stride + t * dilation - padding."""
    rank = len(kernel)
    strides = attribute(node, "strides", [1] * rank)
    extra = attribute(node, "output_padding", [0] * rank)
    shape = attribute(node, "output_shape")
    pads, auto = attribute(node, "pads", [0] * (2 * rank)), attribute(node, "auto_pad", "NOTSET")
    axes = []
    for i, (size, k, d, s) in enumerate(zip(sizes, kernel, dilations, strides, strict=True)):
        whole = (size - 1) * s + extra[i] + (k - 1) * d + 1
        before, after = (pads[i], pads[i + rank]) if auto == "NOTSET" else (0, 0)
        wanted = None if shape is None else shape[-rank:][i]
        if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
            wanted = size * s
        if wanted is not None:
            half = max(whole - wanted, 0) // 2  # the specification puts the larger half behind ...
            before = max(whole - wanted, 0) - half if auto == "SAME_LOWER" else half
            after = whole - wanted - before
        axes.append(_Axis(size, whole - before - after, 1, before - np.arange(k) * d, apart=s))
    return axes


def spread(total: int, count: int, start: float) -> Array:
    """Indices of `count` of `total` patches, or of all: systematic sampling from `start` in [0, 1)."""
    count = min(total, count)
    return ((np.arange(count) + start) * (total / max(count, 1))).astype(np.int64)


def start_of(feed: Feed) -> float:
    """A number in [0, 1) that depends on the sample alone."""
    checksum = 0
    for name in sorted(feed):
        if feed[name].dtype != np.object_:
            checksum = zlib.crc32(np.ascontiguousarray(feed[name]).view(np.uint8).data, checksum)
    return checksum / 2**32


def sampled(reader: Reader, array: Array, start: float, samples: int = 1) -> Array:
    """Evenly spread patches of an input of so many samples, [groups, patch, length], float32."""
    total = math.prod(reader.positions(array.shape))
    return reader.read(array, spread(total, reader.patches * samples, start))
