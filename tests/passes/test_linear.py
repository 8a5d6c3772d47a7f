"""Weights are rounded to the type of the file only where no more than rounding is lost."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.passes import linear
from edgewise.passes.base import Refused
from edgewise.passes.linear import narrow


@pytest.mark.parametrize("piece", [1, 2**22])
@pytest.mark.parametrize("shape", [(), (7,), (5, 4, 3)])
def test_narrow(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_PIECE", piece)
    numbers = np.asarray(np.random.default_rng(0).uniform(0.5, 1, shape))
    half = np.dtype(np.float16)
    np.testing.assert_array_equal(narrow(numbers, half), numbers.astype(half))
    for factor, reason in ((1e-7, "precision"), (1e6, "overflow")):
        with pytest.raises(Refused, match=reason):
            narrow(numbers * factor, half)
