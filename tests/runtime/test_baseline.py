"""A result held against an earlier one: whether a model got slower, and by what it was judged."""

from __future__ import annotations

import math

import pytest

from edgewise.runtime.baseline import Change, changes
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.runtime.machine import describe
from edgewise.runtime.statistics import Interval, verdict


def report(
    *times: tuple[str, float], sha: str = "a", reach: float = 0.01, floor: float | None = None
) -> LatencyReport:
    """Medians in milliseconds by name, each known to `reach`; the first file is `sha`."""
    (first, base), *others = times
    models = tuple(
        ModelLatency(
            name=name,
            path=f"{name}.onnx",
            file_bytes=1,
            sha256=sha if name == first else name,
            median_ms=ms,
            low_ms=ms * (1 - reach),
            high_ms=ms * (1 + reach),
            failed=None if math.isfinite(ms) else "crashed",
        )
        for name, ms in times
    )
    intervals = {n: Interval(base / ms, base / ms * (1 - reach), base / ms * (1 + reach)) for n, ms in others}
    ratios = tuple(
        Ratio(name, first, i.value, i.low, i.high, verdict(i))
        for name, i in intervals.items()
        if math.isfinite(i.value) and i.value
    )
    return LatencyReport(describe(), Conditions(), "x", models, ratios, floor, 3, 1.0, "precision reached")


def only(then: LatencyReport, now: LatencyReport) -> Change:
    (change,) = changes(then, now)
    return change


def test_a_single_model_is_compared_by_its_time() -> None:
    change = only(report(("net", 1.0)), report(("net", 1.1)))
    assert change.verdict == "slower"
    assert change.slowdown == pytest.approx(0.1)
    assert change.reference is None


def test_errors_of_both_runs_count() -> None:
    """Each median is known to 1 %, so their quotient to about 1.4 %: 1.3 % says nothing, 1.5 % does."""
    change = only(report(("net", 1.0)), report(("net", 1.013)))
    assert change.high / change.speedup - 1 == pytest.approx(0.0142, abs=2e-4)
    assert change.verdict == "no difference"
    assert only(report(("net", 1.0)), report(("net", 1.015))).verdict == "slower"


def test_the_noise_floor_of_either_run_counts() -> None:
    then = report(("net", 1.0), floor=0.1)
    assert only(then, report(("net", 1.1))).verdict == "no difference"
    assert only(report(("net", 1.1)), then).verdict == "no difference"


def test_the_same_first_file_divides_out_the_machine() -> None:
    """Everything takes twice the time today; only the ratio to the reference tells what changed."""
    then = report(("reference", 1.0), ("net", 2.0))
    change = only(then, report(("reference", 2.0), ("net", 4.0)))
    assert (change.name, change.verdict, change.reference) == ("net", "no difference", "reference")
    assert only(then, report(("reference", 2.0), ("net", 4.4))).slowdown == pytest.approx(0.1)
    assert only(then, report(("reference", 2.0), ("net", 3.6))).verdict == "faster"


def test_another_first_file_leaves_the_times() -> None:
    then, now = report(("old", 1.0), ("net", 2.0)), report(("old", 2.0), ("net", 4.0), sha="b")
    assert [(c.name, c.verdict, c.reference) for c in changes(then, now)] == [
        ("old", "slower", None),
        ("net", "slower", None),
    ]


def test_a_reference_under_another_name() -> None:
    then, now = report(("was", 1.0), ("net", 2.0)), report(("is", 1.0), ("was", 1.0), ("net", 2.0))
    assert [(c.name, c.speedup) for c in changes(then, now)] == [("was", 1.0), ("net", 1.0)]


def test_what_failed_or_was_not_there_is_left_out() -> None:
    then = report(("reference", 1.0), ("bad", math.inf), ("net", 2.0))
    now = report(("reference", 1.0), ("bad", 1.0), ("net", 2.0), ("new", 1.0))
    assert [c.name for c in changes(then, now)] == ["net"]
    assert changes(report(("a", 1.0)), report(("b", 1.0))) == ()
