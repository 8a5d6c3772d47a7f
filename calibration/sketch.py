"""A mergeable histogram of everything a value has held.

A float32 is cut after its upper 16 bits: sign, exponent and 7 bits of mantissa. What remains is the
number of a bin, so no range has to be known before the first sample; bins are 2**-7 of their power of
two wide, the counts of two sketches add, and the sum does not depend on order or on sharding.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

HISTOGRAM_LIMIT = 2048
"""Elements of one array that enter the histogram. Minimum, maximum, NaN and infinity see all of them."""

_BINS = 1 << 16
_ZERO = 1 << 15  # the bin of 0.0, of -0.0 and of what float32 cannot hold as a normal number
_WAITING_LIMIT = 1 << 16  # elements: counting them costs about as much as clearing the counters
_UPPER = 1 if sys.byteorder == "little" else 0  # which half of a float32 holds its sign
_LEAST = 149  # every float32 is a multiple of 2**-149: sums of such integers are exact


@dataclass(frozen=True, eq=False)
class Sketch:
    """The distribution of a value over all samples seen.

    `bins` (uint16) are the occupied bins in the order of the values they hold, `counts` (int64) how many
    elements fell in each. `count` is the number of finite elements seen, sampled or not; `minimum` and
    `maximum` are exact over all of them, infinity and minus infinity where there was none. `nans` and
    `infs` count what is not finite, and is in nothing else. `arrays` held something finite; `lows` and
    `highs` are the sums of their minima and of their maxima, in units of 2**-149.
    """

    bins: Array = field(default_factory=lambda: np.empty(0, np.uint16), repr=False)
    counts: Array = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    nans: int = 0
    infs: int = 0
    arrays: int = 0
    lows: int = 0
    highs: int = 0

    @classmethod
    def of(cls, array: Array) -> Sketch:
        """The sketch of one array: float of any width, integer or boolean."""
        accumulator = Accumulator()
        accumulator.add(array)
        return accumulator.sketch()

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of what both have seen. Associative, commutative, exact."""
        dense = np.zeros(_BINS, np.int64)
        dense[self.bins] = self.counts
        dense[other.bins] += other.counts
        return Sketch(
            *_occupied(dense),
            count=self.count + other.count,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            nans=self.nans + other.nans,
            infs=self.infs + other.infs,
            arrays=self.arrays + other.arrays,
            lows=self.lows + other.lows,
            highs=self.highs + other.highs,
        )

    __add__ = merge

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sketch):
            return NotImplemented
        return (
            self._scalars() == other._scalars()
            and np.array_equal(self.bins, other.bins)
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def _scalars(self) -> tuple[float, ...]:
        seen = (self.count, self.minimum, self.maximum, self.nans, self.infs)
        return (*seen, self.arrays, self.lows, self.highs)

    @property
    def average(self) -> tuple[float, float]:
        """The mean over all arrays of their minimum, and of their maximum; zeros where there was none.

        Means of exact sums, so that they depend on the order of the arrays as little as all else here.
        """
        unit = max(self.arrays, 1) << _LEAST
        return self.lows / unit, self.highs / unit

    def edges(self) -> tuple[Array, Array]:
        """Lower and upper bound (float64) of the values in each of `bins`, ascending.

        They are cut at `minimum` and `maximum`; the bin of zero has no width.
        """
        bins = self.bins.astype(np.int64)
        negative = bins < _ZERO
        magnitude = np.where(negative, _ZERO - 1 - bins, bins - _ZERO)
        near, far = _as_float(magnitude), _as_float(magnitude + 1)
        zero = bins == _ZERO
        low = np.where(zero, 0.0, np.where(negative, -far, near))
        high = np.where(zero, 0.0, np.where(negative, -near, far))
        return low.clip(self.minimum, self.maximum), high.clip(self.minimum, self.maximum)


class Accumulator:
    """Sketches arrays one after the other, in bounded memory.

    Elements wait until there are many: touching the counters of every value at every sample would cost
    more than the counting, for they do not stay in the processor's cache.
    """

    def __init__(self) -> None:
        self._counted = Sketch()
        self._waiting = np.empty(_WAITING_LIMIT, np.uint16)
        self._waiting_size = 0
        self._count = self._nans = self._infs = 0
        self._arrays = self._lows = self._highs = 0
        self._minimum, self._maximum = math.inf, -math.inf

    def add(self, array: Array) -> None:
        """Take in one array of any shape: what one sample makes of the value."""
        flat = _as_float32(array)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())  # NaN if any element is
        if not (math.isfinite(low) and math.isfinite(high)):
            self.add(self._count_non_finite(flat))
            return
        self._count += flat.size
        self._minimum = min(self._minimum, low + 0.0)  # -0.0 becomes 0.0, whichever came first
        self._maximum = max(self._maximum, high + 0.0)
        self._arrays += 1
        self._lows += int(math.ldexp(low, _LEAST))
        self._highs += int(math.ldexp(high, _LEAST))
        halves = flat.view(np.uint16)[_UPPER :: 2 * _stride(flat.size)]
        if self._waiting_size + halves.size > _WAITING_LIMIT:
            self._count_waiting()
        self._waiting[self._waiting_size : self._waiting_size + halves.size] = halves
        self._waiting_size += halves.size

    def sketch(self) -> Sketch:
        """Everything taken in so far."""
        self._count_waiting()
        return dataclasses.replace(
            self._counted,
            count=self._count,
            minimum=self._minimum,
            maximum=self._maximum,
            nans=self._nans,
            infs=self._infs,
            arrays=self._arrays,
            lows=self._lows,
            highs=self._highs,
        )

    def _count_non_finite(self, flat: Array) -> Array:
        """Count what is not finite and return the rest."""
        nans = int(np.isnan(flat).sum())
        finite = flat[np.isfinite(flat)]
        self._nans += nans
        self._infs += flat.size - finite.size - nans
        return finite

    def _count_waiting(self) -> None:
        # Converted here, because numpy's own conversion inside bincount takes three times as long.
        halves = np.bincount(self._waiting[: self._waiting_size].astype(np.intp), minlength=_BINS)
        self._waiting_size = 0
        dense = np.concatenate((halves[_ZERO:][::-1], halves[:_ZERO]))  # ascending by value
        dense[_ZERO] += dense[_ZERO - 1]  # -0.0
        dense[_ZERO - 1] = 0
        dense[self._counted.bins] += self._counted.counts
        self._counted = Sketch(*_occupied(dense))


def _as_float32(array: Array) -> Array:
    """The elements in the order of their indices, float32 and contiguous."""
    if array.dtype == np.float32:
        return np.ascontiguousarray(array).reshape(-1)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and counted as such
        return np.ascontiguousarray(array, dtype=np.float32).reshape(-1)


def _occupied(dense: Array) -> tuple[Array, Array]:
    bins = np.flatnonzero(dense != 0)
    return bins.astype(np.uint16), dense[bins]


def _as_float(halves: Array) -> Array:
    """The float32 whose upper 16 bits are `halves`, as float64."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@lru_cache(maxsize=4096)
def _stride(size: int) -> int:
    """The least step that takes at most `HISTOGRAM_LIMIT` of `size` elements and shares no divisor with it.

    Channels, height and width divide the size, so that the step meets each of their indices equally
    often, whatever the layout.
    """
    step = -(-size // HISTOGRAM_LIMIT)
    while math.gcd(step, size) > 1:
        step += 1
    return step
