"""From a sketch to the range that a quantization grid has to cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.calibration.sketch import Sketch
from edgewise.calibration.weight_scales import float32_scale
from edgewise.passes.quant_plan import LIMITS
from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]
Range = tuple[float, float]
Loss = Callable[[Sequence["_Grid"]], list[float]]

METHODS = ("minmax", "average", "percentile", "entropy", "mse")

_OCTAVES = {"mse": 10, "entropy": 4}  # a range is cut to 2**-10, 2**-4 of what was seen at most
_FINEST = 1 / 16  # octaves; 4 % of the range
_ENTROPY_BINS = 16  # a step, as the source's 2048 for 128 levels: it does not look closer at zero
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
    average     the mean over samples of each one's least and greatest element: what a moving average
                estimates, but whatever the order of the samples
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
    if method in ("average", "percentile"):
        low, high = sketch.average if method == "average" else _central(sketch, percentile)
        low, high = min(low, 0.0), max(high, 0.0)
        return _mirrored(low, high, symmetric) if high - low > _NOTHING else widest
    grid = _Grid(*widest, steps=2**bits - (2 if symmetric else 1))
    if method == "entropy":
        loss = _divergence(_Histogram.of(sketch, grid.step / _ENTROPY_BINS))
    else:
        loss = _squared_error(_Histogram.of(sketch, grid.step * 2.0 ** -_OCTAVES["mse"] / 2))
    return _search(loss, grid, _OCTAVES[method], symmetric)


def grid_of(low: float, high: float, dtype: str) -> tuple[float, int]:
    """Scale and zero point of the integers `dtype` over low..high, zero inside: x = scale * (q - zero point).

    An "int8" grid is symmetric, 255 levels around zero; a "uint8" grid has 256. The scale is a float32, and
    1 where the range has no width.
    """
    first, last = LIMITS[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if first < 0:
        return float32_scale(max(-low, high) / last), 0
    scale = float32_scale((high - low) / (last - first))
    return scale, int(np.clip(first + np.rint(-low / scale), first, last))


def least_elements(method: str, *, bits: int = 8, percentile: float = 99.99) -> int:
    """The elements of a value below which `method` cannot tell what it is to tell.

    One has to lie beyond either end of a percentile, and one in a bin of the histogram of entropy.
    """
    if method == "percentile" and percentile < 100:
        return math.ceil(round(200 / (100 - percentile), 6))
    return _ENTROPY_BINS * (2**bits - 1) if method == "entropy" else 1


def _widest(sketch: Sketch, symmetric: bool) -> Range:
    low, high = min(sketch.minimum, 0.0), max(sketch.maximum, 0.0)
    return _mirrored(low, high, symmetric) if high - low > _NOTHING else (0.0, 0.0)


def _mirrored(low: float, high: float, symmetric: bool) -> Range:
    largest = max(-low, high)
    return (-largest, largest) if symmetric else (low, high)


def _central(sketch: Sketch, percentile: float) -> Range:
    """Quantiles as `numpy.percentile` interpolates them, within the width of a bin."""
    cumulated = np.cumsum(sketch.counts)
    cut, last = (100 - percentile) / 200, int(cumulated[-1]) - 1
    ranks = np.array([cut * last, (1 - cut) * last])
    below, above = (_ranked(sketch, cumulated, r.astype(np.int64)) for r in (np.floor(ranks), np.ceil(ranks)))
    low, high = (below + (above - below) * (ranks % 1)).tolist()
    return low, high


def _ranked(sketch: Sketch, cumulated: Array, ranks: Array) -> Array:
    """The elements of these ranks, if the elements of a bin are spread evenly over it."""
    index = np.searchsorted(cumulated, ranks, side="right")
    low, high = (edge[index] for edge in sketch.edges())
    counts = sketch.counts[index]
    elements: Array = low + (high - low) * (ranks - (cumulated[index] - counts) + 0.5) / counts
    return elements


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

    def best_of(cuts: list[tuple[float, float]]) -> tuple[float, float]:
        if new := [cut for cut in cuts if cut not in seen]:
            seen.update(zip(new, loss([widest.shrunk(*cut) for cut in new]), strict=True))
        return min(cuts, key=seen.__getitem__)

    best = best_of([(float(k), float(k)) for k in range(octaves + 1)])
    moves = _moves(widest, symmetric)
    step = 0.5
    while step >= _FINEST:
        around = [(best[0] + a * step, best[1] + b * step) for a, b in moves]
        nearest = best_of([c for c in around if min(c) >= 0 and max(c) <= octaves])
        if seen[nearest] < seen[best]:
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
    squared error has the antiderivative n / 12 + f**3 / 3 + (x - c)**3 / 3: rounding, then clipping. It is
    continuous, so that bins side by side share what it is between them.
    What is less than half a step of the finest grid is zero on every grid, at an error no choice changes.
    """
    low, high, counts = histogram.low, histogram.high, histogram.counts
    wide = high > low
    density = counts[wide] / (high - low)[wide]
    edges, place = np.unique(np.concatenate((low[wide], high[wide])), return_inverse=True)
    weights = np.bincount(place, np.concatenate((-density, density)), minlength=edges.size)
    points, point_counts = low[~wide], counts[~wide]

    def loss(grids: Sequence[_Grid]) -> list[float]:
        step, first, last = np.array([(g.step, g.first, g.last) for g in grids]).T[:, :, None]
        x = edges / step
        inside = x.clip(first, last)
        level = np.rint(inside)
        integral = level / 4 + _cube(inside - level) + _cube(x - inside)
        x = points / step
        error = np.square(x - np.rint(x.clip(first, last)))
        total = integral @ weights / 3 * step[:, 0] + error @ point_counts
        result: list[float] = (total * step[:, 0] ** 2).tolist()
        return result

    return loss


def _cube(x: Array) -> Array:
    return x * x * x  # an order of magnitude faster than numpy's power


def _divergence(histogram: _Histogram) -> Loss:
    """Kullback-Leibler divergence of what a grid leaves of the distribution, from the distribution.

    The grid keeps of each of its cells only the mass, spread over the cell's bins by their width. As in
    the source, clipped elements join the outermost bin in the reference but not in the approximation, so
    that clipping costs. Zero itself is on every grid and left out.

    With masses m and widths w of bins, M and W of cells, p the masses with what was clipped, and sums P and
    Q of p and m over the grid, the divergence is (sum p log(p / w) - sum p log(M / W)) / P + log(Q / P).
    Of a grid only the ends and the cells have to be looked at, for sums over bins are cumulated once.
    """
    zero = int(np.searchsorted(histogram.low, 0.0))
    center = np.insert((histogram.low + histogram.high) / 2, zero, 0.0)
    width = np.insert(histogram.width / histogram.resolution, zero, 2.0)
    mass = np.insert(histogram.counts, zero, histogram.tiny)
    masses, widths, own = (_cumulated(a) for a in (mass, width, _times_log(mass, width)))

    def loss(grids: Sequence[_Grid]) -> list[float]:
        step, first = np.array([(g.step, g.first) for g in grids]).T[:, :, None]
        bounds = np.searchsorted(center, (first + np.arange(grids[0].steps + 2) - 0.5) * step)
        start, stop = bounds[:, 0], bounds[:, -1]
        kept = masses[stop] - masses[start]
        cells, cell_widths = np.diff(masses[bounds]), np.diff(widths[bounds])
        total = own[stop] - own[start] - _times_log(cells, cell_widths).sum(axis=1)
        for end, clipped in ((start, masses[start]), (stop - 1, masses[-1] - masses[stop])):
            cell = np.arange(len(grids)), (bounds <= end[:, None]).sum(axis=1) - 1
            end = end.clip(0, mass.size - 1)  # of a grid without any bin, which has lost all the same
            total += _times_log(mass[end] + clipped, width[end]) - _times_log(mass[end], width[end])
            total -= np.where(clipped > 0, clipped * np.log(cells[cell] / cell_widths[cell]), 0.0)
        divergence = total / masses[-1] + np.log(kept / masses[-1])
        # What is rounding decides nothing: of ranges that keep all, the widest comes first.
        result: list[float] = np.where(kept > 0, divergence, np.inf).round(12).tolist()
        return result

    return np.errstate(divide="ignore", invalid="ignore")(
        loss
    )  # no mass where some is wanted: infinitely far


def _times_log(mass: Array, width: Array | float) -> Array:
    """mass * log(mass / width), 0 where there is no mass."""
    some = mass > 0
    product: Array = mass * np.log(np.where(some, mass, 1.0) / np.where(some, width, 1.0))
    return product


def _cumulated(array: Array) -> Array:
    """The sums of the first 0, 1, 2, ... elements."""
    return np.concatenate(([0.0], np.cumsum(array)))
