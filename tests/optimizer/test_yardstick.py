"""Decibels of the worst output."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer.yardstick import Yardstick
from edgewise.runtime.evaluate import input_specs

SCORES = "g (float[N, 8] x) => (float[N, 8] y) { s = Mul(x, a) t = Add(s, b) y = Softmax(t) }"
PLAIN = "g (float[N, 8] x) => (float[N, 8] y) { y = Mul(x, a) }"


def scaled(text: str, factor: float, shift: float = 0.0) -> ir.Model:
    weights = {"a": np.float32([factor]), "b": np.float32([shift])}
    return build(text, **{name: w for name, w in weights.items() if f" {name})" in text})


@pytest.fixture(scope="module")
def samples() -> Samples:
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    return from_arrays({"x": x}, input_specs(scaled(PLAIN, 1.0)))


def test_a_tenth_off_is_20_db(samples: Samples) -> None:
    assert Yardstick(scaled(PLAIN, 1.0), samples).decibels(scaled(PLAIN, 1.1)) == pytest.approx(20, abs=1e-3)


def test_the_same_model_has_no_noise(samples: Samples) -> None:
    assert Yardstick(scaled(PLAIN, 1.0), samples).decibels(scaled(PLAIN, 1.0)) == math.inf


def test_nan_is_the_worst_there_is(samples: Samples) -> None:
    assert Yardstick(scaled(PLAIN, 1.0), samples).decibels(scaled(PLAIN, math.nan)) == -math.inf


def test_what_the_original_does_not_know_is_not_compared(samples: Samples) -> None:
    """The logarithm of half of the numbers is NaN."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { l = Log(x) y = Mul(l, a) }"
    ruler = Yardstick(build(text, a=np.float32([1.0])), samples)
    assert ruler.decibels(build(text, a=np.float32([1.1]))) == pytest.approx(20, abs=1e-3)


def test_behind_a_softmax_its_scores_count(samples: Samples) -> None:
    """Ten times the scores: the Softmax is nearly one-hot, and its noise would be that of few samples."""
    ruler = Yardstick(scaled(SCORES, 10.0), samples)
    assert ruler.decibels(scaled(SCORES, 11.0)) == pytest.approx(20, abs=1e-3)


def test_what_a_softmax_takes_away_is_no_noise(samples: Samples) -> None:
    ruler = Yardstick(scaled(SCORES, 1.0), samples)
    assert ruler.decibels(scaled(SCORES, 1.0, shift=3.0)) > 100  # rounding of float32


def test_without_floats_other_answers_are_noise(samples: Samples) -> None:
    first = build("g (float[N, 8] x) => (int64[N, 1] y) { y = ArgMax <axis = 1> (x) }")
    last = build("g (float[N, 8] x) => (int64[N, 1] y) { y = ArgMin <axis = 1> (x) }")
    ruler = Yardstick(first, samples)
    assert ruler.decibels(first) == math.inf
    assert ruler.decibels(last) == pytest.approx(0.0)  # everything differs
