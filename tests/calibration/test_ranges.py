"""Ranges from sketches, against the raw data and against the definitions of the methods."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgewise.calibration.ranges import METHODS, grid_of, least_elements, range_of
from edgewise.calibration.sketch import Sketch
from edgewise.runtime.errors import InputError

few = settings(deadline=None, max_examples=40)
arrays = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)
methods = st.sampled_from(METHODS)


def sketch_of(array: np.ndarray) -> Sketch:
    """Every element counted: arrays below the limit of the histogram, merged."""
    total = Sketch()
    for part in np.array_split(array.ravel(), -(-array.size // 2000)):
        total += Sketch.of(part)
    return total


def mean_squared_error(array: np.ndarray, low: float, high: float, steps: int = 255) -> float:
    """Of a grid over low..high that is moved so that zero is on it."""
    step = (high - low) / steps
    first = round(low / step)
    levels = np.clip(np.rint(array / step), first, first + steps)
    return float(np.mean((array - levels * step) ** 2))


@few
@given(arrays, methods, st.booleans(), st.sampled_from([4, 8, 16]))
def test_ranges_hold_zero_and_stay_within_what_was_seen(
    array: np.ndarray, method: str, symmetric: bool, bits: int
) -> None:
    low, high = range_of(Sketch.of(array), method, symmetric=symmetric, bits=bits)
    least, most = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
    if symmetric:
        least, most = -max(-least, most), max(-least, most)
        assert low == -high
    assert least <= low <= 0 <= high <= most
    assert (low < high) == (most - least > 1e-30)


@few
@given(arrays, methods, st.integers(-20, 20))
def test_ranges_scale_with_the_data(array: np.ndarray, method: str, octaves: int) -> None:
    """By a power of two exactly, for then every element moves by as many bins."""
    array = np.where(abs(array) < 1e-3, 0, array).astype(np.float32)
    scaled = range_of(Sketch.of(array * np.float32(2.0**octaves)), method)
    assert scaled == tuple(2.0**octaves * end for end in range_of(Sketch.of(array), method))


@few
@given(arrays, st.floats(60, 100))
def test_percentile_is_numpys_within_a_bin(array: np.ndarray, percentile: float) -> None:
    low, high = range_of(Sketch.of(array), "percentile", percentile=percentile)
    if (
        max(float(array.max()), 0.0) - min(float(array.min()), 0.0) <= 1e-30
    ):  # no range at all, whatever is asked of it
        assert (low, high) == (0, 0)
        return
    cut = (100 - percentile) / 2
    expected = np.percentile(array.astype(np.float64), [cut, 100 - cut])
    if expected[0] >= 0 >= expected[1]:  # nothing left but zero: the whole range is kept
        return
    scale = float(np.abs(array).max()) * 2**-7
    assert low == pytest.approx(min(expected[0], 0), abs=scale)
    assert high == pytest.approx(max(expected[1], 0), abs=scale)


def test_percentile_cuts_rare_extremes() -> None:
    array = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    array[:4] = [1000, 2000, -1000, -2000]
    low, high = range_of(sketch_of(array), "percentile", percentile=99.9)
    assert (low, high) == pytest.approx(tuple(np.percentile(array, [0.05, 99.95])), rel=2**-7)


def test_percentile_of_a_value_that_is_nearly_always_zero_keeps_the_rest() -> None:
    array = np.zeros(2000, np.float32)
    array[7] = 3.0
    assert range_of(Sketch.of(array), "percentile", percentile=99) == (0.0, 3.0)


DISTRIBUTIONS = {
    "normal": lambda rng: rng.standard_normal(40_000),
    "relu": lambda rng: np.maximum(rng.standard_normal(40_000), 0),
    "laplace": lambda rng: rng.laplace(size=40_000),
    "student": lambda rng: rng.standard_t(2, 40_000),
    "skewed": lambda rng: np.where(rng.random(40_000) < 0.5, -0.1, 1) * rng.exponential(1, 40_000),
    "outlier": lambda rng: np.concatenate([rng.standard_normal(40_000), [300.0]]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_close_to_the_best_of_a_search_on_the_raw_data(name: str, symmetric: bool) -> None:
    """The search moves by 4 % and sees bins of 2**-7: 3 % of the least error are allowed for both."""
    array = DISTRIBUTIONS[name](np.random.default_rng(1)).astype(np.float32)
    steps = 254 if symmetric else 255
    low, high = range_of(sketch_of(array), "mse", symmetric=symmetric)
    widest = range_of(sketch_of(array), "minmax", symmetric=symmetric)
    cuts = 2.0 ** -np.arange(0, 7, 0.1)
    joint = [(widest[0] * cut, widest[1] * cut) for cut in cuts]
    single = (
        [] if symmetric else [(widest[0] * cut, high) for cut in cuts] + [(low, widest[1] * c) for c in cuts]
    )
    best = min(mean_squared_error(array, *ends, steps) for ends in joint + single)
    assert mean_squared_error(array, low, high, steps) <= 1.03 * best


def test_mse_of_few_bits_clips_more() -> None:
    sketch = sketch_of(np.random.default_rng(2).laplace(size=40_000).astype(np.float32))
    widths = [range_of(sketch, "mse", bits=bits, symmetric=True)[1] for bits in (3, 4, 8, 16)]
    assert widths == sorted(widths)
    assert widths[0] < widths[2] / 2
    assert widths[3] == pytest.approx(sketch.maximum if sketch.maximum > -sketch.minimum else -sketch.minimum)


def reference_threshold(array: np.ndarray) -> float:
    """The threshold of Migacz' talk: 2,048 equal bins of |x|, 128 levels, least divergence.

    Empty bins get a little mass, as every implementation does it, lest the divergence be infinite.
    """
    size = np.abs(array[array != 0])
    histogram, edges = np.histogram(size, bins=2048, range=(0, size.max()))
    best = (np.inf, 0.0)
    for stop in range(128, 2049, 8):
        kept = histogram[:stop].astype(float)
        level = np.minimum(np.arange(stop) * 128 // stop, 127)
        occupied = np.bincount(level, kept > 0)
        q = (np.bincount(level, kept) / np.maximum(occupied, 1))[level] * (kept > 0)
        p = kept.copy()
        p[-1] += histogram[stop:].sum()
        p, q = (np.maximum(x / x.sum(), 1e-4) for x in (p, q))
        divergence = float(np.sum(p / p.sum() * np.log(p / p.sum() / (q / q.sum()))))
        best = min(best, (divergence, float(edges[stop])))
    return best[1]


@pytest.mark.parametrize("name", ["normal", "laplace", "student", "outlier"])
def test_entropy_agrees_with_its_source(name: str) -> None:
    """Other bins and a coarser search: within a third, where the maximum may be twenty times away."""
    array = DISTRIBUTIONS[name](np.random.default_rng(3)).astype(np.float32)
    _, high = range_of(sketch_of(array), "entropy", symmetric=True)
    assert high == pytest.approx(reference_threshold(array), rel=1 / 3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_level_where_many_elements_pile_up_is_not_cut(method: str, symmetric: bool) -> None:
    array = np.clip(np.random.default_rng(4).standard_normal(40_000) * 4, 0, 6).astype(np.float32)
    assert range_of(sketch_of(array), method, symmetric=symmetric)[1] == pytest.approx(6, rel=2**-7)


@pytest.mark.parametrize("method", METHODS)
def test_degenerate_values(method: str) -> None:
    def ends(*numbers: float) -> tuple[float, float]:
        return range_of(Sketch.of(np.array(numbers, np.float32)), method)

    assert ends() == (0, 0)
    assert ends(0.0, 0.0) == (0, 0)
    assert ends(np.nan, np.inf) == (0, 0)
    assert ends(1e-40) == (0, 0)
    assert ends(3.0, 3.0, 3.0) == (0, 3)
    assert ends(-2.0) == (-2, 0)
    assert ends(-3e38, 3e38) == pytest.approx((-3e38, 3e38), rel=2**-7)


def test_non_finite_elements_do_not_move_the_range() -> None:
    array = np.array([1.0, -2.0, np.nan, np.inf, -np.inf], np.float32)
    assert range_of(Sketch.of(array), "minmax") == (-2.0, 1.0)


def test_bad_options_are_named() -> None:
    with pytest.raises(
        InputError, match=r"unknown range method 'mean'.*minmax, average, percentile, entropy, mse"
    ):
        range_of(Sketch(), "mean")
    for percentile in (50, 100.1, float("nan")):
        with pytest.raises(InputError, match="percentile"):
            range_of(Sketch(), "percentile", percentile=percentile)


def test_average_is_the_mean_of_every_samples_ends() -> None:
    parts = [np.array(ends, np.float32) for ends in ((-1, 2), (-3, 4), (1, 6))]
    sketch = sum((Sketch.of(part) for part in parts), Sketch())
    assert range_of(sketch, "average") == (-1.0, 4.0)
    assert range_of(sketch, "average", symmetric=True) == (-4.0, 4.0)


def test_average_of_what_cancels_out_is_everything_seen() -> None:
    sketch = Sketch.of(np.array([-2], np.float32)) + Sketch.of(np.array([2], np.float32))
    assert range_of(sketch, "average") == (-2.0, 2.0)


def test_methods_know_how_many_elements_they_want() -> None:
    wanted = {method: least_elements(method) for method in METHODS}
    assert wanted == {"minmax": 1, "average": 1, "percentile": 20_000, "entropy": 16 * 255, "mse": 1}
    assert least_elements("percentile", percentile=99.9) == 2000


def test_grids() -> None:
    assert grid_of(-1.0, 3.0, "uint8") == (float(np.float32(4 / 255)), 64)
    assert grid_of(1.0, 3.0, "uint8") == (float(np.float32(3 / 255)), 0)
    assert grid_of(-1.0, 3.0, "int8") == (float(np.float32(3 / 127)), 0)
    assert grid_of(0.0, 0.0, "uint8") == (1.0, 0)
