"""Never slower, then faster, then smaller."""

from __future__ import annotations

import pytest
from answers import measured

from edgewise.optimizer.choice import choose
from edgewise.optimizer.report import Candidate


def chosen(candidates: tuple[Candidate, ...]) -> str:
    (name,) = [c.name for c in candidates if c.chosen]
    return name


CASES = {
    "the fastest": ({"exact": (1.2, 1.1, 1.3), "int8": (2.0, 1.9, 2.1)}, (100, 100, 30), "int8"),
    "int8 slower": ({"exact": (1.2, 1.1, 1.3), "int8": (0.5, 0.4, 0.6)}, (100, 100, 30), "exact"),
    "all slower": ({"exact": (0.9, 0.8, 0.95), "int8": (0.5, 0.4, 0.6)}, (100, 100, 30), "input"),
    "overlap goes to the smaller": (
        {"exact": (1.25, 1.1, 1.4), "int8": (1.2, 1.05, 1.35)},
        (100, 100, 30),
        "int8",
    ),
    "no difference and smaller": ({"exact": (1.0, 0.97, 1.03)}, (100, 90), "exact"),
    "no difference and larger": ({"exact": (1.0, 0.97, 1.03)}, (100, 101), "input"),
    "too noisy to tell": ({"exact": (1.1, 0.5, 2.4)}, (100, 90), "input"),
    "proven faster beats a lucky guess": (
        {"exact": (1.3, 1.2, 1.4), "int8": (1.9, 0.91, 9.0)},
        (100, 100, 30),
        "exact",
    ),
    "faster and larger": ({"exact": (1.5, 1.4, 1.6)}, (100, 120), "exact"),
    "not faster than the input, smaller than it, beside a faster one": (
        {"exact": (1.5, 1.4, 1.6), "int8": (1.0, 0.95, 1.05)},
        (100, 100, 30),
        "exact",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_choice(case: str) -> None:
    ratios, sizes, expected = CASES[case]
    named = dict(zip(["input", *ratios], sizes, strict=True))
    candidates = choose(named, measured(ratios))
    assert chosen(candidates) == expected
    assert [c.name for c in candidates] == list(named)


def test_the_input_is_a_rival_of_what_is_no_faster() -> None:
    """Equal in speed, equal in size: there is no reason to change anything."""
    candidates = choose({"input": 100, "exact": 100}, measured({"exact": (1.0, 0.98, 1.02)}))
    assert len([c for c in candidates if c.chosen]) == 1


def test_everything_is_told_why() -> None:
    candidates = choose(
        {"input": 100, "exact": 100, "int8": 30},
        measured({"exact": (1.2, 1.1, 1.3), "int8": (0.5, 0.4, 0.6)}),
    )
    why = {c.name: c.why for c in candidates}
    assert why["int8"] == "slower than the input on this target"
    assert why["exact"] == "faster"
    by_name = {c.name: c for c in candidates}
    assert (by_name["int8"].speedup, by_name["int8"].low, by_name["int8"].high) == (0.5, 0.4, 0.6)


def test_what_fails_in_the_benchmark_is_not_written() -> None:
    candidates = choose(
        {"input": 100, "exact": 100, "int8": 30}, measured({"exact": (1.2, 1.1, 1.3)}, failed="int8")
    )
    assert chosen(candidates) == "exact"
    assert "crashed" in candidates[-1].why


def test_an_input_that_cannot_be_measured_stays() -> None:
    candidates = choose({"input": 100, "exact": 90}, measured({}, failed=""))
    assert chosen(candidates) == "input"
    assert candidates[1].why == "could not be measured against the input"


def test_without_measurement_the_most_ambitious_is_written() -> None:
    candidates = choose({"input": 100, "exact": 90, "int8": 30}, None)
    assert chosen(candidates) == "int8"
    assert {c.why for c in candidates} == {"not measured"}


def test_only_the_input() -> None:
    candidates = choose({"input": 100}, measured({}))
    assert chosen(candidates) == "input"
