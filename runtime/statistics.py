"""From noisy timings to a ratio, its interval and a verdict.

Two things move a timing. Within one pair of processes the machine's speed wanders: rounds that are
paired in time cancel it. Between processes the same file runs at a different speed for as long as
the process lives, by where its memory happened to land: no number of rounds cancels that, only new
processes do. A launch is one set of fresh processes, and launches are the independent samples here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Verdict = Literal["faster", "slower", "no difference"]

_TRIM = 0.2  # cut from each end: a neighbour on the machine spoils some rounds, seldom a fifth
_BETWEEN_PROCESSES = 0.01  # about the most that one file's speed differs between two processes
_RESAMPLES = 1000
_WIDEST = math.log(1e6)  # an interval beyond that says nothing more, and stays a finite number
_NORMAL = 1.95996
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95 % interval around it."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width, relative to the estimate."""
        return (self.high - self.low) / 2 / self.value


def trimmed_mean(values: Array) -> tuple[float, float]:
    """The mean of two or more values without the outer fifths, and its standard error.

    The error comes from the winsorized variance (Tukey and McLaughlin, 1963); with fewer than five
    values this is the plain mean.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    count, cut = len(ordered), int(_TRIM * len(ordered))
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    error = winsorized.std(ddof=1) / ((1 - 2 * cut / count) * math.sqrt(count))
    return float(ordered[cut : count - cut].mean()), float(error)


def student(freedom: int) -> float:
    """The two-sided 95 % point of Student's t."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL  # Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class _Launches:
    """One estimate for each launch, its error within the launch, and its weight."""

    means: Array
    errors: Array
    weights: Array

    @classmethod
    def of(cls, rounds: Sequence[Array]) -> _Launches:
        """A launch that was disturbed counts for less: random-effects weights."""
        means, errors = np.array([trimmed_mean(r) for r in rounds]).reshape(-1, 2).T
        return cls(means, errors, 1 / (np.square(errors) + _BETWEEN_PROCESSES**2))

    @property
    def mean(self) -> float:
        return float(np.average(self.means, weights=self.weights))

    def spread(self, around: float) -> float:
        """The weighted sum of squares; with weights of inverse variance, each adds 1 on average."""
        return float(np.sum(self.weights * np.square(self.means - around)))


def speedup(rounds: Sequence[Array], twins: Sequence[Array] = ()) -> Interval:
    """How many times as fast a model is as the baseline, with Student's interval over the launches.

    `rounds` holds, for each launch, log(baseline time / model time) of each round, where the baseline's
    time is the geometric mean of its two processes if it has a twin. `twins` holds log(time / twin's
    time): its true value is 0, it is independent of the first, and has 4/3 of its variance where all
    processes vary alike. The variance is measured on the launches (Hartung and Knapp, 2001), and on
    launches and twins together; the larger counts, and never less than what the rounds imply.
    """
    launches = _Launches.of(rounds)
    mean, total, count = launches.mean, float(launches.weights.sum()), len(rounds)
    spread, freedom = launches.spread(mean), count - 1 + len(twins)
    variances = [float(np.sum(np.square(launches.weights * launches.errors))) / total**2]
    if count > 1:
        variances.append(spread / (count - 1) / total)
    if twins:
        variances.append((spread + 0.75 * _Launches.of(twins).spread(0.0)) / freedom / total)
    reach = min(student(max(freedom, 1)) * math.sqrt(max(variances)), _WIDEST)
    return Interval(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach))


def noise_floor(twins: Sequence[Array]) -> float:
    """How far, relatively, the baseline's two processes lie from their common mean."""
    return math.expm1(abs(_Launches.of(twins).mean) / 2)


def verdict(ratio: Interval, floor: float = 0.0) -> Verdict:
    """The ratio in words: a difference counts where the whole interval lies beyond the noise floor."""
    if ratio.low > 1 + floor:
        return "faster"
    if ratio.high < 1 / (1 + floor):
        return "slower"
    return "no difference"


def bootstrap_median(launches: Sequence[Array], seed: int = 0) -> Interval:
    """The median of all values, resampled in two stages: launches, then the values within each."""
    rng = np.random.default_rng(seed)
    medians = [np.median(_resampled(launches, rng)) for _ in range(_RESAMPLES)]
    low, high = np.quantile(medians, [0.025, 0.975])
    return Interval(float(np.median(np.concatenate(launches))), float(low), float(high))


def _resampled(launches: Sequence[Array], rng: np.random.Generator) -> Array:
    drawn = (launches[i] for i in rng.integers(0, len(launches), len(launches)))
    return np.concatenate([values[rng.integers(0, len(values), len(values))] for values in drawn])
