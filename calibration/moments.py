"""First and second moments of what the weights of a layer are multiplied by."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import onnx_ir as ir

from edgewise.calibration.edits import Anchor, anchors
from edgewise.calibration.integer_products import geometry
from edgewise.calibration.taps import open_taps, sizes_on, values_of
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import Array, attribute
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed

_MOST_PATCHES = 64  # of one sample and layer: neighbours tell little new, and inference stays dearer
_FEWEST_PATCHES = 16  # small moments are known from few
_SMALLEST_BLOCK = 64
_BUFFER = 1 << 21  # bytes of patches multiplied at once: small products keep no processor busy


@dataclass(frozen=True)
class LayerMoments:
    """Sums over `count` patches x of one layer's input, each with k elements in the order of the kernels.

    `first` is the sum of x, groups x k. `second` holds the sums of x x^T, groups x b x b, for consecutive
    blocks of b elements: one block with b = k wherever memory allows.
    """

    count: int
    first: Array = field(repr=False)
    second: tuple[Array, ...] = field(repr=False)

    @property
    def mean(self) -> Array:
        """Groups x k."""
        mean: Array = self.first / self.count
        return mean

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The elements that each array of `second` is about."""
        ends = np.cumsum([0, *(block.shape[1] for block in self.second)]).tolist()
        return tuple(slice(a, b) for a, b in pairwise(ends))

    def covariance(self, block: int) -> Array:
        """Of one block, around the mean; groups x b x b."""
        mean = self.mean[:, self.blocks[block]]
        covariance: Array = self.second[block] / self.count - mean[:, :, None] * mean[:, None, :]
        return covariance

    def merge(self, other: LayerMoments) -> LayerMoments:
        second = tuple(a + b for a, b in zip(self.second, other.second, strict=True))
        return LayerMoments(self.count + other.count, self.first + other.first, second)


@dataclass(frozen=True)
class Moments:
    """What `samples` samples show of the inputs of `layers`, which are named by their first output."""

    fingerprint: str
    samples: int
    layers: Mapping[str, LayerMoments]

    def merge(self, other: Moments) -> Moments:
        """Both together. Raises `InputError` on moments of another model or under another memory bound."""
        blocks = {name: layer.blocks for name, layer in self.layers.items()}
        if self.fingerprint != other.fingerprint:
            raise InputError("these moments are of two different models")
        if blocks != {name: layer.blocks for name, layer in other.layers.items()}:
            raise InputError("these moments are of different layers or blocks: collect them alike")
        layers = {name: layer.merge(other.layers[name]) for name, layer in self.layers.items()}
        return Moments(self.fingerprint, self.samples + other.samples, layers)


def collect_moments(
    model: ir.Model,
    samples: Iterable[Feed],
    plan: QuantPlan,
    *,
    threads: int | None = None,
    memory: int = 1 << 29,
    progress: Callable[[int], None] | None = None,
) -> Moments:
    """Moments of the inputs of every layer of `model` whose weights `plan` quantizes.

    Of every sample 16 to 64 patches of a layer are taken, as many as a patch has elements, evenly spread
    from a start that the sample's own numbers decide: the result is the same for any order of the samples,
    up to rounding. Activations and sums take half of `memory` bytes each; where they do not fit, the model
    is run once for each group of layers, and moments are taken over blocks. Raises `InputError` without
    samples.
    """
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise InputError("no samples to take moments of")
    layers = [a for a in anchors(model, plan) if a.own_weights]
    sums = _sums(layers, memory // 2)
    names = [name for name in sums if name not in first]
    sizes = sizes_on(model, names, first)
    taps = open_taps(model, sizes, memory // 2, threads)
    done = 0
    for done, feed in enumerate(chain([first], stream), start=1):
        start = _start(feed)
        for name, array in chain(feed.items(), values_of(taps, feed)):
            for one in sums.get(name, ()):
                one.add(array, start)
        if progress is not None:
            progress(done)
    seen = {one.anchor.name: one.moments() for readers in sums.values() for one in readers}
    return Moments(fingerprint(model), done, seen)


def _start(feed: Feed) -> float:
    """A number in [0, 1) that depends on the sample alone."""
    checksum = 0
    for name in sorted(feed):
        if feed[name].dtype != np.object_:
            checksum = zlib.crc32(np.ascontiguousarray(feed[name]).view(np.uint8).data, checksum)
    return checksum / 2**32


class _Sum:
    """The moments of one layer so far."""

    def __init__(self, anchor: Anchor, largest_block: int) -> None:
        self.anchor = anchor
        k = _length(anchor)
        edges = np.linspace(0, k / 2, -(-k // largest_block) + 1).round().astype(int) * 2  # pairs stay whole
        edges[-1] = k
        self._blocks = [slice(a, b) for a, b in pairwise(edges.tolist())]
        self._second = [np.zeros((anchor.groups, b.stop - b.start, b.stop - b.start)) for b in self._blocks]
        self._first = np.zeros((anchor.groups, k))
        self._count = 0
        self._waiting: list[Array] = []

    def add(self, array: Array, start: float) -> None:
        self._waiting.append(patches(self.anchor, array, start))
        if sum(x.nbytes for x in self._waiting) > _BUFFER:
            self._multiply()

    def _multiply(self) -> None:
        x = np.concatenate(self._waiting, axis=1)
        self._waiting.clear()
        self._count += x.shape[1]
        self._first += x.sum(axis=1, dtype=np.float64)
        for total, block in zip(self._second, self._blocks, strict=True):
            part = x[:, :, block]
            total += part.transpose(0, 2, 1) @ part

    def moments(self) -> LayerMoments:
        if self._waiting:
            self._multiply()
        return LayerMoments(self._count, self._first, tuple(self._second))


def _length(anchor: Anchor) -> int:
    """Products that an output element is the sum of."""
    return anchor.weights.array.size // anchor.weights.channels


def _sums(layers: Sequence[Anchor], memory: int) -> dict[str, list[_Sum]]:
    """An empty sum for every layer, by the value it reads, in the largest blocks that fit."""
    largest = max((_length(a) for a in layers), default=1)

    def needed(block: int) -> int:
        return sum(8 * a.groups * _length(a) * min(_length(a), block) for a in layers)

    while needed(largest) > memory and largest > _SMALLEST_BLOCK:
        largest = -(-largest // 2)
    sums: dict[str, list[_Sum]] = {}
    for anchor in layers:
        sums.setdefault(anchor.input.name or "", []).append(_Sum(anchor, largest))
    return sums


def patches(anchor: Anchor, array: Array, start: float) -> Array:
    """Evenly spread patches of an input, groups x patches x k; float32."""
    if anchor.node.op_type == "Conv":
        return _conv_patches(anchor, array, start)
    if anchor.node.op_type == "Gemm" and attribute(anchor.node, "transA", 0):
        array = array.T
    rows = array.reshape(-1, array.shape[-1])
    return rows[_spread(len(rows), anchor, start)][None].astype(np.float32, copy=False)


def _spread(total: int, anchor: Anchor, start: float) -> Array:
    """Indices of some of `total` patches: systematic sampling."""
    count = min(total, max(_FEWEST_PATCHES, min(_length(anchor), _MOST_PATCHES)))
    return ((np.arange(count) + start) * (total / max(count, 1))).astype(np.int64)


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution: output i looks at the elements i * stride + offsets of the input."""

    size: int
    out: int
    stride: int
    offsets: Array

    def seen(self, position: Array) -> tuple[Array, Array]:
        """What the outputs at `position` look at, and whether that is inside; positions x taps."""
        at = position[:, None] * self.stride + self.offsets
        return at.clip(0, self.size - 1), (at >= 0) & (at < self.size)


def _axes(node: ir.Node, kernel: Sequence[int], sizes: Sequence[int]) -> list[_Axis]:
    dilations = attribute(node, "dilations", [1] * len(kernel))
    return [
        _Axis(size, (size + before + after - reach) // stride + 1, stride, np.arange(k) * dilation - before)
        for size, k, dilation, (before, after), reach, stride in zip(
            sizes, kernel, dilations, *geometry(node, sizes, kernel), strict=True
        )
    ]


def _conv_patches(anchor: Anchor, array: Array, start: float) -> Array:
    """What the kernel sees around some output positions, zero where it looks over the edge."""
    batch, channels, *sizes = array.shape
    axes = _axes(anchor.node, anchor.weights.array.shape[2:], sizes)
    out = (batch, *(axis.out for axis in axes))
    image, *positions = np.unravel_index(_spread(math.prod(out), anchor, start), out)
    count = len(image)
    index, inside = np.zeros((count, 1), np.int64), np.ones((count, 1), np.bool_)
    for axis, position in zip(axes, positions, strict=True):
        at, valid = axis.seen(position)
        index = (index[:, :, None] * axis.size + at[:, None, :]).reshape(count, -1)
        inside = (inside[:, :, None] & valid[:, None, :]).reshape(count, -1)
    pixels = array.reshape(batch, channels, -1)[image[:, None], :, index] * inside[:, :, None]
    grouped = pixels.reshape(count, index.shape[1], anchor.groups, -1).transpose(2, 0, 1, 3)
    return grouped.reshape(anchor.groups, count, -1)
