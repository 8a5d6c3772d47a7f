"""Sketches: what they hold exactly, what they hold within a bin, and that they merge."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgewise.calibration.sketch import HISTOGRAM_LIMIT, Accumulator, Sketch

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = hnp.arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32))
arrays = hnp.arrays(np.float32, st.integers(0, 30), elements=floats)
few = settings(deadline=None, max_examples=60)


@few
@given(st.lists(floats, min_size=1, max_size=40))
def test_every_element_lies_within_a_bin_of_2_to_the_minus_7(values: list[float]) -> None:
    sketch = Sketch.of(np.array(values, np.float32))
    low, high = sketch.edges()
    held = np.repeat(np.arange(len(low)), sketch.counts)
    ordered = np.sort(np.array(values, np.float64))
    normal = abs(ordered) > 1e-37  # smaller ones may share the bin of zero, which has no width
    assert (low[held] <= ordered)[normal].all()
    assert (ordered <= high[held])[normal].all()
    assert ((high - low) <= np.maximum(np.minimum(abs(low), abs(high)) * 2**-7, 2**-133)).all()
    assert (np.diff(sketch.bins.astype(int)) > 0).all()


@few
@given(anything)
def test_exact_figures(array: np.ndarray) -> None:
    sketch = Sketch.of(array)
    finite = array[np.isfinite(array)]
    assert sketch.count == finite.size == sketch.counts.sum()
    assert sketch.minimum == finite.min(initial=math.inf)
    assert sketch.maximum == finite.max(initial=-math.inf)
    assert sketch.nans == np.isnan(array).sum()
    assert sketch.infs == np.isinf(array).sum()


@few
@given(anything, anything, anything)
def test_merging_is_associative_and_commutative(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    x, y, z = Sketch.of(a), Sketch.of(b), Sketch.of(c)
    assert (x + y) + z == x + (y + z)
    assert x + y == y + x
    assert x + Sketch() == x


@few
@given(st.lists(anything, min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(0, 6))
def test_order_and_split_of_the_samples_do_not_matter(samples: list, random, cut: int) -> None:
    def sketch(arrays: list) -> Sketch:
        accumulator = Accumulator()
        for array in arrays:
            accumulator.add(array)
        return accumulator.sketch()

    shuffled = samples[:]
    random.shuffle(shuffled)
    assert sketch(samples) == sketch(shuffled[:cut]) + sketch(shuffled[cut:])


def test_many_arrays_are_counted_as_one_by_one() -> None:
    """Enough of them for the elements that wait to be counted in between."""
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal(3000).astype(np.float32) for _ in range(80)]
    accumulator = Accumulator()
    total = Sketch()
    for sample in samples:
        accumulator.add(sample)
        total += Sketch.of(sample)
    assert accumulator.sketch() == total
    assert accumulator.sketch() == total  # asking changes nothing
    assert total.counts.sum() == sum(-(-3000 // s) for s in [_stride_of(3000)] * 80)


def _stride_of(size: int) -> int:
    kept = int(Sketch.of(np.ones(size, np.float32)).counts.sum())
    return next(s for s in range(1, size) if -(-size // s) == kept)


@pytest.mark.parametrize(
    "shape", [(1, 56, 56, 24), (1, 24, 56, 56), (7, 7, 1280), (100_003,), (1, 1, 65_536)]
)
def test_large_arrays_are_sampled_but_their_extremes_are_exact(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    array.flat[12345] = -77.0
    array.flat[-1] = 99.0
    sketch = Sketch.of(array)
    assert (sketch.minimum, sketch.maximum, sketch.count) == (-77.0, 99.0, array.size)
    assert HISTOGRAM_LIMIT // 2 <= sketch.counts.sum() <= HISTOGRAM_LIMIT


@pytest.mark.parametrize("channels", [3, 16, 24, 32, 96, 256])
def test_sampling_meets_every_channel_equally_often(channels: int) -> None:
    """Each channel holds its own power of two, so that the bins tell them apart."""
    array = np.empty((1, 28, 28, channels), np.float32)
    array[:] = 2.0 ** (np.arange(channels) % 128 - 64) * np.where(np.arange(channels) < 128, 1, -1)
    for layout in (array, array.transpose(0, 3, 1, 2)):
        counts = Sketch.of(layout).counts
        assert len(counts) == channels
        assert counts.max() - counts.min() <= 1


def test_sampling_follows_the_logical_order_not_the_memory_order() -> None:
    array = np.random.default_rng(2).standard_normal((64, 96)).astype(np.float32)
    assert Sketch.of(np.asfortranarray(array)) == Sketch.of(array)


def test_other_types_count_as_float32() -> None:
    assert Sketch.of(np.array([-3, 0, 7])) == Sketch.of(np.array([-3, 0, 7], np.float32))
    assert Sketch.of(np.array([True, False])) == Sketch.of(np.array([1, 0], np.float32))
    assert Sketch.of(np.array([0.5, -2], np.float16)) == Sketch.of(np.array([0.5, -2], np.float32))
    wide = Sketch.of(np.array([1e300, 2.0]))
    assert (wide.infs, wide.count, wide.maximum) == (1, 1, 2.0)


def test_the_sign_of_zero_leaves_no_trace() -> None:
    assert Sketch.of(np.array([-0.0], np.float32)) == Sketch.of(np.array([0.0], np.float32))
    assert math.copysign(1, Sketch.of(np.array([-0.0], np.float32)).minimum) == 1


def test_scalars_and_empty_arrays() -> None:
    assert Sketch.of(np.float32(2.5)).maximum == 2.5
    assert Sketch.of(np.empty((0, 3), np.float32)) == Sketch()
    nothing = Sketch.of(np.array([np.nan, np.inf], np.float32))
    assert (nothing.count, nothing.nans, nothing.infs, nothing.minimum) == (0, 1, 1, math.inf)


def test_sketches_differ_where_anything_differs() -> None:
    sketch = Sketch.of(np.array([1.0, 2.0], np.float32))
    assert sketch != Sketch.of(np.array([1.0, 3.0], np.float32))
    assert sketch != Sketch.of(np.array([1.0, 1.0, 2.0], np.float32))
    assert sketch != Sketch.of(np.array([1.0, 2.0, np.nan], np.float32))
    assert sketch != "sketch"


@few
@given(st.lists(arrays.filter(len), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_averages_are_exact_and_know_no_order(samples: list, random) -> None:
    sketch = sum((Sketch.of(array) for array in samples), Sketch())
    lows, highs = ([Fraction(float(end(a))) for a in samples] for end in (np.min, np.max))
    assert sketch.average == (float(sum(lows) / len(lows)), float(sum(highs) / len(highs)))
    random.shuffle(samples)
    assert sum((Sketch.of(array) for array in samples), Sketch()).average == sketch.average


def test_averages_leave_out_what_is_not_finite() -> None:
    sketch = Sketch.of(np.array([np.nan, 1, 3], np.float32)) + Sketch.of(np.array([np.inf], np.float32))
    assert (sketch.arrays, sketch.average) == (1, (1.0, 3.0))
    assert Sketch().average == (0.0, 0.0)
