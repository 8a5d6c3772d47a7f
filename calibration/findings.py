"""What a calibration table shows of samples that are not fit to calibrate with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgewise.calibration.ranges import METHODS, least_elements
from edgewise.calibration.sketch import Sketch
from edgewise.calibration.table import CalibrationTable

_NAMED = 3
_MANY = 0.01  # of the elements: of samples of one kind few are beyond what others of it held


def findings(table: CalibrationTable, methods: Sequence[str] = METHODS) -> tuple[str, ...]:
    """A line for each kind of trouble, with the values it befell; none where all is well.

    `methods` are those of ranges that the table is for.
    """
    sketches = table.sketches
    constant = [f"{n} ({s.minimum:g})" for n, s in sketches.items() if s.minimum == s.maximum]
    notes = [note] if (note := broken(table)) else []
    if constant:
        notes.append(
            f"one number and nothing else was seen in {_listed(constant)}: its range fits no other, so see "
            "that the samples are not all alike"
        )
    return (*notes, *_too_few(table, methods))


def broken(table: CalibrationTable) -> str:
    """A line on the values that were not finite; empty where all were."""
    found = [f"{n} ({s.nans} NaN, {s.infs} infinite)" for n, s in table.sketches.items() if s.nans or s.infs]
    return f"NaN or infinity was seen in {_listed(found)}: these values stay in float" if found else ""


def strangers(known: CalibrationTable, new: CalibrationTable) -> tuple[str, ...]:
    """A line on values that on other samples, those of `new`, are far from what calibrated."""
    found = []
    for name, sketch in new.sketches.items():
        share = _share_beyond(sketch, known.sketches[name]) if name in known.sketches else 0.0
        if share > _MANY:
            found.append(f"{name} ({share:.0%})")
    note = "elements beyond all that was calibrated with were seen in "
    return (f"{note}{_listed(found)}: calibrate with samples like these",) if found else ()


def _share_beyond(new: Sketch, known: Sketch) -> float:
    """The share of elements that lie outside the least and the greatest known one."""
    low, high = new.edges()
    beyond = new.counts[(high < known.minimum) | (low > known.maximum)].sum()
    return float(beyond / max(new.counts.sum(), 1))


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
