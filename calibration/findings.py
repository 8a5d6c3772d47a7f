"""What a calibration table shows of samples that are not fit to calibrate with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgewise.calibration.ranges import METHODS, least_elements
from edgewise.calibration.sketch import Sketch
from edgewise.calibration.table import CalibrationTable

_NAMED = 3


def findings(table: CalibrationTable, methods: Sequence[str] = METHODS) -> tuple[str, ...]:
    """A line for each kind of trouble, with the values it befell; none where all is well.

    `methods` are those of ranges that the table is for.
    """
    sketches = table.sketches
    broken = [f"{n} ({s.nans} NaN, {s.infs} infinite)" for n, s in sketches.items() if s.nans or s.infs]
    constant = [f"{n} ({s.minimum:g})" for n, s in sketches.items() if s.minimum == s.maximum]
    notes = []
    if broken:
        notes.append(f"NaN or infinity was seen in {_listed(broken)}: these values stay in float")
    if constant:
        notes.append(
            f"one number and nothing else was seen in {_listed(constant)}: its range fits no other, so see "
            "that the samples are not all alike"
        )
    return (*notes, *_too_few(table, methods))


def _too_few(table: CalibrationTable, methods: Sequence[str]) -> list[str]:
    """The methods that would tell more than the elements seen do, each with the values."""
    notes = []
    for method in methods:
        least = least_elements(method)
        few = {n: e for n, s in table.sketches.items() if 0 < (e := _elements(s)) < least}
        if few:
            named = _listed([f"{name} ({elements})" for name, elements in few.items()])
            samples = math.ceil(least * table.samples / min(few.values()))
            notes.append(
                f"{method} ranges want {least} elements, and fewer were seen of {named}: give {samples} "
                f"samples, or use another method"
            )
    return notes


def _elements(sketch: Sketch) -> int:
    return int(sketch.counts.sum())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} value{'s' * (len(names) > 1)}: {', '.join(names[:_NAMED])}{more}"
