"""A measurement held against an earlier one, so that a model that got slower is noticed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.runtime.statistics import Interval, Verdict, verdict


@dataclass(frozen=True)
class Change:
    """A model now and then: speedup = time then / time now, with its 95 % interval.

    `reference` names the model by which both times were divided first, the same file then and now; None
    where the times themselves are compared, which takes the machine to be as fast as it was.
    """

    name: str
    speedup: float
    low: float
    high: float
    verdict: Verdict
    reference: str | None = None

    @property
    def slowdown(self) -> float:
        """By how much the time grew, relatively."""
        return 1 / self.speedup - 1


def changes(then: LatencyReport, now: LatencyReport) -> tuple[Change, ...]:
    """One for each model that both reports measured, by name.

    Where the first model of both is the same file, the others are compared by their ratios to it: the
    speed of the machine, which differs from day to day, is divided out.
    """
    return tuple(_changes(then, now))


def _changes(then: LatencyReport, now: LatencyReport) -> Iterator[Change]:
    reference = _reference(then, now)
    before = {model.name: model for model in then.models if not model.failed}
    floor = max(then.noise_floor or 0.0, now.noise_floor or 0.0)
    for model in now.models:
        if model.failed or model.name not in before or (reference == model.name and len(now.models) > 1):
            continue
        change = (
            _quotient(_time(before[model.name]), _time(model))
            if reference is None
            else _quotient(_ratio(now, model.name), _ratio(then, model.name))
        )
        yield Change(model.name, change.value, change.low, change.high, verdict(change, floor), reference)


def _reference(then: LatencyReport, now: LatencyReport) -> str | None:
    """The first model, if both reports have ratios to the same file."""
    first, old = now.models[0], then.models[0]
    same = first.sha256 == old.sha256 != "" and not first.failed and not old.failed
    return first.name if same and now.ratios and then.ratios else None


def _ratio(report: LatencyReport, name: str) -> Interval:
    """Of a model that did not fail; the first one's ratio to itself is 1."""
    itself = Ratio(name, name, 1.0, 1.0, 1.0, "no difference")
    found = next((ratio for ratio in report.ratios if ratio.name == name), itself)
    return Interval(found.speedup, found.low, found.high)


def _time(model: ModelLatency) -> Interval:
    return Interval(model.median_ms, model.low_ms, model.high_ms)


def _quotient(one: Interval, other: Interval) -> Interval:
    """one / other of two independent estimates: their relative errors add in quadrature."""
    value = one.value / other.value
    below = math.hypot(math.log(one.value / one.low), math.log(other.high / other.value))
    above = math.hypot(math.log(one.high / one.value), math.log(other.value / other.low))
    return Interval(value, value * math.exp(-below), value * math.exp(above))
