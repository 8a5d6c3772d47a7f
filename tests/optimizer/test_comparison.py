"""How far two outputs are apart: what counts as a difference, and what cannot be compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.optimizer.comparison import agreement, differences, relative

F = np.float32


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        (F([1, 2, 4]), F([1, 2, 4]), 0.0),
        (F([1, 2, 4]), F([1, 2, 5]), 0.25),
        (F([-8, 0]), F([-8, 2]), 0.25),
        (F([0, 0]), F([0, 0.5]), 0.5),  # nothing to scale by: absolute
        (F([np.nan, 1]), F([np.nan, 1]), 0.0),
        (F([np.inf, 1]), F([np.inf, 1]), 0.0),
        (F([np.inf, 2]), F([np.inf, 1]), 0.5),
        (F([]), F([]), 0.0),
        (np.float16([4]), np.float16([5]), 0.25),
        (np.complex64([3 + 4j]), np.complex64([3 + 3j]), 0.2),
        (np.array([1, 2]), np.array([1, 2]), 0.0),
        (np.array([True]), np.array([True]), 0.0),
        (np.array(["a"], object), np.array(["a"], object), 0.0),
        ([F([1]), F([2])], [F([1]), F([2])], 0.0),
        ([F([2])], [F([1])], 0.5),
        ({"a": 2.0}, {"a": 1.0}, 0.5),
        ([{1: 0.5}], [{1: 0.5}], 0.0),
        ([{1: 0.5}], [{1: 0.25}], 0.5),
    ],
)
def test_relative(expected: Any, actual: Any, error: float) -> None:
    assert relative(expected, actual) == pytest.approx(error)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (F([1, 2]), F([1])),
        (F([1]), F([[1]])),
        (F([1]), np.float64([1])),
        (F([np.nan]), F([1])),
        (F([1]), F([np.nan])),
        (F([1]), F([np.inf])),
        (F([np.inf]), F([-np.inf])),
        (F([1]), None),
        ([F([1])], []),
        ([F([1])], F([1])),
        ({"a": 1.0}, {"b": 1.0}),
        ([{1: 0.5}], [{2: 0.5}]),
    ],
)
def test_incomparable_is_infinite(expected: Any, actual: Any) -> None:
    assert relative(expected, actual) == math.inf


def test_share_of_what_is_no_float() -> None:
    assert relative(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 0.25
    assert relative(np.array([True, False]), np.array([True, False])) == 0.0
    assert relative(np.array(["a"], object), np.array(["b"], object)) == 1.0


def test_a_difference_has_all_its_numbers() -> None:
    expected = [{"y": F([[3, 0], [0, 4]])}]
    actual = [{"y": F([[3, 0], [5, 4]])}]
    (found,) = differences(expected, actual)
    assert (found.output, found.absolute) == ("y", 5.0)
    assert found.relative == pytest.approx(1.25)
    assert found.snr_db == pytest.approx(0.0, abs=1e-6)  # noise 25, signal 25
    assert found.cosine == pytest.approx(25 / math.sqrt(25 * 50))
    assert found.agreement == 0.5
    assert str(found) == "y: relative 1.25e+00, 0.0 dB, same arg max in 50.00%"


@pytest.mark.parametrize(
    "value",
    [
        F([[1, 2]]),
        np.array([[1, 2]]),
        np.array([True, False]),
        np.array(["a"], object),
        [F([1])],
        F([[np.nan, 1]]),
        F([[np.inf, 1]]),
    ],
    ids=["float", "int", "bool", "string", "sequence", "NaN", "infinity"],
)
def test_equal_outputs_show_no_difference_whatever_their_type(value: Any) -> None:
    (found,) = differences([{"y": value}], [{"y": value}])
    assert (found.relative, found.absolute) == (0.0, 0.0)
    assert found.snr_db == math.inf
    assert found.cosine == pytest.approx(1.0)


def test_what_cannot_be_compared_is_as_far_as_can_be() -> None:
    (found,) = differences([{"y": F([1])}], [{"y": F([1, 2])}])
    assert (found.relative, found.absolute, found.snr_db) == (math.inf, math.inf, -math.inf)
    (found,) = differences([{"y": np.array(["a"], object)}], [{"y": np.array(["b"], object)}])
    assert found.relative == 1.0


def test_no_samples_no_differences() -> None:
    assert differences([], []) == ()


def test_agreement_needs_rows() -> None:
    assert agreement([F([1, 2])], [F([1, 2])]) is None
    assert agreement([F([[1]])], [F([[1]])]) is None
    assert agreement([F([[1, 2], [2, 1]])], [F([[1, 2], [1, 2]])]) == 0.5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_relative_does_not_depend_on_the_scale(numbers: list[float], factor: float) -> None:
    a = np.array(numbers, np.float64)
    b = a + np.linspace(-1, 1, len(a))
    if np.abs(a).max() > 0:
        assert relative(a * factor, b * factor) == pytest.approx(relative(a, b), rel=1e-9)
