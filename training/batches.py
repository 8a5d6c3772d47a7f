"""Samples as batches: stacked once, drawn in any order, and varied without a loop over samples."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgewise.calibration.data import Samples
from edgewise.passes.graph import Array
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Feed

Indices = npt.NDArray[np.int64]
Shapes = tuple[tuple[int, ...], ...]

_SHIFT = 1 / 8  # of an image's side, at most
_SMALLEST = 8  # pixels of a side: what is smaller is no image
_COLOURS = (1, 3, 4)
_PASTED = 0.5  # the share of batches that are mixed by pasting


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples `numbers` as one feed, with what is to come out and a label for each row, where they are known.

    Row i of a mixture is `share[i]` of itself and for the rest the row that `others[i]` labels.
    """

    feed: Feed
    numbers: Indices
    targets: Feed | None = None
    labels: Array | None = None
    others: Array | None = None
    share: Array | None = None


@dataclass(frozen=True, eq=False)
class Stack:
    """All samples, those of one shape stacked together: `places` says in which bucket and where each is.

    No batch has more than `at_once` samples, whatever the size of a step.
    """

    buckets: tuple[Mapping[str, Array], ...]
    places: Indices
    labels: Array | None
    at_once: int = sys.maxsize
    targets: tuple[Mapping[str, Array], ...] | None = None

    @classmethod
    def of(cls, samples: Samples, memory: int, *, at_once: int = sys.maxsize) -> Stack:
        """Read every sample once. Beyond `memory` bytes they lie in a temporary file.

        Raises `InputError` where there are none, and `EdgewiseError` where a file finds no room.
        """
        if not len(samples):
            raise InputError("there are no samples to train on: give more")
        buckets: dict[Shapes, _Bucket] = {}
        places = np.empty((len(samples), 2), np.int64)
        in_memory = _bytes(samples[0]) * len(samples) <= memory
        for number, feed in enumerate(samples):
            shapes = tuple(array.shape for array in feed.values())
            if shapes not in buckets:
                buckets[shapes] = _Bucket(len(buckets), feed, None if in_memory else len(samples))
            places[number] = buckets[shapes].index, buckets[shapes].add(feed)
        labels = samples.labels
        if labels is not None:
            labels = labels.reshape(len(samples), -1, *labels.shape[1:])
        return cls(tuple(bucket.stacked() for bucket in buckets.values()), places, labels, at_once)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.places)

    def batches(self, numbers: Indices) -> Iterator[Batch]:
        """These samples in as few batches as their shapes and `at_once` allow."""
        for index, bucket in enumerate(self.buckets):
            own = numbers[self.places[numbers, 0] == index]
            for part in np.array_split(own, math.ceil(len(own) / self.at_once)) if len(own) else ():
                places = self.places[part, 1]
                targets = None if self.targets is None else _taken(self.targets[index], places)
                labels = None if self.labels is None else _rows(self.labels[part])
                yield Batch(_taken(bucket, places), part, targets, labels)

    def largest(self) -> Batch:
        """A sample of those with the most bytes, without its label."""
        feeds = (_taken(bucket, np.zeros(1, np.int64)) for bucket in self.buckets)
        return Batch(max(feeds, key=_bytes), np.zeros(1, np.int64))

    def in_order(self, size: int) -> Iterator[Batch]:
        """All samples, up to `size` at a time."""
        for start in range(0, len(self), size):
            yield from self.batches(np.arange(start, min(start + size, len(self))))

    def steps(self, size: int, rng: np.random.Generator) -> Iterator[tuple[Batch, ...]]:
        """All samples in a new order, in equal parts: as many as have `size` or more, at least one."""
        count = max(len(self) // size, 1)
        for numbers in np.array_split(rng.permutation(len(self)), count):
            yield tuple(self.batches(numbers))

    def with_targets(self, answers: Callable[[Batch], Feed], size: int, memory: int) -> Stack:
        """The same with `answers` for every sample, or itself where those take more than `memory` bytes."""
        plain, found = replace(self, targets=None), list[Mapping[str, Array]]()
        for index in range(len(self.buckets)):
            numbers = np.flatnonzero(self.places[:, 0] == index)
            bucket: _Bucket | None = None
            for start in range(0, len(numbers), size):
                for batch in plain.batches(numbers[start : start + size]):
                    rows = {
                        n: a.reshape(len(batch.numbers), -1, *a.shape[1:]) for n, a in answers(batch).items()
                    }
                    for i in range(len(batch.numbers)):
                        one = {name: array[i] for name, array in rows.items()}
                        if _bytes(one) * len(self) > memory:
                            return plain
                        bucket = bucket or _Bucket(index, one)
                        bucket.add(one)
            assert bucket is not None  # no bucket is empty
            found.append(bucket.stacked())
        return replace(self, targets=tuple(found))


class _Bucket:
    """Grows by a sample at a time: in memory, or in a file with room for `capacity`."""

    def __init__(self, index: int, feed: Feed, capacity: int | None = None) -> None:
        self.index = index
        self._count = 0
        self._lists: dict[str, list[Array]] = {name: [] for name in feed}
        self._files = {} if capacity is None else {n: _file(a, capacity) for n, a in feed.items()}

    def add(self, feed: Feed) -> int:
        for name, array in feed.items():
            if self._files:
                self._files[name][self._count] = array
            else:
                self._lists[name].append(array)
        self._count += 1
        return self._count - 1

    def stacked(self) -> dict[str, Array]:
        if self._files:
            return {name: rows[: self._count] for name, rows in self._files.items()}
        return {name: np.stack(arrays) for name, arrays in self._lists.items()}


def _file(array: Array, capacity: int) -> Array:
    """Rows like `array` in a file that is gone with the last who reads it."""
    needed, free = capacity * array.nbytes, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:  # the file would be made all the same, and writing to it end the process
        raise EdgewiseError(
            f"samples of {needed / 1e9:.1f} GB find no room in {tempfile.gettempdir()}: give fewer samples, "
            "more memory, or another folder in TMPDIR"
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, array.dtype, "w+", shape=(capacity, *array.shape))


def _bytes(feed: Feed) -> int:
    return sum(array.nbytes for array in feed.values())


def _taken(bucket: Mapping[str, Array], places: Indices) -> dict[str, Array]:
    return {name: _rows(array[places]) for name, array in bucket.items()}


def _rows(samples: Array) -> Array:
    """[samples, rows, ...] as [rows, ...]; a number for each sample stays one."""
    rows: Array = np.asarray(samples).reshape(-1, *samples.shape[2:]) if samples.ndim > 1 else samples[0]
    return rows


def are_images(feed: Feed) -> bool:
    """Whether every input is a stack of images, with colours and sides, which may be moved a little."""
    return all(a.ndim == 4 and a.dtype.kind in "fu" and _is_image(a) for a in feed.values())


def _is_image(array: Array) -> bool:
    (colours,) = {1, 2, 3} - {*_spatial(array)}
    return array.shape[colours] in _COLOURS and min(_sides(array)) >= _SMALLEST


def _spatial(array: Array) -> tuple[int, int]:
    """The axes of height and width."""
    last = array.shape[3] in _COLOURS and array.shape[1] not in _COLOURS
    return (1, 2) if last else (2, 3)


def _sides(array: Array) -> tuple[int, int]:
    height, width = _spatial(array)
    return array.shape[height], array.shape[width]


def varied(batch: Batch, rng: np.random.Generator, *, flips: bool) -> Batch:
    """The images of `batch` moved by up to an eighth, mirrored where `flips`, and mixed with one another.

    What moves in at the border repeats its last pixel. A batch is mixed as mixup does it (Zhang et al., ICLR
    2018), or others are pasted into its images as CutMix does it (Yun et al., ICCV 2019), with uniform shares
    (Beyer et al., CVPR 2022).
    """
    count = len(next(iter(batch.feed.values())))
    moves, mirrored = rng.uniform(-_SHIFT, _SHIFT, (2, count)), rng.random(count) < 0.5 * flips
    feed = {name: _moved(array, moves, mirrored) for name, array in batch.feed.items()}
    if count < 2 or any(array.dtype.kind != "f" for array in feed.values()):
        return replace(batch, feed=feed, targets=None)
    share = rng.random(count).astype(np.float32)
    other, corners, pastes = rng.permutation(count), rng.random((2, count)), rng.random() < _PASTED
    feed = {
        name: _pasted(array, array[other], share, corners) if pastes else _blended(array, array[other], share)
        for name, array in feed.items()
    }
    labels = None if batch.labels is None else batch.labels[other]
    return replace(batch, feed=feed, targets=None, others=labels, share=share)


def _blended(images: Array, others: Array, share: Array) -> Array:
    column = share[:, None, None, None]
    blended: Array = column * images + (1 - column) * others
    return blended


def _pasted(images: Array, others: Array, share: Array, corners: Array) -> Array:
    """Each image but for a rectangle of another, which leaves it its share to the nearest pixel.

    The rectangle is of the image's shape; `corners` say where it begins, in shares of the room for it.
    """
    side = np.sqrt(1 - share)
    within = []
    for size, corner in zip(_sides(images), corners, strict=True):
        start, middles = corner * (1 - side), (np.arange(size) + 0.5) / size
        within.append((middles >= start[:, None]) & (middles < (start + side)[:, None]))
    mask = within[0][:, :, None] & within[1][:, None, :]
    return np.where(np.expand_dims(mask, 3 if _spatial(images) == (1, 2) else 1), others, images)


def _moved(images: Array, moves: Array, mirrored: Array) -> Array:
    """Each image moved by shares of its height and width: one gather."""
    height, width = _sides(images)
    down, right = np.rint(moves * np.array([[height], [width]])).astype(np.int64)
    rows = (np.arange(height) + down[:, None]).clip(0, height - 1)
    columns = (np.arange(width) + right[:, None]).clip(0, width - 1)
    columns = np.where(mirrored[:, None], width - 1 - columns, columns)
    each = np.arange(len(images))[:, None, None]
    if _spatial(images) == (1, 2):
        moved: Array = images[each, rows[:, :, None], columns[:, None, :]]
        return moved
    return np.moveaxis(images.transpose(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]], 3, 1)
