"""From a sketch to the range that a quantization grid has to cover."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.calibration.sketch import Sketch
from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]
Range = tuple[float, float]
Loss = Callable[["_Grid"], float]

METHODS = ("minmax", "percentile", "entropy", "mse")

_OCTAVES = {"mse": 10, "entropy": 4}  # a range is cut to 2**-10, 2**-4 of what was seen at most
_FINEST = 1 / 16  # octaves; 4 % of the range
_NOTHING = 1e-30  # the scale of a narrower range would leave float32's normal numbers


def range_of(
    sketch: Sketch,
    method: str = "minmax",
    *,
    bits: int = 8,
    symmetric: bool = False,
    percentile: float = 99.99,
) -> Range:
    """The range (low, high) of a grid of `bits` bits for what `sketch` has seen; low <= 0 <= high.

    minmax      everything seen
    percentile  the central `percentile` % of it, (100 - percentile) / 2 % cut on either side
    entropy     least Kullback-Leibler divergence of the quantized from the float distribution, after
                Migacz, "8-bit inference with TensorRT", GTC 2017
    mse         least mean squared error of quantizing and back

    A `symmetric` range is (-a, a), for grids without a zero point. The width is zero only where nothing
    finite but zero (or 1e-30 and less) was seen: any scale represents that. Raises `InputError` on an
    unknown method or a percentile outside (50, 100].
    """
    if method not in METHODS:
        raise InputError(f"unknown range method {method!r}: choose from {', '.join(METHODS)}")
    if not 50 < percentile <= 100:
        raise InputError(f"percentile {percentile} is not above 50 and at most 100")
    widest = _widest(sketch, symmetric)
    if method == "minmax" or widest == (0, 0):
        return widest
    if method == "percentile":
        low, high = _central(sketch, percentile)
        return _mirrored(low, high, symmetric) if low < high else widest
    grid = _Grid(*widest, steps=2**bits - (2 if symmetric else 1))
    if method == "entropy":
        # 16 bins a step, as the source's 2048 bins for 128 levels: it does not look closer at zero.
        loss = _divergence(_Histogram.of(sketch, grid.step / 16))
    else:
        loss = _squared_error(_Histogram.of(sketch, grid.step * 2.0 ** -_OCTAVES["mse"] / 2))
    return _search(loss, grid, _OCTAVES[method], symmetric)


def _widest(sketch: Sketch, symmetric: bool) -> Range:
    low, high = min(sketch.minimum, 0.0), max(sketch.maximum, 0.0)
    return _mirrored(low, high, symmetric) if high - low > _NOTHING else (0.0, 0.0)


def _mirrored(low: float, high: float, symmetric: bool) -> Range:
    largest = max(-low, high)
    return (-largest, largest) if symmetric else (low, high)


def _central(sketch: Sketch, percentile: float) -> Range:
    """Quantiles as `numpy.percentile` interpolates them, within the width of a bin; zero inside."""
    cut = (100 - percentile) / 200
    last = int(sketch.counts.sum()) - 1
    low, high = _quantile(sketch, cut * last), _quantile(sketch, (1 - cut) * last)
    return min(low, 0.0), max(high, 0.0)


def _quantile(sketch: Sketch, rank: float) -> float:
    below, above = math.floor(rank), math.ceil(rank)
    start = _ranked(sketch, below)
    return start + (_ranked(sketch, above) - start) * (rank - below)


def _ranked(sketch: Sketch, rank: int) -> float:
    """The element of that rank, if the elements of a bin are spread evenly over it."""
    cumulated = np.cumsum(sketch.counts)
    index = int(np.searchsorted(cumulated, rank, side="right"))
    low, high = (edge[index] for edge in sketch.edges())
    before = cumulated[index] - sketch.counts[index]
    return float(low + (high - low) * (rank - before + 0.5) / sketch.counts[index])


@dataclass(frozen=True)
class _Grid:
    """`steps` + 1 equidistant levels over low..high, moved by half a step at most so that one is zero."""

    low: float
    high: float
    steps: int

    @property
    def step(self) -> float:
        return (self.high - self.low) / self.steps

    @property
    def first(self) -> int:
        return round(self.low / self.step)

    @property
    def last(self) -> int:
        return self.first + self.steps

    def shrunk(self, low: float, high: float) -> _Grid:
        """The same levels over a range cut by so many octaves on either side."""
        return _Grid(self.low * 2**-low, self.high * 2**-high, self.steps)


def _search(loss: Loss, widest: _Grid, octaves: int, symmetric: bool) -> Range:
    """The range of least loss: both ends in octaves first, then each end in ever finer moves."""
    seen: dict[tuple[float, float], float] = {}

    def at(cut: tuple[float, float]) -> float:
        if cut not in seen:
            seen[cut] = loss(widest.shrunk(*cut))
        return seen[cut]

    best = min(((float(k), float(k)) for k in range(octaves + 1)), key=at)
    moves = _moves(widest, symmetric)
    step = 0.5
    while step >= _FINEST:
        around = [(best[0] + a * step, best[1] + b * step) for a, b in moves]
        nearest = min((c for c in around if min(c) >= 0 and max(c) <= octaves), key=at)
        if at(nearest) < at(best):
            best = nearest
        else:
            step /= 2
    chosen = widest.shrunk(*best)
    return chosen.low, chosen.high


def _moves(widest: _Grid, symmetric: bool) -> tuple[tuple[int, int], ...]:
    """Directions that change the range: an end at zero stays there, symmetric ends move together."""
    both = ((1, 1), (-1, -1))
    if symmetric or widest.low == 0 or widest.high == 0:
        return both
    return (*both, (1, 0), (-1, 0), (0, 1), (0, -1))


@dataclass(frozen=True)
class _Histogram:
    """Bins with bounds `low`, `high` and float `counts`, without those of magnitude up to `resolution`.

    `tiny` is the number of elements of that magnitude other than zero.
    """

    low: Array
    high: Array
    counts: Array
    tiny: float
    resolution: float

    @classmethod
    def of(cls, sketch: Sketch, resolution: float) -> _Histogram:
        low, high = sketch.edges()
        size = np.maximum(abs(low), abs(high))
        seen = size > resolution
        counts = sketch.counts.astype(np.float64)
        tiny = counts[~seen & (size > 0)].sum()
        return cls(low[seen], high[seen], counts[seen], float(tiny), resolution)

    @property
    def width(self) -> Array:
        """Of the whole bins, not only of what lies between the least and the greatest element."""
        _, exponent = np.frexp(np.minimum(abs(self.low), abs(self.high)))
        width: Array = np.ldexp(1.0, exponent - 8)
        return width


def _squared_error(histogram: _Histogram) -> Loss:
    """Sum over all elements x of (x - q(x))**2, the elements of a bin spread evenly over it.

    In steps of the grid, with c the nearest x inside it, n the integer nearest to c and f = c - n, the
    squared error has the antiderivative n / 12 + f**3 / 3 + (x - c)**3 / 3: rounding, then clipping.
    What is less than half a step of the finest grid is zero on every grid, at an error no choice changes.
    """
    low, high, counts = histogram.low, histogram.high, histogram.counts
    wide = high > low

    def loss(grid: _Grid) -> float:
        a, b = low / grid.step, high / grid.step
        inside_a, inside_b = a.clip(grid.first, grid.last), b.clip(grid.first, grid.last)
        level_a, level_b = np.rint(inside_a), np.rint(inside_b)
        rounding = (level_b - level_a) / 12 + (_cube(inside_b - level_b) - _cube(inside_a - level_a)) / 3
        clipping = (_cube(b - inside_b) - _cube(a - inside_a)) / 3
        error = np.square(a - level_a)
        np.divide(rounding + clipping, b - a, out=error, where=wide)
        return float(counts @ error) * grid.step**2

    return loss


def _cube(x: Array) -> Array:
    return x * x * x  # an order of magnitude faster than numpy's power


def _divergence(histogram: _Histogram) -> Loss:
    """Kullback-Leibler divergence of what a grid leaves of the distribution, from the distribution.

    The grid keeps of each of its cells only the mass, spread over the cell's bins by their width. As in
    the source, clipped elements join the outermost bin in the reference but not in the approximation, so
    that clipping costs. Zero itself is on every grid and left out.
    """
    zero = int(np.searchsorted(histogram.low, 0.0))
    center = np.insert((histogram.low + histogram.high) / 2, zero, 0.0)
    width = np.insert(histogram.width, zero, 2 * histogram.resolution)
    mass = np.insert(histogram.counts, zero, histogram.tiny)

    def loss(grid: _Grid) -> float:
        level = np.rint(center / grid.step).astype(np.int64)
        start, stop = np.searchsorted(level, (grid.first, grid.last + 1))
        if not mass[start:stop].any():
            return math.inf
        cell, w, reference = level[start:stop] - grid.first, width[start:stop], mass[start:stop].copy()
        occupied = np.maximum(np.bincount(cell, w), w.min())  # above zero where there is no bin as well
        approximation = (np.bincount(cell, reference) / occupied)[cell] * w
        reference[0] += mass[:start].sum()
        reference[-1] += mass[stop:].sum()
        return _kullback_leibler(reference, approximation)

    return loss


def _kullback_leibler(reference: Array, approximation: Array) -> float:
    p, q = reference / reference.sum(), approximation / approximation.sum()
    some = p > 0
    with np.errstate(divide="ignore"):  # mass where the approximation has none: infinitely far
        return float(p[some] @ np.log(p[some] / q[some]))
