"""Signal and noise: energies add up over samples, and what is not finite is told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.calibration.noise import Energy, decibels
from edgewise.runtime.evaluate import Array

X = np.array([3.0, -4.0], np.float32)


def energy(*pairs: tuple[Array, Array]) -> Energy:
    found = Energy()
    for expected, actual in pairs:
        found.add(expected, actual)
    return found


def test_sums_over_samples() -> None:
    found = energy((X, X), (X, X + np.float32(0.5)))
    assert (found.signal, found.noise) == (50, 0.5)
    assert found.share == pytest.approx(0.01)
    assert found.decibels == pytest.approx(20)


def test_half_precision_does_not_overflow() -> None:
    large = np.full(4, 60000, np.float16)
    assert energy((large, large)).signal == 4 * 60000.0**2


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_not_finite(odd: float) -> None:
    """It does not count where both have it; in one of them it drowns everything, in any order."""
    with_odd = np.array([3, odd], np.float32)
    assert energy((with_odd, with_odd)).share == 0
    for found in (energy((X, with_odd), (X, X)), energy((X, X), (with_odd, X))):
        assert found.share == math.inf
        assert found.decibels == -math.inf


def test_another_shape_drowns_everything() -> None:
    assert energy((X, X[:1])).share == math.inf


def test_without_a_signal() -> None:
    nothing = np.zeros(2, np.float32)
    assert (energy((nothing, nothing)).share, energy((nothing, nothing)).decibels) == (0, math.inf)
    assert (energy((nothing, X)).share, energy((nothing, X)).decibels) == (1, -math.inf)


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == -math.inf
