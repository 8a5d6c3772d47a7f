"""Findings: a word for every kind of trouble in a table, and none where there is none."""

from __future__ import annotations

import numpy as np

from edgewise.calibration.findings import findings
from edgewise.calibration.sketch import Sketch
from edgewise.calibration.table import CalibrationTable


def table(**values: np.ndarray) -> CalibrationTable:
    return CalibrationTable("abc", 4, {name: Sketch.of(array) for name, array in values.items()})


def plenty(**values: np.ndarray) -> CalibrationTable:
    """Ten times the elements that a histogram takes of one array."""
    sketches = {name: sum((Sketch.of(a) for a in [array] * 10), Sketch()) for name, array in values.items()}
    return CalibrationTable("abc", 10, sketches)


NORMAL = np.random.default_rng(0).standard_normal(2048).astype(np.float32)


def test_nothing_to_say_of_a_good_table() -> None:
    assert findings(plenty(x=NORMAL, y=NORMAL)) == ()
    assert findings(CalibrationTable("abc", 1, {})) == ()


def test_what_is_not_finite_is_counted() -> None:
    broken = np.concatenate([NORMAL, np.array([np.nan, np.nan, np.inf], np.float32)])
    (note,) = findings(plenty(x=broken, y=NORMAL))
    assert note == "NaN or infinity was seen in 1 value: x (20 NaN, 10 infinite): these values stay in float"


def test_values_that_never_change_are_named() -> None:
    (note,) = findings(plenty(a=np.zeros(2048, np.float32), b=np.full(2048, 2.5, np.float32), c=NORMAL))
    assert note.startswith("one number and nothing else was seen in 2 values: a (0), b (2.5): ")


def test_too_few_samples_for_a_method() -> None:
    percentile, entropy = findings(table(x=NORMAL, y=NORMAL[:5], z=NORMAL, w=NORMAL))
    assert percentile == (
        "percentile ranges want 20000 elements, and fewer were seen of 4 values: x (2048), y (5), z (2048) "
        "and 1 more: give 16000 samples, or use another method"
    )
    assert entropy.startswith("entropy ranges want 4080 elements")
    assert findings(plenty(x=NORMAL[:1000]))[0].endswith("give 20 samples, or use another method")
