"""Measure the candidates against the input and choose: never slower, then faster, then smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from edgewise.optimizer.report import Candidate
from edgewise.runtime.latency import LatencyReport, Ratio

INPUT = "input"
_WORST = 0.9  # a speed-up whose interval reaches below this was not shown to be none the slower


Objective = Literal["latency", "size", "balanced"]


def choose(
    sizes: Mapping[str, int], latency: LatencyReport | None, objective: Objective = "latency"
) -> tuple[Candidate, ...]:
    """What becomes of each candidate; the first is the input, the later ones are more ambitious.

    `sizes` are bytes by name. Without a measurement the most ambitious candidate is chosen. A
    candidate that is slower than the input beyond the noise, or larger and not faster, is taken back;
    whoever wants the smallest file gets it though it be slower.
    """
    if latency is None:
        chosen = list(sizes)[-1]
        return tuple(Candidate(n, s, None, None, None, n == chosen, "not measured") for n, s in sizes.items())
    ratios = {ratio.name: ratio for ratio in latency.ratios}
    failures = {m.name: m.failed for m in latency.models if m.failed}
    why = {name: _taken_back(name, sizes, ratios, failures) for name in sizes}
    if objective == "size":
        chosen = min((n for n in sizes if n not in failures), key=lambda n: sizes[n])
        why[chosen] = ""
    else:
        fit = [name for name in sizes if not why[name]]
        chosen = (_best if objective == "latency" else _most_balanced)(fit, sizes, ratios)
    return tuple(
        Candidate(
            name,
            size,
            ratios[name].speedup if name in ratios else None,
            ratios[name].low if name in ratios else None,
            ratios[name].high if name in ratios else None,
            name == chosen,
            why[name] or _praise(name, chosen, ratios),
        )
        for name, size in sizes.items()
    )


def _taken_back(
    name: str, sizes: Mapping[str, int], ratios: Mapping[str, Ratio], failures: Mapping[str, str]
) -> str:
    """Why `name` may not be written, or an empty text."""
    if name == INPUT:
        return ""
    if name in failures:
        return f"failed in the benchmark: {failures[name]}"
    if name not in ratios:
        return "could not be measured against the input"
    if ratios[name].verdict == "slower":
        return "slower than the input on this target"
    if ratios[name].verdict == "faster":
        return ""
    if ratios[name].low < _WORST:
        return "the measurement was too noisy to rule out that it is slower"
    if sizes[name] > sizes[INPUT]:
        return "neither faster nor smaller than the input"
    return ""


def _best(names: list[str], sizes: Mapping[str, int], ratios: Mapping[str, Ratio]) -> str:
    """The one that is fastest at the least; of its equals, whose intervals overlap, the smallest."""
    measured = [name for name in names if name in ratios]
    if not measured:
        return INPUT
    best = ratios[max(measured, key=lambda name: ratios[name].low)]
    equals = [n for n in measured if ratios[n].high >= best.low and ratios[n].verdict == best.verdict]
    return min(equals, key=lambda name: sizes[name])


def _most_balanced(names: list[str], sizes: Mapping[str, int], ratios: Mapping[str, Ratio]) -> str:
    """The one of least time x size."""
    return min(names, key=lambda n: sizes[n] / (ratios[n].speedup if n in ratios else 1.0))


def _praise(name: str, chosen: str, ratios: Mapping[str, Ratio]) -> str:
    if name == INPUT:
        return "nothing beat it" if chosen == INPUT else ""
    return f"{ratios[name].verdict}" if name == chosen else f"{ratios[name].verdict}, but {chosen} is better"
