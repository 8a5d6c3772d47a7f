"""First and second moments of what the weights of a layer are multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import onnx_ir as ir

from edgewise.calibration.edits import anchors
from edgewise.calibration.patches import Reader, sampled, start_of
from edgewise.calibration.taps import open_taps, sizes_on, values_of
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import Array
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed

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
    readers = [Reader.of(a.node, a.weights.array) for a in anchors(model, plan) if a.own_weights]
    done, layers = input_moments(model, samples, readers, threads=threads, memory=memory, progress=progress)
    return Moments(fingerprint(model), done, layers)


def input_moments(
    model: ir.Model,
    samples: Iterable[Feed],
    readers: Sequence[Reader],
    *,
    batch: int = 1,
    threads: int | None = None,
    memory: int = 1 << 29,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, dict[str, LayerMoments]]:
    """The number of feeds, and the moments of the inputs of `readers` as above, by their first output.

    Each feed holds up to `batch` samples.
    """
    stream = iter(samples)
    first = next(stream, None)
    if first is None:
        raise InputError("no samples to take moments of")
    sums = _sums(readers, memory // 2)
    names = [name for name in sums if name not in first]
    sizes = sizes_on(model, names, first)
    taps = open_taps(model, sizes, memory // 2, threads)
    done = 0
    for done, feed in enumerate(chain([first], stream), start=1):
        start = start_of(feed)
        for name, array in chain(feed.items(), values_of(taps, feed)):
            for one in sums.get(name, ()):
                one.add(array, start, batch)
        if progress is not None:
            progress(done)
    return done, {one.name: one.moments() for some in sums.values() for one in some}


class _Sum:
    """The moments of one layer so far."""

    def __init__(self, reader: Reader, largest_block: int) -> None:
        self.name = reader.node.outputs[0].name or ""
        self._reader = reader
        k = reader.length
        edges = np.linspace(0, k / 2, -(-k // largest_block) + 1).round().astype(int) * 2  # pairs stay whole
        edges[-1] = k
        self._blocks = [slice(a, b) for a, b in pairwise(edges.tolist())]
        self._second = [np.zeros((reader.groups, b.stop - b.start, b.stop - b.start)) for b in self._blocks]
        self._first = np.zeros((reader.groups, k))
        self._count = 0
        self._waiting: list[Array] = []

    def add(self, array: Array, start: float, samples: int) -> None:
        self._waiting.append(sampled(self._reader, array, start, samples))
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


def _sums(readers: Sequence[Reader], memory: int) -> dict[str, list[_Sum]]:
    """An empty sum for every layer, by the value it reads, in the largest blocks that fit."""
    largest = max((r.length for r in readers), default=1)

    def needed(block: int) -> int:
        return sum(8 * r.groups * r.length * min(r.length, block) for r in readers)

    while needed(largest) > memory and largest > _SMALLEST_BLOCK:
        largest = -(-largest // 2)
    sums: dict[str, list[_Sum]] = {}
    for reader in readers:
        source = reader.node.inputs[0]
        assert source is not None  # a layer reads something
        sums.setdefault(source.name or "", []).append(_Sum(reader, largest))
    return sums
