"""The benchmark's intervals cover the truth as often as they claim, with noise as it was seen on machines."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgewise.runtime.statistics import (
    Array,
    Interval,
    bootstrap_median,
    noise_floor,
    speedup,
    student,
    trimmed_mean,
    verdict,
)

ROUNDS = 20


def rounds(rng: np.random.Generator, spread: float = 0.02) -> Array:
    """The noise of one model's rounds in a launch: mostly normal, some rounds four times as bad."""
    worse = np.where(rng.random(ROUNDS) < 0.15, 4.0, 1.0)
    return spread * worse * rng.standard_normal(ROUNDS)


def experiment(
    seed: int, effect: float = 0.0, launches: int = 5, process: float = 0.005, disturbed: float = 1.0
) -> tuple[list[Array], list[Array]]:
    """The gains of a model that is `effect` slower, and the differences of the baseline's twins.

    Every process has a speed of its own (standard deviation `process`); each third launch has
    `disturbed` times the noise.
    """
    rng = np.random.default_rng(seed)
    gains, twins = [], []
    for launch in range(launches):
        spread = 0.02 * (disturbed if launch % 3 == 1 else 1.0)
        one, other, model = (process * rng.standard_normal() + rounds(rng, spread) for _ in range(3))
        gains.append((one + other) / 2 - model - effect)
        twins.append(one - other)
    return gains, twins


def judged(seed: int, **kind: float) -> str:
    gains, twins = experiment(seed, **kind)  # type: ignore[arg-type]
    return verdict(speedup(gains, twins), noise_floor(twins))


class TestTrimmedMean:
    def test_is_the_plain_mean_of_few_values(self) -> None:
        mean, error = trimmed_mean(np.array([1.0, 2.0, 6.0]))
        assert mean == pytest.approx(3.0)
        assert error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))

    def test_ignores_a_fifth_of_outliers_on_either_side(self) -> None:
        clean = np.linspace(0.9, 1.1, 10)
        spoiled = clean.copy()
        spoiled[8:], spoiled[:2] = 50.0, -70.0
        assert trimmed_mean(spoiled) == pytest.approx(trimmed_mean(clean))

    def test_its_error_is_the_spread_of_repetitions(self) -> None:
        rng = np.random.default_rng(0)
        means, errors = zip(*(trimmed_mean(rounds(rng)) for _ in range(1000)), strict=True)
        # 10 %: the winsorized variance of 20 values is a little biased, and 1,000 repetitions leave 2 %
        assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (3, 3.182), (10, 2.228), (11, 2.201), (20, 2.086), (1000, 1.962)]
)
def test_student_agrees_with_the_printed_tables(freedom: int, expected: float) -> None:
    assert student(freedom) == pytest.approx(expected, abs=1e-3)


class TestSpeedup:
    def test_is_the_ratio_of_the_times(self) -> None:
        noise = np.array([-1e-3, 1e-3])
        interval = speedup([math.log(2.0) + noise, math.log(2.0) - noise])
        assert interval.value == pytest.approx(2.0)
        assert interval.low < 2.0 < interval.high

    @pytest.mark.parametrize("launches", [1, 2, 3, 5])
    def test_covers_the_truth(self, launches: int) -> None:
        """At least 93 of 100: the interval claims 95, and 300 trials leave a standard error of 1.3."""
        intervals = [speedup(*experiment(seed, 0.03, launches)) for seed in range(300)]
        covered = np.mean([i.low <= math.exp(-0.03) <= i.high for i in intervals])
        assert covered >= 0.93

    def test_knows_what_differs_between_processes(self) -> None:
        """Rounds alone would claim a precision that a new launch does not keep."""
        intervals = [speedup(*experiment(seed, process=0.03)) for seed in range(300)]
        assert np.mean([i.low <= 1 <= i.high for i in intervals]) >= 0.93

    def test_a_disturbed_launch_counts_for_little(self) -> None:
        calm, twins = experiment(1, 0.03)
        rng = np.random.default_rng(2)
        spoiled = [*calm[:-1], calm[-1] + 0.5 + rounds(rng, 0.5)]
        alone, beside = speedup(calm, twins), speedup(spoiled, twins)
        assert beside.value == pytest.approx(alone.value, rel=0.01)

    def test_twins_that_disagree_widen_the_interval(self) -> None:
        gains, twins = experiment(3)
        apart = [t + s * 0.05 for t, s in zip(twins, (1, -1, 1, -1, 1), strict=True)]
        assert speedup(gains, apart).half_width > 1.5 * speedup(gains, twins).half_width

    def test_more_launches_narrow_it(self) -> None:
        few = np.mean([speedup(*experiment(s, launches=3)).half_width for s in range(50)])
        many = np.mean([speedup(*experiment(s, launches=8)).half_width for s in range(50)])
        assert many < 0.6 * few

    def test_stays_finite_where_nothing_is_known(self) -> None:
        interval = speedup([np.array([-300.0, 300.0])])
        assert 0 < interval.low < interval.high < math.inf


class TestVerdict:
    @pytest.mark.parametrize(
        ("interval", "floor", "expected"),
        [
            (Interval(1.8, 1.7, 1.9), 0.01, "faster"),
            (Interval(0.9, 0.88, 0.92), 0.01, "slower"),
            (Interval(1.0, 0.99, 1.01), 0.0, "no difference"),
            (Interval(1.02, 1.005, 1.035), 0.0, "faster"),
            (Interval(1.02, 1.005, 1.035), 0.01, "no difference"),
            (Interval(0.98, 0.965, 0.995), 0.01, "no difference"),
        ],
    )
    def test_needs_the_whole_interval_beyond_the_noise(
        self, interval: Interval, floor: float, expected: str
    ) -> None:
        assert verdict(interval, floor) == expected

    def test_the_same_file_is_no_different(self) -> None:
        assert sum(judged(seed) == "no difference" for seed in range(200)) >= 0.96 * 200

    def test_three_percent_more_work_is_found(self) -> None:
        assert sum(judged(seed, effect=0.03) == "slower" for seed in range(200)) >= 0.97 * 200

    def test_three_percent_are_found_though_launches_are_disturbed(self) -> None:
        assert sum(judged(seed, effect=0.03, disturbed=10.0) == "slower" for seed in range(200)) >= 0.9 * 200


def test_noise_floor_is_half_of_what_lies_between_the_twins() -> None:
    noise = np.array([-1e-4, 1e-4])
    assert noise_floor([0.02 + noise, 0.02 - noise]) == pytest.approx(math.expm1(0.01), rel=1e-6)
    assert noise_floor([-0.02 + noise]) == pytest.approx(math.expm1(0.01), rel=1e-6)


class TestBootstrapMedian:
    def test_is_the_median_of_all_values(self) -> None:
        interval = bootstrap_median([np.array([1.0, 2.0, 9.0]), np.array([3.0, 4.0])])
        assert interval.value == 3.0
        assert 1.0 <= interval.low <= 3.0 <= interval.high <= 9.0

    def test_counts_launches_that_differ(self) -> None:
        same = [np.linspace(0.99, 1.01, 50)] * 4
        shifted = [values * factor for values, factor in zip(same, (1.0, 1.1, 1.2, 1.3), strict=True)]
        assert bootstrap_median(shifted).half_width > 10 * bootstrap_median(same).half_width

    def test_gives_the_same_answer_twice(self) -> None:
        values = [np.random.default_rng(0).standard_normal(30) + 9]
        assert bootstrap_median(values) == bootstrap_median(values)
